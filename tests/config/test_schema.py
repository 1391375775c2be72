"""The configuration: strict, frozen; digests that change with what matters and no more."""

from __future__ import annotations

import copy

import pytest
from conftest import MODEL, refused
from pydantic import ValidationError

from qncd_cli.config.loading import load_config, parse_config
from qncd_cli.config.schema import Config
from qncd_cli.config.shipped import shipped_configs

# ---- strictness ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("sampling.steps=many", "sampling.steps"),
        ("sampling.steps=5.0", "sampling.steps"),
        ("sampling.steps=true", "sampling.steps"),
        ("sampling.steps='5'", "sampling.steps"),
        ("sampling.scheduler=eular", "sampling.scheduler"),
        ("sampling.classes=[1, x]", "sampling.classes"),
        ("sampling.classes=5", "sampling.classes"),
        ("sampling=null", "sampling"),
        ("model=somewhere", "model"),
        ("model.dtype=fp32", "model.dtype"),
        ("evaluation.reference=7", "evaluation.reference"),
        ("quantization.cache_time_embeddings=1", "quantization.cache_time_embeddings"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(minimal, override, key):
    assert f"{key}: " in refused(minimal, override)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("sampling.steps=0", "sampling.steps"),
        ("sampling.steps=1001", "sampling.steps"),
        ("sampling.eta=1.5", "sampling.eta"),
        ("sampling.eta=.nan", "sampling.eta"),
        ("sampling.guidance_scale=-1", "sampling.guidance_scale"),
        ("sampling.guidance_scale=.inf", "sampling.guidance_scale"),
        ("sampling.seed=-1", "sampling.seed"),
        ("sampling.reuse=0", "sampling.reuse"),
        ("sampling.reuse=1", "sampling.reuse"),
        ("quantization.weights.bits=1", "quantization.weights.bits"),
        ("quantization.weights.bits=99", "quantization.weights.bits"),
        ("quantization.weights.bits=16", "quantization.weights"),
        ("quantization.activations.bits=17", "quantization.activations"),
        ("quantization.attention.bits=16", "quantization.attention"),
        ("quantization.attention.probabilities_bits=12", "quantization.attention"),
        (
            "quantization.attention.probabilities_bits=1",
            "quantization.attention.probabilities_bits",
        ),
        ("quantization.first_last_bits=12", "quantization"),
        ("quantization.first_last_activation_bits=17", "quantization"),
        ("quantization.activations.percentile=50", "quantization.activations.percentile"),
        ("quantization.overrides={'a*': {weights: {bits: 16}}}", "quantization.overrides.a*"),
        ("quantization.overrides={'a*': {activations: {bits: 17}}}", "quantization.overrides.a*"),
        ("calibration.trajectories=0", "calibration.trajectories"),
        ("correction.inter.part=0", "correction.inter.part"),
        ("correction.inter.part=1.01", "correction.inter.part"),
        ("correction.inter.part=.nan", "correction.inter.part"),
        ("evaluation.num_samples=1", "evaluation.num_samples"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(minimal, override, key):
    assert f"{key}: " in refused(minimal, override)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["quantization.activations.timestep_groups=21"], "timestep_groups (21) exceeds"),
        (["calibration.noise_trajectories=129"], "noise_trajectories cannot exceed trajectories"),
        (["sampling.eta=0.5", "sampling.scheduler=euler"], "eta applies to the ddim scheduler"),
        (["sampling.classes=[]"], "classes must not be empty"),
        (["calibration.sizes=[]"], "sizes must name each size once"),
        (["calibration.sizes=[[32, 48], [32, 48]]"], "sizes must name each size once"),
        (["calibration.sizes=[[32, 48], [48, 32]]"], "2 more need a batch each, but 16 traj"),
        (["sampling.negative_prompt=blur"], "negative_prompt belongs to text models"),
        (
            ["sampling.reuse=0.5", "correction.inter.method=ptqd"],
            "correction.inter.method ptqd is of sampling without reuse",
        ),
        (["sampling.reuse=0.5", "sampling.scheduler=unipc"], "sampling.reuse takes the schedulers"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(minimal, overrides, text):
    assert text in refused(minimal, *overrides)


# ---- frozen, round trip -------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["sampling", "quantization.weights", "correction.inter", ""])
def test_no_section_can_be_changed(minimal, path):
    section = load_config(minimal)
    for part in filter(None, path.split(".")):
        section = getattr(section, part)
    name = next(iter(type(section).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section, name, getattr(section, name))


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_the_resolved_yaml_reads_back_as_the_same_configuration(name, tmp_path):
    config = load_config(
        name,
        [
            "sampling.classes=[1, 0]",
            "quantization.overrides={'mid_block.*': {weights: {bits: 8}}}",
        ],
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    again = load_config(str(path))
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    assert again.stage_digest("quantize") == config.stage_digest("quantize")


@pytest.mark.parametrize(
    ("changes", "depends", "named"),
    [
        ({}, False, False),
        ({"method": "runtime"}, False, False),
        ({"method": "runtime", "part": 0.5}, True, True),
        ({"method": "runtime", "granularity": "batch"}, True, False),
        ({"method": "runtime", "granularity": "batch", "part": 0.5}, True, True),
        ({"method": "ptqd", "part": 0.5, "granularity": "batch"}, False, False),
    ],
)
def test_a_part_is_named_only_where_it_decides_something(changes, depends, named):
    """So that sets drawn before there was one stay valid."""
    inter = parse_config({**MODEL, "correction": {"inter": changes}}, "here").correction.inter
    assert inter.depends_on_batch == depends
    assert ("part" in inter.identity()) == named
    assert inter.identity()["method"] == changes.get("method", "none")


# ---- digests ------------------------------------------------------------------------------------

# Every key, another value for it, and the stages that it makes stale where correction.intra is
# none or embedding.
BOTH, QUANTIZE, NEITHER = {"calibrate", "quantize"}, {"quantize"}, set()
KEYS: dict[str, tuple[object, set[str]]] = {
    "model.source": ("elsewhere", BOTH),
    "model.compvis_config": ("ldm.yaml", BOTH),
    "model.tokenizer": ("clip", BOTH),
    "model.base": ("folder", BOTH),
    "model.lora": (["style.safetensors"], BOTH),
    "model.dtype": ("bfloat16", BOTH),
    "sampling.scheduler": ("euler", BOTH),
    "sampling.steps": (30, BOTH),
    "sampling.eta": (0.5, BOTH),
    "sampling.guidance_scale": (1.5, BOTH),
    "sampling.seed": (7, NEITHER),
    "sampling.classes": ([1, 2], BOTH),
    "sampling.prompts": (["a bag"], BOTH),
    "sampling.negative_prompt": ("blur", BOTH),
    "sampling.image_size": (512, BOTH),
    "sampling.reuse": (0.5, NEITHER),
    "sampling.height": (512, BOTH),
    "sampling.width": (512, BOTH),
    "sampling.images": (["b.png"], BOTH),
    "sampling.masks": (["n.png"], BOTH),
    "sampling.strength": (0.7, BOTH),
    "sampling.control": (["c.png"], BOTH),
    "sampling.control_scale": (0.7, BOTH),
    "sampling.lora_branch": (["l.safetensors"], BOTH),
    "sampling.inputs": ("y", BOTH),
    "calibration.effort": ("quick", BOTH),
    "calibration.trajectories": (256, BOTH),
    "calibration.batch_size": (16, BOTH),
    "calibration.seed": (5, BOTH),
    "calibration.noise_trajectories": (9, BOTH),
    "calibration.sizes": ([[32, 48]], BOTH),
    "quantization.preset": ("minmax", NEITHER),  # its keys count, its name does not
    "quantization.strict": (True, NEITHER),
    "quantization.weights.bits": (8, QUANTIZE),
    "quantization.weights.rounding": ("nearest", QUANTIZE),
    "quantization.weights.passes": (3, QUANTIZE),
    "quantization.weights.asymmetry": (0.5, QUANTIZE),
    "quantization.weights.iterations": (20, QUANTIZE),
    "quantization.weights.reconstruction_batch": (8, QUANTIZE),
    "quantization.weights.reconstruction_rows": (64, QUANTIZE),
    "quantization.weights.learn_bias": (True, QUANTIZE),
    "quantization.weights.learn_input_scale": (True, QUANTIZE),
    "quantization.weights.budget": (4.5, QUANTIZE),
    "quantization.activations.bits": (6, QUANTIZE),
    "quantization.activations.observer": ("minmax", QUANTIZE),
    "quantization.activations.percentile": (99.0, QUANTIZE),
    "quantization.activations.timestep_groups": (2, BOTH),
    "quantization.sensitive.weight_bits": (0.1, QUANTIZE),
    "quantization.sensitive.activation_bits": (0.1, QUANTIZE),
    "quantization.bias_correction": (True, QUANTIZE),
    "quantization.attention.bits": (6, QUANTIZE),
    "quantization.attention.probabilities_bits": (16, QUANTIZE),
    "quantization.first_last_bits": (32, QUANTIZE),
    "quantization.first_last_activation_bits": (8, QUANTIZE),
    "quantization.first_margin": (1.5, QUANTIZE),
    "quantization.step_weights": (0.5, QUANTIZE),
    "quantization.rotation": (16, BOTH),
    "quantization.first_last_observer": ("mse", QUANTIZE),
    "quantization.split_skip_connections": (False, BOTH),
    "quantization.cache_time_embeddings": (False, QUANTIZE),
    "quantization.overrides": ({"mid_block.*": {"weights": {"bits": 8}}}, QUANTIZE),
    "correction.intra": ("?", BOTH),
    "correction.smoothing_strength": (0.25, NEITHER),
    "correction.reuse": ("site", NEITHER),
    "correction.inter.method": ("runtime", NEITHER),
    "correction.inter.target": ("injected", QUANTIZE),
    "correction.inter.granularity": ("tensor", NEITHER),
    "correction.inter.interval": (3, NEITHER),
    "correction.inter.first": (2, NEITHER),
    "correction.inter.repeat": (True, NEITHER),
    "correction.inter.part": (0.5, NEITHER),
    "correction.inter.baseline": ("none", NEITHER),
    "correction.inter.slope": (True, NEITHER),
    "correction.inter.noise": ("balanced", NEITHER),
    "correction.inter.field": (4, QUANTIZE),
    "first_stage.bits": (8, NEITHER),
    "first_stage.tile": (512, NEITHER),
    "text_encoders.bits": (8, NEITHER),
    "evaluation.num_samples": (50, NEITHER),
    "evaluation.reference": ("elsewhere", NEITHER),
}


OF_TEXT_MODELS = ("sampling.negative_prompt", "text_encoders.bits")


def leaves(tree: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in tree.items():
        nested = isinstance(value, dict) and key != "overrides"
        found |= leaves(value, f"{prefix}{key}.") if nested else {prefix + key}
    return found


def test_the_table_of_keys_is_complete():
    assert set(KEYS) == leaves(parse_config(MODEL, "here").to_dict())


SIDES = {"height": 256, "width": 256}
FROM_IMAGES = {"images": ["a.png"], "masks": ["m.png"], "strength": 0.5, "inputs": "x"}
BESIDE = {
    **dict.fromkeys(("sampling.height", "sampling.width"), SIDES),
    **{f"sampling.{key}": FROM_IMAGES for key in FROM_IMAGES},
    **dict.fromkeys(("sampling.control", "sampling.control_scale"), {"control": ["a.png"]}),
}
"""What a key cannot be without."""

# intra: auto chooses by the error at the configured widths
SEEN_BY_AUTO = {
    "quantization.weights.bits",
    "quantization.weights.rounding",  # nearest or not
    "quantization.activations.bits",
    "quantization.activations.observer",
    "quantization.activations.percentile",
    "quantization.first_last_bits",
    "quantization.first_last_activation_bits",
    "quantization.first_last_observer",
    "quantization.overrides",
}


def expected_stale(key: str, intra: str) -> set[str]:
    if intra == "auto" and key in SEEN_BY_AUTO:
        return BOTH
    if intra in ("smoothquant", "range") and key == "correction.smoothing_strength":
        return BOTH
    return KEYS[key][1]


@pytest.mark.parametrize("intra", ["none", "embedding", "smoothquant", "range", "auto"])
@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_stage_is_stale_exactly_when_a_key_that_it_uses_changes(key, intra):
    own = {"sampling": {"prompts": ["a shoe"]}} if key in OF_TEXT_MODELS else {}
    if key in BESIDE:
        own = {"sampling": {"prompts": ["a shoe"], **BESIDE[key]}}
    if key == "calibration.sizes":
        own = {"calibration": {"batch_size": 4}}  # a batch for each
    before = parse_config({**MODEL, **own, "correction": {"intra": intra}}, "here")
    value = KEYS[key][0]
    if key == "correction.intra":
        value = "none" if intra != "none" else "embedding"
    tree = copy.deepcopy(before.to_dict())
    node = tree
    *parents, last = key.split(".")
    for part in parents:
        node = node[part]
    assert node[last] != value, "the table must name another value than the default"
    node[last] = value
    after = parse_config(tree, "changed")
    stages = ("calibrate", "quantize")
    changed = {s for s in stages if before.stage_digest(s) != after.stage_digest(s)}
    assert changed == expected_stale(key, intra)


def test_spelling_a_default_out_changes_no_digest():
    spelled = {**MODEL, "sampling": {"steps": 20, "eta": 0, "guidance_scale": 3}}
    for stage in ("calibrate", "quantize"):
        short, long = parse_config(MODEL, "a"), parse_config(spelled, "b")
        assert short.stage_digest(stage) == long.stage_digest(stage)


@pytest.mark.parametrize("stage", ["calibrate", "quantize", "reuse", "first_stage"])
def test_no_stage_of_a_run_made_before_there_were_sizes_is_stale(stage):
    config = parse_config({**MODEL, "sampling": {"reuse": 0.5}}, "here")
    inputs = config.stage_inputs(stage)
    assert "sizes" not in inputs.get("calibration", {})
    several = {"calibration": {"batch_size": 4, "sizes": [[32, 48]]}}
    of_several = parse_config({**MODEL, **several}, "here").stage_inputs(stage)
    assert ("sizes" in of_several.get("calibration", {})) == (stage != "reuse")


def test_the_default_configuration_is_a_config():
    assert isinstance(parse_config(MODEL, "here"), Config)


def test_a_plan_of_reuse_depends_on_its_budget_the_sampler_and_what_is_mended(minimal):
    plain = load_config(minimal, ["sampling.reuse=0.5"])
    for change, same in (
        ("sampling.reuse=0.6", False),
        ("sampling.steps=10", False),
        ("sampling.scheduler=euler", False),
        ("sampling.guidance_scale=2.0", False),
        ("correction.reuse=site", False),
        ("correction.inter.field=4", False),
        ("sampling.seed=5", True),
        ("sampling.classes=[1]", True),
    ):
        other = load_config(minimal, ["sampling.reuse=0.5", change])
        assert (other.stage_digest("reuse") == plain.stage_digest("reuse")) == same, change
