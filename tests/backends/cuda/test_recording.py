"""Launches that are recorded and replayed, by a recorder of the CPU in the place of a GPU's."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.backends.cuda.recording import MOST, Recorded


class Denoiser:
    """A call of the four inputs; counts how often it is made."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, t, row, condition):
        self.calls += 1
        return x * row.sum() + t[:, None] + condition["class"]


def record(call, inputs):
    """As a CUDA graph: a replay reads the same memory and writes to the same memory."""
    output = call(*inputs)

    def replay():
        x, t, row, condition = inputs
        output.copy_(x * row.sum() + t[:, None] + condition["class"])

    return replay, output


def inputs(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return draw(rows, 4), draw(rows), draw(5), {"class": draw(rows, 4)}


def test_a_replay_computes_what_the_call_does_for_other_inputs():
    call = Denoiser()
    recorded, plain = Recorded(call, record), Denoiser()
    for seed in range(4):
        assert torch.equal(recorded(*inputs(seed=seed)), plain(*inputs(seed=seed)))
    assert call.calls == 2  # the first call, and its recording


def test_a_prediction_stays_what_it_was_when_the_next_is_made():
    recorded, plain = Recorded(Denoiser(), record), Denoiser()
    predictions = [recorded(*inputs(seed=seed)) for seed in range(3)]
    for seed, prediction in enumerate(predictions):
        assert torch.equal(prediction, plain(*inputs(seed=seed)))


def test_inputs_are_read_not_kept_and_not_written_to():
    recorded, plain = Recorded(Denoiser(), record), Denoiser()
    given = inputs()
    before = [y.clone() for y in given[:3]]
    recorded(*given)
    assert all(torch.equal(a, b) for a, b in zip(given[:3], before, strict=True))
    given[0].zero_()
    assert torch.equal(recorded(*inputs(seed=1)), plain(*inputs(seed=1)))
    assert torch.equal(recorded(*given), plain(*given))


def test_every_shape_has_a_recording_of_its_own_up_to_a_number():
    call, plain = Denoiser(), Denoiser()
    recorded = Recorded(call, record)
    for _ in range(2):
        for rows in range(2, 2 + MOST + 2):
            assert torch.equal(recorded(*inputs(rows)), plain(*inputs(rows)))
    assert call.calls == 2 * MOST + 2 * 2  # those beyond are called every time


def cannot(call, inputs):
    raise RuntimeError("operation not permitted when stream is capturing")


def stale(call, inputs):
    output = call(*inputs)
    return (lambda: None), output


def other(call, inputs):
    output = call(*inputs)
    return (lambda: output.add_(1.0)), output


@pytest.mark.parametrize("recorder", [cannot, stale, other])
def test_what_cannot_be_recorded_or_replays_other_numbers_is_called(recorder):
    call, plain = Denoiser(), Denoiser()
    recorded = Recorded(call, recorder)
    for seed in range(3):
        assert torch.equal(recorded(*inputs(seed=seed)), plain(*inputs(seed=seed)))
    assert call.calls >= 3
