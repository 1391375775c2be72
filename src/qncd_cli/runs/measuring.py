"""Measuring for eval and ablate: what with, and what they say of what cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..errors import ArtifactError, BackendUnavailable, ConfigError
from ..metrics.domains import DOMAINS, Domain, domain_of
from ..metrics.record import FEATURELESS, UNREFERENCED

ZOO = "zoo"
NO_WEIGHTS = (
    "no Inception weights here (--inception-weights FILE, or --network inception to download them)"
)
NO_REFERENCE = "no reference to measure against (--reference DIR|NPZ)"


@dataclass(frozen=True)
class Wishes:
    """named: metrics asked for by name, none for the usual ones; the rest as on the command line.

    What is asked for by name and cannot be had makes a command fail in the end; what is usual is
    left out with a line. skip_broken: whether files of a folder of images that cannot be read are
    left out; lpips_weights, clip: folders of these metrics' weights.
    """

    named: tuple[str, ...]
    reference: str | None
    network: str
    inception_weights: str | None
    skip_broken: bool = False
    lpips_weights: str | None = None
    clip: str | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.named or ("fid",)

    @property
    def insists(self) -> bool:
        """Whether Inception's features are asked for by name."""
        return self.network in ("inception", "efficientnet") or bool({*self.named} - {*FEATURELESS})


def check(wishes: Wishes, config: Config) -> None:
    """Check, before hours of work, that what the command line names is there.

    Packaged features and references are for packaged models of the same domain alone.

    Raises ConfigError, ArtifactError.
    """
    _check_named("--reference", None if wishes.reference == ZOO else wishes.reference)
    _check_named("--inception-weights", wishes.inception_weights)
    _check_named("--lpips-weights", wishes.lpips_weights)
    _check_named("--clip", wishes.clip)
    source = config.model.source
    own, named = domain_of(source), DOMAINS.get(wishes.network)
    if named is not None and named != own:
        other = "--inception-weights FILE measures distances of other models"
        raise ConfigError(
            f"--network {named.name}: the packaged classifier knows {named.data} alone, "
            f"not {source}",
            f"--network {own.name}, or leave the option out" if own else f"leave it out; {other}",
        )
    if own is None and ZOO in (wishes.reference, wishes.reference or config.evaluation.reference):
        key = "--reference zoo" if wishes.reference else "evaluation.reference: zoo"
        raise ConfigError(
            f"{key}: the packaged references are {_data()}, for packaged models, not {source}",
            "name images of the model's own data (--reference DIR|NPZ), or none",
        )


def _data() -> str:
    return " and ".join(domain.data for domain in DOMAINS.values())


def _check_named(option: str, path: str | None) -> None:
    if path is not None and not Path(path).exists():
        raise ArtifactError(f"{option} {path}: no such file or folder", "check the path")


def protocol_of(wishes: Wishes, config: Config) -> Any:
    """How a model is measured. Raises what check raises, and ArtifactError for damaged files."""
    check(wishes, config)
    own = domain_of(config.model.source)
    reference = wishes.reference or config.evaluation.reference or (ZOO if own else None)
    usual = wishes.network == "auto" and wishes.inception_weights is None
    judge = own if usual else DOMAINS.get(wishes.network)
    return _protocol(wishes, reference, own, judge)


def protocol_of_images(wishes: Wishes) -> Any:
    """How images are measured that no model is known of: in Inception's features, unless packaged
    ones are named.

    Raises ConfigError without a reference, BackendUnavailable without weights, and ArtifactError as
    protocol_of.
    """
    judge = DOMAINS.get(wishes.network)
    if wishes.reference == ZOO and judge is None:
        networks = " or ".join(f"--network {name}" for name in DOMAINS)
        raise ConfigError(f"--images: --reference zoo is {_data()}", f"say which one: {networks}")
    _check_named("--reference", None if wishes.reference == ZOO else wishes.reference)
    reference = wishes.reference or (ZOO if judge else None)
    if reference is None and set(wishes.metrics) - UNREFERENCED:
        raise ConfigError("--images: there is no reference", "name one with --reference DIR|NPZ")
    protocol = _protocol(wishes, reference, judge, judge)
    if protocol.network is None:
        raise BackendUnavailable(*protocol.left_out["distance"])
    return protocol


