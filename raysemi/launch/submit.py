"""A command of raysemi as a job of a Ray cluster: checked here, sent, followed to its end, with its own exit code."""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raysemi import __version__, config_io
from raysemi.config import RunConfig
from raysemi.errors import ConfigError, RaysemiError
from raysemi.launch.cluster import refuse_relative_paths, set_authentication
from raysemi.launch.job import SENT_BY

_log = logging.getLogger(__name__)

VERBS = {
    "train": ("train",),
    "pack": ("pack",),
    "index": ("index",),
    "evaluate": ("evaluate",),
    "predict": ("predict",),
    "sweep": ("tune", "run"),
}
"""What a job may be, and its command; jobs/*.py are the same."""
_EVERYWHERE = {"pack": ("--ray", "auto"), "index": ("--ray", "auto"), "sweep": ("--ray", "auto")}
"""What takes these commands to all machines."""
_STOP_S = 120
"""For the program to write a checkpoint when its job is stopped; Ray's own patience is 3 s."""
_POLL_S = 0.5
_HEAD_STARTS_S = 60
"""For the job agent of a head that has just begun to answer."""
_KUBERAY = Path(__file__).parents[1] / "infra/kuberay"
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.working_dir",
)
"""Loggers of Ray's that tell of uploads, folders that are left out and closed connections."""


@dataclass(frozen=True)
class Job:
    """What is to run."""

    kind: str
    """Of `VERBS`."""
    arguments: tuple[str, ...]
    run: str | None = None
    """Run folder or result, which no two jobs may write at a time."""
    config: RunConfig | None = None
    """Of a training."""
    gpus: float = 0
    """For the job's own process; workers of a training have theirs."""

    @property
    def words(self) -> list[str]:
        """The command's arguments behind `raysemi`."""
        return [*VERBS[self.kind], *_EVERYWHERE.get(self.kind, ()), *self.arguments]


def training(recipe: str, overrides: Sequence[str]) -> Job:
    """A training, its config read and checked as the job would.

    Raises:
        ConfigError: every fault, among them paths that only this machine knows.
    """
    config = config_io.load(recipe, overrides)
    if config.ray == "none":
        raise ConfigError("ray must have workers in a job of a cluster; got none. Remove ray=none.")
    paths: list[tuple[str, str | None]] = [("run", config.run), ("data.labeled", config.data.labeled)]
    paths += [("data.val", config.data.val), *(("data.unlabeled", pool) for pool in config.data.unlabeled_pools)]
    refuse_here_only(paths)
    return Job("train", (recipe, *overrides), run=config.run.rstrip("/"), config=config)


def refuse_here_only(paths: Sequence[tuple[str, str | None]]) -> None:
    """Refuses what each machine would look up in a folder of its own, as ConfigError."""
    refuse_relative_paths(paths, "the same command without `submit`")


@contextmanager
def uploaded(job: Job, checkout: Path | None) -> Iterator[tuple[Job, Path | None]]:
    """What travels with a job: a checkout, or its recipe where that is a file.

    Args:
        job: the job.
        checkout: folder whose raysemi runs in place of the cluster's own; None: the latter.

    Yields:
        The job with the recipe's name over there, and the folder to upload.

    Raises:
        ConfigError: the recipe lies outside of the checkout.
    """
    if checkout is not None:
        yield _within(job, checkout.resolve()), checkout
    elif job.config is None or not Path(job.arguments[0]).is_file():
        yield job, None
    else:
        with tempfile.TemporaryDirectory(prefix="raysemi-job-") as folder:
            # All of it, a base recipe included, as it was checked here.
            (Path(folder) / "recipe.yaml").write_text(config_io.dump(job.config), encoding="utf-8")
            yield _renamed(job, "recipe.yaml", ()), Path(folder)


