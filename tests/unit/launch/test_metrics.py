"""A run's numbers as Prometheus sees them; and that rules, dashboard and docs speak of numbers that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from makers import tiny_run

from raysemi.launch.metrics import METRICS, series

ROOT = Path(__file__).parents[3]
RULES = ROOT / "infra/prometheus/rules.yaml"
DASHBOARD = ROOT / "infra/grafana/raysemi.json"
OF_RAY = {
    "ray_node_cpu_utilization",
    "ray_node_mem_used",
    "ray_node_mem_total",
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
    "ray_node_gram_available",
}
"""Ray 2.60's own, which its agents export."""
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (in Debian's package prometheus)"
)


def test_a_log_line(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, tmp_path / "run", "fixmatch", "train.batch.labeled=3", "train.batch.unlabeled=5")
    line = {
        "loss/total": 0.75,
        "loss/supervised": 0.5,
        "gradient_norm": 2.5,
        "skipped_steps": 4.0,
        "method/kept_ratio": 0.25,
        "method/alpha": 9.0,
        "data/stall": 0.125,
        "images_per_s": 16.0,
        "lr": 0.01,
        "checkpoint/age_s": 30.0,
        "data/skipped": 2.0,
        "data/labeled_passes": 7.5,
        "data/unlabeled_passes": 1.5,
        "data/unlabeled_passes/0": 1.0,
        "data/unlabeled_passes/1": 6.0,
    }
    assert dict(series(config, 40, line, now=1000.0)) == {
        ("raysemi_step", ""): 40.0,
        ("raysemi_progress_timestamp_seconds", ""): 1000.0,
        ("raysemi_checkpoint_timestamp_seconds", ""): 970.0,
        ("raysemi_images_per_second", "labeled"): 6.0,
        ("raysemi_images_per_second", "unlabeled"): 10.0,
        ("raysemi_step_seconds", ""): 0.5,
        ("raysemi_data_stall_ratio", ""): 0.125,
        ("raysemi_loss", "total"): 0.75,
        ("raysemi_loss", "supervised"): 0.5,
        ("raysemi_gradient_norm", ""): 2.5,
        ("raysemi_learning_rate", ""): 0.01,
        ("raysemi_kept_ratio", ""): 0.25,
        ("raysemi_skipped_steps", ""): 4.0,
        ("raysemi_skipped_samples", ""): 2.0,
        ("raysemi_pool_passes", "labeled"): 7.5,
        ("raysemi_pool_passes", "unlabeled"): 1.5,
        ("raysemi_pool_passes", "unlabeled/0"): 1.0,
        ("raysemi_pool_passes", "unlabeled/1"): 6.0,
    }


def test_an_evaluation_and_a_method_without_unlabeled_images(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, tmp_path / "run", "supervised", "train.batch.labeled=3", "train.batch.unlabeled=5")
    found = dict(series(config, 9, {"eval/miou": 40.0, "eval/iou/traffic light": 62.5}, now=0.0))
    assert found["raysemi_miou_ratio", ""] == pytest.approx(0.4)
    assert found["raysemi_class_iou_ratio", "traffic light"] == pytest.approx(0.625)
    found = dict(series(config, 9, {"images_per_s": 6.0, "data/labeled_passes": 2.0}, now=0.0))
    assert found["raysemi_images_per_second", "labeled"] == 6.0
    assert ("raysemi_images_per_second", "unlabeled") not in found
    assert found["raysemi_step_seconds", ""] == 0.5


def test_names_are_those_that_prometheus_wants() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"raysemi(_[a-z]+)+", name)
        assert not name.endswith("_total")  # a counter's ending; these are gauges
        assert metric.meaning.endswith(".")


def expressions(node: Any) -> Iterator[str]:
    """All PromQL of a tree."""
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "expr")
        for value in node.values():
            yield from expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value)


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "tree", [yaml.safe_load(RULES.read_text(encoding="utf-8")), dashboard()], ids=["rules", "dashboard"]
)
def test_every_query_asks_for_a_metric_that_exists(tree: Any) -> None:
    exported = {f"ray_{name}" for name in METRICS}
    asked = {name for query in expressions(tree) for name in re.findall(r"\bray_\w+", re.sub(r"\{[^}]*\}", "", query))}
    assert len(asked) >= 8
    assert asked <= exported | OF_RAY


def test_the_dashboard_shows_every_metric_on_panels_that_do_not_overlap() -> None:
    page = dashboard()
    assert {f"ray_{name}" for name in METRICS} <= {
        name for query in expressions(page) for name in re.findall(r"\bray_raysemi_\w+", query)
    }
    ids = [panel["id"] for panel in page["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in page["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["type"] in ("timeseries", "stat")
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["targets"]
    variables = {one["name"]: one for one in page["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text(encoding="utf-8"))) - {"__all"} == set(variables)
    assert "ray_raysemi_step" in variables["run"]["query"]["query"]


def test_every_alert_says_what_to_do_and_is_tested() -> None:
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"][0]["rules"]
    tests = yaml.safe_load(RULES.with_name("rules_test.yaml").read_text(encoding="utf-8"))["tests"]
    heard: dict[str, set[bool]] = {}
    for case in (case for test in tests for case in test["alert_rule_test"]):
        heard.setdefault(case["alertname"], set()).add(bool(case.get("exp_alerts")))
    for rule in rules:
        assert set(rule["annotations"]) == {"summary", "description"}
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]
        assert True in heard[rule["alert"]]


def test_the_docs_have_each_metric_with_its_meaning_and_each_alert() -> None:
    page = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
    rows = {
        f"| `ray_{name}` |{f' `{metric.label}` ' if metric.label else ' '}| {metric.meaning} |"
        for name, metric in METRICS.items()
    }
    assert rows == {line for line in page.splitlines() if line.startswith("| `ray_")}
    alerts = {rule["alert"] for rule in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"][0]["rules"]}
    assert alerts == {line.split("`")[1] for line in page.splitlines() if line.startswith("| `Raysemi")}


@needs_promtool
def test_the_rules_fire_as_they_should() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", RULES.with_name("rules_test.yaml")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        ["promtool", "check", "config", RULES.with_name("prometheus.yaml")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_dashboards_queries_are_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": query.replace("$run", ".*")}
        for number, query in enumerate(expressions(dashboard()))
    ]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "queries.yaml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_operators_object_holds_the_same_rules() -> None:
    head = RULES.with_name("prometheusrule-head.yaml").read_text(encoding="utf-8")
    body = "".join(f"  {line}" for line in RULES.read_text(encoding="utf-8").splitlines(keepends=True))
    made = yaml.safe_load(head + body)
    assert made["kind"] == "PrometheusRule"
    assert made["spec"] == yaml.safe_load(RULES.read_text(encoding="utf-8"))
