"""The fourth stage of a run: its images against full precision, and against a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config.loading import load_config
from ..config.schema import Config
from ..errors import ArtifactError
from ..lineage.measured import Measurement
from ..metrics.embeddings import KIND as ENCODERS
from ..metrics.embeddings import note_of_encoders
from ..metrics.record import same_protocol
from ..store.artifact_files import read_stored
from ..store.files import finite, read_json, write_sealed_json
from ..store.run_dir import RunDir, find_run, read_coverage
from .job import agreed
from .measuring import Wishes, protocol_of, settle
from .model import model_digest, open_model
from .reporting import bench_files, is_whole, read_bench, write_report
from .sets import check_model, check_quantized, config_of, full_folder
from .status import reported
from .watch import SILENT, Watch

CALLED = "qncd_cli.evaluate"
"""What a report is said to be made by, where no command line made it."""


@dataclass(frozen=True)
class Evaluated:
    """metrics: what metrics.json holds, by protocol, full, quantized, fidelity and bytes
    (docs/numbers.md); report: the page; pairs: the sheet of worst, typical and best pairs; skipped:
    whether all was there; model: its source; bench: of bench.json of this model on this machine."""

    run: RunDir
    metrics: Mapping[str, Any]
    report: Path
    pairs: Path
    skipped: bool
    model: str
    bench: Mapping[str, Any] | None


def evaluate(
    run_dir: str | Path | None = None,
    *,
    metrics: Sequence[str] = (),
    reference: str | Path | None = None,
    network: str = "auto",
    inception_weights: str | Path | None = None,
    skip_broken: bool = False,
    lpips_weights: str | Path | None = None,
    clip: str | Path | None = None,
    name: str = "quantized",
    device: str = "auto",
    command: str = CALLED,
    watch: Watch = SILENT,
    show: Callable[[Evaluated], object] | None = None,
) -> Evaluated:
    """Measure a set of images against a reference and against full precision on the same seeds.

    Draws the full-precision images that are missing; writes metrics.json and report.html. run_dir:
    a sampled run, None for the current one. metrics: of fid, sfid, fid_infinity, isc, kid, prc,
    cvvdp, lpips, clip; none for fid where it can be had. reference: a folder of images, an .npz or
    statistics file, or zoo. network: auto, fashion, emoji, inception or efficientnet;
    inception_weights: its file. skip_broken: leave out files of the reference that cannot be read.
    lpips_weights: a folder, None for torch.hub's; clip: a folder of transformers' CLIPModel. name:
    of the set. command: for the report.
    show: hears the result before what could not be had is raised.

    Raises BackendUnavailable where a metric that is named cannot be had, with all else written;
    ArtifactError for a set or a reference that is missing or damaged; ConfigError, ModelError.

    >>> evaluate("runs/mine").metrics["fidelity"]["psnr_db"]
    """
    run = find_run(None if run_dir is None else str(run_dir))
    config = load_config(str(run.config))
    given = (reference, inception_weights, lpips_weights, clip)
    known, weights, *folders = (None if path is None else str(path) for path in given)
    wishes = Wishes(tuple(metrics), known, network, weights, skip_broken, *folders)
    work = _measurement(run, config, wishes, name)
    found = agreed(lambda: work.still_holds() if work is not None else None)
    if work is not None and found is not None:
        measured, skipped = found, True
    else:
        measured = _evaluate(run, config, wishes, name, device, command, work, watch)
        skipped = False
    source = config.model.source
    places = _outputs(run, name)[1:]
    done = Evaluated(run, measured, *places, skipped, source, read_bench(run, source))
    for check in done.metrics.get("checks", ()):
        watch.note(check["says"])
    if show is not None:
        show(done)
    settle(watch.note, done.metrics["protocol"]["left_out"], wishes)
    return done


def _evaluate(
    run: RunDir,
    config: Config,
    wishes: Wishes,
    name: str,
    device: str,
    command: str,
    work: Measurement | None,
    watch: Watch,
) -> dict[str, Any]:
    """Measure, write, and give metrics.json."""
    from ..lineage.sample_set import read_set
    from ..runtime.ranks import of_job
    from ..stages import evaluate as stage
    from ..stages.decoder import KIND, decoder_fidelity, note_of_decoder

    ranks = of_job()
    with ranks.locked(run.path, watch.note), reported(run.path, "eval", watch) as watch:
        ranks.agreed(lambda: None)  # the lock is held
        protocol = protocol_of(wishes, config)
        quantized_set = read_set(run.samples(name))
        check_quantized(run, quantized_set)
        model = open_model(config_of(config, quantized_set), ranks.device(device), run.path, watch)
        check_model(quantized_set, model)
        full_set = read_set(full_folder(run, config, model, quantized_set, watch, ranks))
        coverage = read_coverage(run.coverage)
        sizes = stage.sizes(run.tensors("quantized"), coverage)
        outputs = _outputs(run, name)
        metrics_path = outputs[0]
        earlier = _earlier(metrics_path)
        with watch.keeping("all images are kept, and the features of those that were looked at"):
            made = _made(config, coverage)
            metrics = stage.run(
                *(full_set, quantized_set, sizes, protocol, watch.track, earlier),
                made=made,
                ranks=ranks,
            )
            if KIND in quantized_set.manifest["digests"]:
                found = ranks.agreed(lambda: decoder_fidelity(quantized_set, model, watch.track))
                metrics["decoder"] = found
                metrics["checks"] = [*metrics["checks"], note_of_decoder(found)]
            if ENCODERS in quantized_set.manifest["digests"]:
                body = read_stored(run.tensors(ENCODERS), ENCODERS).body
                metrics[ENCODERS] = {key: body[key] for key in ("bits", "prompts", "fidelity")}
                metrics["checks"] = [*metrics["checks"], note_of_encoders(body)]

        def write() -> None:
            sets = full_set, quantized_set
            write_sealed_json(metrics_path, finite(metrics))
            write_report(run, config, sets, metrics, coverage, outputs, command)
            if work is not None:
                grew = same_protocol(earlier.get("protocol", {}), metrics["protocol"])
                work.note(full_set.folder, grew=grew)

        ranks.agreed(write)
    return metrics


def _outputs(run: RunDir, name: str) -> tuple[Path, Path, Path]:
    """metrics.json, the report and the sheet of pairs of a sample set."""
    suffix = "" if name == "quantized" else f"_{name}"
    names = f"metrics{suffix}.json", f"report{suffix}.html", f"pairs{suffix}.png"
    metrics, report, pairs = (run.path / name for name in names)
    return metrics, report, pairs


def _measurement(run: RunDir, config: Config, wishes: Wishes, name: str) -> Measurement | None:
    """None where only loading the model tells which one it is."""
    model = model_digest(config)
    if model is None:
        return None
    options = {key: value for key, value in asdict(wishes).items() if key != "named"}
    asked = {**options, "source": config.model.source, "config": config.to_yaml()}
    weights = Path(wishes.inception_weights) if wishes.inception_weights else None
    reference = wishes.reference or config.evaluation.reference
    there = [path for path in (run.study, *bench_files(run)) if path.is_file()]
    folders = [Path(named) for named in (wishes.lpips_weights, wishes.clip) if named]
    there += [path for f in folders for path in sorted(f.glob("*")) if path.is_file()]
    return Measurement(
        run,
        name,
        wishes.metrics,
        asked,
        model,
        reference,
        weights,
        wishes.insists,
        *_outputs(run, name),
        there,
    )


def _earlier(path: Path) -> dict[str, Any]:
    """metrics.json as it is, empty where it is missing or damaged: it is replaced then."""
    try:
        found = read_json(path, "qncd eval")
    except ArtifactError:
        return {}
    return found if is_whole(found) else {}


def _made(config: Config, coverage: dict[str, Any]) -> dict[str, Any]:
    """How the model was quantized, for metrics.json: preset, the label's bits, and where
    coverage.json has them the means over all multiplications and bit operations."""
    known = ("mean_weight_bits", "mean_input_bits", "bit_operations")
    return {
        "preset": config.quantization.preset,
        "weights": config.quantization.weights.bits,
        "activations": config.quantization.activations.bits,
        **{key: coverage.get(key) for key in known},
    }
