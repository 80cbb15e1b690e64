"""Which samples form a global step: a pure function of (pool digest, seed, step, global batch).

The stream of a pool is an endless line of positions p = step * batch + slot. Pass k covers the positions k*N to
(k+1)*N - 1, so that every sample comes exactly once a pass, across batch boundaries. Within a pass, sub-lane q mod L
reads its own stretch of a shuffled line of N samples. In that line the shards stand in random order, inside a shard
its blocks (at most 64 consecutive rows), inside a block its rows. So each sub-lane reads one shard after the other,
block by block, while neighbouring positions come from sub-lanes that are far apart in the line. As the sub-lanes stand
on the line like the teeth of a comb, L positions see min(L, shards) shards of equal size: a free shuffle of all blocks
would not promise 16 of, say, 20 shards to each window.

Tables are kept per shard, never per sample, except for pools of at most 4,096 samples, which are shuffled whole. The
blocks of a shard are shuffled when it is read: the words of a counter-based generator are there for any of them.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raysemi.errors import ConfigError, DataError

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

SHUFFLED_WHOLE = 4096
"""Samples up to which a pass is one free permutation."""
LARGEST_BLOCK = 64
FEWEST_LANES = 32
_AT_ONCE = 8192  # positions whose blocks are shuffled together: 4 MB of keys
_WORDS_A_COUNT = 4  # of Philox


class _Blocks(NamedTuple):
    """One shard in one pass: its blocks as they stand on the line."""

    order: Int64
    """Number of the block in its shard, from 0."""
    starts: Int64
    """Line position of the block's first sample."""


@dataclass(frozen=True)
class _Line:
    """One pass of a large pool: its shards as they stand on the line."""

    shards: Int64
    """Shard by place."""
    starts: Int64
    """Line position of each place's first sample, and N at the end."""
    seed: int
    """Key of the generator that shuffles shards and blocks."""
    key: np.uint64
    opened: OrderedDict[int, _Blocks] = field(default_factory=OrderedDict)
    """The shards that were read last, by place."""


