"""--profile of calibrate and quantize."""

from __future__ import annotations


def test_where_the_time_went_is_told(qncd):
    made = qncd("calibrate", "--config", "tiny.yaml", "--profile")
    assert "calibrating" in made.stdout and "imports, files, everything else" in made.stdout
    made = qncd("quantize", "--profile", "--json")
    phases = {phase["name"]: phase for phase in made.data["phases"]}
    assert {"rounding weights", "measuring quantization noise"} <= phases.keys()
    rounded = phases["rounding weights"]
    assert len(rounded["layers"]) == rounded["units"] > 1
    assert 0 < sum(phase["seconds"] for phase in phases.values()) <= made.data["seconds"]
    assert all(phase["peak_bytes"] != 0 for phase in phases.values())


def test_what_was_skipped_has_no_phases(qncd):
    qncd("calibrate", "--config", "tiny.yaml")
    again = qncd("calibrate", "--config", "tiny.yaml", "--profile")
    assert "skipped" in again.stdout and "phase" not in again.stdout
    assert qncd("calibrate", "--config", "tiny.yaml", "--profile", "--json").data["phases"] == []
    assert "phases" not in qncd("calibrate", "--config", "tiny.yaml", "--json").data
