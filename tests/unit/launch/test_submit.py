"""What is sent, or printed, and what is refused before."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from raysemi import config_io
from raysemi.errors import ConfigError
from raysemi.launch import submit
from raysemi.launch.job import SENT_BY, say_which_raysemi_runs

INFRA = Path(__file__).parents[3] / "infra/kuberay"
POOLS = "data.pools=/storage/pools/scenes"


def test_the_manifest_is_the_one_of_infra_for_its_command() -> None:
    written = yaml.safe_load((INFRA / "base/jobs/train.yaml").read_text(encoding="utf-8"))
    recipe, *overrides = shlex.split(written["spec"]["entrypoint"])[2:]
    assert submit.manifest(submit.training(recipe, overrides)) == written


def test_a_manifest_has_a_pod_a_worker_and_the_run_s_name() -> None:
    job = submit.training(
        "scenes-fixmatch", ["run=s3://bucket/runs/My_Run.7/", POOLS, "ray.num_workers=4", "train.batch.unlabeled=8"]
    )
    made = submit.manifest(job)
    assert made["metadata"]["name"] == "my-run-7"
    group = made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert [group[key] for key in ("minReplicas", "replicas", "maxReplicas")] == [4, 4, 4]
    assert shlex.split(made["spec"]["entrypoint"]) == ["raysemi", *job.words]
    assert submit.manifest(submit.Job("evaluate", ("s3://b/run", "--json"), gpus=1))["spec"]["entrypointNumGpus"] == 1


def test_an_image_is_that_of_all_pods() -> None:
    job = submit.Job("evaluate", ("s3://b/run",))
    made = submit.manifest(job, image="r/raysemi:2-ray2.60.0")["spec"]
    cluster = made["rayClusterSpec"]
    templates = [cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]]
    for template in (*templates, made["submitterPodTemplate"]):
        assert template["spec"]["containers"][0]["image"] == "r/raysemi:2-ray2.60.0"


def test_a_worker_that_no_pod_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ray\.cpus_per_worker must be at most .* 8; got 9"):
        submit.manifest(submit.training("scenes-fixmatch", ["run=/storage/a", POOLS, "ray.cpus_per_worker=9"]))


def test_all_faults_are_told_before_anything_is_sent() -> None:
    with pytest.raises(ConfigError) as caught:
        submit.training("scenes-fixmatch", ["run=runs/a", "data.pools=pools"])
    assert [fault.split(" must ")[0] for fault in caught.value.faults] == [
        "run",
        "data.labeled",
        "data.val",
        "data.unlabeled",
    ]
    with pytest.raises(ConfigError, match=r"train\.stesp must be a known setting"):
        submit.training("scenes-fixmatch", ["run=/storage/a", POOLS, "train.stesp=3"])
    with pytest.raises(ConfigError, match="ray must have workers"):
        submit.training("scenes-fixmatch", ["run=/storage/a", POOLS, "ray=none"])


def test_a_recipe_of_one_s_own_travels_as_it_was_checked(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: scenes-derprop\nrun: /storage/a\ndata: {pools: /storage/pools}\noptim: {lr: 0.0125}\n")
    job = submit.training(str(recipe), ["seed=5"])
    with submit.uploaded(job, None) as (sent, folder):
        assert folder is not None
        assert sent.words == ["train", "recipe.yaml"]
        assert config_io.load(folder / "recipe.yaml") == job.config
    with submit.uploaded(job, tmp_path) as (sent, folder):
        assert sent.words == ["train", "mine.yaml", "seed=5"]
        assert folder == tmp_path
    with (
        pytest.raises(ConfigError, match="recipe must lie in the folder that is uploaded"),
        submit.uploaded(job, INFRA),
    ):
        pass
    with pytest.raises(ConfigError, match="recipe must be one that the image has"):
        submit.manifest(job)
    named = submit.training("scenes-derprop", ["run=/storage/a", POOLS])
    with submit.uploaded(named, None) as (sent, folder):
        assert (sent, folder) == (named, None)


def test_an_address_is_that_of_the_dashboard() -> None:
    with pytest.raises(ConfigError, match="--address must be http"):
        submit.Cluster("ray://127.0.0.1:10001")


def test_a_job_says_where_its_raysemi_lies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="raysemi")
    monkeypatch.chdir(Path(submit.__file__).parents[2])
    say_which_raysemi_runs()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SENT_BY, "0.0.1")
    say_which_raysemi_runs()
    first, second, warned = (record.getMessage() for record in caplog.records)
    assert ", uploaded with the job: " in first
    assert ", installed: " in second
    assert warned == "raysemi 0.0.1 sent this job; settings may differ here."
