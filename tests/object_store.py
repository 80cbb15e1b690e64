"""A real S3 server on loopback (moto's), and a proxy before it that fails, is slow, or is gone for a while."""

from __future__ import annotations

import http.client
import importlib.util
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from pyarrow import fs

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "tester", "AWS_EC2_METADATA_DISABLED": "true"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


@contextmanager
def moto_server(log: Path) -> Iterator[str]:
    """Address host:port of a server that lives as long as the block."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("needs moto's S3 server: pip install 'raysemi[dev]'")
    port = free_port()
    with log.open("wb") as out:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | CREDENTIALS)
    try:
        until = time.monotonic() + 60
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, "moto's server did not come up"
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def client(address: str) -> fs.S3FileSystem:
    """A plain client, to fill buckets with."""
    return fs.S3FileSystem(
        endpoint_override=address, scheme="http", region="us-east-1", allow_bucket_creation=True,
        allow_bucket_deletion=True,
    )  # fmt: skip


def upload(source: Path, address: str, destination: str) -> None:
    """Copies a local folder to bucket/folder."""
    store = client(address)
    store.create_dir(destination.partition("/")[0])
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        with store.open_output_stream(f"{destination}/{file.relative_to(source).as_posix()}") as out:
            out.write(file.read_bytes())


class Request(NamedTuple):
    """What the proxy was asked for."""

    method: str
    path: str
    first: int
    """First byte of the range, 0 without one."""
    length: int
    """Bytes of the range, 0 without one."""


class Proxy:
    """Hands requests on to the server, and keeps a list of them.

    Args:
        upstream: host:port of the server.
        fails: share of the requests that get an error: in turns a status 500, a 503 and a cut connection.
        slow: share of the requests that are answered late.
        delay: seconds, of those.
        answer: status that every request gets instead, with the region header of a bucket that lies elsewhere.
    """

    def __init__(
        self, upstream: str, *, fails: float = 0.0, slow: float = 0.0, delay: float = 0.3, answer: int = 0,
        wait: float = 0.0,
    ) -> None:  # fmt: skip
        self.upstream, self.fails, self.slow, self.delay, self.answer = upstream, fails, slow, delay, answer
        self.wait = wait
        self.requests: list[Request] = []
        self.failed = 0
        self.late = 0
        self.refused = 0
        self.pause_after: int | None = None
        self._draws = random.Random(5)
        self._lock = threading.Lock()
        self.port = free_port()
        self._server: ThreadingHTTPServer | None = None
        self.up()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reads(self, suffix: str = ".tar") -> list[Request]:
        """The reads of objects so named."""
        return [one for one in self.requests if one.method == "GET" and one.path.endswith(suffix)]

    def up(self) -> None:
        proxy = self

        class Handler(_Handler):
            owner = proxy

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 64

            def handle_error(self, request: object, client_address: object) -> None:
                return None  # a client that went away

        self._server = Server(("127.0.0.1", self.port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def down(self) -> None:
        """Nothing listens any more."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self._thread.join(10)

    def die_for(self, seconds: float) -> threading.Thread:
        """Goes away, and comes back by itself under the same address."""

        def act() -> None:
            self.down()
            time.sleep(seconds)
            self.up()

        thread = threading.Thread(target=act)
        thread.start()
        return thread

    def fate(self) -> str:
        with self._lock:
            if self.pause_after is not None and len(self.requests) >= self.pause_after:
                self.pause_after = None
                self.died = self.die_for(1.0)
            if self._server is None:
                self.refused += 1
                return "cut"
            draw = self._draws.random()
            if draw < self.fails:
                self.failed += 1
                return ("500", "503", "cut")[self.failed % 3]
            if draw < self.fails + self.slow:
                self.late += 1
                return "late"
            return "well"


class _Handler(BaseHTTPRequestHandler):
    owner: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a content that is sent behind its headers waits 40 ms for their receipt

    def log_message(self, *_: object) -> None:
        return None

    def _handle(self) -> None:
        owner = self.owner
        body = self._body()
        first, last = 0, -1
        if wanted := self.headers.get("Range"):
            first, last = (int(end) for end in wanted.removeprefix("bytes=").split("-"))
        owner.requests.append(Request(self.command, self.path.partition("?")[0], first, last - first + 1))
        fate = str(owner.answer) if owner.answer else owner.fate()
        time.sleep(owner.delay if fate == "late" else owner.wait)
        if fate == "cut":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fate.isdigit():
            self.send_response(int(fate))
            self.send_header("Content-Length", "0")
            self.send_header("x-amz-bucket-region", "eu-central-1")
            self.end_headers()
            return
        onward = http.client.HTTPConnection(owner.upstream, timeout=30)
        try:
            hop = ("connection", "transfer-encoding")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in hop}
            onward.request(self.command, self.path, body=body or None, headers=headers)
            answer = onward.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(content)
        finally:
            onward.close()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            continue
        return body

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle
