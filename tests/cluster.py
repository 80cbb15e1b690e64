"""All jobs of raysemi on a cluster of this machine: a head that asks for a token, two nodes, real submissions.

    python tests/cluster.py

packs the drawn scenes, trains derprop under ZeRO 2 with a worker on each node, stops that job, kills the next one's
driver, sees the run continue to its end with the losses of one process, evaluates, predicts a pool, sweeps; and sees
what is refused. Jobs are sent both by `raysemi submit` and by `ray job submit --working-dir . -- python jobs/...`, from
a copy of this checkout in which all that they write comes to lie. Ends at the first thing that is wrong, with exit code
1.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from makers import tiny_settings
from nodes import Cluster, Command, cluster
from sweeps import write_sweep

from raysemi.data.pool import Pool
from raysemi.engine import checkpoint
from raysemi.engine.folder import RunFolder
from raysemi.tune.study import read

ROOT = Path(__file__).parents[1]
TRIALS = 4
UPLOAD_BYTES = 5 << 20
NOT_UPLOADED = ("pools", "runs", "sweeps", "docs", "tests", "requirements")
"""Of the copy; all of them are there when a job is sent."""


@dataclass(frozen=True)
class Size:
    """How much is done."""

    images: int = 24
    """To train with; 8 are labeled."""
    pixels: int = 64
    steps: int = 80
    twin: bool = False
    """Train once more, without being disturbed: the same bits come out."""
    patience: float = 900.0
    """Seconds that one command may take."""


class Walk:
    """The stages, in their order.

    Args:
        on: the cluster.
        size: how much is done.
    """

    def __init__(self, on: Cluster, size: Size) -> None:
        self._on, self._size = on, size
        self._checkout = copy_checkout(on.folder / "raysemi")
        self._pools, self._run = self._checkout / "pools", self._checkout / "runs/derprop"

    def go(self) -> None:
        """Walks."""
        with stage("without the token nothing is taken; with it the nodes pack"):
            self._pack()
        with stage("a job that is stopped saves; meanwhile no other one gets its run"):
            self._stop()
        with stage("the same command goes on, a worker on each node, until its driver is killed"):
            self._kill()
        with stage("the same command goes on to the end"):
            self._finish()
        if self._size.twin:
            with stage("a run that nobody disturbed ends with the same bits"):
                self._compare()
        with stage("a finished run says so, an evaluation repeats its mIoU, a mistake ends with 2"):
            self._small_jobs()
        with stage("two workers predict a pool"):
            self._predict()
        with stage(f"a sweep of {TRIALS} trials"):
            self._sweep()
        with stage("what was uploaded"):
            self._measure_uploads()

    def _pack(self) -> None:
        size = self._size
        words = f"scenes train={size.images} val=5 size={size.pixels} --split 8 --shard-samples 3 --out {self._pools}"
        refused = self._raysemi("--job", "pack", "--", *words.split(), token=False)
        refused_by_ray = self._ray("pack", *words.split(), token=False)
        self._ray("pack", *words.split()).end(0, ", uploaded with the job: ", "labeled: 8 images")
        refused.end(1, "cluster must take the token")
        refused_by_ray.end(1, "Missing authentication token")
        made = {name: Pool.open(self._pools / name).num_samples for name in ("labeled", "unlabeled", "val")}
        assert made == {"labeled": 8, "unlabeled": size.images - 8, "val": 5}, made
        jobs = self._on.ask("api/jobs/")
        assert len(jobs) == 1, f"the refused jobs must not have come; got {jobs}"

    def _stop(self) -> None:
        first = self._raysemi("--stop-with-me", *self._training())
        first.wait(lambda: "submitted: raysubmit_" in first.text, "its submission")
        self._raysemi(*self._training()).end(2, "run must be written by one job at a time")
        first.wait(lambda: self._reached() >= 2, "a checkpoint")
        first.process.send_signal(signal.SIGINT)
        first.end(130, ", uploaded with the job: ", "stopping the job")
        log = self._on.ask(f"api/jobs/{job_id(first)}/logs")["logs"]
        told = re.search(r"was at step (\d+) of \d+; the same command goes on from its last checkpoint", log)
        assert told, log
        assert int(told[1]) <= self._reached() < self._size.steps, f"{self._reached()} steps\n{log}"
        print(f"          stopped at step {self._reached()} of {self._size.steps}")

    def _kill(self) -> None:
        begun_at = self._reached()
        job = self._ray("train", *self._training())
        job.wait(lambda: self._reached() > begun_at, "a checkpoint")
        workers = self._workers()
        psutil.Process(int(self._on.ask(f"api/jobs/{job_id(job)}")["driver_info"]["pid"])).kill()
        killed = time.monotonic()
        job.end(1, f"going on from step {begun_at}")
        address = {node["node_id"]: node["node_ip"] for node in self._on.listed("nodes")}
        assert sorted(address[worker["node_id"]] for worker in workers) == ["127.0.0.3", "127.0.0.4"], workers
        while self._workers():
            assert time.monotonic() < killed + 120, "workers must go with their driver"
            time.sleep(0.2)
        print(f"          killed at step {self._reached()}; workers gone {time.monotonic() - killed:.1f} s later")

    def _finish(self) -> None:
        begun_at = self._reached()
        seldom = "train.checkpoint_every=20"  # a run that goes on may change it
        self._raysemi(*self._training(), seldom).end(0, f"going on from step {begun_at}", "steps were lost")
        result = self._result()
        assert result["steps"] == self._size.steps == self._reached(), result
        self._compare_with_one_process(begun_at)
        print(f"          from step {begun_at} to {self._size.steps}, mIoU {result['miou']:.2f} %")

    def _compare_with_one_process(self, begun_at: int) -> None:
        """Losses of the first steps, and of the first that the driver's death was followed by."""
        alone = self._run.with_name("alone")
        steps = begun_at + 4
        words = [sys.executable, "-m", "raysemi", "train", *self._training(alone), "ray=none", f"train.stop_at={steps}"]
        self._on.begin(self._checkout, *words).end(0)
        one, two = (losses(folder) for folder in (alone, self._run))
        for step in (*range(1, 5), *range(begun_at + 1, steps + 1)):  # rounding grows with the steps
            largest = 1e-5 if step <= 4 else 1e-3
            assert abs(one[step] - two[step]) < largest, f"step {step}: {two[step]}, of one process {one[step]}"
        print(f"          losses of steps 1 to 4 and {begun_at + 1} to {steps} are those of one process")

    def _compare(self) -> None:
        from soak import differences

        twin = self._run.with_name("twin")
        self._ray("train", *self._training(twin)).end(0)
        found = differences(twin, self._run)
        assert not found, f"{len(found)} differences: {', '.join(found[:5])}"

    def _small_jobs(self) -> None:
        nowhere = self._run.with_name("nowhere")
        again = self._ray("train", *self._training())
        evaluation = self._raysemi("--job", "evaluate", "--", str(self._run), "--json")
        over_there = self._raysemi("--job", "evaluate", "--", str(nowhere))
        said_by_ray = self._ray("train", *self._training(), "train.stepz=7")
        here = self._raysemi(*self._training(), "train.stepz=7")
        again.end(0, f"step {self._size.steps} of {self._size.steps}: nothing left to do")
        lines = evaluation.end(0).splitlines()
        measured = json.loads(next(line for line in lines if line.startswith("{")))
        # two ranks measured it; one meets the images in other batches, whose last bits may differ
        assert abs(measured["miou"] - self._result()["miou"]) < 0.1, measured
        over_there.end(2, f"error: {nowhere} must be a run folder")
        said_by_ray.end(1, "train.stepz must be")  # all that Ray's own command knows
        assert self._on.ask(f"api/jobs/{job_id(said_by_ray)}")["driver_exit_code"] == 2
        assert "submitted:" not in here.end(2, "train.stepz must be")

    def _predict(self) -> None:
        pool, out = self._pools / "unlabeled", self._pools / "pseudo"
        words = ("--pool", str(pool), "--shards", "--workers", "2", "--out", str(out))
        self._raysemi("--job", "predict", "--", str(self._run), *words).end(0)
        assert Pool.open(out).num_samples == Pool.open(pool).num_samples

    def _sweep(self) -> None:
        folder = self._checkout / "sweeps"
        folder.mkdir()
        file = write_sweep(folder, self._pools, search={"trials": TRIALS})
        self._ray("sweep", str(file), "--out", str(folder / "out")).end(0, "report: ")
        states = [trial.state for trial in read(folder / "out")[1]]
        assert states == ["finished"] * TRIALS, states
        assert (folder / "out/report.html").is_file()

    def _measure_uploads(self) -> None:
        packages = self._on.folder / "0/session_latest/runtime_resources/working_dir_files"
        found = list(packages.glob("_ray_pkg_*/"))
        assert len(found) == 1, f"what jobs write into the checkout must not change what is uploaded; got {found}"
        package = found[0]
        there = {path.name for path in package.iterdir()}
        assert {"raysemi", "jobs", "pyproject.toml"} <= there, there
        assert not there & set(NOT_UPLOADED), there
        assert (package / "raysemi/infra/kuberay/base/jobs/train.yaml").is_file()  # a link here, a file there
        size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
        assert 1 << 20 < size < UPLOAD_BYTES, size
        print(f"          {size / (1 << 20):.1f} MiB in {package.name}")

    def _training(self, run: Path | None = None) -> list[str]:
        return [
            "scenes-derprop",
            f"run={run or self._run}",
            *tiny_settings(self._pools),
            f"train.steps={self._size.steps}",
            "train.batch.unlabeled=4",
            "train.checkpoint_every=2",
            "train.strategy=deepspeed",
            "train.zero.stage=2",
            "model.batch_norm=frozen",
            "ray.num_workers=2",
            "ray.cpus_per_worker=1",
        ]

    def _raysemi(self, *words: str, token: bool = True) -> Command:
        line = (sys.executable, "-m", "raysemi", "submit", "--address", self._on.address, *words)
        return self._on.begin(self._checkout, *line, token=token)

    def _ray(self, job: str, *words: str, token: bool = True) -> Command:
        line = ("ray", "job", "submit", "--address", self._on.address, "--working-dir", ".", "--")
        return self._on.begin(self._checkout, *line, "python", f"jobs/{job}.py", *words, token=token)

    def _reached(self) -> int:
        """Step of the run's newest checkpoint."""
        return max(checkpoint.steps(RunFolder(self._run)), default=0)

    def _result(self) -> dict[str, Any]:
        return json.loads((self._run / "result.json").read_text())

    def _workers(self) -> list[dict[str, Any]]:
        """Train's workers that live."""
        actors = self._on.listed("actors")
        return [one for one in actors if one["class_name"] == "RayTrainWorker" and one["state"] == "ALIVE"]


