"""Object stores: where a URL leads, and reads that are tried again until a deadline.

Whatever reads a remote pool (`pool.json`, the index, shards) goes through `open_store`: a `pyarrow` filesystem whose
reads survive a server that fails, is slow or goes away for a while. What cannot go better by itself (a missing bucket,
no access) is raised at once, as FileNotFoundError or PermissionError; a deadline that passes as TimeoutError.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs
from pydantic import Field, field_validator

from raysemi.base import Config
from raysemi.errors import DataError, DataFailure

_log = logging.getLogger(__name__)
Result = TypeVar("Result")

NOT_THERE = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
"""Errors of a filesystem that another try would not mend."""
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 8.0  # seconds before the second try, and before the later ones
_SILENCE, _CONNECT = 10.0, 5.0  # seconds without a byte, or without a connection, that fail one try
_IN_URL = ("region", "endpoint_override", "scheme")
_SECRET_IN_URL = re.compile(r"://[^/]*@|[?&](access_key|secret_key|session_token|password|token)=", re.IGNORECASE)


class StoreConfig(Config):
    """How pools in an object store are read. Credentials are never set here: they come from the store's standard chain
    (for S3: the environment, `~/.aws`, the machine's role). May change when a run goes on."""

    endpoint: str | None = None
    """URL of an S3 server other than AWS's own, such as `https://minio.example:9000`; none = AWS_ENDPOINT_URL_S3 or
    AWS_ENDPOINT_URL, else AWS."""
    region: str | None = None
    """Region of the S3 bucket; none = AWS_REGION or AWS_DEFAULT_REGION, else the bucket is asked."""
    deadline: float = Field(120.0, ge=1.0)
    """Seconds for which one read is tried again, with growing pauses, before the run stops."""
    connections: int = Field(8, ge=1, le=256)
    """Requests of one pool that a rank has under way at once."""
    prefetch_bytes: int = Field(512 * 2**20, ge=2**20)
    """Bytes that a rank holds of remote pools, arrived or under way, ahead of the steps that need them. Requests are
    merged fully where it holds, twice, 64 images for each of 2 x batch / ranks slots (at least 32 over all ranks)."""
    cache: str | None = None
    """Folder on a local disk where whole shards are kept, shared by all processes of the machine; none = no cache."""
    cache_bytes: int = Field(64 * 2**30, ge=0)
    """Limit of that folder, bytes, downloads under way included. A pool that is larger is read without it."""

    @field_validator("endpoint")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        if value is not None and (_SECRET_IN_URL.search(value) or not re.fullmatch(r"https?://[^/?#\s]+/?", value)):
            raise ValueError("must be http(s)://HOST[:PORT] without a password, path or query")
        return value


@dataclass(frozen=True)
class _Address:
    """What is needed to reach a store, but for credentials."""

    scheme: str
    url: str
    bucket: str
    region: str | None
    endpoint: str | None

    def connect(self, config: StoreConfig, attempts: int) -> fs.FileSystem:
        if self.scheme != "s3":
            if self.scheme in ("gs", "gcs"):
                return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=config.deadline))
            return fs.FileSystem.from_uri(self.url)[0]
        protocol, _, host = (self.endpoint or "https://").rstrip("/").rpartition("://")
        return fs.S3FileSystem(
            region=self.region if self.region or self.endpoint else fs.resolve_s3_region(self.bucket),
            endpoint_override=host or None,
            scheme=protocol,
            request_timeout=min(_SILENCE, config.deadline),
            connect_timeout=min(_CONNECT, config.deadline),
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
            check_directory_existence_before_creation=True,
        )


def unreadable(what: str, error: OSError) -> DataError:
    """The error to raise when a file cannot be read: a DataFailure where another try may go better."""
    kind = DataError if isinstance(error, NOT_THERE) else DataFailure
    return kind(f"{what} must be readable; got {error}. Check the disk or the network.")


