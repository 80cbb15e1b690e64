"""What a driver refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from makers import call
from sweeps import write_sweep

from raysemi.errors import ConfigError
from raysemi.launch.cluster import cores
from raysemi.tune import driver, sweep
from raysemi.tune.study import is_driven

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own code


@pytest.mark.parametrize(
    ("out", "said"),
    [("made.yaml", "got .*made.yaml, a file"), ("made.yaml/deeper", "a file or below one"), ("s3://b/sweeps", "a URL")],
)
def test_a_folder_that_can_be_none_is_refused(tmp_path: Path, scenes: Path, out: str, said: str) -> None:
    config = sweep.load(write_sweep(tmp_path, scenes))
    (tmp_path / "made.yaml").touch()
    folder = Path(out) if "://" in out else tmp_path / out
    with pytest.raises(ConfigError, match=said):
        driver.prepare(config, folder)


def test_more_cores_than_there_are_need_a_cluster(
    tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = sweep.load(write_sweep(tmp_path, scenes), [f"resources.cpus={cores() + 1}"])
    with pytest.raises(ConfigError, match=r"resources\.cpus must be at most this machine's cores"):
        driver.prepare(config, tmp_path / "out")
    assert driver.prepare(config, tmp_path / "out", "auto").bases  # its machines may have them


def test_a_dry_run_leaves_nothing_behind(tmp_path: Path, scenes: Path) -> None:
    result = call("tune", "run", write_sweep(tmp_path, scenes), "--out", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert "12 trials by tpe" in result.stdout
    assert not (tmp_path / "out").exists()


def test_an_override_without_a_value_says_how_to_write_one(tmp_path: Path, scenes: Path) -> None:
    with pytest.raises(ConfigError, match=r"override must read a\.b=value; got space\.method\.order\. Write"):
        sweep.load(write_sweep(tmp_path, scenes), ["space.method.order"])


def test_looking_whether_a_driver_is_at_work_writes_nothing(tmp_path: Path) -> None:
    assert not is_driven(tmp_path)
    assert list(tmp_path.iterdir()) == []
