"""The run folder: local or in an object store, every file written whole or not at all."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from pyarrow import ArrowInvalid, fs

from raysemi.errors import CheckpointError


class RunFolder:
    """A folder of files, addressed by paths relative to it.

    Args:
        location: a local path, or a URL that pyarrow.fs knows (`s3://bucket/runs/a`, `gs://...`).
    """

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        if "://" in self.location:
            try:
                self._fs, self._root = fs.FileSystem.from_uri(self.location)
            except (ArrowInvalid, OSError) as error:
                raise CheckpointError(
                    f"run must be a local path or an s3:// or gs:// URL; got {self.location}. {error}"
                ) from error
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
        return bool(self._fs.get_file_info(self.path(name)).type != fs.FileType.NotFound)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when it is not there."""
        info = self._fs.get_file_info(self.path(name))
        return info.size if info.type == fs.FileType.File else None

    def names(self, name: str = "") -> list[str]:
        """Names directly below a folder, sorted; none when the folder is not there."""
        selector = fs.FileSelector(self.path(name), allow_not_found=True)
        return sorted(info.base_name for info in self._fs.get_file_info(selector))

    def read_bytes(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            CheckpointError: the file is not there or cannot be read.
        """
        try:
            with self._fs.open_input_file(self.path(name)) as file:
                return bytes(file.read())
        except OSError as error:
            raise CheckpointError(f"{self.location}/{name} must be a readable file. {error}") from error

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes a file beside its place, then moves it there (an object store's write is whole already).

        Raises:
            CheckpointError: no room or no permission; what stood there before still does.
        """
        path = self.path(name)
        beside = f"{path}.part" if self.is_local else path
        try:
            self._fs.create_dir(path.rpartition("/")[0], recursive=True)
            with self._fs.open_output_stream(beside, compression=None) as file:
                file.write(content)
            if self.is_local:
                self._fs.move(beside, path)
        except OSError as error:
            if self.is_local:
                Path(beside).unlink(missing_ok=True)
            raise _write_error(self.location, error) from error

    def remove(self, name: str) -> None:
        """Removes a folder and all below it."""
        if self.exists(name):
            self._fs.delete_dir(self.path(name))

    def publish(self, source: Path, name: str, last: str) -> None:
        """Makes a local folder appear as `name`: its file `last` is written after all others.

        Args:
            source: local folder with files, no folders; it is used up.
            name: where it goes; what stood there is replaced.
            last: the file whose presence says that the rest is complete.

        Raises:
            CheckpointError: no room or no permission; other folders are as they were.
        """
        self.remove(name)
        try:
            if self.is_local and source.parent == Path(self.path(name)).parent:
                source.replace(self.path(name))
                return
            self._fs.create_dir(self.path(name), recursive=True)
            files = sorted(source.iterdir(), key=lambda file: file.name == last)
            for file in files:
                with file.open("rb") as incoming, self._fs.open_output_stream(self.path(f"{name}/{file.name}")) as out:
                    shutil.copyfileobj(incoming, out, 1 << 22)
        except OSError as error:
            raise _write_error(self.location, error) from error


def _write_error(location: str, error: OSError) -> CheckpointError:
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        return CheckpointError(
            f"the disk of {location} must have room; got none left. Free space and give the same command again: "
            "it continues from the last complete checkpoint."
        )
    return CheckpointError(f"{location} must be writable. {error}")