def open_store(url: str, config: StoreConfig | None = None) -> tuple[fs.FileSystem, str]:
    """The filesystem behind a URL, and the path inside it. Nothing is asked of the store yet.

    Args:
        url: `s3://bucket/folder` (also with `?region=...&endpoint_override=host:port&scheme=http`), `gs://`, or
            another that `pyarrow.fs` knows.
        config: `data.store.*`.

    Raises:
        DataError: the URL carries credentials, or is of a kind that cannot hold a pool.
    """
    config = config or StoreConfig()
    shown = url.partition("?")[0].rpartition("@")[2] if _SECRET_IN_URL.search(url) else url
    scheme = url.partition(":")[0].lower()
    if _SECRET_IN_URL.search(url):
        raise DataError(
            f"URL of a pool must not carry credentials; got one at {shown}. Give them by the environment "
            f"(AWS_ACCESS_KEY_ID, ...), ~/.aws or the machine's role."
        )
    if scheme in ("http", "https"):
        raise DataError(
            f"pool must be a folder or a URL such as s3://bucket/pool; got {shown}, and a web server promises neither "
            f"reads by range nor unchanged bytes. Copy the pool, or set data.store.endpoint to an S3 server."
        )
    try:
        if scheme == "file":
            filesystem, folder = fs.FileSystem.from_uri(url)
            return filesystem, folder.rstrip("/")
        address, folder = _address(url, scheme, config)
    except pa.ArrowException as error:
        raise DataError(
            f"pool must be a folder or a URL such as s3://bucket/pool; got {shown}: {error}. Give another."
        ) from error
    return fs.PyFileSystem(_Store(address, config)), folder


def patiently(filesystem: fs.FileSystem, act: Callable[[fs.FileSystem], Result], path: str) -> Result:
    """What `act` gives: of a store of `open_store`, tried again with growing pauses until its deadline.

    Args:
        filesystem: what `act` is given, or for a store its own client.
        act: may be done twice: a whole file is written, a folder is removed.
        path: what it is about, for the texts.

    Raises:
        OSError: of a local disk at once; of a store FileNotFoundError and PermissionError at once, and TimeoutError.
    """
    store = getattr(filesystem, "handler", None)
    if isinstance(store, _Store):
        # a file has many parts: each of them may fail twice before all is sent anew
        return store.patient(lambda: act(store.client(attempts=3)), path)
    return act(filesystem)


def _address(url: str, scheme: str, config: StoreConfig) -> tuple[_Address, str]:
    parts = urlsplit(url)
    given = dict(parse_qsl(parts.query))
    unknown = sorted(set(given) - set(_IN_URL)) if scheme == "s3" else []
    if unknown or (scheme in ("s3", "gs", "gcs") and not parts.netloc):
        what = f"?{unknown[0]}=" if unknown else "no bucket"
        raise DataError(
            f"URL of a pool must read {scheme}://BUCKET/FOLDER, for S3 with {', '.join(_IN_URL)} at most; got {what} "
            f"in {url}. Change it, or set data.store.*."
        )
    folder = f"{parts.netloc}/{unquote(parts.path).strip('/')}".rstrip("/")
    if scheme not in ("s3", "gs", "gcs"):
        return _Address(scheme, url, "", None, None), fs.FileSystem.from_uri(url)[1].rstrip("/")
    endpoint = config.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if "endpoint_override" in given:
        host = given["endpoint_override"].rpartition("://")[2]
        endpoint = f"{given.get('scheme', 'https')}://{host}"
    regions = (given.get("region"), config.region, os.environ.get("AWS_REGION"), os.environ.get("AWS_DEFAULT_REGION"))
    return _Address(scheme, url, parts.netloc, next(filter(None, regions), None), endpoint), folder


class _Store(fs.FileSystemHandler):
    """A remote filesystem whose reads are patient. May be pickled: each process makes its own connections."""

    def __init__(self, address: _Address, config: StoreConfig) -> None:
        self.address, self.config = address, config
        self._made: dict[int, fs.FileSystem] = {}
        self._process = os.getpid()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.address, self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Store) and (self.address, self.config) == (other.address, other.config)

    def __hash__(self) -> int:
        return hash(self.address)

    def client(self, attempts: int = 1) -> fs.FileSystem:
        """The store's own filesystem, which tries that often by itself."""
        if self._process != os.getpid():  # the threads of the parent's connections stayed there
            self._made, self._process, self._lock = {}, os.getpid(), threading.Lock()
        with self._lock:
            if attempts not in self._made:
                self._made[attempts] = self.address.connect(self.config, attempts)
            return self._made[attempts]

    @property
    def writer(self) -> fs.FileSystem:
        """For what cannot be tried again from outside, since bytes are gone once they are handed over."""
        return self.client(attempts=8)

    def patient(self, act: Callable[[], Result], path: str) -> Result:
        """What `act` gives, tried again with growing random pauses.

        Raises:
            FileNotFoundError, PermissionError: will not go better.
            TimeoutError: the deadline has passed; the text holds the last cause.
        """
        began, tries = time.monotonic(), 0
        while True:
            try:
                return act()
            except OSError as error:
                _raise_if_lasting(error, path, self)
                tries += 1
                pause = min(_FIRST_WAIT * 2 ** (tries - 1), _LONGEST_WAIT) * (0.5 + 0.5 * _draws.random())
                passed = time.monotonic() - began
                if passed + pause > self.config.deadline or not threading.main_thread().is_alive():
                    raise TimeoutError(
                        f"no answer of {self.where} within {self.config.deadline:g} s (data.store.deadline) in "
                        f"{tries} tries, the last: {_short(error)}"
                    ) from error
                if tries in (4, 12):
                    _log.warning("%s: %d tries failed, the last: %s; going on", path, tries, _short(error))
            time.sleep(pause)

    @property
    def where(self) -> str:
        """For people: scheme and server."""
        return f"{self.address.scheme}:// at {self.address.endpoint or 'its own address'}"

    def open_input_file(self, path: str) -> pa.NativeFile:
        file = self.patient(lambda: self.client().open_input_file(path), path)
        return pa.PythonFile(_RemoteFile(self, file, path), mode="r")

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return self.patient(lambda: self.client().get_file_info(paths), paths[0] if paths else "")

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return self.patient(lambda: self.client().get_file_info(selector), selector.base_dir)

    def get_type_name(self) -> str:
        return self.address.scheme

    def normalize_path(self, path: str) -> str:
        return path

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return self.writer.open_output_stream(path, metadata=metadata or None)

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return self.writer.open_append_stream(path, metadata=metadata or None)

    def create_dir(self, path: str, recursive: bool) -> None:
        self.writer.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self.writer.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.writer.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise PermissionError("all of a store must not be deleted")

    def delete_file(self, path: str) -> None:
        self.writer.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self.writer.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self.writer.copy_file(src, dest)


