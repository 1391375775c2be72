"""What keeping a site costs: the error of the guided prediction, measured at every step and age."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..config.schema import Config
from ..models.loading import DiffusionModel
from ..progress import Track, counted
from ..runtime import trajectory
from ..runtime.denoiser import Denoiser
from ..runtime.reuse import Pattern, ReusingDenoiser, sites_of
from ..sampling.levels import StepInfo, plan_steps
from ..sampling.noise import chunks
from ..sampling.parametrization import prediction_type, to_corrected

AGES = 5
"""Most steps in a row that a value is kept; more: plans of fewer MACs, for more measurements."""
MEASURED = 8
"""Trajectories that errors are measured on; more: steadier plans, in proportion to their time."""
Errors = dict[str, dict[tuple[int, int], float]]
"""Mean squared error of eps by site, of (step, age): the value is from `age` steps before."""


def site_errors(config: Config, model: DiffusionModel, denoiser: Denoiser, track: Track) -> Errors:
    """Errors of every site, alone, along the denoiser's own trajectories without reuse.

    denoiser: quantized, not installed for reuse yet. Errors are of the guided prediction in eps (of
    rectified flows in the velocity), without any correction.
    """
    calibration = config.calibration
    seeds = range(calibration.seed, calibration.seed + calibration.noise_trajectories)[:MEASURED]
    batches = chunks(list(seeds), calibration.batch_size)
    meter = _Meter(config, model, denoiser)
    calls = len(batches) * len(meter.plan)
    for batch, tick in counted(track, batches, "measuring what reuse costs", calls, "steps"):
        trajectory.draw(config, model, meter, batch, tick=tick)
    return {
        site: {key: total / len(seeds) for key, total in found.items()}
        for site, found in meter.sums.items()
    }


class _Meter(Denoiser):
    """A denoiser that draws without reuse and tries at every step what each site's would cost."""

    def __init__(self, config: Config, model: DiffusionModel, denoiser: Denoiser):
        super().__init__(denoiser.module, denoiser.step, denoiser.group_bounds)
        timed = trajectory.timed_scheduler(config, model)
        self.plan: Sequence[StepInfo] = plan_steps(timed, config.sampling.eta)
        self.kind = prediction_type(timed)
        scale = config.sampling.guidance_scale
        self.guidance = scale if model.guides(scale) else None
        times = tuple(float(t) for t in timed.timesteps)
        known = frozenset(sites_of(denoiser.module))
        self.reusing = ReusingDenoiser(denoiser, Pattern(times, (known,) * len(times)))
        self.sums: Errors = {name: {} for name in known}
        self._values: list[dict[str, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor | float, condition: Mapping[str, Tensor]) -> Tensor:
        step = self.reusing.pattern.step_of(float(t))
        if step == 0:
            self._values = []
        prediction, values = self.reusing.computed(x, t, condition, {})
        wanted = self._guided(prediction, x, step)
        for age, earlier in enumerate(self._values, 1):
            for name, value in earlier.items():
                tried, _ = self.reusing.computed(x, t, condition, {name: value})
                error = (self._guided(tried, x, step) - wanted).square()
                total = float(error.flatten(1).mean(1).sum())
                sums = self.sums[name]
                sums[step, age] = sums.get((step, age), 0.0) + total
        self._values = [values, *self._values[: AGES - 1]]
        return prediction

    def _guided(self, prediction: Tensor, x: Tensor, step: int) -> Tensor:
        if self.guidance is not None:
            null, asked = prediction.chunk(2)
            prediction, x = null + self.guidance * (asked - null), x[: len(null)]
        return to_corrected(prediction, x, self.plan[step].abar_t, self.kind)
