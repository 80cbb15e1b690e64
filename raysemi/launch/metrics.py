"""A run's numbers for Prometheus: gauges that Ray's agent on the driver's node serves, each as `ray_` and its name.

The driver tells them, as it hears them from rank 0: it lives as long as the run, through all restarts of workers, so a
run whose workers are gone is still seen to stand still. Ray's agent forgets a gauge that was not set again for two of
its report intervals, so each is set every second; and a run that has ended is gone after some seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raysemi.config import RunConfig

_REFRESH_S = 1.0
"""Ray reports no more often, so this is enough whatever its interval."""


@dataclass(frozen=True)
class Metric:
    """A gauge.

    Args:
        meaning: for people, with its unit.
        source: the name in metrics.parquet; or, ending in `/`, names whose rest is the label's value.
        label: what tells its series apart, beside `run` and `method`.
        factor: source to base unit.
    """

    meaning: str
    source: str = ""
    label: str = ""
    factor: float = 1.0


METRICS = {
    "raysemi_step": Metric("Steps done, of the whole run."),
    "raysemi_target_step": Metric("Step at which the run ends: train.stop_at, else train.steps."),
    "raysemi_progress_timestamp_seconds": Metric("Unix time at which steps or an evaluation were last told of."),
    "raysemi_restarts": Metric("Times that this launch has started its workers again."),
    "raysemi_checkpoint_timestamp_seconds": Metric(
        "Unix time of the newest whole checkpoint; of the launch before its first one."
    ),
    "raysemi_images_per_second": Metric("Images of all workers, evaluations and saves left out.", label="kind"),
    "raysemi_step_seconds": Metric("Time of a step, its wait for data included, evaluations and saves left out."),
    "raysemi_data_stall_ratio": Metric("Share of that time in which steps wait for their batch.", "data/stall"),
    "raysemi_loss": Metric("Losses; total is what is minimised.", "loss/", "term"),
    "raysemi_gradient_norm": Metric("Norm of the gradient.", "gradient_norm"),
    "raysemi_learning_rate": Metric("Learning rate of the optimizer's first group.", "lr"),
    "raysemi_kept_ratio": Metric("Share of the unlabeled pixels whose pseudo-label counts.", "method/kept_ratio"),
    "raysemi_threshold": Metric("Confidence from which on a pseudo-label counts.", "method/threshold"),
    "raysemi_miou_ratio": Metric("mIoU on data.val, 0 to 1.", "eval/miou", factor=0.01),
    "raysemi_class_iou_ratio": Metric("IoU of each class on data.val, 0 to 1.", "eval/iou/", "class", 0.01),
    "raysemi_skipped_steps": Metric("Steps of the run whose loss or gradient was not finite.", "skipped_steps"),
    "raysemi_skipped_samples": Metric("Corrupt samples passed over, with data.on_corrupt=skip.", "data/skipped"),
    "raysemi_pool_passes": Metric("Times that each image of a pool has been seen, on average.", label="pool"),
}
"""All of them; docs/observability.md has the same table."""

Series = tuple[str, str]
"""Name of a metric and its label's value; the latter empty where it has no label."""


def series(config: RunConfig, step: int, metrics: Mapping[str, float], now: float) -> Iterator[tuple[Series, float]]:
    """What a log line or an evaluation says, for Prometheus.

    Args:
        config: the run.
        step: steps done.
        metrics: by their names in metrics.parquet.
        now: unix time.
    """
    yield ("raysemi_step", ""), float(step)
    yield ("raysemi_progress_timestamp_seconds", ""), now
    if "checkpoint/age_s" in metrics:
        yield ("raysemi_checkpoint_timestamp_seconds", ""), now - metrics["checkpoint/age_s"]
    if rate := metrics.get("images_per_s"):
        batch = {"labeled": config.train.batch.labeled}
        if "data/unlabeled_passes" in metrics:
            batch["unlabeled"] = config.train.batch.unlabeled
        yield ("raysemi_step_seconds", ""), sum(batch.values()) / rate
        for kind, images in batch.items():
            yield ("raysemi_images_per_second", kind), rate * images / sum(batch.values())
    for source, value in metrics.items():
        kind, passes, number = source.removeprefix("data/").partition("_passes")
        if passes:
            yield ("raysemi_pool_passes", kind + number), value  # a mixture's: unlabeled, unlabeled/0, unlabeled/1
        for name, metric in METRICS.items():
            if source == metric.source:
                yield (name, ""), value * metric.factor
            elif metric.label and metric.source and source.startswith(metric.source):
                yield (name, source.removeprefix(metric.source)), value * metric.factor


class Exporter:
    """Sets the gauges of a run; in a process that is connected to Ray.

    Args:
        config: the run.
    """

    def __init__(self, config: RunConfig) -> None:
        from ray.util.metrics import Gauge

        self._config = config
        self._tags = {"run": config.run, "method": config.method.name}
        self._gauges: dict[str, Any] = {
            name: Gauge(name, metric.meaning, (*self._tags, *([metric.label] if metric.label else ())))
            for name, metric in METRICS.items()
        }
        self._set_at = float("-inf")
        now = time.time()
        self._values: dict[Series, float] = {
            ("raysemi_target_step", ""): float(config.train.stop_at or config.train.steps),
            ("raysemi_progress_timestamp_seconds", ""): now,
            ("raysemi_checkpoint_timestamp_seconds", ""): now,
            ("raysemi_restarts", ""): 0.0,
        }
        threshold = getattr(config.method, "threshold", None)
        if isinstance(threshold, float):  # not one that moves, which the method tells
            self._values["raysemi_threshold", ""] = threshold

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes what the run logs."""
        self._values.update(series(self._config, step, metrics, time.time()))
        self._set_at = float("-inf")

    def restarted(self) -> None:
        """Counts that the workers are started again."""
        self._values["raysemi_restarts", ""] += 1.0

    def refresh(self) -> None:
        """Sets the gauges when it is time to; called often."""
        now = time.monotonic()
        if now - self._set_at < _REFRESH_S:
            return
        self._set_at = now
        for (name, value_of_label), value in self._values.items():
            label = {METRICS[name].label: value_of_label} if METRICS[name].label else {}
            self._gauges[name].set(value, tags=self._tags | label)
