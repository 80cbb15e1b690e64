"""Ray Train's elastic scaling, held to the numbers of workers that the batches can be spread over.

With `ScalingConfig(num_workers=(min, max))` Ray starts any number between the two that the cluster has room for, and
restarts the workers without a word when there is room for another number. Here only fitting numbers count, and running
workers are asked to save and end first, so that no step is lost. Ray's public settings have no place for either:
`ElasticScalingPolicy` and the hook that hands it to the controller are internal to Ray (2.60); tests/ray runs them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.util.placement_group import placement_group, remove_placement_group

from raysemi.errors import RaysemiError

_PAUSE_S = 0.5
_PROBE_S = 5.0
"""For room that is there: Ray needs a fraction of a second to reserve it."""


class FittingSizes(ElasticScalingPolicy):
    """How many workers run; lives in Ray Train's controller.

    Args:
        scaling: Ray's, with (min, max).
        sizes: numbers of workers that fit.
        board: the actor that workers ask whether to end.
        start_timeout_s: longest wait for the room for the smallest number.
    """

    def __init__(self, scaling: Any, sizes: Sequence[int], board: Any, start_timeout_s: float) -> None:
        super().__init__(scaling)
        self._sizes = sizes
        self._board = board
        self._start_timeout_s = start_timeout_s
        self._waiting_since: float | None = None

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        # Ray counts nodes that are being taken back, though it starts nothing on them any more.
        state: Any = ray._private.state.state
        leaving = state.get_draining_nodes()
        staying = {node: resources for node, resources in reserved_resources.items() if node not in leaving}
        possible = super()._count_possible_workers(staying)
        return max((size for size in self._sizes if size <= possible), default=0)

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Starts the largest number there is room for."""
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            smallest, largest = self._sizes[0], decision.num_workers
            there = (size for size in reversed(self._sizes) if smallest <= size <= largest and self._is_there(size))
            if workers := next(there, 0):
                self._waiting_since = None
                return self._get_resize_decision(workers)
        self._waiting_since = self._waiting_since or time.monotonic()
        if time.monotonic() - self._waiting_since > self._start_timeout_s:
            raise RaysemiError(no_room(self._sizes[0], self._start_timeout_s))
        time.sleep(_PAUSE_S)  # Ray asks again at once
        return NoopDecision()

    def _is_there(self, workers: int) -> bool:
        """Whether so many would start now: Ray counts a machine that vanished until its health checks have failed."""
        group = placement_group([self.scaling_config._resources_per_worker_not_none] * workers)
        try:
            return group.wait(_PROBE_S)
        finally:
            remove_placement_group(group)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Asks the workers to save and end where there is room for another number."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision):
            more = decision.num_workers - worker_group_state.num_workers
            if more > 0 and not self._is_there(more):
                return NoopDecision()
            workers = "a worker" if decision.num_workers == 1 else f"{decision.num_workers} workers"
            self._board.ask.remote(f"there is room for {workers}")
            return NoopDecision()
        return decision


class ElasticTrainer(TorchTrainer):
    """TorchTrainer whose controller has the policy above.

    Args:
        sizes, board, start_timeout_s: of the policy.
        settings: of TorchTrainer.
    """

    def __init__(self, *, sizes: Sequence[int], board: Any, start_timeout_s: float, **settings: Any) -> None:
        super().__init__(**settings)
        self._policy = FittingSizes(self.scaling_config, sizes, board, start_timeout_s)

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        inner: Any = super()  # TorchTrainer's annotations are those of its first version
        return inner._initialize_and_run_controller(**settings | {"scaling_policy": self._policy})


def no_room(workers: int, seconds: float) -> str:
    """What to say of a cluster on which the workers found no room."""
    return (
        f"the cluster must have room for {workers} worker{'s' if workers > 1 else ''} within ray.start_timeout_s, "
        f"{seconds:g} s; got none. Free CPUs and GPUs, ask for fewer (ray.num_workers, ray.cpus_per_worker), or wait "
        "longer."
    )
