"""`raysemi bench grid`: every method with every weighting and every gradient rule, over seeds.

Each cell and seed is an ordinary run in a folder of its own, in a fresh process, so that its memory is its own and a
crash or Ctrl-C loses no other. The same command goes on: what is finished stays, what was begun continues.

    DIR/grid.json              the plan: recipes, overrides, cells, seeds, and the cells that the config refuses
    DIR/runs/CELL-SEED/        run folders
    DIR/records/CELL-SEED.json how the run ended, its memory, the passes of its step
    DIR/logs/CELL-SEED.log     what it said
    DIR/grid.{md,csv,png}      `bench.grid_report`
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from raysemi import catalogue, config_io
from raysemi.config import RunConfig
from raysemi.config_faults import did_you_mean
from raysemi.engine import checkpoint
from raysemi.engine.folder import RunFolder
from raysemi.errors import ConfigError, DataError
from raysemi.launch.cluster import cores
from raysemi.launch.restore import MAY_CHANGE, open_pools, refuse_another_run

_POLL_S = 0.2
_OURS = {
    "run": "--out",
    "seed": "--seeds",
    "method": "--methods",
    "weighting": "--weighting",
    "gradients": "--gradients",
    "ray": "--jobs",
    "train.stop_at": "train.steps",
}
"""Settings that the grid sets itself, or their `.name`, and what to use in their place."""


class Cell(NamedTuple):
    """A row of the table."""

    method: str
    weighting: str
    gradients: str

    @property
    def name(self) -> str:
        """Of its folders and files."""
        return "-".join(self)


@dataclass(frozen=True)
class Plan:
    """What a grid's folder holds, or is to hold."""

    recipes: str
    """What the recipes' names, or files, begin with: `camvid` stands for camvid-METHOD."""
    overrides: tuple[str, ...]
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    refused: tuple[tuple[Cell, str], ...] = ()
    """The cells that the config refuses, with the reason."""

    def joined(self, later: Plan) -> Plan:
        """This grid with another's cells and seeds; the settings are the later one's."""
        cells = dict.fromkeys((*self.cells, *later.cells))
        refused = {cell: reason for cell, reason in (*self.refused, *later.refused) if cell not in cells}
        seeds = dict.fromkeys((*self.seeds, *later.seeds))
        return replace(later, cells=tuple(cells), seeds=tuple(seeds), refused=tuple(refused.items()))

    @staticmethod
    def read(folder: Path) -> Plan | None:
        """The plan of a folder, None where no grid was begun.

        Raises:
            DataError: a broken file.
        """
        file = folder / "grid.json"
        if not file.is_file():
            return None
        try:
            parts = json.loads(file.read_text(encoding="utf-8"))
            return Plan(
                str(parts["recipes"]),
                tuple(parts["overrides"]),
                tuple(Cell(*cell) for cell in parts["cells"]),
                tuple(int(seed) for seed in parts["seeds"]),
                tuple((Cell(*cell), str(reason)) for cell, reason in parts["refused"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file} must be as `raysemi bench grid` writes it; got {type(error).__name__}: {error}. Remove it: "
                "the same command writes it anew, and keeps the runs."
            ) from error

    def write(self, folder: Path) -> None:
        """As `read` reads it."""
        RunFolder(folder).write_bytes("grid.json", json.dumps(asdict(self), indent=1).encode())


@dataclass(frozen=True)
class GridRun:
    """One cell with one seed."""

    cell: Cell
    seed: int
    folder: Path
    """Of the grid."""

    @property
    def name(self) -> str:
        """Of its folders and files."""
        return f"{self.cell.name}-{self.seed}"

    @property
    def location(self) -> Path:
        """Its run folder."""
        return self.folder / "runs" / self.name

    @property
    def log(self) -> Path:
        """What its process said."""
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def record(self) -> dict[str, Any]:
        """How it stands: `state` (running, done, failed, stopped), `reason`, `peak_bytes`, `memory`, `passes`."""
        records = RunFolder(self.folder)
        name = f"records/{self.name}.json"
        found: dict[str, Any] = json.loads(records.read_bytes(name)) if records.exists(name) else {}
        return found

    def note(self, **parts: Any) -> None:
        """Writes parts of the record."""
        content = json.dumps({**self.record, **parts}, indent=1).encode()
        RunFolder(self.folder).write_bytes(f"records/{self.name}.json", content)

    @property
    def steps(self) -> int:
        """Steps that its newest checkpoint has."""
        return max(checkpoint.steps(RunFolder(self.location)), default=0)

    @property
    def finished(self) -> bool:
        """Whether it is not to be run again."""
        return self.record.get("state") == "done" and (self.location / "result.json").is_file()

    def standing(self) -> str:
        """For people."""
        record = self.record
        if self.finished:
            return "finished"
        begun = f"at step {self.steps}" if self.steps else "not begun"
        return f"failed, {begun}: {record['reason']}" if record.get("state") == "failed" else begun


def make_plan(
    folder: Path,
    recipes: str,
    methods: Sequence[str] | None,
    weighting: Sequence[str],
    gradients: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
) -> Plan:
    """The cells of a grid, each tried with config and pools; those that the config refuses, with the reason.

    Args:
        folder: of the grid; run folders that were begun in it are compared with the plan.
        recipes: what the recipes' names, or files, begin with.
        methods: names; None: all that have such a recipe.
        weighting: names.
        gradients: names of rules.
        seeds: one run of each cell for each.
        overrides: settings `a.b=value` of every run.

    Raises:
        ConfigError: unknown names, overrides that every cell refuses or that the grid sets itself, or settings other
            than those with which the folder or one of its runs was begun.
        DataError: a pool that cannot serve.
    """
    faults = [
        f"{path} must not be given to a grid, which sets it itself; got {text}. Use {_OURS[path]}."
        for text in overrides
        if (path := text.partition("=")[0].strip().removesuffix(".name")) in _OURS
    ]
    chosen = _with_recipe(recipes) if methods is None else list(dict.fromkeys(methods))
    if not chosen:
        faults.append(f"--recipes must begin the name of a recipe; got {recipes}. Take camvid, or DIR/NAME of files.")
    for option, given, known in (
        ("--methods", chosen, catalogue.names()),
        ("--weighting", weighting, catalogue.values("weighting")),
        ("--gradients", gradients, catalogue.values("gradients")),
    ):
        faults += [
            f"{option} must be among {', '.join(known)}; got {name}. {did_you_mean(name, known) or 'Choose of these.'}"
            for name in given
            if name not in known
        ]
    if faults:
        raise ConfigError(faults)

    accepted: list[Cell] = []
    refused: dict[Cell, str] = {}
    plan = Plan(recipes, tuple(overrides), (), tuple(dict.fromkeys(seeds)))
    _refuse_other_settings(folder, plan)
    errors: list[ConfigError] = []
    for cell in itertools.starmap(Cell, itertools.product(chosen, dict.fromkeys(weighting), dict.fromkeys(gradients))):
        try:
            configs = [config_of(plan, GridRun(cell, seed, folder)) for seed in plan.seeds]
            open_pools(configs[0])
        except ConfigError as error:
            errors.append(error)
            refused[cell] = " ".join(error.faults)
            continue
        for config in configs:
            refuse_another_run(config)
        accepted.append(cell)
    if not accepted:  # no pair that makes no sense, but a mistake in what all have in common
        raise errors[0]
    return replace(plan, cells=tuple(accepted), refused=tuple(refused.items()))


def config_of(plan: Plan, run: GridRun) -> RunConfig:
    """The config of an ordinary run.

    Raises:
        ConfigError: what the config refuses.
    """
    cell = run.cell
    own = [f"weighting={cell.weighting}", f"gradients={cell.gradients}"]
    ours = [f"run={json.dumps(str(run.location))}", f"seed={run.seed}", "ray=none"]
    return config_io.load(_recipe(plan.recipes, cell.method), [*own, *plan.overrides, *ours])


def runs_of(plan: Plan, folder: Path) -> list[GridRun]:
    """All runs, seed by seed: after the first one every cell has a number."""
    return [GridRun(cell, seed, folder) for seed in plan.seeds for cell in plan.cells]


def run_grid(plan: Plan, folder: Path, jobs: int, say: Callable[[str], None]) -> list[GridRun]:
    """Runs what is not finished, `jobs` processes at a time.

    Args:
        plan: of `make_plan`.
        folder: of the grid.
        jobs: on a CPU each gets an equal share of the cores as threads, unless OMP_NUM_THREADS is set.
        say: told a line when a run begins or ends.

    Returns:
        The runs that failed.

    Raises:
        KeyboardInterrupt: after Ctrl-C; every run was asked to write a checkpoint.
    """
    waiting = [run for run in runs_of(plan, folder) if not run.finished]
    total = len(plan.cells) * len(plan.seeds)
    failed: list[GridRun] = []
    active: dict[GridRun, subprocess.Popen[bytes]] = {}
    with _ended_with_us(active):
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                say(f"{run.name} begins{f' again at step {run.steps}' if run.steps else ''}; it writes {run.log}")
                active[run] = _start(run, config_of(plan, run), jobs)
            time.sleep(_POLL_S)
            for run, process in list(active.items()):
                code = process.poll()
                if code is None:
                    continue
                del active[run]
                if run.record.get("state") != "done":
                    if run.record.get("state") == "running":  # it could not say why itself
                        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                        run.note(state="failed", reason=f"the process ended with {how}; see {run.log}")
                    failed.append(run)
                say(f"{run.name} {_outcome(run)} ({total - len(waiting) - len(active)} of {total})")
    return failed


def _outcome(run: GridRun) -> str:
    if not run.finished:
        return f"failed: {run.record.get('reason', 'it was stopped')}"
    result = json.loads((run.location / "result.json").read_text(encoding="utf-8"))
    return f"is finished: mIoU {result['miou']:.2f} %, {result['seconds']:.0f} s"


def _start(run: GridRun, config: RunConfig, jobs: int) -> subprocess.Popen[bytes]:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    run.note(state="running", reason=None)
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    arguments = [str(run.folder), *run.cell, str(run.seed), str(os.getpid())]
    with run.log.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "raysemi.bench.grid_run", *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,  # Ctrl-C is ours to hand on, once: twice would end a run without a checkpoint
        )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # one that died at once is seen by its exit code
        pipe.write(config_io.dump(config).encode())
    return process


