"""Why qncd stops: one family of errors, each with a fixed exit code.

Every error says what is wrong, where (file, layer, key) and what to do about it; the command
line prints that as one line and exits with `exit_code` (the traceback only with --debug).
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_UNFORESEEN = 1
EXIT_USAGE = 2
EXIT_FILE = 4
EXIT_SIGNAL = 128
"""A process that a signal stopped exits with this and the signal's number."""


class QncdError(Exception):
    """message: what is wrong and where; hint: what to do, a phrase or a command; told: whether
    another process of the job says it."""

    exit_code = EXIT_UNFORESEEN
    told = False

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = " ".join(message.split())
        self.hint = " ".join(hint.split())

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(QncdError):
    """The configuration is wrong: unknown key, wrong type, value out of range."""

    exit_code = 3


class ArtifactError(QncdError):
    """A file of the run is missing, damaged, from another model or configuration, or unwritable."""

    exit_code = 4


class ModelError(QncdError):
    """The model cannot be found, read, or used."""

    exit_code = 5


class NotFinite(ModelError):
    """NaN or infinity, where it was first seen. seeds: of the samples concerned, where known."""

    def __init__(self, message: str, hint: str = "", seeds: Sequence[int] = ()):
        super().__init__(message, hint)
        self.seeds = tuple(seeds)


class BackendUnavailable(QncdError):
    """A backend, device or optional package is not available here."""

    exit_code = 6


class VerificationFailed(QncdError):
    """Images are black, constant or not finite, or too far from full precision's."""

    exit_code = 7
