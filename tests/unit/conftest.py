from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from raysemi.data.sources.scenes import CLASSES, PALETTE, draw_scene

LEVEL = {"supervised": 34.0, "fixmatch": 41.0, "derprop": 47.5}


def png(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def coloured(labels):
    table = np.zeros((256, 3), np.uint8)
    table[: len(PALETTE)] = PALETTE
    return table[labels]


def worse(label, rng, share):
    """Blocks of a label map replaced by other classes."""
    changed = label.copy()
    side = len(label)
    while (changed != label).mean() < share:
        y, x = rng.integers(0, side, 2)
        changed[y : y + 12, x : x + 16] = rng.integers(len(CLASSES))
    return changed


def saturating(steps, start, end, pace, rng, noise):
    return end + (start - end) * np.exp(-np.asarray(steps) / pace) + rng.normal(0, noise, len(steps))


class RunMaker:
    """Writes run folders as a training run leaves them."""

    def __init__(self, root):
        self.root = root

    def __call__(self, name, method="derprop", seed=0, steps=600, pictures=True, config=None, **parts):
        folder = self.root / name
        folder.mkdir(parents=True)
        rng = np.random.default_rng([seed, len(method)])
        method_settings = {"name": method} | ({"order": 1, "preset": "raysemi"} if method == "derprop" else {})
        settings = {
            "run": str(folder),
            "seed": seed,
            "data": {"labeled": "pools/labeled", "unlabeled": "pools/unlabeled", "val": "pools/val", "crop": 128},
            "model": {"name": "deeplabv3plus", "encoder": "tf_efficientnet_lite0", "output_stride": 16},
            "method": method_settings | (config or {}),
            "train": {"steps": steps, "batch": {"labeled": 4, "unlabeled": 4}, "precision": "auto"},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        curves = self.curves(method, steps, rng) | self.gradients(steps, rng, parts.get("rule"))
        if "rule" in parts:
            settings["gradients"] = {"name": parts["rule"], "measure_every": 1}
            (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        if parts.get("metrics", True):
            rows = [(s, n, v) for n, (at, values) in curves.items() for s, v in zip(at, values, strict=True)]
            columns = [list(column) for column in zip(*rows, strict=True)]
            table = pa.table(dict(zip(("step", "name", "value"), columns, strict=True)))
            pq.write_table(table, folder / "metrics.parquet")
        if parts.get("result", True):
            done = parts.get("done", steps)
            result = {
                "method": method,
                "miou": float(curves["eval/miou"][1][-1]),
                "iou": {name: float(curves[f"eval/iou/{name}"][1][-1]) for name in CLASSES},
                "pixel_accuracy": float(curves["eval/pixel_accuracy"][1][-1]),
                "steps": done,
                "labeled": 16,
                "unlabeled": 0 if method == "supervised" else 784,
                "seconds": 143.0 + 60 * len(method) + seed,
            }
            (folder / "result.json").write_text(json.dumps(result))
        if parts.get("confusion", True):
            (folder / "evaluation").mkdir()
            matrix = rng.integers(0, 900, (7, 7)) * rng.integers(0, 2, (7, 7))
            matrix += np.diag(rng.integers(3000, 9000, 7))
            matrix[0] *= 8
            confusion = {"classes": CLASSES, "palette": PALETTE, "matrix": matrix.tolist()}
            (folder / "evaluation" / "confusion.json").write_text(json.dumps(confusion))
        if pictures:
            self.pictures(folder, method, rng)
        return folder

    @staticmethod
    def curves(method, steps, rng):
        log, measured = np.arange(10, steps + 1, 10), np.arange(50, steps + 1, 50)
        top = LEVEL.get(method, 40.0) + rng.normal(0, 0.9)
        curves = {
            "loss/total": (log, saturating(log, 2.1, 0.35, 90, rng, 0.03)),
            "loss/supervised": (log, saturating(log, 1.9, 0.12, 70, rng, 0.02)),
            "lr": (log, 0.01 * (1 - log / (steps + 1)) ** 0.9),
            "images_per_s": (log, rng.normal(31, 1.5, len(log))),
            "eval/miou": (measured, saturating(measured, 8, top, 110, rng, 0.5)),
            "eval/pixel_accuracy": (measured, saturating(measured, 60, 66 + top / 3, 90, rng, 0.3)),
        }
        for name in CLASSES:
            curves[f"eval/iou/{name}"] = (measured, np.clip(curves["eval/miou"][1] + rng.normal(0, 14), 0, 100))
        if method != "supervised":
            curves["loss/consistency"] = (log, saturating(log, 0.9, 0.25, 200, rng, 0.02))
            curves["method/threshold"] = (log, saturating(log, 0.14, 0.93, 100, rng, 0.001))
            curves["method/kept_ratio"] = (log, np.clip(saturating(log, 0.2, 0.83, 120, rng, 0.01), 0, 1))
            for stage, lift in (("before", 0), ("after", 4 if method == "derprop" else None)):
                if lift is None:
                    continue
                for measure, level in (("accuracy", 72), ("mining", 66), ("effective", 51)):
                    values = saturating(measured, 40, level + lift, 120, rng, 0.4)
                    curves[f"pseudo/{measure}_{stage}"] = (measured, values)
                    for name in CLASSES:
                        own = np.clip(values + rng.normal(0, 9), 0, 100)
                        curves[f"pseudo/{measure}_{stage}/{name}"] = (measured, own)
        if method == "derprop":
            curves["loss/derivative"] = (log, saturating(log, 0.6, 0.08, 150, rng, 0.01))
            curves["method/alpha"] = (log, np.clip(log / 300, 0, 1))
        return curves

    @staticmethod
    def gradients(steps, rng, rule):
        """Of a run that measured them; `uniform` knows no guards."""
        if rule is None:
            return {}
        at, low = np.arange(1, steps + 1), 0.0 if rule == "pareto" else -0.6
        values = {
            "norm_supervised": rng.lognormal(0.5, 0.4, steps),
            "norm_unsupervised": np.where(at < 9, 0.0, rng.lognormal(-1.5, 0.6, steps)),
            "cosine": np.clip(rng.normal(0.1, 0.3, steps), -1, 1),
            "least_cosine": rng.uniform(low, 1, steps),
            "weight_unsupervised": rng.uniform(0.5, 1, steps) if rule == "pareto" else np.full(steps, 0.5),
            "scale": rng.uniform(1, 10, steps) if rule == "pareto" else np.ones(steps),
        }
        curves = {f"gradients/{name}": (at, value) for name, value in values.items()}
        if rule == "pareto":
            curves["gradients/fallback"] = curves["gradients/capped"] = (at[9::10], np.full(len(at[9::10]), 0.1))
        return curves

    @staticmethod
    def pictures(folder, method, rng):
        (folder / "pictures").mkdir()
        listing = []
        error = (60 - LEVEL.get(method, 40.0)) / 130
        for part, kind in (("train", "unlabeled"), ("val", "val")):
            if kind == "unlabeled" and method == "supervised":
                continue
            for index in range(2):
                scene = draw_scene(0, part, 20 + index)
                panels = {"image": scene.image_HW3, "prediction": coloured(worse(scene.label_HW, rng, error))}
                if kind == "unlabeled":
                    pseudo = worse(scene.label_HW, rng, error * 1.3)
                    panels["pseudo-label"] = coloured(pseudo)
                    if method == "derprop":
                        pseudo = worse(scene.label_HW, rng, error)
                        panels["after propagation"] = coloured(pseudo)
                    panels["kept pixels"] = coloured(np.where(scene.image_HW3[..., 0] > 40, pseudo, 255))
                panels["truth"] = coloured(scene.label_HW)
                entries = []
                for title, picture in panels.items():
                    file = f"{len(listing):02d}-{title.replace(' ', '-')}.png"
                    (folder / "pictures" / file).write_bytes(png(picture))
                    entries.append({"title": title, "file": file})
                listing.append({"kind": kind, "key": f"{part}-{index:06d}", "step": 600, "panels": entries})
        (folder / "pictures" / "pictures.json").write_text(json.dumps(listing))


@pytest.fixture
def make_run(tmp_path):
    return RunMaker(tmp_path / "runs")
