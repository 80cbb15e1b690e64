"""The evaluated network of a run as an ONNX file, checked against torch before it appears.

Input `images`: float32 RGB in [0, 1], [batch, 3, height, width]; the graph normalises. Output `logits`: float32
[batch, classes, height, width]. Metadata: see `exported`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raysemi.errors import CheckpointError, ConfigError
from raysemi.launch.exported import metadata
from raysemi.launch.restore import Trained
from raysemi.models.encoders import DinoV2
from raysemi.models.segmentor import Segmentor

SUFFIX = ".onnx"
_TRACED = (97, 129)
"""Height and width with which a graph for all sizes is made; it is checked with these and with others."""
_CHECKED = ((1, 97, 129), (2, 130, 75), (1, 64, 200))
_TOLERANCE = 1e-4
"""Largest difference of two logits, in parts of the largest logit: float32 sums in another order."""


@dataclass(frozen=True)
class Check:
    """How an ONNX file compares with torch, over images of several sizes."""

    images: tuple[tuple[int, int, int], ...]
    """Number, height and width of the images of each pass."""
    max_difference: float
    """Largest absolute difference of two logits."""
    max_logit: float
    """Largest absolute logit of torch."""
    agreement: float
    """Share of pixels, in [0, 1], with the same most probable class."""


class _Logits(nn.Module):
    def __init__(self, network: Segmentor) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images).logits_BKHW
        return logits


def write_onnx(trained: Trained, out: Path, size: tuple[int, int] | None = None) -> Check:
    """Writes the graph and its weights, if onnxruntime computes with it what torch does.

    Args:
        trained: network, in eval mode on the CPU.
        out: file, replaced if it is there.
        size: height and width of the images that it takes; None: any, which transformers do not have.

    Raises:
        ConfigError: packages are missing, the file cannot be written, or the network needs a size.
        CheckpointError: torch cannot make the graph, or it computes something else.
    """
    network = trained.network
    if size is None and network.encoder.multiple > 1:
        raise ConfigError(
            f"--size must be given for {trained.config.model.encoder}, whose position embeddings are resampled for one "
            f"size at a time. Add --size HEIGHTxWIDTH, such as {37 * network.encoder.multiple}x"
            f"{37 * network.encoder.multiple}."
        )
    try:
        import onnx  # noqa: F401 - the exporter's own error does not say what to install
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"an ONNX file needs the packages of the extra `export`; got {error}. Install them: "
            "pip install 'raysemi[export]'."
        ) from error
    height, width = size or _TRACED
    dynamic = {0: "batch"} | ({2: "height", 3: "width"} if size is None else {})
    beside = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _exportable(network, (height, width)), torch.no_grad(), _quiet():
            program: Any = torch.onnx.export(
                _Logits(network).eval(),
                (torch.rand(2, 3, height, width),),
                dynamo=True,
                dynamic_shapes={"images": dynamic},
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
            rule = None if size is None else {"height": height, "width": width}
            program.model.metadata_props.update(metadata(trained, rule))
            program.save(beside)
        check = _check(network, onnxruntime, beside, size)
        beside.replace(out)
    except OSError as error:
        raise ConfigError(f"{out} must be writable; got {error}. Choose another --out.") from error
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{trained.config.model.encoder} must be a network that torch {torch.__version__} exports; got "
            f"{type(error).__name__} ({str(error).splitlines()[0]}). Give --size HEIGHTxWIDTH, or "
            "export a .safetensors."
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    return check


def _check(network: Segmentor, onnxruntime: Any, path: Path, size: tuple[int, int] | None) -> Check:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    passes = _CHECKED if size is None else ((1, *size), (2, *size))
    generator = torch.Generator().manual_seed(0)
    difference = largest = same = pixels = 0.0
    for count, height, width in passes:
        coarse = torch.rand(count, 3, 7, 9, generator=generator)
        images_B3HW = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
        with torch.inference_mode():
            wanted_BKHW = network(images_B3HW).logits_BKHW
        (found,) = session.run(None, {"images": images_B3HW.numpy()})
        found_BKHW = torch.from_numpy(found)
        if found_BKHW.shape != wanted_BKHW.shape:
            raise CheckpointError(
                f"the ONNX graph must give logits {list(wanted_BKHW.shape)}; got {list(found_BKHW.shape)}. Give --size."
            )
        difference = max(difference, float((found_BKHW - wanted_BKHW).abs().max()))
        largest = max(largest, float(wanted_BKHW.abs().max()))
        same += float((found_BKHW.argmax(1) == wanted_BKHW.argmax(1)).sum())
        pixels += count * height * width
    check = Check(passes, difference, largest, same / pixels)
    if not difference <= _TOLERANCE * max(largest, 1.0):
        raise CheckpointError(
            f"the ONNX graph must compute what torch does, within {_TOLERANCE:g} of the largest logit ({largest:.3g}); "
            f"got a difference of {difference:.3g}, and the same class in {100 * check.agreement:.2f} % of the pixels. "
            "Nothing was written: give --size, or export a .safetensors."
        )
    return check


@contextmanager
def _exportable(network: Segmentor, size: tuple[int, int]) -> Iterator[None]:
    """Within it, parts whose Python depends on the size of an image are what ONNX has for them."""
    import timm.layers as layers

    Conv2dSame: Any = layers.Conv2dSame  # type: ignore[attr-defined]

    def same(self: Any, x_BDhw: Tensor) -> Tensor:
        batch, _, *sides = x_BDhw.shape
        strided = [(side + stride - 1) // stride for side, stride in zip(sides, self.stride, strict=True)]
        inputs = [x_BDhw, self.weight] + ([] if self.bias is None else [self.bias])
        how = {
            "auto_pad": "SAME_UPPER",
            "strides": list(self.stride),
            "dilations": list(self.dilation),
            "group": self.groups,
        }
        shape = (batch, self.weight.shape[0], *strided)
        result: Tensor = torch.onnx.ops.symbolic("Conv", inputs, how, dtype=x_BDhw.dtype, shape=shape)
        return result

    encoder: Any = network.encoder
    before = Conv2dSame.forward
    if isinstance(network.encoder, DinoV2):
        grid = [side // encoder.multiple for side in network.seen_size(size)]
        positions_1ND = encoder.positions(grid).detach()
        encoder.positions = lambda grid: positions_1ND
    Conv2dSame.forward = same
    try:
        yield
    finally:
        Conv2dSame.forward = before
        encoder.__dict__.pop("positions", None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says to those who write exporters."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in names:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
