"""Where the work of a denoiser can be left out: runs of modules whose output an earlier step has.

Of a U-Net, the input of a residual block on the way up: with the kept features there, everything
that is deeper need not be computed, and the skip connections beside it stay exact (DeepCache, arXiv
2312.00858). Of a transformer, what a run of blocks adds to its input (block caching, arXiv
2312.03209): all blocks, and fewer and fewer around the middle one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

MOST_SITES = 8
"""Sites of a denoiser; more: a finer choice, for more measurements and graphs."""


@dataclass(frozen=True)
class Site:
    """A run of modules that can be left out.

    modules: by name, in the order of a call. Of those of a U-Net the last one's output is kept,
    of blocks of a transformer (residual) what all of them together add to their input.
    """

    name: str
    modules: tuple[str, ...]
    residual: bool = False

    @property
    def last(self) -> str:
        return self.modules[-1]

    def holds(self, layer: str) -> bool:
        """Whether a layer lies within one of its modules."""
        return any(layer == name or layer.startswith(f"{name}.") for name in self.modules)


def reuse_chains(denoiser: nn.Module) -> list[list[Site]]:
    """All sites. Those of one chain lie within each other, the widest first; chains lie apart.

    Empty where nothing can be left out.
    """
    if getattr(denoiser, "up_blocks", None) is not None:
        sites = _of_unet(denoiser)
        return [_thinned(sites)] if sites else []
    names = [
        f"{group}.{i}"
        for group in ("transformer_blocks", "single_transformer_blocks")
        for i in range(len(getattr(denoiser, group, None) or ()))
    ]
    return [_thinned(_of_blocks(names))] if names else []


def _of_blocks(names: Sequence[str]) -> list[Site]:
    """Runs of blocks around the middle one, each without the first or the last of the wider one."""
    runs = [tuple(names[(n + 1) // 2 : len(names) - n // 2]) for n in range(len(names))]
    return [Site(_called(run), run, residual=True) for run in runs]


def _called(run: Sequence[str]) -> str:
    group, _, number = run[-1].rpartition(".")
    last = number if run[0].startswith(f"{group}.") else run[-1]
    return run[0] if len(run) == 1 else f"{run[0]}-{last}"


def _of_unet(denoiser: nn.Module) -> list[Site]:
    """One site per residual block on the way up, the last block's first."""
    down: list[str] = []
    behind: list[int] = [0]
    for i, block in enumerate(denoiser.get_submodule("down_blocks").children()):
        for j in range(len(_parts(block, "resnets"))):
            down += _members(block, f"down_blocks.{i}", ("resnets", "attentions"), j)
            behind.append(len(down))
        for j in range(len(_parts(block, "downsamplers"))):
            down.append(f"down_blocks.{i}.downsamplers.{j}")
            behind.append(len(down))
    up: list[str] = []
    cuts: list[tuple[str, int]] = []
    for i, block in enumerate(denoiser.get_submodule("up_blocks").children()):
        for j in range(len(_parts(block, "resnets"))):
            cuts.append((f"up_blocks.{i}.resnets.{j}", len(up)))
            up += _members(block, f"up_blocks.{i}", ("resnets", "attentions"), j)
        up += [f"up_blocks.{i}.upsamplers.{j}" for j in range(len(_parts(block, "upsamplers")))]
    if len(cuts) != len(behind) or getattr(denoiser, "mid_block", None) is None:
        return []  # skip connections of another kind
    return [
        Site(name, (*down[behind[number] :], "mid_block", *up[:before]))
        for number, (name, before) in enumerate(reversed(cuts))
    ]


def _parts(block: nn.Module, group: str) -> Sequence[nn.Module]:
    parts = getattr(block, group, None)
    return [part for part in parts if part is not None] if parts is not None else []


def _members(block: nn.Module, name: str, groups: Sequence[str], index: int) -> list[str]:
    return [f"{name}.{group}.{index}" for group in groups if index < len(_parts(block, group))]


