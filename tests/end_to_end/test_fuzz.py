"""Whatever is in a file: it is read as it was meant, or refused in one line.

QNCD_FUZZ=300 takes so many mutated files a test (docs/reliability.md has the figures of such a
run); a few are enough to see that the tests can fail.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Qncd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from qncd_cli.config.loading import load_config
from qncd_cli.config.yaml_text import parse_yaml
from qncd_cli.errors import ArtifactError, ConfigError
from qncd_cli.lineage.sample_set import read_set
from qncd_cli.lineage.sample_sets import read_manifest
from qncd_cli.metrics.reference import load_reference
from qncd_cli.store import artifacts, own_code
from qncd_cli.store.artifact_files import content_digest, read_stored, tensor_line
from qncd_cli.store.digests import canonical_json
from qncd_cli.store.files import read_json, write_json, write_sealed_json
from qncd_cli.store.run_dir import read_coverage

RUN = Path("runs/tiny")
DOCUMENTED = {0, 2, 3, 4, 5, 6, 7}
fuzz = settings(
    max_examples=int(os.environ.get("QNCD_FUZZ", "12")),
    deadline=None,
    database=None,
    derandomize="QNCD_FUZZ" not in os.environ,  # the same few in every run of the suite
    suppress_health_check=list(HealthCheck),
)

# ---- mutations ----------------------------------------------------------------------------------

PLACE = st.floats(0, 1, exclude_max=True)
SOME_BYTES = st.binary(min_size=1, max_size=9) | st.sampled_from(
    [b"\xff" * 8, b"\0" * 8, b"[" * 200, b'{"a":', b"-1", b"1e999", b"NaN", b"&a [*a]", b"!!x "]
)
MUTATION = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACE, st.integers(1, 99)),
    st.tuples(st.just("end"), PLACE, st.just(0)),
    st.tuples(st.just("insert"), PLACE, SOME_BYTES),
    st.tuples(st.just("over"), PLACE, SOME_BYTES),
    st.tuples(st.just("again"), PLACE, st.integers(1, 99)),
)
MUTATIONS = st.lists(MUTATION, min_size=1, max_size=3)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def mutated(data: bytes, mutations: list[tuple[str, float, Any]]) -> bytes:
    for kind, place, how in mutations:
        at = int(place * len(data))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << how]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + how :]
        elif kind == "end":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + how + data[at:]
        elif kind == "over":
            data = data[:at] + how + data[at + len(how) :]
        elif kind == "again":
            data = data[:at] + data[at : at + how] + data[at:]
    return data


@st.composite
def changed_trees(draw: Callable[..., Any], tree: Any) -> Any:
    """The tree with one of its values exchanged or left out, at any depth."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(tree)))
        if draw(st.integers(0, 2)):
            return {**tree, key: draw(changed_trees(tree[key]))}
        return {k: v for k, v in tree.items() if k != key}
    if isinstance(tree, list) and tree and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(tree) - 1))
        return [*tree[:at], draw(changed_trees(tree[at])), *tree[at + 1 :]]
    return draw(ANYTHING)


def refused_or(read: Callable[[], Any], error: type[Exception] = ArtifactError) -> Any:
    """What is read, or None where it is refused in one line of a length that can be read."""
    try:
        return read()
    except error as refusal:
        said = str(refusal)
        assert "\n" not in said and len(said) < 5000, said
        return None


@pytest.fixture(scope="module")
def run(sampled_shallow, tmp_path_factory) -> Path:
    """A run directory whose files are changed one at a time."""
    folder = tmp_path_factory.mktemp("fuzz") / "work"
    return Path(shutil.copytree(sampled_shallow, folder)) / RUN


# ---- configurations -----------------------------------------------------------------------------


def config_or_refusal(path: Path) -> None:
    config = refused_or(lambda: load_config(path), ConfigError)
    if config is not None:
        path.write_text(config.to_yaml())
        assert load_config(path) == config


@fuzz
@given(MUTATIONS)
def test_a_configuration_of_any_bytes_is_read_or_refused(run, mutations):
    own = run.with_name("own.yaml")
    own.write_bytes(mutated((run / "config.yaml").read_bytes(), mutations))
    config_or_refusal(own)


@fuzz
@given(st.data())
def test_a_configuration_of_any_values_is_read_or_refused(run, data):
    own = run.with_name("own.yaml")
    tree = data.draw(changed_trees(parse_yaml((run / "config.yaml").read_text())))
    own.write_text(json.dumps(tree))
    config_or_refusal(own)


# ---- artifacts ----------------------------------------------------------------------------------

KINDS = ["calibration", "smoothing", "quantized", "noise_stats"]


@fuzz
@given(st.sampled_from(KINDS), MUTATIONS)
def test_a_changed_byte_in_an_artifact_is_found(run, kind, mutations):
    good = (run / f"{kind}.safetensors").read_bytes()
    data, path = mutated(good, mutations), run.with_name("own.safetensors")
    path.write_bytes(data)
    for read in (artifacts.read, read_stored):
        found = refused_or(lambda read=read: read(path, kind))
        assert (found is None) == (data != good)


