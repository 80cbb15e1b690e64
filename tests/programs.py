"""Reads commands as their programs would read them, without running any: `check(words)` raises at what they refuse."""

from __future__ import annotations

import argparse
import itertools
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from documents import ROOT

import raysemi.cli
from raysemi import catalogue, config_io
from raysemi.bench import grid, step_table
from raysemi.data.sources import read_options
from raysemi.data.standard import standard_names
from raysemi.launch import submit
from raysemi.tune import driver
from raysemi.tune import sweep as sweeps

UNCHECKED = {
    "helm": "charts lie in registries on the network",
    "base64": "a program of the system", "grep": "a program of the system",
    "umask": "the shell's", "export": "the shell's", "for": "the shell's",
    "tensorboard": "its options need its imports of seconds; `--logdir` is its first",
    "wandb": "an optional package, `sync` asks the network",
}  # fmt: skip
"""Programs whose commands only the shell reads here (`test_blocks_are_what_the_shell_reads`), and why."""
SPACE = ("run=/storage/runs/a", "data.pools=/storage/pools/a")
"""What `...` stands for where a job needs it."""
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# ---- raysemi


def leaf(words: list[str]) -> tuple[tuple[str, ...], click.Command, list[str]]:
    """The command that `raysemi WORDS` is, and its arguments."""
    command, path = typer.main.get_command(raysemi.cli.app), ()
    while hasattr(command, "commands"):
        assert words, f"{path} needs a command"
        assert words[0] in command.commands, f"raysemi has no {' '.join((*path, words[0]))}"
        path, command, words = (*path, words[0]), command.commands[words[0]], words[1:]
    return path, command, words


def run_raysemi(words: list[str]) -> None:
    gap = "..." in words
    path, command, given = leaf([word for word in words if word not in ("...", "a.b=value")])
    if not given and not gap:
        return  # named in passing
    if gap and path == ("submit",):
        given = given if any(catalogue_recipe(word) for word in given) else ["voc-derprop", *given]
        given = [*given, *SPACE]
    if gap and path == ("train",) and not any(catalogue_recipe(word) for word in given):
        given = ["voc-derprop", *given]
    try:
        parameters = command.make_context(" ".join(path), list(given)).params
    except typer.Exit as end:  # of --list
        if end.exit_code:
            raise
        return
    if (check := SETTINGS.get(path)) is not None:
        check(parameters)


def catalogue_recipe(word: str) -> bool:
    return (ROOT / "raysemi/recipes" / f"{word}.yaml").is_file()


def of_submit(given: dict[str, Any]) -> None:
    job = raysemi.cli.submit._checked(given["kind"], list(given["arguments"]))
    submit.manifest(job, None, given["image"])
    overlays = [path.name for path in (ROOT / "infra/kuberay/overlays").iterdir()]
    assert given["overlay"] is None or given["dry_run"]
    assert given["overlay"] is None or given["overlay"].name in (*overlays, "NAME")


def of_pack(given: dict[str, Any]) -> None:
    read_options(given["source"], given["options"] or [])
    names = {"voc": standard_names("voc"), "cityscapes": standard_names("cityscapes"), "coco": standard_names("coco")}
    split = given["split"]
    assert split is None or given["source"] not in names or split.isdecimal() or split in names[given["source"]]


def of_grid(given: dict[str, Any]) -> None:
    lists = {name: (given[name] or "").split(",") for name in ("weighting", "gradients", "seeds")}
    if not given["report_only"]:
        methods = given["methods"].split(",") if given["methods"] else None
        seeds = [int(seed) for seed in lists["seeds"]]
        settings = given["overrides"] or []
        grid.make_plan(given["out"], given["recipes"], methods, lists["weighting"], lists["gradients"], seeds, settings)


def of_step(given: dict[str, Any]) -> None:
    how = {"weighting": given["weighting"], "gradients": given["gradients"]}
    if given["every"]:
        step_table.settings_of_all(**how, precision="auto", compile=False, threads=given["threads"])
    else:
        assert None not in (given["backbone"], given["crop"], given["batch"]) or given["method"] in catalogue.names()


def of_methods(given: dict[str, Any]) -> None:
    assert given["name"] in (*catalogue.names(), "agreement", "NAME"), given  # docs/methods.md writes agreement


SETTINGS: dict[tuple[str, ...], Callable[[dict[str, Any]], object]] = {
    ("train",): lambda given: config_io.load(given["recipe"], given["overrides"] or []),
    ("detect", "train"): lambda given: config_io.load_detector(given["recipe"], given["overrides"] or []),
    ("tune", "run"): lambda given: driver.prepare(
        sweeps.load(given["sweep"], given["overrides"] or []), given["out"] or Path("sweeps/new"), given["address"]
    ),
    ("submit",): of_submit,
    ("pack",): of_pack,
    ("bench", "grid"): of_grid,
    ("bench", "step"): of_step,
    ("methods",): of_methods,
}
"""What is asked beside the command line itself, by the functions that the command would ask."""


# ---- other programs


def run_python(words: list[str]) -> None:
    if words[0] == "-m":
        modules = {"raysemi": run_raysemi, "pytest": run_pytest, "raysemi.infra.check": existing}
        modules |= {"uv": lambda rest: uv(rest)}
        modules[words[1]](words[2:])
        return
    script = ROOT / words[0]
    assert script.is_file(), script
    if words[0].startswith("jobs/"):
        run_raysemi(words_of_job(script, words[1:]))
    else:
        options_of_script(script, words[1:])


class Read(Exception):
    """The command line was read: no need to go on."""


