"""The processes of one job, as torchrun begins them: who does what, and how they hear of it.

Rank 0 decides and writes, holds the lock of the run directory and joins what all have done. What
ranks say to each other is JSON and tensors, over gloo, whatever computes: only finished work is
exchanged.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from .. import errors, launch
from ..errors import BackendUnavailable, QncdError
from ..store.lock import locked

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a rank waits for the others' work; one that has died is noticed at once."""
POLL = 0.02
"""Seconds between two looks at whether the others have come; in between signals are heard."""
_VALUE = "the value"


@dataclass(frozen=True)
class Message:
    """value: as JSON has it."""

    value: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Ranks:
    """The ranks of a job, seen from one of them. All of them make the same calls in one order."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count

    @property
    def first(self) -> bool:
        """Whether this is the one that decides and writes."""
        return self.rank == 0

    @property
    def label(self) -> str:
        """Who this is, for people: "" where there is nobody else."""
        return f", rank {self.rank} of {self.count}" if self.count > 1 else ""

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What this rank does of work that any rank can do."""
        return items[self.rank :: self.count]

    def agreed(self, make: Callable[[], T]) -> T:
        """What make returns on the first rank, on every rank: a value as JSON has it.

        Its QncdError is raised on all.
        """
        return self.told(lambda: Message(make())).value if self.count > 1 else make()

    def after_first(
        self,
        first: Callable[[], T],
        others: Callable[[Any], T],
        decided: Callable[[T], Any],
    ) -> T:
        """What the first rank makes, and the others after it as it decided: decided says how."""
        made: list[T] = []

        def make() -> Any:
            made.append(first())
            return decided(made[0])

        how = self.agreed(make)
        return made[0] if made else others(how)

    def told(self, make: Callable[[], Message]) -> Message:
        """The message of the first rank on every rank: `agreed` with tensors."""
        if self.count == 1:
            return make()
        message, failed = Message(), None
        if self.first:
            try:
                message = make()
            except QncdError as error:
                failed = error
            said = {"value": message.value, "error": _described(failed)}
            message = Message(said, message.tensors)
        found = _decoded(self._broadcast(_encoded(message)))
        if failed is not None:
            raise failed
        if found.value["error"] is not None:
            raise _raised(found.value["error"])
        return Message(found.value["value"], found.tensors)

    def gathered(self, message: Message) -> list[Message]:
        """What every rank says, in their order, on the first; nothing on the others."""
        if self.count == 1:
            return [message]
        data = _encoded(message)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        self._wait(dist.all_gather(sizes, torch.tensor([len(data)]), async_op=True))
        longest = int(torch.cat(sizes).max())
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        all_of_them = [torch.empty_like(padded) for _ in sizes] if self.first else None
        self._wait(dist.gather(padded, all_of_them, dst=0, async_op=True))
        found = all_of_them or []
        return [_decoded(d[: int(size)]) for d, size in zip(found, sizes, strict=False)]

    def pooled(self, message: Message) -> list[Message]:
        """What every rank says, in their order, on all of them."""
        if self.count == 1:
            return [message]
        found = self.gathered(message)

        def put() -> Message:
            tensors = {f"{n}/{key}": t for n, m in enumerate(found) for key, t in m.tensors.items()}
            return Message([m.value for m in found], tensors)

        told = self.told(put)
        parts: list[dict[str, Tensor]] = [{} for _ in told.value]
        for name, tensor in told.tensors.items():
            number, _, key = name.partition("/")
            parts[int(number)][key] = tensor
        return [Message(value, part) for value, part in zip(told.value, parts, strict=True)]

    def locked(self, folder: Path, tell: Callable[[str], None]) -> AbstractContextManager[None]:
        """`store.lock.locked` for the whole job: the first rank holds it."""
        return locked(folder, tell) if self.first else nullcontext()

    def device(self, name: str) -> str:
        """The device of this rank, where one is not named by its number."""
        if self.count == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        return f"cuda:{launch.local_rank() % torch.cuda.device_count()}"

    def _broadcast(self, data: Tensor) -> Tensor:
        size = torch.tensor([len(data)])
        self._wait(dist.broadcast(size, src=0, async_op=True))
        if not self.first:
            data = torch.empty(int(size), dtype=torch.uint8)
        self._wait(dist.broadcast(data, src=0, async_op=True))
        return data

    def _wait(self, work: Any) -> None:
        try:
            while not work.is_completed():
                time.sleep(POLL)
            work.wait()
        except RuntimeError as error:
            raise BackendUnavailable(
                f"rank {self.rank} of {self.count}: another rank of the job has ended",
                "its own message says why; the same command goes on from what is kept",
            ) from error


ALONE = Ranks()


@functools.cache
def of_job() -> Ranks:
    """The ranks that torchrun has begun, or this process alone.

    Raises BackendUnavailable where they do not find each other.
    """
    if launch.count() == 1:
        return ALONE
    try:
        dist.init_process_group("gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise BackendUnavailable(
            f"rank {launch.rank()} of {launch.count()}: the ranks of the job do not find each"
            f" other: {str(error).splitlines()[0]}",
            "begin them with torchrun, which sets MASTER_ADDR and MASTER_PORT",
        ) from error
    return Ranks(launch.rank(), launch.count())


# ------------------------------------------------------------------ messages


def _encoded(message: Message) -> Tensor:
    tensors = {name: t.detach().cpu().contiguous() for name, t in message.tensors.items()}
    text = json.dumps(message.value).encode()
    tensors[_VALUE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)


def _decoded(data: Tensor) -> Message:
    tensors = load(data.numpy().tobytes())
    text = tensors.pop(_VALUE).numpy().tobytes()
    return Message(json.loads(text), tensors)


def _described(error: QncdError | None) -> list[str] | None:
    return None if error is None else [type(error).__name__, error.message, error.hint]


def _raised(described: Sequence[str]) -> QncdError:
    """The first rank's error, which that one tells."""
    name, message, hint = described
    error: QncdError = getattr(errors, name)(message, hint)
    error.told = True
    return error
