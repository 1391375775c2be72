"""Calls that are kept, and the memory that long ones give back."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.runtime import kept_calls
from qncd_cli.runtime.denoiser import full_denoiser
from qncd_cli.runtime.kept_calls import KeptCalls
from qncd_cli.store.partial import Partial


@pytest.mark.parametrize(("long", "given"), [(0.0, 2), (60.0, 0)])
def test_memory_goes_back_after_every_long_call_that_is_made(
    made, tmp_path, monkeypatch, long, given
):
    _, model, *_ = made
    times = []
    monkeypatch.setattr(kept_calls, "LONG", long)
    monkeypatch.setattr(kept_calls, "give_back", lambda: times.append(1))
    x, condition = torch.zeros(1, *model.latent_shape), model.condition(torch.tensor([0]))

    def two_calls() -> list[torch.Tensor]:
        with Partial(tmp_path / "partial", {"test": "calls"}, lambda line: None) as kept:
            calls = KeptCalls(full_denoiser(model), kept, "calls")
            found = [calls(x, t, condition) for t in (900.0, 500.0)]
            kept.write()
            return found

    first = two_calls()
    assert len(times) == given
    again = two_calls()
    assert len(times) == given  # what is found is not made
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
