"""`raysemi submit`: what is refused before anything is sent, and what a dry run prints."""

from __future__ import annotations

import shutil

import pytest
import yaml
from typer.testing import CliRunner

from raysemi.cli import app


def run(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["submit", *words])
    return done.exit_code, done.stdout, done.stderr


def test_a_dry_run_prints_a_rayjob_alone_on_stdout() -> None:
    code, out, _ = run("scenes-fixmatch", "run=/storage/runs/a", "data.pools=/storage/pools", "--dry-run")
    assert code == 0
    job = yaml.safe_load(out)
    assert (job["kind"], job["metadata"]["name"]) == ("RayJob", "a")


def test_other_commands_are_read_as_they_would_be_over_there() -> None:
    words = ("--dry-run", "--job", "pack", "--", "scenes", "--split", "8", "--out")
    code, out, _ = run(*words, "s3://bucket/pools")
    assert code == 0
    assert (
        yaml.safe_load(out)["spec"]["entrypoint"] == "raysemi pack --ray auto scenes --split 8 --out s3://bucket/pools"
    )
    assert run(*words, "pools")[0] == 2
    assert (
        "No such option: --spilt" in run("--dry-run", "--job", "pack", "--", "scenes", "--spilt", "8", "--out", "/a")[2]
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("scenes-fixmatch", "run=/s/a", "data.pools=/s/p"), "--address must name the job server"),
        (("scenes-fixmatch", "run=/s/a", "data.pools=/s/p", "--overlay", "x"), "--overlay must come with --dry-run"),
        (("scenes-fixmatch", "run=a", "data.pools=/s/p", "--dry-run"), "run must be an absolute path or a URL"),
        (("x", "--job", "bake", "--dry-run"), "--job must be one of train, pack"),
    ],
)
def test_mistakes_end_with_2(words: tuple[str, ...], said: str) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert said in err


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders the folders, is absent")
def test_an_overlay_is_filled_alike() -> None:
    words = (
        "scenes-fixmatch",
        "run=s3://b/a",
        "data.pools=s3://b/p",
        "ray.num_workers=[1,2]",
        "train.batch.unlabeled=4",
    )
    code, out, _ = run(*words, "--dry-run", "--overlay", "spot")
    assert code == 0
    cluster = yaml.safe_load(out)["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"]
    assert [cluster["workerGroupSpecs"][0][key] for key in ("minReplicas", "maxReplicas")] == [0, 2]
