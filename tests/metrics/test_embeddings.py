"""What is said of text encoders in integers."""

from __future__ import annotations

from qncd_cli.metrics.embeddings import note_of_encoders
from qncd_cli.vocabulary import IDENTICAL_DB


def test_widths_and_figures_are_said():
    figures = {"sqnr_embeddings_db": 31.26, "sqnr_lowest_db": 28.0}
    body = {"bits": 8, "prompts": 3, "fidelity": {"hidden states": figures}}
    note = note_of_encoders(body)
    assert (note["what"], note["count"]) == ("text_encoders", 3)
    assert "with W8A8" in note["says"] and "of 3 prompts" in note["says"]
    assert note["says"].endswith("hidden states over all 31.26, lowest 28.00")
    same = dict.fromkeys(figures, IDENTICAL_DB)
    body = {"bits": 4, "prompts": 3, "fidelity": {"hidden states": figures, "pooled": same}}
    says = note_of_encoders(body)["says"]
    assert "with weights of 4 bits" in says and "; pooled over all identical" in says
