"""Most memory that a process has taken so far."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


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
