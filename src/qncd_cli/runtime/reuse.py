"""A denoiser that leaves out a part of its work at some steps, with what earlier steps computed.

Notation as in docs/method.md, of one site at step s:
    h'', h'      its values at the two latest steps that computed it, h'' the later one
    h^           what stands for its value now: h'' + a h'' + d (h'' - h') + b, per channel
    a, d, b      terms, fitted step by step (ptq/reuse.py); zeros give h'' itself
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ArtifactError, ConfigError
from ..models.reuse_sites import KeptOutputs, Site, install_sites, reuse_chains
from ..store.artifacts import Artifact
from .denoiser import Denoiser

TERMS = ("factor", "slope", "offset")
"""Names of terms in artifacts."""


@dataclass(frozen=True)
class Pattern:
    """Which sites are kept, by step. timesteps: of the steps, descending; kept: names of the sites
    that are not computed, by step."""

    timesteps: tuple[float, ...]
    kept: tuple[frozenset[str], ...]

    def step_of(self, t: float) -> int:
        """The step of a timestep. Raises ConfigError for one that is none."""
        try:
            return self.timesteps.index(t)
        except ValueError:
            raise ConfigError(
                f"timestep {t:g} is none of the {len(self.timesteps)} of the reuse plan",
                'repeat "qncd quantize" with these sampling settings',
            ) from None

    @property
    def sites(self) -> frozenset[str]:
        """All that are kept at some step."""
        return frozenset().union(*self.kept)


@dataclass(frozen=True)
class SiteTerms:
    """a, d, b [B, C] of a site at a step, for the B parts of a batch: the null class's rows and the
    others with guidance, else all."""

    factor: Tensor
    slope: Tensor
    offset: Tensor

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.factor, self.slope, self.offset


@dataclass
class History:
    """The latest values of a site, the newest first."""

    values: list[Tensor] = field(default_factory=list)

    def add(self, value: Tensor) -> None:
        self.values = [value, *self.values[:1]]

    @property
    def slope(self) -> Tensor:
        """h'' - h', nothing where there is no h' yet."""
        latest = self.values[0]
        return latest - self.values[1] if len(self.values) > 1 else torch.zeros_like(latest)

    def estimate(self, terms: SiteTerms | None, axis: int) -> Tensor:
        """h^ in the type of h''; axis: of the channels."""
        latest = self.values[0]
        if terms is None:
            return latest
        parts = []
        cut = [values.chunk(len(terms.factor)) for values in (latest, self.slope)]
        for value, slope, *of_part in zip(*cut, *terms.parts(), strict=True):
            shape = [1] * latest.ndim
            shape[axis] = -1
            a, d, b = (v.to(latest.device).reshape(shape) for v in of_part)
            wide = value.float()
            parts.append((wide + (a * wide + d * slope.float() + b)).to(latest.dtype))
        return torch.cat(parts)


def sites_of(denoiser: torch.nn.Module) -> dict[str, Site]:
    """All sites by name."""
    return {site.name: site for chain in reuse_chains(denoiser) for site in chain}


def channel_axis(site: Site) -> int:
    """Axis of the channels of a site's values: [N, C, H, W], residuals [N, L, C]."""
    return 2 if site.residual else 1


class ReusingDenoiser(Denoiser):
    """A denoiser whose steps leave out what a pattern says.

    inner: computes the rest, its module with `install_sites`. terms: by step and site. rows: most
    of a batch that inner is called with at once.

    One trajectory after the other, each from its first step on: another order is refused, as the
    kept values would be another step's. Values are kept row by row; no sample changes with its
    batch.
    """

    def __init__(
        self,
        inner: Denoiser,
        pattern: Pattern,
        terms: Sequence[Mapping[str, SiteTerms]] | None = None,
        *,
        kept: KeptOutputs | None = None,
        rows: int | None = None,
    ):
        super().__init__(inner.module, inner.step, inner.group_bounds)
        self.inner, self.pattern, self.rows = inner, pattern, rows
        known = sites_of(inner.module)
        self.sites = {name: site for name, site in known.items() if name in pattern.sites}
        self.outputs = install_sites(inner.module, [*self.sites.values()]) if kept is None else kept
        self.terms = terms if terms is not None else [{} for _ in pattern.timesteps]
        self._history: dict[str, History] = {}
        self._last, self._batch = -1, 0

    def __call__(self, x: Tensor, t: Tensor | float, condition: Mapping[str, Tensor]) -> Tensor:
        step = self.pattern.step_of(float(t))
        if step == 0:
            self._history, self._batch = {name: History() for name in self.sites}, len(x)
        elif step != self._last + 1 or len(x) != self._batch:
            raise ConfigError(
                f"step {step + 1} of a trajectory follows step {self._last + 1}: kept values "
                "would be another step's",
                "corrections that call the denoiser in between need sampling.reuse: null",
            )
        self._last = step
        return self._at(step, x, t, condition)

    def _at(self, step: int, x: Tensor, t: Tensor | float, condition: Mapping[str, Tensor]):
        given = {
            name: self._history[name].estimate(self.terms[step].get(name), channel_axis(site))
            for name, site in self.sites.items()
            if name in self.pattern.kept[step]
        }
        prediction, taken = self.computed(x, t, condition, given)
        for name, value in taken.items():
            if name in self._history:
                self._history[name].add(value)
        return prediction

    def computed(
        self,
        x: Tensor,
        t: Tensor | float,
        condition: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A call with these values of sites, and the values of those that it computed."""
        size = self.rows or len(x)
        predictions, taken = [], []
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            own = {k: v[rows] if len(v) == len(x) else v for k, v in condition.items()}
            self.outputs.given = {name: value[rows] for name, value in given.items()}
            self.outputs.taken = {}
            try:
                predictions.append(self.inner(x[rows], t, own))
            finally:
                self.outputs.given = {}
            taken.append(self.outputs.taken)
            self.outputs.taken = {}
        joined = {name: torch.cat([part[name] for part in taken]) for name in taken[0]}
        return torch.cat(predictions), joined


def reusing_denoiser(inner: Denoiser, plan: Artifact) -> ReusingDenoiser:
    """The quantized denoiser with a plan and its terms. Raises ArtifactError for sites that the
    denoiser does not have."""
    body = plan.body
    pattern = Pattern(tuple(body["timesteps"]), tuple(frozenset(names) for names in body["kept"]))
    missing = sorted(pattern.sites - sites_of(inner.module).keys())
    if missing:
        raise ArtifactError(
            f"{plan.path}: site {missing[0]} does not fit the model", 'repeat "qncd quantize"'
        )
    terms = [
        {
            name: SiteTerms(*(plan.tensors[f"{name}.{key}"][step] for key in TERMS))
            for name in names & body["sites"].keys()
        }
        for step, names in enumerate(pattern.kept)
    ]
    return ReusingDenoiser(inner, pattern, terms)
