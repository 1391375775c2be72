"""Seconds, peak memory and layers of a stage's phases."""

from __future__ import annotations

import mmap
from types import SimpleNamespace

import pytest

from qncd_cli.phases import Phases
from qncd_cli.progress import counted, no_progress
from qncd_cli.resident import forget_peak


class Clock:
    """Seconds that pass where a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def take(size: int) -> None:
    """Take memory from the system itself, touch every page of it, and give it back."""
    with mmap.mmap(-1, size) as held:
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1


def recorded():
    clock = Clock()
    return Phases(no_progress, clock), clock


def test_a_phase_has_the_seconds_of_its_units_and_of_what_makes_them():
    phases, clock = recorded()

    def made():
        for number in range(3):
            clock.now += 1
            yield number

    clock.now += 5
    for _ in phases.track(made(), "drawing", 3, "calls"):
        clock.now += 10
    clock.now += 7
    (phase,) = phases.found
    assert (phase.name, phase.seconds, phase.units) == ("drawing", 33, 3)


def test_time_inside_of_an_inner_phase_is_not_the_outer_ones():
    phases, clock = recorded()
    for _ in phases.track(range(2), "rounding", 2, "layers"):
        clock.now += 1
        for _ in phases.track(range(3), "collecting", 3, "calls"):
            clock.now += 4
    seconds = {phase.name: phase.seconds for phase in phases.found}
    assert seconds == {"rounding": 2, "collecting": 24}
    assert sum(seconds.values()) == clock.now - 100


def test_layers_are_named_and_their_seconds_added():
    phases, clock = recorded()
    layers = [SimpleNamespace(name=name) for name in ("a", "b")]
    for layer in phases.track(layers, "ranges", 2, "layers"):
        clock.now += 1 if layer.name == "a" else 2
    for _ in phases.track([(layer, None) for layer in layers], "rounding", 2, "layers"):
        clock.now += 10
    assert [phase.layers for phase in phases.found] == [{"a": 1, "b": 2}, {"a": 10, "b": 10}]
    assert list(phases.found[0].body()["layers"]) == ["b", "a"]


def test_ticks_count_as_units_and_a_loop_that_fails_ends_its_phase():
    phases, clock = recorded()

    def draw():
        for _, tick in counted(phases.track, range(4), "drawing", 8, "calls"):
            clock.now += 3
            tick()
            tick()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        draw()
    clock.now += 50
    for _ in phases.track([], "nothing", 0, "calls"):
        pass
    assert [(p.name, p.seconds, p.units) for p in phases.found] == [
        ("drawing", 3, 2),
        ("nothing", 0, 0),
    ]


@pytest.mark.skipif(not forget_peak(), reason="the system does not tell peaks of memory")
def test_a_phase_has_its_own_peak():
    phases, size = recorded()[0], 64 << 20
    for _ in phases.track(range(1), "much", 1, "calls"):
        take(size)
        for _ in phases.track(range(1), "inner", 1, "calls"):
            pass
    for _ in phases.track(range(1), "little", 1, "calls"):
        pass
    much, inner, little = (phase.peak_bytes for phase in phases.found)
    assert much - little > size / 2
    assert much - inner > size / 2