def _protocol(
    wishes: Wishes, reference: str | None, own: Domain | None, judge: Domain | None
) -> Any:
    """own: whose statistics the reference zoo is; judge: whose classifier supplies the features,
    None for another network."""
    from ..metrics.image import efficientnet, load_reference, packaged
    from ..metrics.protocol import Protocol
    from ..metrics.visible import why_not

    if wishes.network == "efficientnet":
        network, why = efficientnet(), ""
    else:
        network, why = (packaged(domain=judge), "") if judge else _inception(wishes)
    needed = [name for name in wishes.metrics if name not in UNREFERENCED]
    there = reference == ZOO or (reference is not None and Path(reference).exists())
    known = None
    if network is not None and needed and reference is not None and there:
        zoo = own.reference if own else Path(reference)
        known = load_reference(reference, zoo, skip_broken=wishes.skip_broken)
    protocol = Protocol(wishes.metrics, network, known)
    if network is None:
        known_by_features = [name for name in wishes.metrics if name not in FEATURELESS]
        protocol = protocol.without(dict.fromkeys((*known_by_features, "distance"), why))
    if "cvvdp" in wishes.metrics and (reason := why_not()):
        protocol = protocol.without({"cvvdp": reason})
    if not there:
        none = f"evaluation.reference {reference} is not here (--reference DIR|NPZ)"
        protocol = protocol.without(dict.fromkeys(needed, none if reference else NO_REFERENCE))
    return _with_weights(protocol, wishes)


def _with_weights(protocol: Any, wishes: Wishes) -> Any:
    """The protocol with the weights of LPIPS and CLIP where these are asked for, or why not."""
    from ..metrics.perceptual import find_weights
    from ..metrics.prompted import find_clip

    def lpips() -> Any:
        return find_weights(Path(wishes.lpips_weights) if wishes.lpips_weights else None)

    def clip() -> Any:
        if wishes.clip is None:
            raise BackendUnavailable("no CLIP model is named (--clip DIR)")
        return find_clip(Path(wishes.clip))

    for name, find in (("lpips", lpips), ("clip", clip)):
        if name in wishes.metrics:
            try:
                protocol = replace(protocol, **{name: find()})
            except BackendUnavailable as error:
                protocol = protocol.without({name: str(error)})
    return protocol


def _inception(wishes: Wishes) -> tuple[Any, str]:
    """The network, or None and why: it is downloaded only where something needs it by name."""
    from ..metrics.image import downloaded_inception, inception

    if wishes.inception_weights is not None:
        return inception(Path(wishes.inception_weights)), ""
    if not (wishes.insists or downloaded_inception().is_file()):
        return None, NO_WEIGHTS
    try:
        return inception(), ""
    except BackendUnavailable as error:
        return None, str(error)


def settle(
    note: Callable[[str], object], left_out: Mapping[str, Sequence[str]], wishes: Wishes
) -> None:
    """Say what was left out and why, once everything else is written.

    Raises BackendUnavailable, exit code 6, where it was asked for by name.
    """
    left_out = {
        name: why for name, why in left_out.items() if name in (*wishes.metrics, "distance")
    }
    missing = {f"--{name.replace('_', '-')}": name for name in wishes.named if name in left_out}
    if wishes.network == "inception" and "distance" in left_out:
        missing["--network inception"] = "distance"
    if missing:
        why = _reasons({name: left_out[name] for name in missing.values()})
        raise BackendUnavailable(
            f"{', '.join(missing)}: cannot be measured, all else is written: {why}"
        )
    if left_out:
        what = "distances" if "distance" in left_out else "the distance to data"
        note(f"{what} left out: {_reasons(left_out)}")


def _reasons(left_out: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(dict.fromkeys(why for whys in left_out.values() for why in whys))
