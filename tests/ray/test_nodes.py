"""Several local nodes: one goes in the middle of a run and another comes; the run ends as one process would."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from makers import tiny_run

from raysemi import config_io
from raysemi.errors import RaysemiError
from raysemi.launch.restore import load_network
from raysemi.launch.train import launch

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]  # of Ray's own code


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A cluster whose head has no CPU for workers, and two nodes of one CPU; this process is connected to it."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # it kills workers for what other processes take
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def give_notice(address: str, node_id: str) -> None:
    """What a cloud's provider tells Ray before it takes a spot machine back."""
    import ray
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = round((time.time() + 120) * 1000)
    accepted, why = ray._raylet.GcsClient(address=address).drain_node(node_id, reason, "spot", deadline_ms)
    assert accepted, why


@pytest.mark.skipif("RAYSEMI_SOAK" not in os.environ, reason="minutes of starting workers: a part of `make soak`")
def test_workers_leave_and_join_and_the_run_ends_the_same(
    nodes: Any, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """2 workers, a notice, 1, a new node, 2, which vanishes, 1, Ctrl-C: each step once, to the weights of one rank."""
    import ray

    settings = ["train.batch.unlabeled=4", "model.batch_norm=frozen", "train.checkpoint_every=5", "optim.lr=0.0001"]
    settings += ["method.threshold=0.145", "train.steps=100000", "eval.every=100000", "train.log_every=1"]
    alone = tiny_run(scenes, tmp_path / "alone", "fixmatch", *settings)
    changes = [f"run={tmp_path / 'elastic'}", "ray.num_workers=[1, 2]", "ray.cpus_per_worker=1", "ray.resize_every_s=2"]
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes.list_all_nodes() if node.node_id not in (here, nodes.head_node.node_id)]
    losses: dict[int, float] = {}
    stages: list[int] = []

    def disturb(step: int, metrics: dict[str, float]) -> None:
        assert losses.get(step, metrics["loss/total"]) == pytest.approx(metrics["loss/total"], abs=1e-5)
        losses[step] = metrics["loss/total"]
        if len(stages) > caplog.text.count("steps were lost") or step < (stages[-1] if stages else 0) + 10:
            return
        stages.append(step)
        if len(stages) == 1:
            give_notice(nodes.address, others[0].node_id)
        elif len(stages) == 2:
            others.append(nodes.add_node(num_cpus=1, object_store_memory=100 << 20))
        elif len(stages) == 3:
            nodes.remove_node(others[-1], allow_graceful=False)
        else:
            raise KeyboardInterrupt

    caplog.set_level(logging.INFO, logger="raysemi")
    with pytest.raises(KeyboardInterrupt):
        launch(config_io.change(alone, changes), disturb)
    text = caplog.text
    lost = [int(steps) for steps in re.findall(r"(\d+) steps were lost", text)]
    assert lost[:2] == [0, 0]  # told beforehand, and asked before there were more workers
    assert 0 <= lost[2] <= 2 * 5 + 1  # the checkpoint under way was not finished
    assert len(lost) == 3
    assert "there is room for 2 workers" in text
    assert text.count("Starting again") == 1
    end = load_network(tmp_path / "elastic").step
    assert sorted(losses) == list(range(1, max(losses) + 1))
    launch(config_io.change(alone, [f"train.stop_at={end}"]))
    weights, elastic = (load_network(tmp_path / name).network.state_dict() for name in ("alone", "elastic"))
    for name, value in weights.items():
        torch.testing.assert_close(value, elastic[name], rtol=1e-3, atol=1e-4)


def test_only_numbers_that_fit_count_and_running_workers_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy that Ray's controller runs, on rooms of several nodes, one of which is being taken back."""
    import ray
    from ray.train import ScalingConfig
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision

    from raysemi.launch.elastic import FittingSizes

    asked: list[str] = []
    board = SimpleNamespace(ask=SimpleNamespace(remote=asked.append))
    scaling = ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 2}, elastic_resize_monitor_interval_s=0)
    policy = FittingSizes(scaling, [1, 2, 4, 8], board, 0.2)
    room = {"one": {"CPU": 8.0}, "two": {"CPU": 3.0}, "leaving": {"CPU": 64.0}}
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: {"leaving": 0})
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: room)
    for really, started in ((3, 2), (0, None), (8, 4)):  # of 5; a machine that vanished a moment ago still counts
        monkeypatch.setattr(policy, "_is_there", really.__ge__)
        decision = policy.make_decision_for_non_running_worker_group()
        assert getattr(decision, "num_workers", None) == started

    def running(workers: int) -> Any:
        state: Any = SimpleNamespace(start_time=float("-inf"), num_workers=workers)
        return policy.make_decision_for_running_worker_group(state, None)

    assert isinstance(running(4), NoopDecision)
    with monkeypatch.context() as vanished:
        vanished.setattr(policy, "_is_there", (1).__ge__)
        assert isinstance(running(2), NoopDecision)
    assert asked == []
    assert isinstance(running(2), NoopDecision)  # Ray would have killed them
    assert asked == ["there is room for 4 workers"]
    room.clear()
    room["one"] = {"CPU": 1.0}
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    time.sleep(0.3)
    with pytest.raises(RaysemiError, match=r"must have room for 1 worker within ray\.start_timeout_s, 0\.2 s"):
        policy.make_decision_for_non_running_worker_group()
