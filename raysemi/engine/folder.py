"""The run folder: local or in an object store, every file written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import ArrowInvalid, fs

from raysemi.data.store import NOT_THERE, StoreConfig, open_store, patiently
from raysemi.errors import CheckpointError, CheckpointFailure, DataError, NoRoom


class RunFolder:
    """A folder of files, addressed by paths relative to it.

    What a store does not answer is asked again until a deadline; a disk is asked once.

    Args:
        location: a local path, or a URL that pyarrow.fs knows (`s3://bucket/runs/a`, `gs://...`).
        store: how a store is reached; its deadline holds for each request.

    Raises:
        CheckpointError: a URL of another kind.
    """

    def __init__(self, location: str | Path, store: StoreConfig | None = None) -> None:
        self.location = str(location)
        if "://" in self.location:
            try:
                self._fs, self._root = open_store(self.location, store)
            except (ArrowInvalid, DataError, OSError) as error:
                raise CheckpointError(f"run must be a local path or an s3:// or gs:// URL. {error}") from error
        else:
            self._fs, self._root = fs.LocalFileSystem(), str(Path(self.location).expanduser().absolute())

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on this machine's file system."""
        return isinstance(self._fs, fs.LocalFileSystem)

    def path(self, name: str = "") -> str:
        """Full path of a file of the folder, in its own file system."""
        return f"{self._root}/{name}".rstrip("/")

    def exists(self, name: str = "") -> bool:
        """Whether the file or folder is there."""
        with self._reading(name):
            return bool(self._fs.get_file_info(self.path(name)).type != fs.FileType.NotFound)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when it is not there."""
        with self._reading(name):
            info = self._fs.get_file_info(self.path(name))
        return info.size if info.type == fs.FileType.File else None

    def names(self, name: str = "") -> list[str]:
        """Names directly below a folder, sorted; none when the folder is not there."""
        return sorted(info.base_name for info in self._infos(name))

    def sizes(self, name: str = "") -> dict[str, int]:
        """Bytes of each file directly below a folder, by name; none when the folder is not there."""
        files = (info for info in self._infos(name) if info.type == fs.FileType.File)
        return {info.base_name: info.size for info in sorted(files, key=lambda info: info.base_name)}

    def _infos(self, name: str) -> list[fs.FileInfo]:
        with self._reading(name):
            found = self._fs.get_file_info(fs.FileSelector(self.path(name), allow_not_found=True))
        return [info for info in found if info.base_name]  # a store may list the folder's own mark

    def read_bytes(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            CheckpointError: the file is not there.
            CheckpointFailure: it cannot be read.
        """
        with self._reading(name), self._fs.open_input_file(self.path(name)) as file:
            return bytes(file.read())

    def write_bytes(self, name: str, content: bytes, *, sync: bool = False) -> None:
        """Writes a file: on a disk beside its place, then moved there (a store shows an object when it is whole).

        Args:
            name: of the file.
            content: of the file.
            sync: wait until the disk has it, so that a power cut leaves no name without its bytes.

        Raises:
            NoRoom: the disk is full; what stood there before still does.
            CheckpointFailure: no permission, or no answer; as before.
        """
        with self._writing():
            if self.is_local:
                _write_file(Path(self.path(name)), content, sync)
            else:
                patiently(self._fs, lambda store: _put(store, self.path(name), content), self.path(name))

    def make(self, name: str) -> None:
        """Makes a folder; a store has none to make."""
        if self.is_local:
            with self._writing():
                Path(self.path(name)).mkdir(parents=True, exist_ok=True)

    def remove(self, name: str) -> None:
        """Removes a folder and all below it, or a file; nothing when it is not there."""
        with self._writing():
            patiently(self._fs, lambda store: _remove(store, self.path(name)), self.path(name))

    def rename(self, name: str, new: str) -> None:
        """Makes a folder on a disk appear under another name, in place of what stood there."""
        source, target = Path(self.path(name)), Path(self.path(new))
        with self._writing():
            if target.exists():
                shutil.rmtree(target)
            source.replace(target)
            _sync_folder(target.parent)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except NOT_THERE as error:
            kind = CheckpointFailure if isinstance(error, PermissionError) else CheckpointError
            raise kind(f"{self.location}/{name} must be a readable file. {error}") from error
        except OSError as error:
            raise CheckpointFailure(f"{self.location}/{name} must be readable. {error}") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
                raise NoRoom(
                    f"the disk of {self.location} must have room; got none left. Free space and give the same command "
                    "again: it continues from the last complete checkpoint."
                ) from error
            raise CheckpointFailure(f"{self.location} must be writable. {error}") from error


def _put(store: fs.FileSystem, path: str, content: bytes) -> None:
    with store.open_output_stream(path, compression=None) as file:
        file.write(content)


def _remove(store: fs.FileSystem, path: str) -> None:
    kind = store.get_file_info(path).type
    if kind == fs.FileType.Directory:
        store.delete_dir(path)
    elif kind == fs.FileType.File:
        store.delete_file(path)


def _write_file(path: Path, content: bytes, sync: bool) -> None:
    beside = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
