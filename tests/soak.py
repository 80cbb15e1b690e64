"""A run that is killed again and again ends with the bits of one that never was: `make soak`.

Two gloo ranks train a tiny network with the real command, without Ray. At each kill point SIGKILL ends one rank or
both: while they start, in a step, in a save, in an evaluation. Then the same command is given again. What is compared
at the end is read through public functions (last and best weights, result, every logged loss), so it holds for any
format of checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
from forks import FORKS, start
from makers import tiny_run

from raysemi import config_io
from raysemi.data.pack import pack
from raysemi.data.sources.scenes import Scenes
from raysemi.errors import CheckpointError
from raysemi.launch.restore import load_network

When = Literal["start", "step", "save", "evaluation"]
Victims = tuple[int, ...]
WORLD = 2
EVAL_EVERY, SAVE_EVERY = 6, 2
SETTINGS = (
    "optim.name=adamw", "method.threshold=0.2", "train.batch.labeled=4", "train.batch.unlabeled=4", "train.period=5",
    f"train.checkpoint_every={SAVE_EVERY}", f"eval.every={EVAL_EVERY}", "eval.pictures=1",
)  # fmt: skip
"""BatchNorm trains: its statistics are part of what must be the same."""
START_S, EVALUATION_S, SAVE_S, STEP_S = 8.0, 0.3, 0.05, 0.2
"""Longest delay of a kill after what it waits for, seconds."""
ALONE_S = 90.0
"""In which a rank must notice that the other is gone."""


@dataclass(frozen=True)
class Kill:
    """A kill point."""

    when: When
    after: int
    """Steps done in the whole run from which on it falls; for `start` it falls in any case."""
    delay: float
    """Seconds after what it waits for."""
    victims: Victims

    def __str__(self) -> str:
        who = "both ranks" if len(self.victims) == WORLD else f"rank {self.victims[0]}"
        return f"{self.when:10}  {who:10}"


def kill_points(seed: int, points: int, steps: int) -> list[Kill]:
    """As many kill points, spread over the run; every kind comes in turn."""
    draws = random.Random(seed)
    kinds: list[tuple[When, float]] = [
        ("step", STEP_S), ("save", SAVE_S), ("evaluation", EVALUATION_S), ("start", START_S), ("save", SAVE_S),
    ]  # fmt: skip
    found = []
    for number in range(points):
        when, longest = kinds[number % len(kinds)]
        after = 1 + number * (steps - 2) // points
        if when == "evaluation":
            after = min(-(-after // EVAL_EVERY) * EVAL_EVERY, (steps - 1) // EVAL_EVERY * EVAL_EVERY)
        victims = draws.choice([(0,), (1,), tuple(range(WORLD))])
        found.append(Kill(when, after, draws.uniform(0.0, longest), victims))
    return found


def _rank(recipe: Path, said: Path, place: dict[str, str], fresh: bool) -> None:
    """One rank: the command in a new interpreter, or (as `make test` has no time for its imports) in this process."""
    os.environ |= place | {"OMP_NUM_THREADS": "1"}
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    arguments = ["-m", "raysemi", "train", str(recipe)]
    if fresh:
        os.execv(sys.executable, [sys.executable, *arguments])
    from raysemi import cli

    torch.set_num_threads(1)
    sys.argv = arguments[1:]
    cli.main()


@dataclass
class Job:
    """One launch of the command: its ranks, and what they say."""

    recipe: Path
    run: Path
    fresh: bool = True
    """Each rank is an interpreter of its own."""
    ranks: list[Any] = field(default_factory=list)
    _folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def __enter__(self) -> Job:
        start()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(WORLD):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
            environment = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            arguments = (self.recipe, self._said(rank), environment, self.fresh)
            self.ranks.append(FORKS.Process(target=_rank, args=arguments, daemon=True))
            self.ranks[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()
        self._folder.cleanup()

    def _said(self, rank: int) -> Path:
        return Path(self._folder.name) / f"{rank}.txt"

    @property
    def text(self) -> str:
        """What the ranks have said, rank 0 first."""
        files = [self._said(rank) for rank in range(WORLD)]
        return "\n".join(file.read_text(errors="replace") for file in files if file.exists())

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    @property
    def step(self) -> int:
        """Steps done, by the newest log line."""
        return max((int(number) for number in re.findall(r"^step (\d+)/", self.text, re.MULTILINE)), default=0)

    @property
    def evaluating(self) -> bool:
        """Whether the newest log line is that of a step after which an evaluation comes."""
        lines = re.findall(r"^step (\d+)/\d+  (\w+)", self.text, re.MULTILINE)
        return bool(lines) and int(lines[-1][0]) % EVAL_EVERY == 0 and lines[-1][1] != "evaluation"

    def wait_for(self, kill: Kill) -> bool:
        """Until the moment of a kill; False when the run ended before."""
        seen = None
        while self.alive:
            if kill.when == "start":
                break
            if seen is not None:
                if _listing(self.run / "checkpoints") != seen:
                    break
            elif self.step >= kill.after:
                if kill.when == "step" or (kill.when == "evaluation" and self.evaluating):
                    break
                if kill.when == "save":
                    seen = _listing(self.run / "checkpoints")
            time.sleep(0.002)
        time.sleep(kill.delay)
        return self.alive

    def ended(self, within: float) -> list[int]:
        """Exit codes, once all ranks have ended.

        Raises:
            AssertionError: a rank is still there.
        """
        until = time.monotonic() + within
        for rank, process in enumerate(self.ranks):
            process.join(max(until - time.monotonic(), 0.1))
            assert process.exitcode is not None, f"rank {rank} must end within {within} s\n{self.text}"
        return [process.exitcode for process in self.ranks]

    @property
    def begun_at(self) -> int:
        """The step at which this launch went on; 0 at the beginning, or when it never came so far."""
        found = re.search(r"going on from step (\d+)", self.text)
        return int(found[1]) if found else 0


def _listing(folder: Path) -> list[tuple[str, int]]:
    """Everything below a folder that a writer may change, with its time."""
    found = []
    for place, _, files in os.walk(folder):
        for name in (place, *(f"{place}/{file}" for file in files)):
            try:
                found.append((name, os.stat(name).st_mtime_ns))
            except FileNotFoundError:
                found.append((name, 0))
    return found


def final(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, object], dict[tuple[int, str], float]]:
    """Last and best weights, result without its seconds, and losses by step, of a finished run."""
    result = json.loads((run / "result.json").read_text())
    del result["seconds"]
    rows = pq.read_table(run / "metrics.parquet").to_pylist()
    losses = {(row["step"], row["name"]): row["value"] for row in rows if row["name"].startswith(("loss/", "eval/"))}
    weights = {}
    for which in ("last", "best"):
        trained = load_network(run, which)
        weights |= {f"{which} {name}": value for name, value in trained.network.state_dict().items()}
        result[f"{which} step"] = trained.step
    return weights, result, losses


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs do not share to the last bit."""
    (weights, result, losses), (others, other_result, other_losses) = final(one), final(other)
    found = [name for name, value in weights.items() if not torch.equal(value, others[name])]
    found += [f"{name} {result[name]} {other_result[name]}" for name in result if result[name] != other_result[name]]
    names = losses.keys() | other_losses.keys()
    return found + [
        f"{name} of step {step}"
        for step, name in sorted(names)
        if losses.get((step, name)) != other_losses.get((step, name))
    ]