class Order:
    """The order of one pool's samples; cheap to build, also for 100 million samples.

    Args:
        shard_rows: samples a shard, in the order of the index.
        digest: digest of the pool; another pool has another order.
        seed: seed of the run.
        batch: global batch, images a step over all ranks.

    Raises:
        DataError: the pool is empty.
        ConfigError: the batch is not positive.
    """

    def __init__(self, shard_rows: ArrayLike, digest: str, seed: int, batch: int) -> None:
        rows = np.asarray(shard_rows, dtype=np.int64)
        if rows.ndim != 1 or (rows < 0).any():
            raise DataError(f"shard_rows must be one count a shard, none negative; got {rows!r}. Index the pool again.")
        self.num_samples = int(rows.sum())
        if self.num_samples == 0:
            raise DataError("A pool must hold at least one sample; got none. Pack it again from a folder with images.")
        if batch < 1:
            raise ConfigError(
                f"the global batch must be at least 1; got {batch}. Set train.batch.* to a positive number."
            )
        self.batch = batch
        self._name = f"{digest}/{seed}"
        self._passes: OrderedDict[int, Int64 | _Line] = OrderedDict()

        lanes = batch * max(2, math.ceil(FEWEST_LANES / batch))  # two a slot: a slot's neighbours differ in block too
        self._lanes = lanes
        lengths = np.maximum((self.num_samples - np.arange(lanes) + lanes - 1) // lanes, 0)
        self._lane_starts = _spread(lengths)
        self.block = min(max(self.num_samples // (16 * lanes), 1), LARGEST_BLOCK)
        if self.num_samples > SHUFFLED_WHOLE:
            self._shard_rows = rows
            self._shard_first = np.cumsum(rows) - rows
            self._shard_blocks = -(-rows // self.block)
            self._first_block = np.cumsum(self._shard_blocks) - self._shard_blocks

    def step(self, t: int) -> tuple[Int64, Int64]:
        """All samples of global step t.

        Returns:
            rows: int64 [batch], row of the index for each global slot.
            passes: int64 [batch], the pass that each of them belongs to, from 0.
        """
        return self.slots(t, 0, self.batch)

    def slots(self, t: int, lo: int, hi: int) -> tuple[Int64, Int64]:
        """Samples of the global slots lo to hi - 1 of step t, as `step`; rank r of W owns those from r*batch/W on."""
        rows, passes = self.table(t, t + 1, lo, hi)
        return rows[0], passes[0]

    def table(self, start: int, stop: int, lo: int = 0, hi: int | None = None) -> tuple[Int64, Int64]:
        """Samples of the steps start to stop - 1 in the slots lo to hi - 1.

        Returns:
            rows, passes: int64 [stop - start, hi - lo].
        """
        hi = self.batch if hi is None else hi
        if not (0 <= lo <= hi <= self.batch and 0 <= start <= stop):
            raise ConfigError(
                f"steps and slots must be rising, from 0, with slots up to {self.batch}; got steps {start} to {stop}, "
                f"slots {lo} to {hi}. Choose others."
            )
        positions = np.arange(start, stop, dtype=np.int64)[:, None] * self.batch + np.arange(lo, hi, dtype=np.int64)
        passes = positions // self.num_samples
        within = positions - passes * self.num_samples
        rows = np.empty_like(positions)
        for number in set(passes.ravel().tolist()):
            chosen = passes == number
            rows[chosen] = self._rows(number, within[chosen])
        return rows, passes

    def _rows(self, number: int, q: Int64) -> Int64:
        shuffled = self._pass(number)
        if isinstance(shuffled, np.ndarray):
            return shuffled[q]
        line = self._lane_starts[q % self._lanes] + q // self._lanes
        places = np.searchsorted(shuffled.starts, line, side="right") - 1
        opened = [self._blocks(shuffled, place) for place in sorted(set(places.tolist()))]
        starts = np.concatenate([blocks.starts for blocks in opened])
        at = np.searchsorted(starts, line, side="right") - 1
        blocks, offsets = np.concatenate([blocks.order for blocks in opened])[at], line - starts[at]
        shards = shuffled.shards[places]
        block_rows = np.minimum(self._shard_rows[shards] - blocks * self.block, self.block)
        numbers = self._first_block[shards] + blocks
        for first in range(0, len(q), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            offsets[part] = self._shuffled_inside(shuffled.key, numbers[part], block_rows[part], offsets[part])
        return self._shard_first[shards] + blocks * self.block + offsets

    def _blocks(self, line: _Line, place: int) -> _Blocks:
        """The blocks of the shard at a place; those of the shards read last are kept, of two for each sub-lane."""
        blocks = line.opened.pop(place, None)
        if blocks is None:
            shard = int(line.shards[place])
            count = int(self._shard_blocks[shard])
            counter, before = divmod(len(line.shards) + int(self._first_block[shard]), _WORDS_A_COUNT)
            words = np.random.Philox(key=line.seed, counter=counter).random_raw(before + count)[before:]
            order = np.argsort(words >> np.uint64(24), kind="stable")
            lengths = np.minimum(self._shard_rows[shard] - order * self.block, self.block)
            blocks = _Blocks(order, line.starts[place] + np.cumsum(lengths) - lengths)
        line.opened[place] = blocks
        if len(line.opened) > 2 * self._lanes:
            line.opened.popitem(last=False)
        return blocks

    def _shuffled_inside(self, key: np.uint64, blocks: Int64, block_rows: Int64, offsets: Int64) -> Int64:
        columns = np.arange(self.block, dtype=np.uint64)
        keys = _mixed(_mixed(blocks.astype(np.uint64) + key)[:, None] ^ _mixed(columns)) >> np.uint64(1)
        keys[columns >= block_rows[:, None]] = np.iinfo(np.uint64).max  # a short block's missing rows go last
        order = np.argsort(keys, axis=1, kind="stable")
        return order[np.arange(len(blocks)), offsets]

    def _pass(self, number: int) -> Int64 | _Line:
        if number in self._passes:
            self._passes.move_to_end(number)
            return self._passes[number]
        digest = hashlib.blake2b(f"{self._name}/{number}".encode(), digest_size=24).digest()
        seed = int.from_bytes(digest[:16], "little")
        if self.num_samples <= SHUFFLED_WHOLE:
            shuffled: Int64 | _Line = _permutation(seed, self.num_samples)
        else:
            shards = _permutation(seed, len(self._shard_rows))
            starts = np.zeros(len(shards) + 1, dtype=np.int64)
            np.cumsum(self._shard_rows[shards], out=starts[1:])
            shuffled = _Line(shards, starts, seed, np.uint64(int.from_bytes(digest[16:], "little")))
        self._passes[number] = shuffled
        if len(self._passes) > 2:  # a step touches two passes at most, or the pool is smaller than a batch
            self._passes.popitem(last=False)
        return shuffled


def _permutation(seed: int, count: int) -> Int64:
    # raw words and a stable sort: numpy may change its `permutation`, not the bits of Philox
    return np.argsort(np.random.Philox(key=seed).random_raw(count), kind="stable")


def _spread(lengths: Int64) -> Int64:
    """Start of each sub-lane on the line, so that any run of sub-lanes is spread evenly over all of it."""
    lanes = len(lengths)
    stride = next(s for s in range(round(lanes * 0.618), 0, -1) if math.gcd(s, lanes) == 1)
    stretch = np.arange(lanes) * stride % lanes
    along = np.empty(lanes, dtype=np.int64)
    along[stretch] = lengths
    return (np.cumsum(along) - along)[stretch]


def _mixed(x: UInt64) -> UInt64:
    """The splitmix64 finaliser, as in `ops.draws`."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
