"""Several pools read as one: their samples in a row, mixed like those of one pool or in given shares (`mixture`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raysemi.data.pool import Pool, Row, Shard
from raysemi.errors import DataError


class JoinedPool:
    """What a training stream reads of a pool, over several ones. Shards are told apart by the number of their pool.

    Args:
        pools: open pools of the same classes, none of them twice; their order is part of the digest.
        weights: share of each in a batch, in any unit; None: each sample as often as any other.

    Raises:
        DataError: other classes, or a pool twice.
    """

    def __init__(self, pools: Sequence[Pool], weights: Sequence[float] | None = None) -> None:
        self.pools = tuple(pools)
        self.weights = None if weights is None else tuple(weights)
        self.path = " + ".join(pool.path for pool in pools)
        self.classes, self.palette, self.store = pools[0].classes, pools[0].palette, pools[0].store
        self.num_samples = sum(pool.num_samples for pool in pools)
        self.num_masks = sum(pool.num_masks for pool in pools)
        self._firsts = np.cumsum([0, *(pool.num_samples for pool in pools)])
        for pool in pools:
            if pool.classes != self.classes:
                raise DataError(
                    f"pools that are read as one must have the same classes; got {', '.join(self.classes)} in "
                    f"{pools[0].path} and {', '.join(pool.classes)} in {pool.path}. Pack them from one source."
                )
        if len({pool.digest for pool in pools}) < len(pools):
            raise DataError(f"pools that are read as one must be different ones; got {self.path}. Name each once.")

    @property
    def shard_rows(self) -> NDArray[np.int64]:
        """int64 [shards], samples per shard: those of the first pool, then of the next."""
        return np.concatenate([pool.shard_rows for pool in self.pools])

    @cached_property
    def digest(self) -> str:
        """Hex name of what the pools hold, in their order."""
        return hashlib.sha256("\n".join(pool.digest for pool in self.pools).encode()).hexdigest()

    @property
    def labeled(self) -> bool:
        """Whether every sample has a mask."""
        return self.num_masks == self.num_samples

    @property
    def local(self) -> bool:
        """Whether all of them lie on this machine's disks."""
        return all(pool.local for pool in self.pools)

    def open_index(self) -> None:
        """Open the indexes now, so that what is wrong with them shows. Raises as `Pool.rows`."""
        for pool in self.pools:
            pool.open_index()

    def key(self, i: int) -> str:
        """Key of sample i."""
        number, own = self._place(i)
        return self.pools[number].key(own)

    def row(self, i: int) -> Row:
        """Where sample i lies, i from 0 to num_samples - 1."""
        number, own = self._place(i)
        row = self.pools[number].row(own)
        return row._replace(shard=f"{number}:{row.shard}")

    def open_shard(self, name: str) -> pa.NativeFile:
        """A shard by its name in `row`. Raises as `Pool.open_shard`."""
        number, _, shard = name.partition(":")
        return self.pools[int(number)].open_shard(shard)

    def entry(self, name: str) -> tuple[str, Shard] | None:
        """As `Pool.entry`, of a shard by its name in `row`."""
        number, _, shard = name.partition(":")
        return self.pools[int(number)].entry(shard)

    def shard_bytes(self, name: str) -> int:
        """Length of a shard, by its name in `row`."""
        number, _, shard = name.partition(":")
        return self.pools[int(number)].shard_bytes(shard)

    def origin(self, name: str) -> tuple[str, str]:
        """Path of the pool that a shard is in, and its name there, by its name in `row`."""
        number, _, shard = name.partition(":")
        return self.pools[int(number)].origin(shard)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(pool.num_bytes for pool in self.pools)

    @property
    def shard_files(self) -> tuple[Shard, ...]:
        """All shards, under the names that they have in their own pools."""
        return tuple(shard for pool in self.pools for shard in pool.shard_files)

    def _place(self, i: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._firsts, i, side="right")) - 1
        return number, i - int(self._firsts[number])


AnyPool = Pool | JoinedPool
"""What a stream reads."""


def as_one(pools: Sequence[Pool], weights: Sequence[float] | None = None) -> AnyPool:
    """The pool, or several as one. Raises as `JoinedPool`."""
    return pools[0] if len(pools) == 1 else JoinedPool(pools, weights)