def _within(job: Job, checkout: Path) -> Job:
    if job.config is None or not (recipe := Path(job.arguments[0]).expanduser()).is_file():
        return job
    if not recipe.resolve().is_relative_to(checkout):
        raise ConfigError(
            f"recipe must lie in the folder that is uploaded, {checkout}; got {recipe}. Move it, or add --installed."
        )
    return _renamed(job, recipe.resolve().relative_to(checkout).as_posix(), job.arguments[1:])


def _renamed(job: Job, recipe: str, overrides: tuple[str, ...]) -> Job:
    return Job(job.kind, (recipe, *overrides), job.run, job.config, job.gpus)


class Cluster:
    """A Ray cluster's job server.

    Args:
        address: http://HEAD:8265.

    Raises:
        RaysemiError: it does not answer, or refuses the token.
        ConfigError: it runs another Ray.
    """

    def __init__(self, address: str) -> None:
        if urlsplit(address).scheme not in ("http", "https"):
            raise ConfigError(f"--address must be http://HEAD:8265, the dashboard's; got {address}. Correct it.")
        set_authentication(own=False)
        from ray.job_submission import JobSubmissionClient

        self.address = address
        with self._one_line():
            self._client: Any = JobSubmissionClient(address)
            for name in _CHATTY:
                logging.getLogger(name).setLevel(logging.ERROR)
            theirs = self._client._do_request("GET", "/api/version").json()["ray_version"]
        ours = version("ray")
        if theirs.split(".")[:2] != ours.split(".")[:2]:
            raise ConfigError(
                f"Ray must be the same here and on the cluster; got {ours} here, {theirs} at {address}. Install "
                f"ray=={theirs} here, or take the image of ray{ours}."
            )
        if theirs != ours:
            _log.warning("Ray is %s here and %s on the cluster.", ours, theirs)

    def submit(self, job: Job, folder: Path | None) -> str:
        """Sends a job; its id.

        Raises:
            ConfigError: another job that has not ended writes the same folder.
        """
        with self._one_line():
            for other in self._client.list_jobs():
                same = job.run is not None and (other.metadata or {}).get("run") == job.run
                if same and other.status.value not in _ENDED:
                    raise ConfigError(
                        f"run must be written by one job at a time; got {job.run}, which {other.submission_id} writes. "
                        f"Wait for it, or `ray job stop --address {self.address} {other.submission_id}`."
                    )
            environment: dict[str, Any] = {"env_vars": {SENT_BY: __version__, "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)}}
            if folder is not None:
                environment["working_dir"] = str(folder)
            return self._sent(
                entrypoint=shlex.join(["python", "-m", "raysemi", *job.words]),
                runtime_env=environment,
                metadata={"run": job.run} if job.run else None,
                entrypoint_num_gpus=job.gpus or None,
            )

    def _sent(self, **job: Any) -> str:
        until = time.monotonic() + _HEAD_STARTS_S
        while True:
            try:
                return str(self._client.submit_job(**job))
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(_POLL_S)

    def follow(self, job_id: str, write: Any) -> int:
        """Hands on what a job prints until it has ended; its program's exit code, 130 when it was stopped."""
        with self._one_line():
            asyncio.run(self._tail(job_id, write))
            while (info := self._client.get_job_info(job_id)).status.value not in _ENDED:
                asyncio.run(asyncio.sleep(_POLL_S))
        if info.status.value == "STOPPED":
            return 130
        if info.driver_exit_code is None:  # it never started, or went with its node
            raise RaysemiError(
                f"job {job_id} must run to its end; got: {(info.message or 'no reason').splitlines()[0]}"
            )
        return int(info.driver_exit_code)

    async def _tail(self, job_id: str, write: Any) -> None:
        async for lines in self._client.tail_job_logs(job_id):
            write(lines)

    def stop(self, job_id: str) -> None:
        """Asks a job to end; a training writes a checkpoint first."""
        with self._one_line():
            self._client.stop_job(job_id)

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Ray's errors of the connection as one of ours; none of them holds the token."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise RaysemiError(
                f"cluster must take the token; got a refusal of {self.address}. Put its token into a file that "
                "only you may read, and name it by RAY_AUTH_TOKEN_PATH."
            ) from error
        except (ConnectionError, OSError) as error:
            raise RaysemiError(
                f"job server must answer at {self.address}; got {type(error).__name__}. Is it forwarded? "
                "kubectl port-forward service/NAME-head-svc 8265"
            ) from error
        except RuntimeError as error:
            if isinstance(error, RaysemiError):
                raise
            raise RaysemiError(f"job server must do what it is asked; got: {str(error).splitlines()[0]}") from error


def manifest(job: Job, overlay: Path | None = None, image: str | None = None) -> dict[str, Any]:
    """The RayJob of `infra/kuberay` for a job, filled.

    Args:
        job: with a recipe that the image has, by name.
        overlay: folder whose jobs/ kustomize renders, which needs kubectl, or the name of one of `infra/kuberay`; None:
            `base/jobs/train.yaml` as it is.
        image: of all pods; None: the manifest's.

    Raises:
        ConfigError: the recipe is a file, which no pod has; a worker's pod is too small.
    """
    import yaml

    if job.config is not None and Path(job.arguments[0]).is_file():
        raise ConfigError(
            f"recipe must be one that the image has; got the file {job.arguments[0]}. Name the recipe that it "
            "changes and give the rest as a.b=value, or build an image with it."
        )
    if overlay is None:
        found = yaml.safe_load((_KUBERAY / "base/jobs/train.yaml").read_text(encoding="utf-8"))
    else:
        found = _rendered(overlay, "sweep" if job.kind == "sweep" else "train")
    found["metadata"]["name"] = _object_name(job)
    found["metadata"]["labels"]["app.kubernetes.io/name"] = job.kind
    spec = found["spec"]
    spec["entrypoint"] = shlex.join(["raysemi", *job.words])
    if job.gpus:
        spec["entrypointNumGpus"] = job.gpus
    cluster = spec["rayClusterSpec"]
    templates = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for template in (*templates, spec["submitterPodTemplate"]) if image else ():
        template["spec"]["containers"][0]["image"] = image
    if job.config is not None:
        _fit(job.config, cluster)
    return found


def _rendered(overlay: Path, name: str) -> dict[str, Any]:
    from raysemi.infra.check import render

    ours = _KUBERAY / "overlays" / overlay
    overlay = ours if not overlay.is_dir() and ours.is_dir() else overlay
    try:
        documents = list(render(overlay))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error
    labels = (d["metadata"].get("labels", {}).get("app.kubernetes.io/name") for d in documents)
    for document, label in zip(documents, labels, strict=True):
        if document["kind"] == "RayJob" and label == name:
            return document
    raise ConfigError(f"--overlay must have a RayJob labelled app.kubernetes.io/name={name}; got none in {overlay}.")


def _object_name(job: Job) -> str:
    """A run folder's last part, in the signs that Kubernetes takes; KubeRay adds to it, so that it may not be long."""
    last = (job.run or f"raysemi-{job.kind}").rstrip("/").rpartition("/")[2]
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:40].rstrip("-") or f"raysemi-{job.kind}"


def _fit(config: RunConfig, cluster: dict[str, Any]) -> None:
    """One worker a pod: as many pods as the run has workers."""
    assert config.ray != "none"
    group = cluster["workerGroupSpecs"][0]
    cores = float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    wanted = config.ray.cpus_per_worker
    if wanted != "auto" and wanted > cores:
        raise ConfigError(
            f"ray.cpus_per_worker must be at most the cores of a worker's pod, {cores:g}; got {wanted}. Lower it, or "
            "patch the manifest."
        )
    group["maxReplicas"] = config.ray.max_workers
    if not cluster.get("enableInTreeAutoscaling"):
        group["replicas"] = group["minReplicas"] = group["maxReplicas"]


def is_checkout(folder: Path) -> bool:
    """Whether a folder holds the code that a job could run in place of the installed one."""
    return (folder / "raysemi/__init__.py").is_file() and (folder / "jobs").is_dir()
