"""The only file that names torch.distributed: starting a process group, what ranks tell each other."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from raysemi.errors import ConfigError
from raysemi.methods.base import AcrossRanks, SingleRank


class ProcessGroup:
    """Sums, maxima and parts of the ranks of torch's default process group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks; the argument is left as it is, the result carries no gradient."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """Maximum over ranks; the argument is left as it is, the result carries no gradient."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def gather(self, value: Tensor) -> Tensor:
        """The values of all ranks by rank, [world, ...]; the result carries no gradient."""
        value = value.detach().contiguous()
        result = value.new_empty((self.world, *value.shape))
        dist.all_gather(list(result.unbind()), value)
        return result

    @staticmethod
    def _reduce(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        result = value.detach().clone()
        dist.all_reduce(result, op=operation)
        return result


def world_from_environment() -> int:
    """Ranks that torchrun started, 1 without torchrun; Ray Train's workers have a process group already."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE must be a whole number from 1; got {text!r}. Unset it or start with torchrun.")
    return int(text)


def collective_timeout_s(hang_after_s: float = 0.0) -> float:
    """How long a collective may wait for the slowest rank before it fails, seconds.

    Longer than what a rank may take for a step, so that where one hangs all tell their stacks first.
    """
    return max(1800.0, 2 * hang_after_s)


def join(hang_after_s: float = 0.0) -> AcrossRanks:
    """Joins the process group that exists or that torchrun's environment describes; one process otherwise.

    Args:
        hang_after_s: how long a rank may take for a step, seconds.
    """
    if not dist.is_initialized() and world_from_environment() > 1:
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            timeout=timedelta(seconds=collective_timeout_s(hang_after_s)),
        )
    return ProcessGroup() if dist.is_initialized() else SingleRank()


def join_alone(device: torch.device) -> None:
    """Makes a process group of this process alone, for a library that cannot do without one; none if there is one."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]  # documented, and not in its __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone, or does not answer."""
    # gloo's are plain RuntimeErrors
    words = ("gloo/", "Connection closed by peer", "Connection reset by peer", "NCCL", "ProcessGroup")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def start_average(value: Tensor, across: AcrossRanks) -> Callable[[], object]:
    """Begins to replace a contiguous tensor by its mean over ranks; what is returned waits for it (on CUDA, the device
    waits and the host does not)."""
    if across.world == 1:
        return lambda: None
    work = dist.all_reduce(value.div_(across.world), async_op=True)
    wait: Callable[[], object] = work.wait
    return wait


def leave() -> None:
    """Leaves a process group that `join` made; without one it does nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_at_exit() -> None:
    """Leaves the process group when this process ends: torchrun's ranks cannot join a second time.

    For the end of work that went well: after an error on one rank alone, leaving could wait for the others.
    """
    if dist.is_initialized():
        atexit.register(leave)


def barrier(across: AcrossRanks) -> None:
    """Waits until every rank is here."""
    if across.world > 1:
        dist.barrier()


def gather(texts: list[str], across: AcrossRanks) -> list[str]:
    """The texts of all ranks, by rank, on every rank; all ranks must call it, and none returns before all have."""
    if across.world == 1:
        return texts
    parts: list[list[str]] = [[] for _ in range(across.world)]
    dist.all_gather_object(parts, texts)
    return [text for part in parts for text in part]


def local_device(accelerator: bool = True) -> torch.device:
    """This rank's device: its CUDA device, Apple's MPS for a single process, else the CPU."""
    if accelerator and torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if accelerator and torch.backends.mps.is_available() and world_from_environment() == 1:
        return torch.device("mps")
    return torch.device("cpu")
