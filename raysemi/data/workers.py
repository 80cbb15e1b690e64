"""Tasks over processes: results as they come, Ctrl-C lets the running ones end, a killed process is told by name."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Protocol, TypeVar

from raysemi.errors import DataFailure

Task = TypeVar("Task")
Result = TypeVar("Result")
_THREADS = 8


class Runner(Protocol):
    """What `run_tasks` does, wherever it is done: here or on the machines of a cluster."""

    def __call__(
        self, work: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Generator[tuple[Task, Result], None, None]:
        """Results of `work` for each task, in the order in which they end; see `run_tasks`."""


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    work: Callable[[Task], Result], tasks: Sequence[Task], processes: int | None, preload: Sequence[str] = ()
) -> Generator[tuple[Task, Result], None, None]:
    """Results of `work` for each task, in the order in which they end.

    Args:
        work: picklable.
        tasks: picklable, each worth seconds of work.
        processes: None: one a core; 1: here, without another process.
        preload: modules that `work` needs; imported once for all processes.

    Raises:
        DataFailure: a process was killed; also whatever `work` raises. Closing the generator, or an error, lets the
            tasks that are running end and starts no others.
    """
    processes = min(processes or usable_cores(), len(tasks))
    if processes <= 1:
        for task in tasks:
            yield task, work(task)
        return
    # fork would copy the locks of the threads of pyarrow and torch; a fork server has none and imports only once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(dict(os.environ),))
    waiting = list(reversed(tasks))
    running: dict[Future[Result], Task] = {}
    try:
        while waiting or running:
            while waiting and len(running) < 2 * processes:  # tasks may be large: only a few travel at a time
                task = waiting.pop()
                running[executor.submit(work, task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise DataFailure(
            "a process must live until its shard is done; got one that was killed, often for lack of memory. Run the "
            "same command again with fewer --processes: finished shards stay."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def read_ahead(
    work: Callable[[Task], Result], tasks: Iterable[Task], *, remote: bool
) -> Iterator[tuple[Task, Callable[[], Result]]]:
    """Each task and what gives its result, in order.

    Args:
        work: waits for an object store more than it computes.
        tasks: in order.
        remote: whether it does wait; then threads are some tasks ahead. Otherwise it is done when the result is asked
            for.
    """
    if not remote:
        yield from ((task, partial(work, task)) for task in tasks)
        return
    with ThreadPoolExecutor(_THREADS) as threads:
        running: deque[tuple[Task, Future[Result]]] = deque()
        for task in tasks:
            running.append((task, threads.submit(work, task)))
            if len(running) > _THREADS:
                first, future = running.popleft()
                yield first, future.result
        for first, future in running:
            yield first, future.result


def _begin(environment: Mapping[str, str]) -> None:
    # a fork server keeps the environment of its start: credentials may have been set or renewed since then
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process: the first one decides
