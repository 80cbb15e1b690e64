"""A process that no longer gets on ends with its stacks, whatever its main thread is stuck in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STUCK = """
import ctypes, sys, threading, time
from raysemi.engine import watchdog
from raysemi.engine.folder import RunFolder
watchdog._OTHERS_S = watchdog._WORDS_S = 0.2
def stuck_here():
    {stuck}
with watchdog.Watchdog(RunFolder(sys.argv[1]), 3, 0.5, lambda error: print(error, flush=True)) as dog:
    for step in range(8):
        time.sleep(0.2)
        dog.beat(step)
    print("alive", flush=True)
    stuck_here()
"""


def ended(tmp_path: Path, stuck: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STUCK.format(stuck=stuck), str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("stuck", ["threading.Event().wait()", "time.sleep(1000)"])
def test_stacks_go_to_the_run_folder_the_log_and_the_launcher(tmp_path: Path, stuck: str) -> None:
    done = ended(tmp_path, stuck)
    assert done.returncode == 1
    alive, line = done.stdout.splitlines()
    assert alive == "alive"  # beats kept it alive for three times its patience
    assert line.startswith("a step must be done within train.hang_after_s, 0.5 s; got none for ")
    assert "after step 7 on rank 3 " in line
    text = (tmp_path / "stacks" / "rank-3.txt").read_text()
    assert text.startswith(line)
    assert "stuck_here" in text
    assert line in done.stderr


def test_a_main_thread_that_holds_the_interpreter_for_ever_ends_too(tmp_path: Path) -> None:
    """No thread of Python runs any more: a timer of C is left."""
    done = ended(tmp_path, "ctypes.PyDLL(None).sleep(1000)")
    assert done.returncode == 1
    assert "stuck_here" in done.stderr


def test_a_run_that_ends_in_time_leaves_no_trace(tmp_path: Path) -> None:
    done = ended(tmp_path, "pass")
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")
    assert list(tmp_path.iterdir()) == []