def resealed(path: Path, body: Any, target: Path) -> None:
    """The artifact with another description, and a digest that fits."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["qncd"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    meta |= {"body": body, "content": ""}
    digest = content_digest(meta)
    for name, tensor in sorted(tensors.items()):
        digest.update(tensor_line(name, str(tensor.dtype), tuple(tensor.shape)))
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    meta["content"] = digest.hexdigest()
    save_file(tensors, target, {"qncd": canonical_json(meta)})


@fuzz
@given(st.sampled_from(KINDS), st.data())
def test_an_artifact_whose_description_was_exchanged_is_read_or_refused(run, kind, data):
    good, path = run / f"{kind}.safetensors", run.with_name("own.safetensors")
    body = data.draw(changed_trees(read_stored(good, kind).body))
    resealed(good, body, path)
    for read in (artifacts.read, read_stored):
        found = refused_or(lambda read=read: read(path, kind))
        assert found is None or found.body == body
    shown = Qncd(run.parent)("inspect", str(path), ok=False)
    assert shown.exit_code in DOCUMENTED, shown.stderr


def test_a_header_that_claims_more_than_the_file_holds_costs_no_memory(run):
    """47 GB of float32, in a file of a kilobyte."""
    shape = [1 << 20, 11_500]
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}}
    text = json.dumps({"__metadata__": {"qncd": "{}"}, **header}).encode()
    path = run.with_name("own.safetensors")
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 100)
    for read in (artifacts.read, read_stored):
        with pytest.raises(ArtifactError, match="truncated or not"):
            read(path, "quantized")


# ---- what is beside artifacts -------------------------------------------------------------------


@fuzz
@given(st.sampled_from(["manifest.json", "latents.safetensors", "000002.png"]), MUTATIONS)
def test_a_set_is_what_was_drawn_or_refused(run, name, mutations):
    folder = run / "samples" / "quantized"
    path, drawn = folder / name, read_set(folder)
    good = path.read_bytes()
    path.write_bytes(mutated(good, mutations))
    try:
        found = refused_or(lambda: read_set(folder))
    finally:
        path.write_bytes(good)
    if found is not None:
        assert found.seeds == drawn.seeds
        for key in ("classes", "sampling", "digests", "source", "correction"):
            assert found.manifest[key] == drawn.manifest[key]


@fuzz
@given(st.data())
def test_a_manifest_of_any_values_is_read_or_refused(run, data):
    folder = run / "samples" / "quantized"
    path = folder / "manifest.json"
    good = path.read_bytes()
    tree = data.draw(changed_trees(json.loads(good)))
    path.write_text(json.dumps(tree))
    try:
        refused_or(lambda: read_manifest(folder, "qncd sample"))
        refused_or(lambda: read_set(folder))
        again = Qncd(run.parent.parent)("sample", "--num", "6", "--batch-size", "4", ok=False)
    finally:
        path.write_bytes(good)
    assert again.exit_code in DOCUMENTED, again.stderr


@fuzz
@given(MUTATIONS, st.data())
def test_coverage_is_what_was_written_or_refused(run, mutations, data):
    good = json.loads((run / "coverage.json").read_bytes())
    path = run.with_name("own.json")
    path.write_bytes(mutated((run / "coverage.json").read_bytes(), mutations))
    found = refused_or(lambda: read_coverage(path))
    if found is not None:
        assert all(found[key] == value for key, value in good.items() if key != "content")
    tree = data.draw(changed_trees({k: v for k, v in good.items() if k != "content"}))
    if isinstance(tree, dict):
        write_sealed_json(path, tree)
        refused_or(lambda: read_coverage(path))


@fuzz
@given(st.data())
def test_metrics_of_any_values_are_compared_or_refused(run, data):
    row = {"num_samples": 6, "frechet": None}
    metrics = {
        "protocol": {"num_samples": 6, "left_out": {}, "metrics": ["fid"], "sampling": {}},
        "full": row,
        "quantized": row,
        "fidelity": {"psnr_db": 20.0, "per_seed": {"psnr_db": {"0": 20.0}}, "changed": []},
        "bytes": {"full": 4, "quantized": 1, "artifact": 1, "rest": 0},
    }
    other, tree = run.with_name("other"), data.draw(changed_trees(metrics))
    (write_sealed_json if isinstance(tree, dict) else write_json)(other / "metrics.json", tree)
    shown = Qncd(run.parent)("compare", str(other), ok=False)
    assert shown.exit_code in DOCUMENTED, shown.stderr


@fuzz
@given(MUTATIONS)
def test_json_of_any_bytes_is_read_or_refused(run, mutations):
    path = run.with_name("own.json")
    path.write_bytes(mutated((run / "settings.json").read_bytes(), mutations))
    refused_or(lambda: read_json(path, "qncd eval"))


@fuzz
@given(st.sampled_from(["npz", "safetensors"]), MUTATIONS)
def test_a_reference_of_any_bytes_is_read_or_refused(run, kind, mutations):
    import numpy as np
    import safetensors.numpy

    path = run.with_name(f"own.{kind}")
    arrays = {"mu": np.zeros(4), "sigma": np.eye(4), "features": np.ones((3, 4), np.float32)}
    (np.savez if kind == "npz" else lambda p, **a: safetensors.numpy.save_file(a, p))(
        path, **arrays
    )
    path.write_bytes(mutated(path.read_bytes(), mutations))
    refused_or(lambda: load_reference(path))


@fuzz
@given(MUTATIONS)
def test_sealed_code_with_a_changed_byte_is_not_opened(run, mutations):
    path = run.with_name("own.graph")
    own_code.seal(path, bytes(range(256)))
    good = path.read_bytes()
    path.write_bytes(mutated(good, mutations))
    assert own_code.is_sealed(path) == (path.read_bytes() == good)
