"""The verdict says what is known and nothing else."""

from __future__ import annotations

import pytest

from qncd_cli.report.headline import BASELINE, head_table, speed_rows, verdict, way_out

MADE = {"preset": None, "weights": 4, "activations": 8}
FIDELITY = {"psnr_median_db": 32.394, "changed": 3}


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({}, "m."),
        ({"quantization": MADE}, "m at W4A8 (no preset)."),
        ({"bytes": {"full": 20, "quantized": 5}}, "m: 4.0 times smaller."),
        ({"fidelity": FIDELITY}, "m: median PSNR 32.39 dB to full precision."),
        (
            {"fidelity": FIDELITY, "protocol": {"num_samples": 64}},
            "m: median PSNR 32.39 dB to full precision, 3 of 64 images changed.",
        ),
        (
            {"fidelity": {"psnr_median_db": 200.0}},
            "m: images identical to full precision's.",
        ),
    ],
)
def test_the_verdict_leaves_out_what_was_not_measured(metrics, said) -> None:
    assert verdict(metrics, "m") == said
    assert verdict(metrics, "m", "2026-11-27") == f"{said[:-1]}; 2026-11-27."


@pytest.mark.parametrize(
    ("median", "advised"), [(24.9, True), (25.0, False), (200.0, False), (None, False)]
)
def test_images_far_from_full_precision_come_with_a_way_out(median, advised) -> None:
    far = {"fidelity": {"psnr_median_db": median}, "quantization": MADE}
    assert ("correction.intra=auto" in way_out(far)) == advised
    assert not way_out({"fidelity": {"psnr_median_db": median}})  # images of full precision


def test_the_verdict_of_a_preset() -> None:
    made = {"preset": "best", "weights": 4, "activations": 6}
    assert verdict({"quantization": made}, "fashion-ldm") == "fashion-ldm at W4A6 (preset best)."


def test_an_interval_stands_beside_its_number() -> None:
    entry = {"network": "inception-v3-compat", "value": 9.5, "low": 9.0, "high": 10.0}
    table = head_table({"images": {"feature_distance": entry}})
    ((label, (cell,)),) = table.rows
    assert (label, cell.text, cell.range) == ("FID ↓", "9.500", "[9.000, 10.00]")


def test_the_speed_of_a_set_is_that_of_what_it_was_drawn_with() -> None:
    rows = [
        {"name": name, "seconds_per_call": seconds, "speedup": 1 / seconds}
        for name, seconds in {BASELINE: 1.0, "int8-w4a8": 0.5, "int8-w4a8-compiled": 0.25}.items()
    ]
    plain = {"quantization": MADE, "protocol": {"backend": "int8", "compiled": False}}
    other = {"quantization": MADE, "protocol": {"backend": "simulate"}}
    (label, cells), (_, speedups) = speed_rows({"rows": rows}, [plain, other])
    assert label == "time a call, s ↓"
    assert [cell.text for cell in cells] == ["1.000", "0.5", "–"]
    assert [cell.text for cell in speedups] == ["1.000", "2.000", "–"]
    assert speed_rows({"rows": rows}, [other]) == []
