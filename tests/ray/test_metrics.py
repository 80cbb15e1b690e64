"""A run on a Ray head of this machine, scraped by a real Prometheus with the configuration and the rules of infra/."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from makers import tiny_run

from raysemi import config_io
from raysemi.launch.cluster import _read_again
from raysemi.launch.metrics import METRICS
from raysemi.launch.train import launch

INFRA = Path(__file__).parents[2] / "infra/prometheus"
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # of Ray's own code
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (Debian's package of that name)"),
]


@pytest.fixture
def head() -> Iterator[Path]:
    """The folder of a Ray head with a token and a dashboard, which lists the nodes; this process is connected to it."""
    import ray

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rs-", ignore_cleanup_errors=True))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        _read_again()  # tests before this one may have had another token
        ray.init(
            address="local", num_cpus=1, include_dashboard=True, dashboard_port=free_port(), _temp_dir=folder,
            object_store_memory=100 << 20, log_to_driver=False, logging_level=logging.ERROR,
        )  # fmt: skip
        stack.callback(ray.shutdown)
        yield Path(folder)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def ask(head: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """ask(path, **parameters) -> the data of an answer of a Prometheus that scrapes the head each second."""
    config = yaml.safe_load((INFRA / "prometheus.yaml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    discovery = config["scrape_configs"][0]["file_sd_configs"][0]
    discovery["files"] = [str(head / Path(path).name) for path in discovery["files"]]
    discovery["refresh_interval"] = "1s"
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.copy(INFRA / "rules.yaml", tmp_path)
    port = free_port()
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)

    def ask(path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    try:
        yield ask
    finally:
        server.terminate()
        server.wait(20)


def test_a_run_is_seen_by_prometheus(ask: Callable[..., Any], scenes: Path, tmp_path: Path) -> None:
    settings = ["train.steps=100000", "eval.every=20", "train.checkpoint_every=30", "ray.num_workers=1"]
    settings += ["ray.cpus_per_worker=1", "data.on_corrupt=skip", "train.log_every=5"]
    config = config_io.change(tiny_run(scenes, tmp_path / "run", "derprop"), settings)
    wanted = {f"ray_{name}" for name in METRICS}
    seen: dict[str, list[Any]] = {}
    told: dict[str, float] = {}
    since = time.monotonic()

    def look(step: int, metrics: dict[str, float]) -> None:
        told.update(metrics | {"step": step})
        for one in ask("query", query='{__name__=~"ray_raysemi_.*"}')["result"]:
            seen.setdefault(one["metric"]["__name__"], []).append(one)
        if (seen.keys() >= wanted and step > 40) or time.monotonic() - since > 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(config, look)
    assert seen.keys() == wanted

    def last(name: str, **labels: str) -> float:
        found = [one for one in seen[f"ray_raysemi_{name}"] if labels.items() <= one["metric"].items()]
        assert found, (name, labels)
        assert {(one["metric"]["run"], one["metric"]["method"]) for one in found} == {(config.run, "derprop")}
        return float(found[-1]["value"][1])

    assert 0 < last("step") <= told["step"]
    assert last("target_step") == 100000
    assert last("miou_ratio") in (pytest.approx(told["eval/miou"] / 100, abs=0.3), 0.0)
    assert 0 <= last("kept_ratio") <= 1
    assert last("images_per_second", kind="labeled") == last("images_per_second", kind="unlabeled") > 0
    assert last("step_seconds") == pytest.approx(2 / last("images_per_second", kind="labeled"), rel=1e-6)
    assert abs(time.time() - last("progress_timestamp_seconds")) < 60
    assert 0 < time.time() - last("checkpoint_timestamp_seconds") < 100
    assert last("pool_passes", pool="labeled") > last("pool_passes", pool="unlabeled") > 0
    assert last("loss", term="total") > 0
    rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert len(rules) == len(yaml.safe_load((INFRA / "rules.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"])
    assert ask("targets")["activeTargets"][0]["health"] == "up"
