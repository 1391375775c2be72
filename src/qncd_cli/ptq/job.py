"""A quantization job: what all parts of the method are about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..config.schema import Config
from ..correction.statistics import timestep_key
from ..models.loading import DiffusionModel
from ..quant.smoothing import IDENTITY, SmoothingFactor
from ..store.artifacts import Artifact, tensors_below
from ..store.partial import NOTHING_KEPT, Partial
from .layer_plan import LayerPlan
from .smoothing_choice import Factors


@dataclass(frozen=True)
class QuantizationJob:
    """A model that is being quantized.

    calibration: of this model and configuration. plans: what is to become of each layer; factors:
    smoothing factors of the layers that have one. partial: what an earlier process has done.
    step_weights: how much an error at a timestep counts, by `timestep_key`; all the same where it
    is empty.
    """

    config: Config
    model: DiffusionModel
    calibration: Artifact
    plans: list[LayerPlan]
    factors: Factors
    partial: Partial = NOTHING_KEPT
    step_weights: Mapping[int, float] = field(default_factory=dict)

    def planned(self, plans: list[LayerPlan]) -> QuantizationJob:
        """The same job with other plans."""
        return replace(self, plans=plans)

    def step_weight(self, t: float) -> float:
        """How much an error at timestep t counts; 1 on average."""
        return self.step_weights.get(timestep_key(t), 1.0)

    def factor(self, name: str) -> SmoothingFactor:
        """The smoothing factor of a layer."""
        return self.factors.get(name, IDENTITY)

    @property
    def group_bounds(self) -> tuple[float, ...]:
        """Descending timesteps between the groups that ranges are chosen for."""
        return tuple(self.calibration.body["group_bounds"])

    def observed(self, name: str) -> dict[str, Tensor]:
        """What calibration saw of a layer's smoothed input: the state of its observer."""
        return tensors_below(f"{name}.input_", self.calibration.tensors)
