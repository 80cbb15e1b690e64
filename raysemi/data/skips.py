"""Corrupt samples that a run has passed over: each counted once, however many passes, processes and ranks meet it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from raysemi.data.reader import Skipped
from raysemi.errors import DataError

_SHOWN = 10
_log = logging.getLogger(__name__)


class Skips:
    """The skipped samples of a run.

    Args:
        limit: how many there may be.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._found: dict[tuple[str, str, str], str] = {}
        self._untold: list[Skipped] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, skipped: Iterable[Skipped], *, log: bool = True) -> None:
        """Counts those that are new, and names each in the log.

        Args:
            skipped: corrupt samples.
            log: False: they were named before, by another process.
        """
        for sample in skipped:
            if sample.place not in self._found:
                self._found[sample.place] = sample.text
                if log:
                    self._untold.append(sample)
                    _log.warning("skipped corrupt sample %d: %s", len(self), sample.text)

    def untold(self) -> list[Skipped]:
        """Those of this process since the last call, for the other ranks."""
        found, self._untold = self._untold, []
        return found

    def check(self) -> None:
        """Stops when there are too many.

        Raises:
            DataError: names the first of them.
        """
        if len(self) <= self.limit:
            return
        named = sorted(self._found)[:_SHOWN]
        listed = "; ".join(f"pool {pool}, shard {shard}, key {key}" for pool, shard, key in named)
        more = f" and {len(self) - len(named)} more" if len(self) > len(named) else ""
        raise DataError(
            f"data.corrupt_limit must not be exceeded: at most {self.limit} corrupt samples; got {len(self)}: {listed}"
            f"{more}. Run `raysemi verify` on the pool and copy it again, or raise the limit to go on."
        )

    def as_rows(self) -> list[dict[str, str]]:
        """Each as pool, shard, key and reason, sorted: the same on every rank that knows the same samples."""
        return [
            {"pool": pool, "shard": shard, "key": key, "reason": self._found[pool, shard, key]}
            for pool, shard, key in sorted(self._found)
        ]

    def restore(self, rows: Sequence[Any]) -> None:
        """Those of an earlier part of the run, as `as_rows` gave them."""
        self.add((Skipped(row["pool"], row["shard"], row["key"], row["reason"]) for row in rows), log=False)
