"""qncd: post-training quantization of diffusion models with noise correction (QNCD)."""

__version__ = "0.1.0"

# Names that a saved pipeline's model_index.json refers to as ["qncd_cli", NAME]; resolved
# on first use so that `import qncd_cli` stays free of torch.
_PIPELINE_NAMES = ("ClassEmbedder", "ClassConditionalLDMPipeline")


def __getattr__(name: str):
    if name in _PIPELINE_NAMES:
        from .models import pipelines

        return getattr(pipelines, name)
    raise AttributeError(f"module 'qncd_cli' has no attribute {name!r}")