@contextlib.contextmanager
def _ended_with_us(active: dict[GridRun, subprocess.Popen[bytes]]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        for process in active.values():
            process.send_signal(signal.SIGINT)
        for process in active.values():  # a second Ctrl-C comes out here, and kills below
            process.wait()
        raise KeyboardInterrupt("The same command goes on: each run from its last checkpoint.") from error
    finally:
        for process in active.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def _refuse_other_settings(folder: Path, plan: Plan) -> None:
    before = Plan.read(folder)
    if before is None:
        return
    then, now = (
        [("--recipes", each.recipes), *(("", text) for text in each.overrides if not text.startswith(MAY_CHANGE))]
        for each in (before, plan)
    )
    if then != now:
        said = [" ".join(f"{name} {value}".strip() for name, value in each) for each in (now, then)]
        raise ConfigError(
            f"--out must be a folder of this grid or a new one; got {folder}, which was begun with {said[1]}, and now "
            f"{said[0]}. Give another folder, or the same settings."
        )


def _recipe(recipes: str, method: str) -> str:
    file = Path(f"{recipes}-{method}.yaml").expanduser()
    return str(file) if file.is_file() else f"{recipes}-{method}"


def _with_recipe(recipes: str) -> list[str]:
    known = config_io.recipes()
    return [name for name in catalogue.names() if (at := _recipe(recipes, name)) in known or Path(at).is_file()]
