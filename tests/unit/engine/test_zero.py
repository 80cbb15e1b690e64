"""What `train.zero.*` refuses when the config is read; what the engine does with it: tests/distributed/test_zero.py."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch
from makers import tiny_run

from raysemi.config import check_world
from raysemi.engine.footprint import Footprint
from raysemi.engine.zero import _import_deepspeed
from raysemi.engine.zero_config import ZeroConfig, deepspeed_settings, spread
from raysemi.errors import ConfigError

ZERO = ["train.strategy=deepspeed"]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["train.zero.stage=1"], "train.strategy must be deepspeed with settings of train.zero; got auto"),
        ([*ZERO, "train.zero.stage=4"], "train.zero.stage"),
        (
            [*ZERO, "train.zero.stage=0", "train.zero.offload=optimizer"],
            "train.zero.offload must be none with stage 0",
        ),
        ([*ZERO, "train.zero.offload=all"], "train.zero.offload must be none or optimizer below stage 3"),
        ([*ZERO, "train.zero.stage=3", "gradients=pareto"], "gradients.name must be uniform or fixed with train.zero"),
        (
            [*ZERO, "train.zero.stage=3", "gradients.measure_every=5"],
            "gradients.measure_every must be 0 with train.zero",
        ),
        ([*ZERO, "train.zero.stage=3", "train.compile=true"], "train.compile must be false with train.zero.stage=3"),
    ],
)
def test_what_cannot_be_is_refused_when_the_config_is_read(scenes, tmp_path, settings, fault):
    with pytest.raises(ConfigError) as error:
        tiny_run(scenes, tmp_path / "run", "fixmatch", *settings)
    assert len(error.value.faults) == 1
    assert fault in str(error.value)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_pareto_gradients_are_accepted_below_stage_3(scenes, tmp_path, stage):
    config = tiny_run(scenes, tmp_path / "run", "fixmatch", *ZERO, f"train.zero.stage={stage}", "gradients=pareto")
    assert config.train.zero.stage == stage


@pytest.mark.parametrize(
    ("version", "text"), [(None, "find the package deepspeed"), ("0.18.2", "0.19 or later; got 0.18.2")]
)
def test_without_deepspeed_a_run_ends_before_it_begins(scenes, tmp_path, monkeypatch, version, text):
    config = tiny_run(scenes, tmp_path / "run", "fixmatch", *ZERO)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: version)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ConfigError, match=text) as error:
        check_world(config, 2)
    assert "pip install 'raysemi[deepspeed]'" in str(error.value)


def test_a_device_that_deepspeed_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="got deepspeed on mps"):
        _import_deepspeed(torch.device("mps"))


def test_clipping_is_off_unless_asked_for():
    assert deepspeed_settings(ZeroConfig(), 0.0)["gradient_clipping"] == 0.0
    assert deepspeed_settings(ZeroConfig(), 2.0)["gradient_clipping"] == 2.0
    assert deepspeed_settings(ZeroConfig(stage=0), 2.0)["gradient_clipping"] == 0.0  # by us, on the whole gradient


@pytest.mark.parametrize(
    ("zero", "pareto", "cuda", "expected"),
    [  # of 100 MiB of weights, all trained by AdamW, on 4 ranks with buckets of 10 MiB
        ({"stage": 0}, False, True, (100, 100, 200)),
        ({"stage": 1}, False, True, (125, 110, 50)),
        ({"stage": 2}, False, True, (125, 35, 50)),
        ({"stage": 2}, True, True, (125, 235, 50)),  # and both sides' gradients
        ({"stage": 2, "offload": "optimizer"}, False, True, (100, 35, 0)),
        ({"stage": 2, "offload": "optimizer"}, False, False, (125, 35, 50)),  # on CPUs it is the same memory
        ({"stage": 3}, False, True, (70, 35, 50)),  # two buckets' worth of layers are whole at a time
        ({"stage": 3, "offload": "all"}, False, True, (20, 35, 0)),
    ],
)
def test_what_a_rank_holds(zero, pareto, cuda, expected):
    mib = 2**20
    whole = Footprint(100 * mib, (200 if pareto else 100) * mib, 200 * mib, 0, 0, 0, 0, held=True)
    found = spread(whole, ZeroConfig(bucket=10 * mib // 4, **zero), 4, pareto=pareto, cuda=cuda)
    assert (found.parameters, found.gradients, found.optimizer) == tuple(number * mib for number in expected)
