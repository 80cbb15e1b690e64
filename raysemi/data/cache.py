"""Whole shards on a local disk, shared by all processes of a machine, within a hard limit.

KEY.tar    a complete shard; KEY names its URL and the SHA-256 that pool.json gives, so that no two shards collide
KEY.part   one that is being written; it has its full length from the start, so that the lengths of all files are what
           the folder may ever take
lock       held for a moment by whoever looks, makes room, begins or completes

Leases are advisory locks of the kernel (flock) on the files themselves: shared on a shard that a process reads,
exclusive on one that it writes. They end with the process, however it ends, so that nothing stale needs a clock: a
`.part` that can be locked has lost its writer.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from raysemi.data.pool import Shard
from raysemi.errors import DataError

_WHOLE, _PARTIAL = ".tar", ".part"


class ShardCache:
    """The cache in one folder.

    Args:
        folder: on a local disk; made if it is not there.
        limit: bytes that the files of the folder may take together, at any moment.

    Raises:
        DataError: the folder cannot be used.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder).expanduser().absolute(), limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._drop_stale()
        except OSError as error:
            raise DataError(
                f"data.store.cache must be a folder on a local disk that may be written; got {folder}: {error}. "
                f"Give another."
            ) from error

    def ask(self, url: str, shard: Shard) -> int | Download | None:
        """A shard, by its URL and its entry in pool.json.

        Returns:
            A descriptor to read it by, whose lease ends when it is closed; or a Download, for the caller to carry out;
            or None: another process is writing it, or there is no room but by taking what a living process reads.

        Raises:
            OSError: the disk fails.
        """
        name = hashlib.sha256(f"{url}\n{shard.sha256}".encode()).hexdigest()[:40]
        whole, partial = self.folder / f"{name}{_WHOLE}", self.folder / f"{name}{_PARTIAL}"
        with self._alone():
            if (found := self._leased(whole, shard)) is not None:
                return found
            self._drop_stale()
            if whole.exists() or partial.exists() or not self._make_room(shard.bytes):
                return None
            file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                os.ftruncate(file, shard.bytes)
            except BaseException:
                partial.unlink()
                os.close(file)
                raise
        return Download(self, file, partial, whole, shard)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _leased(self, whole: Path, shard: Shard) -> int | None:
        """The complete shard, unless it is not there or not as it was written: then it is removed, if nobody reads."""
        try:
            file = os.open(whole, os.O_RDONLY)
        except FileNotFoundError:
            return None
        state = os.fstat(file)
        if state.st_size == shard.bytes and state.st_mtime_ns == _seal(shard):
            fcntl.flock(file, fcntl.LOCK_SH)
            with suppress(PermissionError):  # another user's: it may be read all the same
                os.utime(whole, ns=(time.time_ns(), _seal(shard)))
            return file
        if _locked(file):
            whole.unlink()
        os.close(file)
        return None

    def _drop_stale(self) -> None:
        for partial in self.folder.glob(f"*{_PARTIAL}"):
            file = os.open(partial, os.O_RDWR)
            if _locked(file):
                partial.unlink()
            os.close(file)

    def _make_room(self, need: int) -> bool:
        """Remove what was used least recently and nobody reads, if that is enough; else nothing."""
        files = [(path, path.stat()) for path in self.folder.iterdir() if path.suffix in (_WHOLE, _PARTIAL)]
        excess = sum(state.st_size for _, state in files) + need - self.limit
        chosen: list[tuple[Path, int]] = []
        try:
            for path, state in sorted(files, key=lambda one: one[1].st_atime_ns):
                if excess <= 0:
                    break
                file = os.open(path, os.O_RDONLY)
                if path.suffix == _WHOLE and _locked(file):
                    chosen.append((path, file))
                    excess -= state.st_size
                else:
                    os.close(file)
            if excess <= 0:
                for path, _ in chosen:
                    path.unlink()
            return excess <= 0
        finally:
            for _, file in chosen:
                os.close(file)


class Download:
    """A shard on its way into the cache: `write` all of it in order, then `publish`; leaving the block early drops it.

    Args:
        cache: where its room is reserved.
        file: descriptor of the partial file, locked.
        partial, whole: its names before and after.
        shard: what pool.json promises.
    """

    def __init__(self, cache: ShardCache, file: int, partial: Path, whole: Path, shard: Shard) -> None:
        self.shard = shard
        self._cache, self._file, self._partial, self._whole = cache, file, partial, whole
        self._digest, self._place, self._done = hashlib.sha256(), 0, False

    def __enter__(self) -> Download:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            self.drop()

    def drop(self) -> None:
        """Give the room back."""
        self._done = True
        with self._cache._alone(), suppress(FileNotFoundError):
            self._partial.unlink()
        os.close(self._file)

    def write(self, content: bytes) -> None:
        """The next bytes.

        Raises:
            OSError: the disk is full or fails.
        """
        self._digest.update(content)
        view = memoryview(content)[: self.shard.bytes - self._place]
        while view:
            written = os.pwrite(self._file, view, self._place)
            self._place += written
            view = view[written:]

    def publish(self) -> int:
        """Make it visible to all, and lease it.

        Returns:
            A descriptor, as `ShardCache.ask`.

        Raises:
            DataError: other bytes came than pool.json promises.
        """
        if (self._place, self._digest.hexdigest()) != (self.shard.bytes, self.shard.sha256):
            raise DataError(
                f"shard {self.shard.name} must hold the {self.shard.bytes} bytes that pool.json promises; got others. "
                f"Run `raysemi verify`, then copy or pack the pool again."
            )
        with self._cache._alone():
            os.utime(self._partial, ns=(time.time_ns(), _seal(self.shard)))
            self._partial.rename(self._whole)
            fcntl.flock(self._file, fcntl.LOCK_SH)
            self._done = True
        return self._file


def _locked(file: int) -> bool:
    """Whether nobody else had it: it is locked now, until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _seal(shard: Shard) -> int:
    """Time of change that a complete shard is given, in ns: whoever writes to it afterwards breaks it."""
    return int(shard.sha256[:7], 16) * 1_000_000_000