def losses(run: Path) -> dict[int, float]:
    """The total loss by step."""
    rows = pq.read_table(run / "metrics.parquet").to_pylist()
    return {row["step"]: row["value"] for row in rows if row["name"] == "loss/total"}


def job_id(command: Command) -> str:
    """Of the job that a command has submitted."""
    found = re.search(r"raysubmit_\w+", command.text)
    assert found, f"it must have submitted a job\n{command}"
    return found[0]


def copy_checkout(out: Path) -> Path:
    """This checkout as git knows it, changes included, in a folder of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, out / name, follow_symlinks=False)
    return out


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Prints what was seen, and the seconds that it took."""
    began = time.monotonic()
    print(f"          {what}", flush=True)
    yield
    print(f"{time.monotonic() - began:7.1f} s", flush=True)


def walk(size: Size) -> None:
    """Starts a cluster, walks, ends it.

    Raises:
        AssertionError: the first thing that is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp") as folder:  # short: Ray's sockets lie below it
        began = time.monotonic()
        with cluster(2, Path(folder) / "c", size.patience) as on:
            print(f"{time.monotonic() - began:7.1f} s  a head with a token, and two nodes", flush=True)
            Walk(on, size).go()


def main() -> None:
    """Walks, as large as the options say."""
    default = Size()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=default.images, help="to train with; 8 are labeled")
    parser.add_argument("--pixels", type=int, default=default.pixels, help="their sides")
    parser.add_argument("--steps", type=int, default=default.steps, help="of the training")
    parser.add_argument("--twin", action="store_true", help="train undisturbed too, and compare the bits")
    parser.add_argument("--patience", type=float, default=default.patience, help="seconds that one command may take")
    options = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored in a script's background job, by its children too
    began = time.monotonic()
    walk(Size(**vars(options)))
    print(f"{time.monotonic() - began:7.1f} s  all")


if __name__ == "__main__":
    main()
