"""Indexes that stay in a process's memory: the trials of a sweep share processes and read the same pools."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyarrow as pa

LARGEST = 256 << 20
"""Bytes of all indexes that a process keeps; what is beyond is read as it is needed."""
_kept: dict[str, pa.Buffer] = {}
"""By SHA-256 of the content, so that nothing in it can be out of date."""
_keeping = False


@contextmanager
def keep_indexes() -> Iterator[None]:
    """Within, the index of a pool is read once, whole, and stays for later blocks of this process and its forks."""
    global _keeping
    before, _keeping = _keeping, True
    try:
        yield
    finally:
        _keeping = before


def open_kept(open_file: Callable[[], pa.NativeFile], sha256: str) -> pa.NativeFile:
    """An index, from memory where it is kept.

    Args:
        open_file: opens the file, for reads at any offset.
        sha256: of its content, as `pool.json` says; a file of another content is not kept.
    """
    if not _keeping:
        return open_file()
    if sha256 not in _kept:
        file = open_file()
        if file.size() + sum(buffer.size for buffer in _kept.values()) > LARGEST:
            return file
        content = file.read_buffer()
        if hashlib.sha256(content).hexdigest() != sha256:
            return pa.BufferReader(content)  # what is wrong with it shows where it is read
        _kept[sha256] = content
    return pa.BufferReader(_kept[sha256])
