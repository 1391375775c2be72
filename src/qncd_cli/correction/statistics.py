"""Offline statistics of the quantization noise, from pairs (eps, eps~) per timestep.

What PtqdCorrection and AffineCorrection apply (docs/method.md; PTQD, arXiv 2305.10657).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError

ROUNDING = 1e-12  # relative error to allow for in float64 sums
AFFINE_RIDGE = 1e-3
"""In units of one element's squared eps, whose variance is about 1."""


def timestep_key(t: float | Tensor) -> int:
    """Integer under which statistics of t are kept; sigma schedulers have fractional timesteps."""
    return round(float(t))


def by_timestep(statistics: Mapping[str, Tensor], name: str) -> dict[int, Tensor]:
    """Table t -> row of one tensor of `NoiseStatistics.finish`."""
    return dict(zip(statistics["timesteps"].tolist(), statistics[name], strict=True))


def at_timestep(table: Mapping[int, Tensor], t: int) -> Tensor:
    """Row of a table by timestep. Raises ConfigError where it was not prepared for t."""
    if t not in table:
        raise ConfigError(
            f"no noise statistics for timestep {t}: they were prepared for other steps"
            f" ({len(table)} timesteps from {min(table, default=0)} to {max(table, default=0)})",
            "run quantize again with the same sampling.steps and scheduler, or use --inter none"
            " or --inter runtime",
        )
    return table[t]


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...] on the device and in the dtype of `like`."""
    return values.to(like).reshape(1, -1, *[1] * (like.ndim - 2))


@dataclass
class NoiseStatistics:
    """Sums over pairs (eps, eps~) per timestep; merges across ranks by addition.

    sums: t -> [6, C] float64, rows (count, sum q, sum q^2, sum eps, sum eps^2, sum q eps), where
    count is elements per channel. Feed guided predictions, where they are what is corrected.
    """

    sums: dict[int, Tensor] = field(default_factory=dict)

    def update(self, t: float | Tensor, eps_fp: Tensor, eps_q: Tensor) -> None:
        """Add a batch at timestep t; eps_fp, eps_q: [N, C, ...] for the same inputs."""
        if eps_fp.shape != eps_q.shape:
            raise ValueError(f"shapes differ: {tuple(eps_fp.shape)} and {tuple(eps_q.shape)}")
        f, g = (
            e.detach().transpose(0, 1).flatten(1).to("cpu", torch.float64) for e in (eps_fp, eps_q)
        )  # [C, N * ...]
        q = g - f
        rows = (torch.ones_like(q), q, q * q, f, f * f, q * f)
        self._add(timestep_key(t), torch.stack([row.sum(1) for row in rows]))

    def merge(self, other: NoiseStatistics) -> None:
        """Add the sums of `other`."""
        for t, sums in other.sums.items():
            self._add(t, sums)

    def finish(self, ridge: float = AFFINE_RIDGE) -> dict[str, Tensor]:
        """Statistics per timestep, ascending: `timesteps` [T] int64, the rest float32.

        mean, variance [T, C] of q; correlation_k [T], residual_mean [T, C], residual_variance [T]
        of q = k eps + r (least squares with one intercept per channel; the variance is what
        remains around the intercepts); affine_a, affine_b [T, C] of eps ~ a eps~ + b, ridge
        regression toward a = 1, b = 0; affine_mean [T, C], affine_variance [T] of what that leaves,
        a eps~ + b - eps. Raises ValueError if nothing was added.
        """
        if not self.sums:
            raise ValueError("no noise statistics: update was never called")
        times = sorted(self.sums)
        n, *totals = torch.stack([self.sums[t] for t in times]).unbind(1)  # each [T, C]
        q, qq, f, ff, qf = (total / n for total in totals)
        cov_qq, cov_ff, cov_qf = qq - q * q, ff - f * f, qf - q * f
        varies = cov_ff.sum(1) > ff.sum(1) * ROUNDING  # else eps is constant and has no slope
        k = torch.where(varies, cov_qf.sum(1) / cov_ff.sum(1), 0.0)
        kc = k[:, None]
        residual = (cov_qq - 2 * kc * cov_qf + kc**2 * cov_ff).clamp(min=0)
        # Affine: -q = alpha eps~ + b with a = 1 + alpha; normal equations of (alpha, b).
        g, gg, gq = f + q, ff + 2 * qf + qq, qf + qq
        slope_weight = (gg * (1 + ridge)).clamp(min=ROUNDING**2)
        det = slope_weight * (1 + ridge) - g * g
        alpha = (g * q - (1 + ridge) * gq) / det
        b = (g * gq - slope_weight * q) / det
        a = 1 + alpha
        cov_fg, cov_gg = cov_ff + cov_qf, cov_ff + 2 * cov_qf + cov_qq
        left = (cov_ff - 2 * a * cov_fg + a**2 * cov_gg).clamp(min=0)
        result = {
            "mean": q,
            "variance": cov_qq.clamp(min=0),
            "correlation_k": k,
            "residual_mean": q - kc * f,
            "residual_variance": residual.mean(1),
            "affine_a": a,
            "affine_b": b,
            "affine_mean": a * g + b - f,
            "affine_variance": left.mean(1),
        }
        tensors = {name: value.to(torch.float32) for name, value in result.items()}
        return {"timesteps": torch.tensor(times, dtype=torch.int64), **tensors}

    def _add(self, t: int, sums: Tensor) -> None:
        self.sums[t] = self.sums[t] + sums if t in self.sums else sums.clone()
