"""Memory of a rank: the most it has taken so far, what its device has, and errors that mean it was not enough."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

_SIGNS = (
    "DefaultCPUAllocator",
    "bad_alloc",
    "out of memory",
    "ALLOC_FAILED",  # cuBLAS, cuDNN
    "could not create a memory",  # oneDNN
    "Cannot allocate memory",
)
"""Parts of the texts of errors that are no `MemoryError` and mean the same."""


def peak_bytes(device: torch.device) -> int:
    """What CUDA's allocator held of a GPU at most; on other devices `resident_bytes`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()


def resident_bytes() -> int:
    """Largest resident memory of this process, imported libraries included."""
    status = Path("/proc/self/status")
    if status.exists():
        # not getrusage: on Linux its maximum outlives exec, so a spawned process would begin with its parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_bytes(device: torch.device) -> int:
    """What a GPU has; on other devices what this process may take: the machine's memory, or its limit where that is
    lower (ulimit, the container's)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    files = map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    limits += [int(text) for file in files if file.is_file() and (text := file.read_text().strip()).isdigit()]
    return min(limits)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on whatever device and in whatever library."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def gib(number: float) -> str:
    """A number of bytes for people: 1.25 GiB."""
    return f"{number / 2**30:.2f} GiB"
