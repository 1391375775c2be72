"""Stage 1: full-precision trajectories, activation statistics, smoothing factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..errors import NotFinite
from ..models.loading import DiffusionModel
from ..models.topology import attention_sites, capture_attention, capture_inputs
from ..progress import Track, counted, no_progress
from ..ptq import smoothing_choice
from ..ptq.attention import operand_observers
from ..ptq.cost import OBSERVING, Cost, DenoiserCall
from ..ptq.layer_plan import plan_layers
from ..ptq.smoothing_choice import BEFORE_FACTORS, Factors, choose_factors, factors_of
from ..quant.layers import StepState
from ..quant.observers import RangeObserver
from ..quant.smoothing import IDENTITY
from ..runtime import trajectory
from ..runtime.denoiser import Denoiser, full_denoiser, group_bounds, timestep_group
from ..runtime.kept_calls import KeptCalls, calls_kept
from ..runtime.ranks import ALONE, Message, Ranks
from ..sampling.noise import chunks
from ..sampling.samplers import OnStep
from ..spec import ATTENTION_OPERANDS
from ..store.artifacts import Artifact, seal
from ..store.partial import NOTHING_KEPT, Partial, Piece

SMOOTHING, OBSERVERS, CALLS = "smoothing", "observers", "trajectories"
"""Names in partial results."""

ROWS = ("x", "prediction", "timestep", "class", "seed")
"""What is kept of a row of the calibration set."""
TRAJECTORIES = "trajectories"
"""The part in which the calibration is held."""


def run(
    config: Config,
    model: DiffusionModel,
    track: Track = no_progress,
    partial: Partial = NOTHING_KEPT,
    ranks: Ranks = ALONE,
) -> tuple[Artifact, Artifact] | None:
    """Returns the calibration and the smoothing artifact (not yet written), on the first rank.

    Every trajectory is a function of its own seed; a row of the calibration set is one sample at
    one step: model input x, timestep, class, seed and the full-precision guided prediction. Where
    there are calibration.sizes, rows are of sampling's own size, and statistics of all. Layers
    that no input reaches (those of inputs that the pipeline does not give) are left out.
    partial: what an earlier process has done; ranks: the first chooses smoothing factors, all
    draw their share of the trajectories.
    """
    config.check_sizes()
    digest = config.stage_digest("calibrate")
    denoiser = full_denoiser(model)
    timesteps = trajectory.timesteps(config, model)

    def choose() -> Piece:
        factors, described = choose_factors(config, model, denoiser, timesteps, track, partial)
        return Piece(described, _factor_tensors(factors))

    def chosen_once() -> Message:
        piece = partial.piece(SMOOTHING, choose)
        return Message(piece.value, piece.tensors)

    told = ranks.told(chosen_once)
    chosen = Piece(told.value, {**told.tensors})
    partial.forget(*BEFORE_FACTORS)
    body = {"layers": chosen.value}
    smoothing = seal(Artifact("smoothing", chosen.tensors, body, digest, model.digest))
    factors = factors_of(smoothing)
    bounds = group_bounds(timesteps, config.quantization.activations.timestep_groups)
    observers = {
        plan.name: RangeObserver(plan.in_channels, plan.channel_axis, len(bounds) + 1)
        for plan in plan_layers(config, model.denoiser)
    }

    def observe(name: str, x: Tensor) -> None:
        x = factors.get(name, IDENTITY).apply(x, observers[name].channel_axis)
        _update(observers[name], f"the input of layer {name}", x, denoiser.step, bounds)

    sites = attention_sites(model.denoiser)
    operands = operand_observers(sites, len(bounds) + 1)

    def observe_operand(name: str, x: Tensor) -> None:
        _update(operands[name], f"attention's operand {name}", x, denoiser.step, bounds)

    with (
        capture_inputs(model.denoiser, list(observers), observe),
        capture_attention(model.denoiser, sites, observe_operand),
    ):
        kept = _kept_calls(denoiser, partial, observers, operands)
        rows = _collect_rows(config, model, kept, track, ranks)
    _merge(observers, ranks)
    _merge(operands, ranks)
    if not ranks.first:
        return None
    observers = {name: observer for name, observer in observers.items() if observer.seen}
    sites = [s for s in sites if all(operands[f"{s.name}.{o}"].seen for o in ATTENTION_OPERANDS)]
    operands = {
        n: o for n, o in operands.items() if n.rpartition(".")[0] in {s.name for s in sites}
    }
    tensors = {f"inputs.{name}": value for name, value in rows.items()}
    for name, observer in observers.items():
        tensors |= {f"{name}.input_{part}": v for part, v in observer.state().items()}
    for name, observer in operands.items():
        tensors |= {f"{name}_{part}": v for part, v in observer.state().items()}
    body = {
        "rows": len(rows["seed"]),
        "latent_shape": list(model.latent_shape),
        "groups": len(bounds) + 1,
        "group_bounds": list(bounds),
        "timesteps": timesteps,
        "layers": {name: len(o.channel_absmax) for name, o in observers.items()},
        "attention": {site.name: site.channels for site in sites},
    }
    parents = {"smoothing": smoothing.digest}
    return seal(Artifact("calibration", tensors, body, digest, model.digest, parents)), smoothing


def costs(
    config: Config,
    denoiser: nn.Module,
    classes: int | None,
    call: DenoiserCall,
    others: Sequence[DenoiserCall] = (),
) -> dict[str, Cost]:
    """The parts of run by what they do, each with what it takes. classes: of the model; others:
    calls at each of calibration.sizes."""
    calibration, macs, passes = config.calibration, 0.0, 0.0
    batch = min(calibration.batch_size, calibration.trajectories)
    for count, one in zip(calibration.by_size, (call, *others), strict=True):
        rows = count * one.copies * one.steps
        macs += rows * one.macs
        passes += OBSERVING * rows * sum(one.inputs.values())
    held = max(one.full_bytes(batch * one.copies) for one in (call, *others))
    found = {TRAJECTORIES: Cost(held, passes=passes, model_macs=macs)}
    if smoothing_choice.looked_at(config, denoiser):
        found["choosing smoothing factors"] = smoothing_choice.cost(config, denoiser, call)
    if smoothing_choice.reads_embeddings(config):
        found["timestep embeddings"] = smoothing_choice.embedding_cost(denoiser, classes, call)
    return found


def _update(
    observer: RangeObserver, what: str, x: Tensor, step: StepState, bounds: tuple[float, ...]
) -> None:
    try:
        observer.update(x, timestep_group(step.timestep, bounds))
    except NotFinite as error:
        raise NotFinite(f"{what} is not finite at timestep {step.timestep:g}") from error


def _kept_calls(
    denoiser: Denoiser,
    partial: Partial,
    inputs: dict[str, RangeObserver],
    operands: dict[str, RangeObserver],
) -> Denoiser:
    """The denoiser, its calls kept with what the observers have seen by then.

    Where such a state is there the observers go on from it, and its calls are not made again.
    """
    observers = {f"input/{name}": observer for name, observer in inputs.items()}
    observers |= {f"operand/{name}": observer for name, observer in operands.items()}

    def state() -> Piece:
        parts = {f"{n}/{part}": v for n, o in observers.items() for part, v in o.memory().items()}
        return Piece(calls.calls, parts)

    replayed = 0
    before = partial.take(OBSERVERS)
    if before is not None and calls_kept(partial, CALLS, before.value):
        replayed = before.value
        for name, observer in observers.items():
            observer.restore({part: before.tensors[f"{name}/{part}"] for part in observer.memory()})
    calls = KeptCalls(denoiser, partial, CALLS, states={OBSERVERS: state}, replayed=replayed)
    return calls


def _merge(observers: Mapping[str, RangeObserver], ranks: Ranks) -> None:
    """Let the first rank's observers take in what those of the others saw."""
    seen = {f"{n}/{part}": t for n, o in observers.items() for part, t in o.memory().items()}
    for message in ranks.gathered(Message(None, seen))[1:]:
        for name, mine in observers.items():
            other = RangeObserver(len(mine.channel_absmax), mine.channel_axis, len(mine.min))
            other.restore({part: message.tensors[f"{name}/{part}"] for part in other.memory()})
            mine.merge(other)