class _RemoteFile:
    """An open object as Python's file protocol has it, for `pa.PythonFile`."""

    def __init__(self, store: _Store, file: pa.NativeFile, path: str) -> None:
        self._store, self._file, self._path = store, file, path
        self._size = file.size()
        self._at = threading.local()  # pyarrow reads at an offset by `seek`, then `read`, and from several threads
        self.closed = False

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: 0, 1: self.tell(), 2: self._size}[whence]
        self._at.place = base + offset
        return base + offset

    def tell(self) -> int:
        return getattr(self._at, "place", 0)

    def read(self, length: int = -1) -> bytes:
        place = self.tell()
        left = max(self._size - place, 0)
        length = left if length < 0 else min(length, left)
        if not length:
            return b""
        content: bytes = self._store.patient(lambda: self._whole(length, place), self._path)
        self._at.place = place + length
        return content

    def _whole(self, length: int, place: int) -> bytes:
        content: bytes = self._file.read_at(length, place)
        if len(content) != length:  # a connection that was cut, to some servers' clients
            raise ConnectionError(f"the answer ended after {len(content)} of {length} bytes")
        return content

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def flush(self) -> None:
        return None

    def close(self) -> None:
        self.closed = True
        self._file.close()


_draws = random.Random()  # of its own, from the system: pauses must differ between ranks, and move no other generator


def _raise_if_lasting(error: OSError, path: str, store: _Store) -> None:
    """Raise what says why, where another try would change nothing."""
    text, where = str(error), store.where
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        bucket = store.address.bucket
        if bucket and not _there(store, bucket):
            raise FileNotFoundError(f"bucket {bucket} is not there, {where}") from error
        raise type(error)(f"{path} is not there, {where}") from error
    if re.search(r"Bucket '?[^']*'? not found|NO_SUCH_BUCKET", text):
        raise FileNotFoundError(f"bucket {store.address.bucket} is not there, {where}") from error
    status = re.search(r"HTTP status (\d+)", text)
    code = int(status[1]) if status else 0
    denied = "ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|EXPIRED_TOKEN|UNRECOGNIZED_CLIENT"
    if isinstance(error, PermissionError) or code in (401, 403) or re.search(denied, text):
        chain = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws or the machine's role"
        found = "" if store.address.scheme != "s3" or "AWS_ACCESS_KEY_ID" in os.environ else "; not in the environment"
        raise PermissionError(
            f"access to {path} is denied, {where} (credentials are taken from {chain}{found}): {_short(error)}"
        ) from error
    if code in (301, 307, 400):
        region = store.address.region or "the default one"
        raise PermissionError(
            f"the request for {path} is refused, {where}: the bucket may lie in another region than {region} "
            f"(data.store.region), or the endpoint be no S3 server: {_short(error)}"
        ) from error


def _there(store: _Store, bucket: str) -> bool:
    try:
        return bool(store.client().get_file_info(bucket).type != fs.FileType.NotFound)
    except OSError:
        return True  # not known: the file is what was asked for


def _short(error: BaseException) -> str:
    """The cause without what is said elsewhere."""
    return re.sub(r"^When .*?(?=AWS Error|Google Cloud)", "", str(error)).removesuffix(".").replace("\n", " ")
