"""The evaluated network of a run as one safetensors file, which says what it needs to be used; and back from there.

The metadata of the file, like those of an ONNX file, are texts by name: `raysemi` (version), `classes`, `palette`,
`mean`, `std`, `sizes`, `model`, `step` (JSON), `method`, `source` (SHA-256 of the checkpoint's manifest) and `config`
(the YAML of the run, without the places of its pools).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from raysemi import __version__, config_io
from raysemi.config import RunConfig
from raysemi.data.store import StoreConfig
from raysemi.engine import checkpoint
from raysemi.errors import CheckpointError, ConfigError
from raysemi.launch.restore import Trained, load_network, untrained_network
from raysemi.models.segmentor import Segmentor
from raysemi.models.weights import save_tensors

SUFFIX = ".safetensors"
_HEADS = "heads."
_PLACE = "exported"
"""Stands in an exported config where the run had a folder or a pool."""


def export(
    run: str, out: Path, which: Literal["last", "best"] | int = "last", size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Writes the evaluated network of a run into a file.

    Args:
        run: run folder or one of its checkpoints, local or URL; or a file that was exported.
        out: `.safetensors`, or `.onnx`: then it is checked with onnxruntime against torch.
        which: of a run folder: `last` checkpoint, `best` on validation, or that of a step.
        size: of an `.onnx`: height and width of its images; None: any.

    Returns:
        `step, out, bytes, classes, method, source, check` (None, or the fields of `onnx_file.Check`).

    Raises:
        CheckpointError: no such run or checkpoint; or torch and onnxruntime differ.
        ConfigError: packages are missing, the file cannot be written, or the network needs a size.
    """
    if not run.endswith(SUFFIX):
        folder, step = checkpoint.locate(run)
        run, which = folder.location, which if step is None else step
    trained = load_network(run, which)
    check: Any = None
    if out.suffix == SUFFIX:
        write_export(trained, out)
    else:
        from raysemi.launch.onnx_file import write_onnx  # it stands on this file

        check = asdict(write_onnx(trained, out, size))
    return {
        "step": trained.step,
        "out": str(out),
        "bytes": out.stat().st_size,
        "classes": list(trained.classes),
        "method": trained.config.method.name,
        "source": trained.digest,
        "check": check,
    }


def metadata(trained: Trained, sizes: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What a file says of its network.

    Args:
        trained: the network and where it comes from.
        sizes: which images the file takes, where they are fewer than the network's own: `height` and `width`.
    """
    network = trained.network
    return {
        "raysemi": __version__,
        "classes": json.dumps(trained.classes),
        "palette": json.dumps(trained.palette),
        "mean": json.dumps(network.mean.flatten().tolist()),
        "std": json.dumps(network.std.flatten().tolist()),
        "sizes": json.dumps(sizes or size_rule(network)),
        "model": trained.config.model.model_dump_json(),
        "method": trained.config.method.name,
        "step": str(trained.step),
        "source": trained.digest,
        "config": config_io.dump(_without_places(trained.config)),
    }


def size_rule(network: Segmentor) -> dict[str, int]:
    """Which images a network takes, in pixels: sides from `min` on, any `multiple` of 1; `seen_multiple` is what the
    network itself resamples them to (14 for the DINOv2 transformers, else 1)."""
    seen = network.encoder.multiple
    return {"min": max(32, 2 * seen), "multiple": 1, "seen_multiple": seen}


def _without_places(config: RunConfig) -> RunConfig:
    data = config.data
    unlabeled = None if data.unlabeled is None else _PLACE
    places = {"labeled": _PLACE, "val": _PLACE, "unlabeled": unlabeled, "store": StoreConfig()}
    weights = config.model.weights if config.model.weights in ("auto", "timm") else "random"
    changed: dict[str, Any] = {
        "run": _PLACE,
        "ray": "none",
        "data": data.model_copy(update=places),
        "model": config.model.model_copy(update={"weights": weights}),
    }
    return config.model_copy(update=changed)


def write_export(trained: Trained, out: Path) -> None:
    """Writes weights and metadata into a file; heads that only training needs are left out.

    Raises:
        ConfigError: the file cannot be written.
    """
    weights = {name: value for name, value in trained.network.state_dict().items() if not name.startswith(_HEADS)}
    save_tensors(weights, out, metadata(trained))


def read_export(path: str | Path) -> Trained:
    """The network of a file that `write_export` wrote, in eval mode on the CPU.

    Raises:
        CheckpointError: no such file, or it holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        config = config_io.parse(about["config"], str(path))
        classes = tuple(json.loads(about["classes"]))
        palette = tuple((red, green, blue) for red, green, blue in json.loads(about["palette"]))
        network = untrained_network(config, len(classes))
        network.heads.clear()
        network.load_state_dict(weights)
        return Trained(network.eval(), config, classes, palette, int(about["step"]), about["source"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError, ConfigError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} must be a file that `raysemi checkpoint export` wrote; got {type(error).__name__} ({first}). "
            "Export it again from its run."
        ) from error