def _factor_tensors(factors: Factors) -> dict[str, Tensor]:
    """Each a copy: layers that read one tensor share a factor, safetensors shares no memory."""
    return {
        f"{name}.{part}": tensor.clone()
        for name, factor in factors.items()
        for part, tensor in factor.tensors().items()
    }


def _collect_rows(
    config: Config, model: DiffusionModel, denoiser: Denoiser, track: Track, ranks: Ranks
) -> dict[str, Tensor]:
    """Run the trajectories, batches taking all sizes in turn; rows of sampling's own size in the
    order of batch, step, seed. On the first rank, which has all of them."""
    calibration = config.calibration
    seeds = list(range(calibration.seed, calibration.seed + calibration.trajectories))
    batches = chunks(seeds, calibration.batch_size)
    models = [model, *(model.sized[size] for size in calibration.sizes or ())]
    mine = ranks.share(list(enumerate(batches)))
    found: dict[str, Tensor] = {}
    calls = len(mine) * len(trajectory.timesteps(config, model))
    for (number, batch), tick in counted(track, mine, "calibrating", calls, "calls"):
        of_size = models[number % len(models)]
        parts: dict[str, list[Tensor]] = {name: [] for name in ROWS}
        record = _recorder(parts, batch, model.labels(batch, config.sampling.classes))
        kept = record if of_size is model else None
        trajectory.draw(config, of_size, denoiser, batch, on_step=kept, tick=tick)
        if kept is None:
            continue
        found |= {f"{number}/{name}": torch.cat(values) for name, values in parts.items()}
    for message in ranks.gathered(Message(None, found))[1:]:
        found |= message.tensors
    if not ranks.first:
        return {}
    numbers = range(0, len(batches), len(models))
    return {name: torch.cat([found[f"{number}/{name}"] for number in numbers]) for name in ROWS}


def _recorder(parts: dict[str, list[Tensor]], seeds: list[int], labels: Tensor) -> OnStep:
    def record(index: int, t: Tensor, x: Tensor, prediction: Tensor) -> None:
        parts["x"].append(x.float().clone())
        parts["prediction"].append(prediction.float().clone())
        parts["timestep"].append(torch.full((len(seeds),), float(t)))
        parts["class"].append(labels)
        parts["seed"].append(torch.tensor(seeds, dtype=torch.int64))

    return record