def _thinned(sites: list[Site]) -> list[Site]:
    """At most MOST_SITES of them, evenly: the widest always."""
    count = min(MOST_SITES, len(sites))
    return [sites[number * len(sites) // count] for number in range(count)]


# ------------------------------------------------------------------ calls that leave work out


@dataclass
class KeptOutputs:
    """What a call of a denoiser is given in the place of sites, and what it computed of them.

    given: kept values by site, which is not computed then; taken: those of the sites that were.
    Values are outputs [N, C, ...] or residuals [N, L, C] of joint streams behind each other.
    """

    given: dict[str, Tensor] = field(default_factory=dict)
    taken: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[torch.Size, bool]] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)


def install_sites(denoiser: nn.Module, sites: Sequence[Site]) -> KeptOutputs:
    """Let the sites of a denoiser be left out from now on, by what the result says.

    Names of modules stay what they are. To be called once per denoiser.
    """
    kept = KeptOutputs()
    for name in dict.fromkeys(name for site in sites for name in site.modules):
        module = denoiser.get_submodule(name)
        own = [site for site in sites if name in site.modules]
        call = _block if own[0].residual else _part
        module.forward = functools.partial(call, kept, name, own, module.forward)
    return kept


def remove_sites(denoiser: nn.Module, sites: Sequence[Site]) -> None:
    """Undo `install_sites`."""
    for name in dict.fromkeys(name for site in sites for name in site.modules):
        denoiser.get_submodule(name).__dict__.pop("forward", None)


def _part(
    kept: KeptOutputs,
    name: str,
    sites: list[Site],
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A module of a U-Net. What nothing reads any more has the right shape and no values."""
    for site in sites:
        if site.name in kept.given:
            given, (shape, in_tuple) = kept.given[site.name], kept.shapes[name]
            output = given
            if name != site.last:
                output = given.new_zeros(()).expand(given.shape[0], *shape)
            return (output,) if in_tuple else output
    result = forward(*args, **kwargs)
    in_tuple = isinstance(result, tuple)
    output = result[0] if in_tuple else result
    kept.shapes[name] = output.shape[1:], in_tuple
    for site in sites:
        if name == site.last:
            kept.taken[site.name] = output
    return result


def _block(
    kept: KeptOutputs,
    name: str,
    sites: list[Site],
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A block of a transformer. sites: it is in, the widest first; narrower ones than one that is
    kept have no value then."""
    streams = _streams(args, kwargs)
    places = [place for place, site in enumerate(sites) if site.name in kept.given]
    for site in sites:
        if name == site.modules[0]:
            kept.inputs[site.name] = streams
    if places:
        site = sites[places[0]]
        outputs = streams if name != site.last else _added(streams, kept.given[site.name])
        result = tuple(outputs) if len(outputs) > 1 else outputs[0]
        sites = sites[: places[0]]
    else:
        result = forward(*args, **kwargs)
        outputs = list(result) if isinstance(result, tuple) else [result]
    for site in sites:
        if name == site.last:
            pairs = zip(outputs, kept.inputs.pop(site.name), strict=True)
            kept.taken[site.name] = torch.cat([o - i for o, i in pairs if o is not None], 1)
    return result


def _added(streams: list[Tensor], residuals: Tensor) -> list[Any]:
    """Streams with what blocks added to them; the last block of SD 3 has no text any more."""
    lengths = [stream.shape[1] for stream in streams]
    if residuals.shape[1] != sum(lengths):
        return [None, streams[1] + residuals]
    return [s + r for s, r in zip(streams, residuals.split(lengths, 1), strict=True)]


def _streams(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """What a block adds to: the features, behind the text where it adds to that as well."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    text = kwargs.get("encoder_hidden_states")
    return [hidden] if text is None or args or "temb" not in kwargs else [text, hidden]
