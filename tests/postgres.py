"""A real PostgreSQL server on loopback, with a password, for the time of a test."""

from __future__ import annotations

import getpass
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from object_store import free_port

USER, PASSWORD = "tester", "not-to-be-seen-7f3a"


class Server:
    """A running one.

    Args:
        tools: folder of its programs.
        data: its folder.
        account: who owns it: it refuses to be root.
    """

    def __init__(self, tools: Path, data: Path, account: str) -> None:
        self.port = free_port()
        self._tools, self._data = tools, data
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._as = {"user": account, "group": pwd.getpwnam(account).pw_gid, "extra_groups": []}
        password = data / "password"
        password.write_text(PASSWORD)
        if self._as:
            for path in (data, password):
                shutil.chown(path, account, self._as["group"])
        initdb = [tools / "initdb", "-D", data / "db", "-U", USER, "-A", "scram-sha-256", f"--pwfile={password}"]
        made = subprocess.run(
            [*initdb, "-N", "-E", "UTF8", "--locale=C"], cwd=data, capture_output=True, text=True, **self._as
        )
        assert made.returncode == 0, made.stderr
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Starts it (again), and waits until it answers."""
        import psycopg

        given = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        options = [part for name, value in given.items() for part in ("-c", f"{name}={value}")]
        line = [self._tools / "postgres", "-D", self._data / "db", "-p", str(self.port), *options]
        with (self._data / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(line, cwd=self._data, stdout=log, stderr=log, **self._as)
        until = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self._conninfo("postgres")).close()
                return self.process
            except psycopg.OperationalError:
                said = (self._data / "log.txt").read_text()
                assert self.process.poll() is None, said
                assert time.monotonic() < until, said
                time.sleep(0.1)

    def stop(self) -> None:
        """Ends it at once, and all its connections."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)

    def database(self, name: str) -> str:
        """Makes a new one; its URL without the password."""
        import psycopg

        with psycopg.connect(self._conninfo("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{name}"

    def _conninfo(self, name: str) -> str:
        return f"host=127.0.0.1 port={self.port} user={USER} password={PASSWORD} dbname={name} connect_timeout=5"


@contextmanager
def postgres_server() -> Iterator[Server]:
    """A server that lives as long as the block; skips where there is none."""
    found = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), reverse=True)]
    tools = [Path(path).resolve().parent for path in found if path]
    if not tools:
        pytest.skip("needs PostgreSQL's initdb and postgres")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("needs psycopg: pip install 'raysemi[postgres]'")
    account = getpass.getuser()
    if os.geteuid() == 0:
        account = "postgres" if "postgres" in {one.pw_name for one in pwd.getpwall()} else "nobody"
    # not below pytest's own folder, which only the account that runs the tests may enter
    data = Path(tempfile.mkdtemp(prefix="raysemi-postgres-"))
    try:
        server = Server(tools[0], data, account)
        yield server
        if server.process.poll() is None:
            server.stop()
    finally:
        shutil.rmtree(data, ignore_errors=True)
