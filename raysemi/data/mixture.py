"""The order of several pools of which each gets a fixed share of every batch and keeps passes of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raysemi.data.joined import AnyPool, JoinedPool
from raysemi.data.order import Int64, Order
from raysemi.errors import ConfigError


def shares(weights: Sequence[float], batch: int) -> tuple[int, ...]:
    """Images of each pool in a batch: the weights' shares, rounded to whole images by the largest remainders.

    Raises:
        ConfigError: a pool would get none.
    """
    total = math.fsum(weights)
    exact = [batch * weight / total for weight in weights]
    whole = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: batch - sum(whole)]:
        whole[i] += 1
    if 0 in whole:
        raise ConfigError(
            f"train.batch.unlabeled must give every pool of data.unlabeled at least one image a step by its weight; "
            f"got {batch}, shared {', '.join(map(str, whole))}. Raise it, or the smallest weight."
        )
    return tuple(whole)


class Mixture:
    """As `order.Order`, over pools read as one; which slots are whose does not depend on step, seed or rank.

    Each pool's samples come once a pass of its own, at its own pace, and in every rank about as often as in the batch.

    Args:
        pools: the pools; rows count through all of them.
        weights: of each pool, in any unit.
        seed: seed of the run.
        batch: global batch, images a step over all ranks.

    Raises:
        ConfigError: a pool would get no image of a batch.
    """

    def __init__(self, pools: JoinedPool, weights: Sequence[float], seed: int, batch: int) -> None:
        self.batch = batch
        self.shares = shares(weights, batch)
        self.orders = [
            Order(pool.shard_rows, pool.digest, seed, share)
            for pool, share in zip(pools.pools, self.shares, strict=True)
        ]
        self._firsts = np.cumsum([0, *(pool.num_samples for pool in pools.pools)])
        self._pool_of_slot = _spread_out(self.shares)

    def slots(self, t: int, lo: int, hi: int) -> tuple[Int64, Int64]:
        """Rows and passes of the global slots lo to hi - 1 of step t, as `Order.slots`; passes are each pool's own."""
        rows, passes = self.table(t, t + 1, lo, hi)
        return rows[0], passes[0]

    def table(self, start: int, stop: int, lo: int, hi: int) -> tuple[Int64, Int64]:
        """The same of the steps start to stop - 1, as `Order.table`: int64 [stop - start, hi - lo] each."""
        mine = self._pool_of_slot[lo:hi]
        rows, passes = (np.empty((stop - start, len(mine)), np.int64) for _ in range(2))
        for number, order in enumerate(self.orders):
            first = int((self._pool_of_slot[:lo] == number).sum())
            here = mine == number
            own, passes[:, here] = order.table(start, stop, first, first + int(here.sum()))
            rows[:, here] = own + self._firsts[number]
        return rows, passes


def _spread_out(counts: Sequence[int]) -> Int64:
    """Pool of each slot, so that any run of slots holds about the same shares."""
    total = sum(counts)
    given = np.zeros(len(counts), dtype=np.int64)
    pools = np.empty(total, dtype=np.int64)
    for slot in range(total):
        behind = np.array(counts) * (slot + 1) - given * total  # in whole numbers: the same on every machine
        pools[slot] = chosen = int(behind.argmax())
        given[chosen] += 1
    return pools


def passes(pool: AnyPool, batch: int, steps: int) -> list[tuple[str, float]]:
    """How often each sample of a pool, or of each pool of a mixture, has been seen after some steps, on average."""
    if isinstance(pool, JoinedPool) and pool.weights is not None:
        each = zip(pool.pools, shares(pool.weights, batch), strict=True)
        return [(own.path, steps * share / own.num_samples) for own, share in each]
    return [(pool.path, steps * batch / pool.num_samples)]


def order_of(pool: AnyPool, seed: int, batch: int) -> Order | Mixture:
    """The order in which a stream reads a pool, or several as one."""
    if isinstance(pool, JoinedPool) and pool.weights is not None:
        return Mixture(pool, pool.weights, seed, batch)
    return Order(pool.shard_rows, pool.digest, seed, batch)
