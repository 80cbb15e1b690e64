"""Bytes of a remote pool's samples, read ahead of the steps that need them, in few large requests.

The order is known (`Order.table`), so a stream says which rows its next steps need. A row that no request covers yet is
read together with all neighbours that are needed soon: a slot walks through blocks of up to 64 neighbouring samples in
random order, so that the first sample of a block brings the whole block. What is read is a matter of speed: the bytes
of a sample are the same, whoever asked for them.

With a cache on the local disk, a shard is also copied whole, once, in the background; its samples come from the copy
as soon as it is complete.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDone
from threading import Event, Lock, main_thread
from typing import NamedTuple

import pyarrow as pa

from raysemi.data.cache import Download, ShardCache
from raysemi.data.joined import AnyPool
from raysemi.data.order import FEWEST_LANES, LARGEST_BLOCK, SHUFFLED_WHOLE
from raysemi.data.pool import Row
from raysemi.data.store import NOT_THERE, StoreConfig
from raysemi.errors import DataError, DataFailure

_log = logging.getLogger(__name__)

Payloads = dict[tuple[str, int], bytes]
"""(shard, offset) of an image or a mask -> its bytes."""

LARGEST_REQUEST = 16 * 2**20
"""Bytes of one request: a block of 64 images of up to 256 KB is one."""
_GAP = 2**18  # bytes that are read for nothing rather than by another request
_MOST_PLANNED = 2**14  # samples that are looked at ahead
_DOWNLOADS = 2  # shards that are copied to the cache at once, beside the requests
_ASK_AGAIN = 5.0  # seconds until a shard is offered to a full cache again
_MOST_OPEN = 256  # shards
_PART = 8 * 2**20  # bytes of a download's requests


class _Place(NamedTuple):
    """Bytes of a sample in its shard, from the first to behind the last that are needed."""

    shard: str
    start: int
    stop: int
    parts: tuple[tuple[int, int], ...]
    """Offset and length of the image and, where it is needed, of the mask."""


class _Request:
    """A run of bytes of one shard, under way or arrived, for the rows that it brings."""

    def __init__(self, rows: list[int], shard: str, start: int, stop: int) -> None:
        self.rows, self.shard, self.start, self.stop = rows, shard, start, stop
        self.slack = 0
        """Bytes that were read for nothing; given up when the first row is taken."""
        self.content: Future[dict[int, bytes]]
        """Offset -> bytes of the parts of its rows."""


class _Copy:
    """A shard that this process has leased in the cache, or that is on its way there."""

    def __init__(self, ready: Future[int], download: Download | None) -> None:
        self.ready, self.download = ready, download
        self.live = 0

    def usable(self) -> bool:
        return self.ready.done() and not self.ready.cancelled() and self.ready.exception() is None

    def give_back(self) -> None:
        """Ends the lease, or the download, now or when it is no longer under way."""
        self.ready.add_done_callback(self._ended)

    def _ended(self, ready: Future[int]) -> None:
        if ready.cancelled():
            assert self.download is not None
            self.download.drop()
        elif ready.exception() is None:
            os.close(ready.result())


class Ahead:
    """Hands out the bytes of one step after the other.

    Args:
        pool: a pool or joined ones; the requests go through `open_shard`.
        steps: rows of each step, in the order in which they will be taken.
        masks: whether masks are needed too.
        budget: bytes that may be held, arrived or under way, besides the samples of one step.
    """

    def __init__(self, pool: AnyPool, steps: Iterable[Sequence[int]], masks: bool, budget: int) -> None:
        config = pool.store
        self.pool, self.masks, self.budget = pool, masks, budget
        self.requests = 0
        """Requests sent for samples, without those that fill the cache."""
        self.held_bytes = 0
        self._source: Iterator[Sequence[int]] | None = iter(steps)
        small = pool.num_bytes <= budget // 2  # stays here whole: each next use is planned before the last one
        window = 2 * pool.num_samples if small else 3 * budget * pool.num_samples // max(4 * pool.num_bytes, 1)
        self._window = min(max(window, 1), _MOST_PLANNED)
        self._largest = min(LARGEST_REQUEST, max(budget // 4, 1))
        self._gap = min(_GAP, budget // 64)
        self._steps: deque[Sequence[int]] = deque()
        self._planned = 0
        self._sent = self._sent_rows = 0  # of the planned steps and their rows
        self._wanted: Counter[int] = Counter()  # row -> uses in the planned steps
        self._held: dict[int, _Request | _Copy] = {}
        self._places: dict[int, _Place] = {}
        self._patience = config.deadline + 15.0
        self._threads = ThreadPoolExecutor(config.connections, thread_name_prefix="ahead")
        self._files: dict[str, pa.NativeFile] = {}
        self._opening = Lock()
        self._closed = Event()
        self._cache = ShardCache(config.cache, config.cache_bytes) if config.cache and _fits(pool) else None
        self._copies: dict[str, _Copy] = {}
        self._refused: dict[str, float] = {}  # shard -> when the cache may be asked again
        self._copying = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="copy") if self._cache else None

    @property
    def next_rows(self) -> Sequence[int]:
        """Rows of the step that `take` will hand out; none at the end."""
        self._plan()
        return self._steps[0] if self._steps else ()

    def take(self) -> Payloads:
        """Bytes of the next step's samples.

        Raises:
            DataError: names pool, shard and key when they cannot be read; a DataFailure when the store gives no answer.
        """
        self._settle()
        self._plan()
        self._send()
        rows = self._steps.popleft()
        self._sent -= 1
        self._sent_rows -= len(rows)
        self._planned -= len(rows)
        payloads: Payloads = {}
        for row in rows:
            place, holder = self._place(row), self._held[row]
            for offset, length in place.parts:
                payloads[place.shard, offset] = self._bytes(row, holder, offset, length)
        for row in rows:
            self._done_with(row)
        self._plan()
        self._send()
        if not self._steps:
            self.close()
        return payloads

    def close(self) -> None:
        """Ends what is under way; called by itself after the last step."""
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._copying is not None:
            self._copying.shutdown(wait=False, cancel_futures=True)
        for copy in self._copies.values():
            copy.give_back()
        self._copies.clear()
        self._files.clear()

    def _plan(self) -> None:
        while self._source is not None and (self._planned < self._window or not self._steps):
            rows = next(self._source, None)
            if rows is None:
                self._source = None
                return
            self._steps.append(rows)
            self._planned += len(rows)
            self._wanted.update(rows)

    def _send(self) -> None:
        """Sends requests in the order of the steps, up to the budget.

        Three quarters of the window stay ahead of the last step that was sent: its rows find all their neighbours.
        """
        while self._sent < len(self._steps):
            rows = self._steps[self._sent]
            ahead = self._planned - self._sent_rows - len(rows)
            if self._sent and self._source is not None and ahead < 3 * self._window // 4:
                return
            for row in rows:
                if row in self._held:
                    continue
                copy = self._copy(self._place(row).shard)
                if copy is not None:
                    self._held[row] = copy
                    copy.live += 1
                    continue
                request, room = self._around(row, self._largest), self.budget - self.held_bytes
                if request.stop - request.start > room:
                    if self._sent:
                        return
                    request = self._around(row, room)  # the next step cannot wait: with fewer neighbours, or none
                self._ask(request)
            self._sent += 1
            self._sent_rows += len(rows)

    def _ask(self, request: _Request) -> None:
        places = [self._place(row) for row in request.rows]
        length = request.stop - request.start
        request.slack = length - sum(place.stop - place.start for place in places)
        parts = [part for place in places for part in place.parts]
        self._held.update(dict.fromkeys(request.rows, request))
        self.held_bytes += length
        self.requests += 1
        request.content = self._threads.submit(self._read_parts, request.shard, request.start, length, parts)

    def _around(self, row: int, most: int) -> _Request:
        """A request of at most so many bytes for a row and its neighbours in the shard that are needed soon."""
        own = self._place(row)
        rows = [row]
        start, stop, waste = own.start, own.stop, 0
        for direction in (-1, 1):
            near = edge = row
            while 0 <= (near := near + direction) < self.pool.num_samples:
                place = self._place(near)
                new_start, new_stop = min(start, place.start), max(stop, place.stop)
                gap = start - place.stop if direction < 0 else place.start - stop
                gap = gap if abs(near - edge) > 1 else 0  # what lies between neighbours costs nothing worth a request
                if place.shard != own.shard or gap > self._gap or new_stop - new_start > most:
                    break
                if near not in self._wanted or near in self._held:
                    if len(rows) >= LARGEST_BLOCK:  # what is wanted of the next block comes when more of it is
                        break
                    continue
                if waste + gap > 3 * (new_stop - new_start) // 4:
                    break
                edge, waste, start, stop = near, waste + gap, new_start, new_stop
                rows.append(near)
        return _Request(rows, own.shard, start, stop)

    def _place(self, row: int) -> _Place:
        if row not in self._places:
            if len(self._places) > 4 * _MOST_PLANNED:
                self._places.clear()
            self._places[row] = _place(self.pool.row(row), self.masks)
        return self._places[row]

    def _bytes(self, row: int, holder: _Request | _Copy, offset: int, length: int) -> bytes:
        if isinstance(holder, _Copy):
            return os.pread(holder.ready.result(), length, offset)
        try:
            content = holder.content.result(self._patience)
        except (DataError, OSError, NotDone) as error:
            raise self._fault(row, error) from error
        self.held_bytes -= holder.slack
        holder.slack = 0
        return content[offset]

    def _fault(self, row: int, error: BaseException) -> DataError:
        one = self.pool.row(row)
        where = f"pool {self.pool.path}, shard {one.shard}, key {one.key}"
        if isinstance(error, DataError):
            return type(error)(f"{where}: {error}")
        kind = DataError if isinstance(error, NOT_THERE) else DataFailure
        got = error if str(error) else f"no answer within {self._patience:g} s"
        return kind(f"{where}: shard must be readable; got {got}. Check the network.")

    def _done_with(self, row: int) -> None:
        self._wanted[row] -= 1
        if self._wanted[row]:
            return
        del self._wanted[row]
        holder, place = self._held.pop(row), self._place(row)
        if isinstance(holder, _Copy):
            holder.live -= 1
            return
        self.held_bytes -= place.stop - place.start
        for offset, _ in place.parts:
            del holder.content.result()[offset]

    def _copy(self, shard: str) -> _Copy | None:
        """The shard in the cache, or None while it is not there; it is then brought there if it may."""
        if self._cache is None or self._copying is None:
            return None
        copy = self._copies.get(shard)
        if copy is None and self._refused.get(shard, 0.0) < time.monotonic() and (entry := self.pool.entry(shard)):
            self._tidy()
            found = self._cache.ask(*entry)
            if found is None:
                self._refused[shard] = time.monotonic() + _ASK_AGAIN
                return None
            ready: Future[int] = Future()
            if isinstance(found, Download):
                ready = self._copying.submit(self._fetch, shard, found)
            else:
                ready.set_result(found)
            copy = self._copies[shard] = _Copy(ready, found if isinstance(found, Download) else None)
        return copy if copy is not None and copy.usable() else None

    def _settle(self) -> None:
        """Tells of downloads that failed."""
        for shard, copy in list(self._copies.items()):
            if copy.ready.done() and (error := copy.ready.exception()) is not None:
                del self._copies[shard]
                self._refused[shard] = float("inf")
                if isinstance(error, DataError) and not isinstance(error, DataFailure):
                    raise error
                _log.warning("pool %s, shard %s is read without the cache: %s", self.pool.path, shard, error)

    def _tidy(self) -> None:
        """Gives back the copies that no planned step needs."""
        for shard, copy in list(self._copies.items()):
            if copy.usable() and not copy.live:
                self._copies.pop(shard).give_back()

    def _fetch(self, shard: str, download: Download) -> int:
        with download:
            for start in range(0, download.shard.bytes, _PART):
                download.write(self._read(shard, start, min(_PART, download.shard.bytes - start)))
            return download.publish()

    def _read_parts(self, shard: str, start: int, length: int, parts: list[tuple[int, int]]) -> dict[int, bytes]:
        content = self._read(shard, start, length)
        # copies, so that each goes when it was used, not when the last of its neighbours was
        return {offset: content[offset - start : offset - start + size] for offset, size in parts}

    def _read(self, shard: str, start: int, length: int) -> bytes:
        if self._closed.is_set() or not main_thread().is_alive():
            raise ConnectionError("the stream was closed")
        content: bytes = self._file(shard).read_at(length, start)
        return content

    def _file(self, shard: str) -> pa.NativeFile:
        with self._opening:
            file = self._files.get(shard)
        if file is None:
            file = self.pool.open_shard(shard)
            with self._opening:
                if len(self._files) >= _MOST_OPEN:
                    self._files.clear()
                file = self._files.setdefault(shard, file)
        return file


def _place(row: Row, masks: bool) -> _Place:
    parts = [(row.image_offset, row.image_bytes)]
    if masks and row.mask_offset is not None and row.mask_bytes is not None:
        parts.append((row.mask_offset, row.mask_bytes))
    stop = max(offset + length for offset, length in parts)
    return _Place(row.shard, min(parts)[0], stop, tuple(parts))


def _fits(pool: AnyPool) -> bool:
    return pool.num_bytes <= pool.store.cache_bytes


def cache_faults(pools: Mapping[str, tuple[AnyPool, int]], config: StoreConfig) -> list[str]:
    """What to tell of a cache that cannot hold at once what a step reads from; nothing without a cache.

    Args:
        pools: by name, with the global batch that is drawn from each.
        config: `data.store.*`.
    """
    if config.cache is None:
        return []
    cached = {name: one for name, one in pools.items() if not one[0].local and _fits(one[0])}
    needs = {name: _at_once(*one) for name, one in cached.items()}
    if sum(needs.values()) <= config.cache_bytes:
        return []
    parts = ", ".join(f"{need} for {name}" for name, need in needs.items())
    return [
        f"data.store.cache_bytes must hold the shards that the slots of a step read at once, {sum(needs.values())} "
        f"bytes ({parts}); got {config.cache_bytes}. Raise it, pack smaller shards, or set data.store.cache=null."
    ]


def _at_once(pool: AnyPool, batch: int) -> int:
    """Bytes of the shards that are in use at once: each of the order's sub-lanes stands in one."""
    if pool.num_samples <= SHUFFLED_WHOLE:
        return pool.num_bytes
    lanes = batch * max(2, math.ceil(FEWEST_LANES / batch))
    return min(pool.num_bytes, lanes * max(shard.bytes for shard in pool.shard_files))
