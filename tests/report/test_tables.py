"""Tables in Markdown."""

from __future__ import annotations

from qncd_cli.report.tables import markdown_table


def test_markdown_table() -> None:
    rows = [{"preset": "a|b", "psnr_db": 27.4}, {"preset": "qncd\nx", "psnr_db": None}]
    assert markdown_table(rows, ["preset", "psnr_db"]).splitlines() == [
        "| preset | psnr_db |",
        "| --- | ---: |",
        "| a\\|b | 27.40 |",
        "| qncd x | – |",
    ]
