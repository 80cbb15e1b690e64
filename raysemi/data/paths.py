"""Files and folders that `pack` reads and writes: `pathlib.Path` on a disk, `StorePath` in an object store.

A `StorePath` offers, under the same names, what the sources and `pack` use of `pathlib.Path`; so they need not know
which of the two they have. A file that was listed carries its size and time: asking for these again costs no request.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from pyarrow import fs

from raysemi.data.store import StoreConfig, open_store, unreadable

_UPLOAD_BYTES = 64 << 20
"""Of an upload, bytes in memory at most."""


class FileStat(NamedTuple):
    """Size in bytes, and time of the last change in nanoseconds."""

    st_size: int
    st_mtime_ns: int


class _Store(NamedTuple):
    """What all paths of one URL share."""

    filesystem: fs.FileSystem
    scheme: str
    query: str


class StorePath:
    """A file or folder of an object store. Picklable: each process makes its own connections.

    Methods that ask whether and what something is raise a DataFailure when the store does not answer; those that read
    and write raise OSError, as those of `pathlib.Path` do.
    """

    __slots__ = ("_inside", "_stat", "_store")

    def __init__(self, store: _Store, inside: str, stat: FileStat | None = None) -> None:
        self._store, self._inside, self._stat = store, inside, stat

    def __reduce__(self) -> tuple[type[StorePath], tuple[_Store, str]]:
        return StorePath, (self._store, self._inside)  # who reads the file needs no size

    def __str__(self) -> str:
        """The URL, from which `as_path` makes the same path."""
        inside = self._inside.replace("%", "%25").replace("?", "%3F").replace("#", "%23")
        return f"{self._store.scheme}://{inside}{self._store.query}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and (self._inside, *self._store[1:]) == (other._inside, *other._store[1:])

    def __hash__(self) -> int:
        return hash(self._inside)

    def __lt__(self, other: StorePath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(self._store, f"{self._inside}/{name}")

    @property
    def name(self) -> str:
        """Last part."""
        return self._inside.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Last part without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """What follows the last dot of the name, with the dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> StorePath:
        """The folder around it."""
        return StorePath(self._store, self._inside.rpartition("/")[0])

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return self._stat is not None or self._info().type == fs.FileType.File

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        return self._stat is None and self._info().type == fs.FileType.Directory

    def exists(self) -> bool:
        """Whether it is a file or a folder."""
        return self._stat is not None or self._info().type != fs.FileType.NotFound

    def stat(self) -> FileStat:
        """Size and time of a file."""
        if self._stat is None:
            info = self._info()
            if info.type != fs.FileType.File:
                raise FileNotFoundError(f"{self} is not there")
            return _stat(info)
        return self._stat

    def iterdir(self) -> Iterator[StorePath]:
        """What lies directly in the folder."""
        yield from self._listed(recursive=False)

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """Files below the folder whose relative path fits, part by part."""
        parts = pattern.split("/")
        for path in self._listed(recursive=len(parts) > 1):
            own = path._inside.removeprefix(f"{self._inside}/").split("/")
            if path._stat and len(own) == len(parts) and all(map(fnmatchcase, own, parts)):
                yield path

    def rglob(self, pattern: str) -> Iterator[StorePath]:
        """Files at any depth below the folder whose name fits."""
        return (path for path in self._listed(recursive=True) if path._stat and fnmatchcase(path.name, pattern))

    def read_bytes(self) -> bytes:
        """All of a file."""
        with self._store.filesystem.open_input_file(self._inside) as file:
            return bytes(file.readall())

    def read_text(self, encoding: str) -> str:
        """All of a file as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str) -> IO[bytes]:
        """All of a file, in memory."""
        assert mode == "rb"
        return io.BytesIO(self.read_bytes())

    def upload(self, file: IO[bytes]) -> None:
        """Store a local file here, tried again until the store's deadline. Seen when it is complete, not before.

        Raises:
            OSError: the store refuses it, does not answer, or has kept other bytes.
        """
        filesystem = self._store.filesystem

        def once() -> None:
            file.seek(0)
            stream = filesystem.open_output_stream(self._inside)
            try:
                while chunk := file.read(_UPLOAD_BYTES):
                    stream.write(chunk)
                    stream.flush()  # else all of it would wait in memory for a slow network
                stream.close()
            except OSError:
                raise  # not completed; what is deleted now might be deleted late, after the next try
            except BaseException:
                with suppress(OSError):  # pyarrow cannot give an upload up: closing it leaves half a file
                    stream.close()
                    filesystem.delete_file(self._inside)
                raise

        filesystem.handler.patient(once, self._inside)
        sent, kept = file.seek(0, os.SEEK_END), filesystem.get_file_info(self._inside).size
        if kept != sent:  # some servers store the frames of an upload in chunks as if they were content
            raise OSError(f"{kept} bytes in the store where {sent} were sent")

    def mkdir(self, *, parents: bool, exist_ok: bool) -> None:
        """Make a folder seen that nothing is in yet."""
        assert parents
        assert exist_ok
        self._store.filesystem.create_dir(self._inside, recursive=True)

    def unlink(self) -> None:
        """Delete a file."""
        self._store.filesystem.delete_file(self._inside)

    def remove(self) -> None:
        """Delete a folder and what is in it."""
        self._store.filesystem.delete_dir(self._inside)

    def _info(self) -> fs.FileInfo:
        try:
            return self._store.filesystem.get_file_info(self._inside)
        except OSError as error:
            raise unreadable(str(self), error) from error

    def _listed(self, *, recursive: bool) -> Iterator[StorePath]:
        selector = fs.FileSelector(self._inside, allow_not_found=True, recursive=recursive)
        try:
            infos = self._store.filesystem.get_file_info(selector)
        except OSError as error:
            raise unreadable(str(self), error) from error
        for info in infos:
            yield StorePath(self._store, info.path, _stat(info) if info.type == fs.FileType.File else None)


AnyPath = Path | StorePath


def _stat(info: fs.FileInfo) -> FileStat:
    return FileStat(info.size, info.mtime_ns or 0)


def as_path(text: str | AnyPath, config: StoreConfig | None = None) -> AnyPath:
    """The path that a user means by a text: below the home folder for `~`, in an object store for a URL.

    Args:
        text: a path is taken as it is.
        config: how the store is reached, in place of what the URL and the environment say.

    Raises:
        DataError: the URL carries credentials, or is of a kind that cannot hold files.
    """
    if isinstance(text, StorePath):
        return text
    if "://" not in str(text):
        return Path(text).expanduser()
    filesystem, inside = open_store(str(text), config)
    if isinstance(filesystem, fs.LocalFileSystem):
        return Path(inside)
    scheme, _, rest = str(text).partition("://")
    query = rest.partition("?")[2]
    return StorePath(_Store(filesystem, scheme, query and f"?{query}"), inside)


def store_config(path: AnyPath) -> StoreConfig | None:
    """How the store of a path is reached; None for a path on a disk."""
    return path._store.filesystem.handler.config if isinstance(path, StorePath) else None


@contextmanager
def draft(path: AnyPath) -> Iterator[tuple[IO[bytes], Callable[[], None]]]:
    """A new file to write and read, and what puts it in its place, where it is seen whole or not at all.

    Until that is called nothing is seen of it, and nothing stays when the block ends.
    """
    if isinstance(path, StorePath):
        place = path
        with tempfile.TemporaryFile() as file:  # without a name: gone even when the process is killed
            yield file, lambda: place.upload(file)
        return
    beside = path.with_name(f"{path.name}.part")

    def put() -> None:
        file.flush()
        os.fsync(file.fileno())
        beside.replace(path)

    try:
        with beside.open("w+b") as file:
            yield file, put
    finally:
        beside.unlink(missing_ok=True)


def below(path: AnyPath, folder: AnyPath) -> PurePosixPath | None:
    """What leads from a folder to a path; None where the path does not lie in it."""
    if isinstance(path, StorePath) and isinstance(folder, StorePath):
        start = f"{folder._inside}/"
        inside = path._inside.startswith(start) and path._store[1:] == folder._store[1:]
        return PurePosixPath(path._inside.removeprefix(start)) if inside else None
    if isinstance(path, Path) and isinstance(folder, Path) and path.is_relative_to(folder):
        return PurePosixPath(path.relative_to(folder).as_posix())
    return None


def remove_folder(folder: AnyPath) -> None:
    """Delete a folder and what is in it, as far as it is there and may be deleted."""
    if isinstance(folder, StorePath):
        with suppress(OSError):
            folder.remove()
    else:
        shutil.rmtree(folder, ignore_errors=True)
