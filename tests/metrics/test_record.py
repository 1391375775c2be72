"""metrics.json grows within one protocol and is replaced by another one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from qncd_cli.metrics.record import COMPARABLE, FIXED, OPTIONAL, differing, grown, same_protocol

FID = {"value": 1.5}


def record(metrics: list[str], **changes: Any) -> dict[str, Any]:
    protocol = {key: f"{key} of mine" for key in FIXED}
    protocol |= {"network": "n", "network_sha256": "a", "reference": "r", "reference_sha256": "b"}
    protocol |= {"metrics": metrics, "left_out": {}, **changes}
    entry = {
        "network": {"name": "n"},
        "feature_distance": FID if "fid" in metrics else None,
        "class_score": {"value": 2.5} if "isc" in metrics else None,
    }
    return {
        "protocol": protocol,
        "full": entry,
        "quantized": entry,
        "fidelity": {"psnr_db": 30.0, "feature_distance": FID},
        "bytes": {"full": 2, "quantized": 1},
    }


def without_features() -> dict[str, Any]:
    """Measured again on a machine without weights."""
    nothing = dict.fromkeys(("network", "network_sha256", "reference", "reference_sha256"))
    left_out = {"fid": ["no weights"], "distance": ["no weights"]}
    now = record([], **nothing, left_out=left_out)
    now["full"] = now["quantized"] = dict.fromkeys(now["full"])
    now["fidelity"] = {"psnr_db": 31.0, "feature_distance": None}
    return now


def test_what_was_measured_with_features_outlives_a_call_without():
    merged = grown(record(["fid", "isc"]), without_features())
    assert merged["protocol"]["metrics"] == ["fid", "isc"]
    assert merged["protocol"]["network_sha256"] == "a"
    assert merged["protocol"]["left_out"] == {}
    assert merged["quantized"] == record(["fid", "isc"])["quantized"]
    assert merged["fidelity"] == {"psnr_db": 31.0, "feature_distance": FID}, "the present ones"
    assert grown(without_features(), record(["fid"]))["protocol"]["metrics"] == ["fid"]


@pytest.mark.parametrize("key", [*FIXED, *OPTIONAL])
def test_another_protocol_replaces_the_record(key):
    earlier = record(["isc"], **{key: "another"})
    assert not same_protocol(earlier["protocol"], record(["fid"])["protocol"])
    assert grown(earlier, record(["fid"])) == record(["fid"])


def test_a_record_of_an_earlier_version_is_replaced():
    earlier = record(["isc"])
    del earlier["protocol"]["sets"]
    assert grown(earlier, record(["fid"])) == record(["fid"])
    assert grown({}, record(["fid"])) == record(["fid"])


@pytest.mark.parametrize("key", COMPARABLE)
def test_runs_of_one_table_agree_in_every_key(key):
    mine = record([])["protocol"]
    found = differing(mine, record([], **{key: "another"})["protocol"])
    assert found == {key: (mine[key], "another")}
    assert differing(mine, record(["fid"], artifact="another")["protocol"]) == {}


@pytest.mark.parametrize("module", ["metrics.record", "metrics.image_files"])
def test_what_reads_only_files_needs_no_torch(module):
    code = f"import sys, qncd_cli.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
