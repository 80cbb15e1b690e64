"""A sweep's database on a real PostgreSQL server: its password, its deaths, and those of a driver."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from makers import call
from object_store import free_port
from postgres import PASSWORD, Server
from sweeps import write_sweep

from raysemi.errors import CheckpointFailure
from raysemi.tune import checks, sweep
from raysemi.tune.report import write_report
from raysemi.tune.search import Search
from raysemi.tune.storage import answering, close, is_made, open_storage
from raysemi.tune.study import Study, read

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own code


@contextlib.contextmanager
def opened(folder: Path, pools: Path, storage: str) -> Iterator[Study]:
    config = sweep.load(write_sweep(folder, pools), [f"storage={storage}"])
    (folder / "sweep").mkdir(exist_ok=True)
    (folder / "sweep" / "sweep.yaml").write_text(sweep.dump(config))
    with contextlib.closing(Study(config, checks.build(config, tried=False), folder / "sweep")) as study:
        yield study


def searching(study: Study) -> Search:
    return Search(study, lambda trial: {"number": trial.number, "draw": study.draw(trial)}, 12)


def result(step: int, miou: float, **more: object) -> dict[str, object]:
    return {"step": step, "miou": miou, "hours": 0.25, "first_step_s": 1.5, **more}


def test_the_password_stands_nowhere(tmp_path: Path, scenes: Path, postgres: Server) -> None:
    with opened(tmp_path, scenes, postgres.database("nowhere")) as study:
        search = searching(study)
        search.suggest("a")
        search.on_trial_complete("a", result(6, 41.0, finished=True))
        kept = str(study.optuna.user_attrs) + str(study.optuna.trials)
    folder = tmp_path / "sweep"
    write_report(folder)
    shown = call("tune", "show", folder)
    assert shown.exit_code == 0
    assert "41.00" in shown.stdout
    texts = [kept, shown.output, *(file.read_text() for file in folder.iterdir() if file.is_file())]
    assert {file.name for file in folder.iterdir()} >= {"sweep.yaml", "report.html", "trials.csv", "best.yaml"}
    assert not (folder / "study.db").exists()
    assert sum("41.0" in text for text in texts) >= 4
    assert not any(PASSWORD in text for text in texts)


def test_a_wrong_password_is_told_in_a_line_without_it(
    tmp_path: Path, scenes: Path, postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = postgres.database("locked")
    monkeypatch.setenv("PGPASSWORD", "another-9c1e")
    said = refused(tmp_path, scenes, storage)
    assert "password authentication failed" in said
    assert "another-9c1e" not in said


def test_a_server_that_is_not_there_is_told_in_a_line(tmp_path: Path, scenes: Path, postgres: Server) -> None:
    storage = f"postgresql://tester@127.0.0.1:{free_port()}/sweeps"
    said = refused(tmp_path, scenes, storage)
    assert said.startswith(f"storage must answer; got {storage}: ")
    assert "refused" in said
    done = call("tune", "show", tmp_path / "sweep")
    assert done.exit_code == 1
    assert said in done.output
    assert PASSWORD not in done.output


def refused(folder: Path, pools: Path, storage: str) -> str:
    with pytest.raises(CheckpointFailure) as error, opened(folder, pools, storage):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_server_that_dies_ends_a_sweep_in_a_line_and_loses_no_trial(
    tmp_path: Path, scenes: Path, postgres: Server
) -> None:
    storage = postgres.database("dies")
    with opened(tmp_path, scenes, storage) as study:
        search = searching(study)
        given = search.suggest("a")
        search.on_trial_result("a", result(2, 33.0))
        postgres.stop()
        try:
            match = "storage must answer; got postgresql"
            with pytest.raises(CheckpointFailure, match=match) as error, answering(study.sweep):
                search.on_trial_result("a", result(4, 35.0))
            assert "\n" not in str(error.value)
        finally:
            postgres.start()
        search.on_trial_result("a", result(4, 35.0))  # the connections that died are not used again
    with opened(tmp_path, scenes, storage) as study:
        assert searching(study).suggest("b") == given
        assert study.history()[0].curve == {2: 33.0, 4: 35.0}


def test_sweeps_that_begin_together_on_a_new_server_all_get_their_tables(
    tmp_path: Path, scenes: Path, postgres: Server
) -> None:
    config = sweep.load(write_sweep(tmp_path, scenes), [f"storage={postgres.database('new')}"])
    together = threading.Barrier(4)

    def begin(number: int) -> bool:
        together.wait()
        close(open_storage(config, tmp_path / str(number)))
        return is_made(config, tmp_path / str(number))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(begin, range(4)))


DRIVER = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from test_postgres import opened, result, searching
with opened(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]) as study:
    search = searching(study)
    for name in "abc":
        search.suggest(name)
    search.on_trial_complete("a", result(6, 40.0, finished=True))
    search.on_trial_result("b", result(2, 33.0))
    print("running", flush=True)
    time.sleep(600)
"""


def test_trials_of_a_killed_driver_are_taken_up(tmp_path: Path, scenes: Path, postgres: Server) -> None:
    storage = postgres.database("killed")
    here = Path(__file__).resolve().parent
    line = [sys.executable, "-c", DRIVER, tmp_path, scenes, storage, here, here.parents[1]]
    with subprocess.Popen([*map(str, line)], stdout=subprocess.PIPE, text=True, env=os.environ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "running\n"
        driver.send_signal(signal.SIGKILL)
    before = read(tmp_path / "sweep")[1]
    assert [trial.state for trial in before] == ["finished", "running", "running"]
    with opened(tmp_path, scenes, storage) as study:
        search = searching(study)
        again = [search.suggest(name) for name in "xyz"]
        assert [one["number"] for one in again] == [1, 2, 3]
        assert [one["draw"] for one in again[:2]] == [trial.draw for trial in before[1:]]
        for name in "xyz":
            search.on_trial_complete(name, result(6, 35.0, finished=True))
        assert [trial.state for trial in study.history()] == ["finished"] * 4
        assert study.history()[1].curve == {2: 33.0, 6: 35.0}