def options_of_script(script: Path, arguments: list[str]) -> None:
    if "argparse" not in script.read_text(encoding="utf-8"):
        assert not [word for word in arguments if word.startswith("-")], f"{script} has no options"
        return

    def read_by(parse: Callable[..., object]) -> Callable[..., None]:
        def read(self: argparse.ArgumentParser, *given: Any) -> None:
            parse(self, *given)
            raise Read

        return read

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, read_by(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.syspath_prepend(str(script.parent))
        with pytest.raises(Read):
            runpy.run_path(str(script), run_name="__main__")


def words_of_job(script: Path, arguments: list[str]) -> list[str]:
    """What the job's file hands to the command line."""
    found: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raysemi.cli, "main", found.append)
        patch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")
    return found[0]


def run_ray(words: list[str]) -> None:
    from ray.dashboard.modules.job.cli import job_cli_group
    from ray.scripts.scripts import cli

    if words[0] == "job":
        command = job_cli_group.commands[words[1]]
        if words[2:]:  # not named in passing
            check(list(command.make_context(words[1], words[2:]).params["entrypoint"]))
    else:
        command = cli.commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words[1:] if word.startswith("-")} <= known


def run_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    assert given.module
    assert given.training_script == "raysemi"
    run_raysemi(given.training_script_args)


def run_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = {*re.findall(r"^([a-z]+):", text, re.MULTILINE), *re.findall(r"^([A-Z]+) \?=", text, re.MULTILINE)}
    assert {word.partition("=")[0] for word in words} <= known, f"no target {words}"


def run_pytest(words: list[str]) -> None:
    if words[:1] == ["-m"]:
        marks = {line.partition(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
        assert set(re.findall(r"\w+", words[1])) - {"not", "and", "or"} <= marks
        words = words[2:]
    existing(words)


def run_pip(words: list[str]) -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    for word in words:
        if match := re.fullmatch(r"raysemi\[(\w+)\]", word):
            assert match[1] in extras, f"no extra {match[1]}"


def uv(words: list[str]) -> None:
    assert words[0] == "pip"
    run_pip(words)
    known = subprocess.run([sys.executable, "-m", "uv", *words[:2], "--help"], capture_output=True, text=True)
    assert known.returncode == 0, known.stderr
    for word in words[2:]:
        assert not word.startswith("--") or f"{word} " in known.stdout or f"{word}\n" in known.stdout, word


def run_kubectl(words: list[str]) -> None:
    manifests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "infra").rglob("*.yaml"))
    for option, value in itertools.pairwise(words):
        if option == "-k":
            for folder in paths(value):
                assert any((folder / name).is_file() for name in ("kustomization.yaml", "kustomization.yml")), value
        elif option == "-f" and value != "-" and "logs" not in words:
            assert (ROOT / value).is_file(), value
        elif option == "-n":
            assert f"namespace: {value}" in manifests
        elif option == "-l" and not value.startswith("nvidia.com/"):  # a label that NVIDIA's operator gives
            assert value.replace("=", ": ") in manifests, value
    if "label" in words:
        assert words[-1].replace("=", ": ") in manifests, words[-1]
    for word in words:
        if match := re.fullmatch(r"service/(raysemi-\w+)-head-svc", word):  # KubeRay's name of a cluster's service
            assert f"name: {match[1]}" in manifests


def paths(given: str) -> list[Path]:
    """Folders that a path with NAME stands for; of infra/kuberay where it begins below."""
    base = ROOT if given.startswith("infra/") else ROOT / "infra/kuberay"
    names = [path.name for path in (ROOT / "infra/kuberay/overlays").iterdir()] if "NAME" in given else [""]
    return [base / given.replace("NAME", name) for name in names]


def run_docker(words: list[str]) -> None:
    dockerfile = ROOT / "infra/docker/Dockerfile"
    text = dockerfile.read_text(encoding="utf-8")
    if "imagetools" in words:
        for name, value in re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE):
            text = text.replace(f"${{{name}}}", value)
        assert f"FROM {words[words.index('inspect') + 1]}@" in text
        return
    assert ROOT / words[words.index("-f") + 1] == dockerfile
    assert f"ARG {words[words.index('--build-arg') + 1].partition('=')[0]}\n" in text
    image = words[words.index("-t") + 1].rpartition("/")[2]
    assert f"image: &image {image}" in (ROOT / "infra/kuberay/base/jobs/train.yaml").read_text(encoding="utf-8")


def run_sed(words: list[str]) -> None:
    expression, file = words[-2:]
    delimiter = expression[1]
    assert re.search(expression.split(delimiter)[1], (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def existing(words: list[str]) -> None:
    for word in words:
        path = word.rpartition("=")[2]
        assert path.startswith("-") or "/" not in path or (ROOT / path).exists(), path


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "raysemi": run_raysemi,
    "python": run_python,
    "ray": run_ray,
    "torchrun": run_torchrun,
    "make": run_make,
    "pytest": run_pytest,
    "pip": run_pip,
    "kubectl": run_kubectl,
    "docker": run_docker,
    "sed": run_sed,
    "cat": existing,
    "prometheus": existing,
    "promtool": existing,
    "source": lambda words: None if words == [".venv/bin/activate"] else pytest.fail(str(words)),
    "tests/soak.py": lambda words: options_of_script(ROOT / "tests/soak.py", words),
}


def check(words: list[str]) -> None:
    """A command of a shell."""
    name = words[0].removeprefix(".venv/bin/")
    if name in UNCHECKED or re.fullmatch(r"\w+=\$?", name):
        return
    assert name in CHECKS, f"no check knows {name}"
    CHECKS[name](words[1:])
