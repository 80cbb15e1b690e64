"""Tasks over the machines of a Ray cluster, with the promises of `raysemi.data.workers.run_tasks`.

Only a few tasks a CPU travel at a time. Ray begins a task again whose worker or machine died; what a task raises ends
the work. Nothing of the results depends on where a task runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from raysemi.data.workers import Result, Runner, Task
from raysemi.errors import DataFailure, RaysemiError

_RETRIES = 5
"""Times that Ray begins a task again after a death."""
_TASKS_A_CPU = 2
_POLL_S = 5.0
"""Between looks at how many CPUs the cluster has: it may grow."""
_LAST_S = 60.0
"""For the tasks that run when one has failed: the next command should not meet them."""


@contextmanager
def runner(ray: str, processes: int | None, paths: Mapping[str, object]) -> Iterator[Runner | None]:
    """What `--ray` asks for.

    Args:
        ray: `none`; `local`, workers of a new Ray on this machine; `auto`, the cluster that this machine belongs to; or
            an address.
        processes: tasks at once; None: as many as there are CPUs.
        paths: option -> path that the tasks read or write.

    Yields:
        What runs tasks over the cluster; None for `none`.

    Raises:
        ConfigError: a relative path on a cluster of several machines.
        RaysemiError: the cluster does not answer.
    """
    if ray == "none":
        yield None
        return
    from raysemi.config import RayConfig  # imports torch: seconds that only this needs
    from raysemi.launch.cluster import connected, cores, ctrl_c_wins, refuse_relative_paths

    config = RayConfig(address=ray, num_workers=processes or cores(), cpus_per_worker=1)
    with ctrl_c_wins(), connected(config) as cluster:
        if not cluster.here:
            named = ((option, None if path is None else str(path)) for option, path in paths.items())
            refuse_relative_paths(named, "--ray local")
        yield _Spread(processes)


class _Spread:
    """A `Runner` over the cluster that this process is connected to."""

    def __init__(self, most: int | None) -> None:
        self._most = most

    def __call__(
        self, work: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Generator[tuple[Task, Result], None, None]:
        """See `Runner`.

        Raises:
            DataFailure: a worker died again and again; also whatever `work` raises.
        """
        import ray

        remote: Any = ray.remote(num_cpus=1, max_retries=_RETRIES)(_call)
        shared = ray.put(work)
        waiting = list(reversed(tasks))
        running: dict[Any, Task] = {}
        try:
            while waiting or running:
                most = self._most or _TASKS_A_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
                while waiting and len(running) < most:
                    task = waiting.pop()
                    running[remote.remote(shared, task)] = task
                for done in ray.wait(list(running), num_returns=1, timeout=_POLL_S)[0]:
                    task = running.pop(done)
                    yield task, _result(done, task)
        except Exception:
            # No `ray.cancel`, here or after Ctrl-C: where a task ends at that moment, it aborts this process
            # (ray-project/ray#54527). What still runs then ends with the connection.
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_LAST_S)
            raise


def _call(work: Callable[[Task], Result], task: Task) -> Result:
    """What each of Ray's workers does."""
    return work(task)


def _result(reference: Any, task: object) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaysemiError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        first = str(error).strip().splitlines()[0]
        raise DataFailure(
            f"a worker must live until {task} is done; got {_RETRIES + 1} that did not, the last: {first} Run the same "
            "command again, where memory is the cause with fewer --processes."
        ) from error
