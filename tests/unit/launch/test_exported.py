"""Files of a network: what comes back is what was written, and ONNX computes what torch does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import tiny_run
from safetensors.torch import load_file, save_file

import raysemi
from raysemi import api, config_io
from raysemi.errors import CheckpointError, ConfigError
from raysemi.launch import onnx_file
from raysemi.launch.exported import export, read_export, write_export
from raysemi.launch.onnx_file import write_onnx
from raysemi.launch.restore import Trained, load_network
from raysemi.launch.worker import run
from raysemi.models.segmentor import build_segmentor

PALETTE = ((0, 0, 0), (200, 10, 10), (20, 220, 20))


def network_of(*model: str) -> Trained:
    """As if trained: random weights, statistics that are not the first ones, logits of a usual size."""
    config = config_io.load(None, ["run=x", "data.pools=x", "method=supervised", "data.crop=322", *model])
    network = build_segmentor(config.model, 3, None, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
        network.decoder.classifier.weight.mul_(30)
    return Trained(network.eval(), config, ("a", "b", "c"), PALETTE, 12, "ab" * 32)


@pytest.fixture(scope="module")
def trained_run(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = tiny_run(scenes, folder, "u2pl", "train.steps=4", "eval.every=2", "method.representation.dim=8")
    run(config)
    return folder


def test_what_is_exported_comes_back_and_predicts_alike(scenes, trained_run, tmp_path):
    report = export(str(trained_run), tmp_path / "net.safetensors")
    trained, loaded = load_network(trained_run), raysemi.load_exported(tmp_path / "net.safetensors")
    assert (report["step"], report["source"], report["check"]) == (4, trained.digest, None)
    assert not any(name.startswith("heads.") for name in load_file(tmp_path / "net.safetensors"))
    images = torch.rand(2, 3, 50, 61)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits_BKHW, trained.network(images).logits_BKHW)
    assert (loaded.classes, loaded.palette) == (trained.classes, trained.palette)
    assert not loaded.training
    for source, out in ((trained_run, "a"), (tmp_path / "net.safetensors", "b")):
        assert api.predict(source, pool=scenes / "val", out=tmp_path / out) == 5
    labels = [sorted((tmp_path / out).rglob("labels/**/*.png")) for out in "ab"]
    assert [a.read_bytes() for a in labels[0]] == [b.read_bytes() for b in labels[1]]
    text = (tmp_path / "net.safetensors").read_bytes()[:20_000].decode(errors="ignore")
    assert str(scenes) not in text
    assert str(trained_run) not in text


@pytest.mark.parametrize("which", ["best", 2, "checkpoints/step-000002"])
def test_any_checkpoint_can_be_exported(trained_run, tmp_path, which):
    source, which = (trained_run, which) if "/" not in str(which) else (trained_run / which, "last")
    report = export(str(source), tmp_path / "net.safetensors", which)
    expected = json.loads((trained_run / "best.json").read_text())["step"] if which == "best" else 2
    assert report["step"] == expected == read_export(tmp_path / "net.safetensors").step


def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"12345678901")
    good = network_of("model.encoder=test_efficientnet", "model.weights=random", "model.channels=16")
    write_export(good, tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-100])
    for name in ("other", "garbage", "cut", "gone"):
        with pytest.raises(
            CheckpointError, match=r"must be a file that `raysemi checkpoint export` wrote; got"
        ) as told:
            api.load_exported(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(told.value)


CASES = {
    "lite0": (["model.channels=16"], None),
    "dpt": (["model.name=dpt", "model.encoder=vit_small_patch14_dinov2", "model.weights=random"], (60, 84)),
    "resnet26": (["model.encoder=resnet26", "model.weights=random", "model.output_stride=8"], None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_onnx_computes_what_torch_does_at_every_size(tmp_path, name):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    settings, size = CASES[name]
    trained = network_of(*settings)
    check = write_onnx(trained, tmp_path / "net.onnx", size)
    assert check.max_difference <= 1e-4 * check.max_logit
    assert check.agreement > 0.999
    assert len(check.images) > 1
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    for count, height, width in [(1, *size)] if size else [(1, 96, 96), (3, 101, 67)]:
        images = torch.rand(count, 3, height, width)
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            wanted = trained.network(images).logits_BKHW.numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert json.loads(about["classes"]) == ["a", "b", "c"]
    assert json.loads(about["palette"]) == [list(colour) for colour in PALETTE]
    assert (about["step"], about["method"], about["source"]) == ("12", "supervised", "ab" * 32)
    assert json.loads(about["mean"]) == pytest.approx(trained.network.mean.flatten().tolist())
    assert json.loads(about["sizes"]) == (
        {"height": 60, "width": 84} if size else {"min": 32, "multiple": 1, "seen_multiple": 1}
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "net.onnx"]


@pytest.mark.slow
def test_a_graph_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    trained = network_of("model.encoder=test_efficientnet", "model.weights=random", "model.channels=16")
    forward = onnx_file._Logits.forward
    monkeypatch.setattr(onnx_file._Logits, "forward", lambda self, images: forward(self, images) * 1.01)
    with pytest.raises(CheckpointError, match=r"must compute what torch does.*Nothing was written"):
        write_onnx(trained, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_transformer_needs_a_size(tmp_path):
    trained = network_of(*CASES["dpt"][0])
    with pytest.raises(ConfigError, match=r"--size must be given for vit_small_patch14_dinov2.* such as 518x518"):
        write_onnx(trained, tmp_path / "net.onnx")
