"""What a caller may catch. Every text reads: `<what> must <rule>; got <value>. <what to do next>`."""

from __future__ import annotations

from collections.abc import Sequence


class RaysemiError(Exception):
    """Base of all errors that raysemi raises on purpose; the command line prints them as one line, without a trace."""


class ConfigError(RaysemiError, ValueError):
    """A setting is wrong; holds every fault that was found, not just the first.

    Args:
        faults: one text a fault, each beginning with the dotted path of the setting (`train.steps must ...`).
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        return type(self), (self.faults,)  # crosses process borders whole


class DataError(RaysemiError, ValueError):
    """A pool, a shard or a source file is wrong; the text names the file, the shard and the key."""


class DataFailure(DataError):
    """Reading or writing a pool failed for what is no mistake in it (no room, no answer, a killed process)."""


class CheckpointError(RaysemiError, RuntimeError):
    """A checkpoint or a run folder is broken, or does not belong to this run."""


class OutOfMemory(RaysemiError, MemoryError):
    """A step needs more memory than there is; no mistake in a setting, but made again it would fail again."""


class CheckpointFailure(CheckpointError):
    """Reading or writing a run folder failed for what is no mistake in it (no answer of a store, no permission)."""


class NoRoom(CheckpointFailure):
    """The disk of a run folder is full: trying again would end alike."""


class TrainingError(RaysemiError):
    """A run cannot go on as it is, however often it is begun again from its checkpoint."""
