"""Graphs of a denoiser that leaves work out: one for each set of sites that is kept at some step.

They share the packed weights of quantized layers. Kept values go in and computed ones come out, so
that what stands for a value is made outside of them (runtime/reuse.py).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..backends.compiled import graph
from ..errors import BackendUnavailable
from ..models.reuse_sites import KeptOutputs
from ..store.digests import digest_of
from .compiled_graph import GraphDenoiser, Tell, filled, has_graph, made_graph, registered
from .denoiser import Denoiser
from .reuse import Pattern, ReusingDenoiser

MOST_GRAPHS = 9
"""Graphs that one plan is worth, each of which takes minutes: one more than a chain has sites."""


class PatternGraphs(GraphDenoiser):
    """A denoiser whose calls run the graph of the sites that they are given."""

    def __init__(
        self,
        eager: Denoiser,
        graphs: Mapping[frozenset[str], graph.Graph],
        outputs: KeptOutputs,
    ):
        super().__init__(eager, next(iter(graphs.values())))
        self._graphs, self._outputs = graphs, outputs

    def _part(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        rows, given = len(x), self._outputs.given
        if rows < graph.BATCH_RANGE[0]:
            x, t = filled(x), filled(t)
            condition = {name: filled(value) for name, value in condition.items()}
            given = {name: filled(value) for name, value in given.items()}
        ordered = {name: in_order(value) for name, value in given.items()}
        row = self._tables[self.step.group]
        run = self._graphs[frozenset(given)]
        prediction, taken = run(x, t.to(torch.float32), row, condition, ordered)
        self._outputs.taken = {name: value[:rows] for name, value in taken.items()}
        first: Tensor = prediction[:rows]
        return first


def in_order(value: Tensor) -> Tensor:
    """A kept value as graphs have it in memory: images with their channels last."""
    if value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value.contiguous()


def compile_reusing(
    reusing: ReusingDenoiser,
    digests: Mapping[str, str],
    example: tuple[Tensor, Mapping[str, Tensor]],
    folder: Path,
    tell: Tell,
) -> ReusingDenoiser:
    """The reusing denoiser with graphs inside, from `folder` or made there.

    digests: of what constants come from, without the plan's, whose terms lie outside of graphs;
    the rest, and what is raised, as `compile_denoiser` has it. BackendUnavailable also for a plan
    of too many patterns.
    """
    eager, outputs, pattern = reusing.inner, reusing.outputs, reusing.pattern
    patterns = patterns_of(pattern)
    if len(patterns) > MOST_GRAPHS:
        raise BackendUnavailable(
            f"the reuse plan keeps {len(patterns)} different sets of sites, and would need as many "
            f"graphs (at most {MOST_GRAPHS})",
            "use --no-compile",
        )
    layers = registered(eager, digests)
    x, condition = eager.in_own_dtype(*example)
    inputs = filled(x), {name: filled(value) for name, value in condition.items()}
    values: dict[str, Tensor] = {}

    def compile(kept: Collection[str]) -> bytes:
        if not values:  # also tells the shapes of what is not computed
            _, taken = reusing.computed(inputs[0], pattern.timesteps[0], inputs[1], {})
            values.update({name: in_order(value) for name, value in taken.items()})
        given = {name: values[name] for name in sorted(kept)}
        return graph.compile_graph(eager.module, eager.step, layers, inputs, kept=(outputs, given))

    graphs = {}
    for number, kept in enumerate(patterns, 1):
        saying = f"compiling graph {number} of {len(patterns)} of the reuse plan, once"
        own = _digests(digests, pattern, kept)
        graphs[kept] = made_graph(own, folder, functools.partial(compile, kept), tell, saying)
    inner = PatternGraphs(eager, graphs, outputs)
    rows = graph.BATCH_RANGE[1]
    return ReusingDenoiser(inner, pattern, reusing.terms, kept=outputs, rows=rows)


def patterns_of(pattern: Pattern) -> list[frozenset[str]]:
    """The different sets of sites that steps keep, in an order of their own."""
    return sorted(set(pattern.kept), key=sorted)


def has_graphs(folder: Path, digests: Mapping[str, str], pattern: Pattern) -> bool:
    """Whether all graphs of a plan are kept and can be used."""
    found = [has_graph(folder, _digests(digests, pattern, kept)) for kept in patterns_of(pattern)]
    return all(found)


def _digests(digests: Mapping[str, str], pattern: Pattern, kept: Collection[str]) -> dict[str, str]:
    """What decides a graph: which sites it is given, and which its results are."""
    sites: Sequence[Sequence[str]] = sorted(kept), sorted(pattern.sites)
    return {**digests, "kept": digest_of([*map(list, sites)])}