def complete(job: Job, within: float = 600.0) -> None:
    """Lets a launch come to its end."""
    assert job.ended(within) == [0] * WORLD, job.text


def soak(folder: Path, kills: list[Kill], steps: int, pools: Path, fresh: bool = True) -> list[str]:
    """Runs undisturbed and killed.

    Args:
        folder: where the runs go.
        kills: in the order of the launches.
        steps: of the run.
        pools: labeled, unlabeled and val.
        fresh: every rank of every launch is a new interpreter.

    Returns:
        A row of the table a kill point.

    Raises:
        AssertionError: a run that does not go on, hangs, or ends with other bits.
    """
    recipes = {}
    for name in ("whole", "killed"):
        config = tiny_run(pools, folder / name, "fixmatch", f"train.steps={steps}", *SETTINGS)
        recipes[name] = folder / f"{name}.yaml"
        recipes[name].write_text(config_io.dump(config), encoding="utf-8")
    with Job(recipes["whole"], folder / "whole", fresh) as job:
        complete(job)
    rows: list[str] = []
    run = folder / "killed"

    def launch() -> Job:
        return Job(recipes["killed"], run, fresh)

    before: tuple[Kill, int, float] | None = None
    for kill in [*kills, None]:
        with launch() as job:
            if kill is None:
                complete(job)
            else:
                before_this = before
                before = _kill(job, kill)
                _readable(run)
            last = before if kill is None else before_this
            if last is not None:
                rows.append(_row(len(rows) + 1, last, job.begun_at))
    found = differences(folder / "whole", run)
    assert not found, f"{len(found)} differences: {', '.join(found[:5])}"
    return rows


def _kill(job: Job, kill: Kill) -> tuple[Kill, int, float]:
    """Kills a launch; the step that it had reached, and the seconds until the other rank had ended too."""
    assert job.wait_for(kill), f"{kill} came too late\n{job.text}"
    reached, hit = max(job.step, job.begun_at), time.monotonic()
    for rank in kill.victims:
        job.ranks[rank].kill()
    codes = job.ended(ALONE_S)
    assert all(code != 0 for code in codes), (codes, job.text)
    return kill, reached, time.monotonic() - hit


def _readable(run: Path) -> None:
    """Whatever a kill left, its newest whole checkpoint can be read; before the first there is none."""
    try:
        load_network(run)
    except CheckpointError as error:
        before_the_first = "got none" in str(error) or "without config.yaml" in str(error)
        if not before_the_first:
            raise


def _row(number: int, before: tuple[Kill, int, float], begun_at: int) -> str:
    kill, reached, seconds = before
    on = f"{begun_at:4}" if begun_at else "   -"  # killed before it came so far
    return f"{number:3}  {kill}  {kill.delay:5.2f} s  {reached:4}  {on}  {seconds:5.1f} s"


HEADER = "  #  killed in   who           delay  step  next  others end"


def main() -> None:
    """Prints the table; fails on the first difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--forked", action="store_true", help="fork ranks from one interpreter: no imports, less time")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="raysemi-soak-") as name:
        folder = Path(name)
        pack(Scenes(train=24, val=5, size=64), folder / "pools", split=8, processes=1, shard_samples=6)
        kills = kill_points(options.seed, options.points, options.steps)
        rows = soak(folder, kills, options.steps, folder / "pools", fresh=not options.forked)
    print(HEADER, *rows, sep="\n")
    print(f"{len(rows)} kills, the same bits at the end, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
