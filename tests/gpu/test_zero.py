"""On a CUDA device: ZeRO at every stage, of one rank and under bf16, takes the steps of the single strategy."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from makers import tiny_run

from raysemi.data.loader import Stream
from raysemi.data.pool import Pool
from raysemi.engine import distributed
from raysemi.engine.evaluate import inference
from raysemi.engine.strategy import synchronise_batch_norm
from raysemi.engine.trainer import Trainer
from raysemi.launch.restore import build
from raysemi.methods.base import SingleRank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
    pytest.mark.filterwarnings("ignore"),  # of DeepSpeed's imports
]
DEVICE = torch.device("cuda", 0)


def trained(scenes: Path, folder: Path, *settings: str, precision: str = "bf16") -> tuple[Trainer, list[float]]:
    """A trainer after three steps, and the loss of each."""
    config = tiny_run(scenes, folder, "fixmatch", "method.threshold=0.145", f"train.precision={precision}", *settings)
    student, learner = build(config, 7)
    trainer = Trainer(
        student, learner, config.train, config.optim,
        across=SingleRank(), device=DEVICE, period=2, seed=0, gradients=config.gradients,
    )  # fmt: skip
    pools = {name: Pool.open(scenes / name) for name in ("labeled", "unlabeled")}
    stream = Stream(config.data, pools, 0, 2, 2, 0, 1, learner.strong_views, learner.second_view, 0, 3)
    return trainer, [float(trainer.train_step(host)["loss/total"]) for host in stream]


@pytest.fixture(autouse=True)
def _exact():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", ["uniform", "pareto"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_takes_the_steps_of_one_process(scenes, tmp_path, stage, rule, precision):
    if (stage, rule) == (3, "pareto"):
        pytest.skip("refused when the config is read")
    zero = ["train.strategy=deepspeed", f"train.zero.stage={stage}", "train.zero.whole_below=50"]
    one, expected = trained(scenes, tmp_path / "one", f"gradients={rule}", precision=precision)
    trainer, losses = trained(scenes, tmp_path / "zero", f"gradients={rule}", *zero, precision=precision)
    assert float(trainer.skipped) == 0
    assert losses == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 3e-2)
    with trainer.strategy.whole():
        weights = trainer.student.state_dict()
    for name, value in one.student.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")])
def test_offloaded_state_lies_on_the_cpu(scenes, tmp_path, stage, offload):
    zero = ["train.strategy=deepspeed", f"train.zero.stage={stage}", f"train.zero.offload={offload}"]
    trainer, losses = trained(scenes, tmp_path / "zero", *zero, "optim.name=adamw")
    assert all(torch.isfinite(torch.tensor(losses)))
    state = [value for of in trainer.optimizer.torch.state.values() for value in of.values()]
    assert state
    assert all(value.device.type == "cpu" for value in state)


def test_synchronised_batch_norm_under_an_engine(scenes, tmp_path, monkeypatch):
    """Converted before the engine is made, its statistics stay in fp32 and are whole at stage 3."""
    distributed.join_alone(DEVICE)

    class Two(SingleRank):
        world = 2  # to the conversion alone: the group has one rank

    monkeypatch.setattr(
        "raysemi.engine.trainer.synchronise_batch_norm",
        lambda student, across, device: synchronise_batch_norm(student, Two(), device),
    )
    zero = ["train.strategy=deepspeed", "train.zero.stage=3", "train.zero.whole_below=50"]
    trainer, losses = trained(scenes, tmp_path / "zero", *zero)
    assert any("SyncB" in type(module).__name__ for module in trainer.student.modules())
    assert all(torch.isfinite(torch.tensor(losses)))
    with trainer.strategy.whole(), inference(trainer.student, DEVICE, torch.bfloat16):
        assert torch.isfinite(trainer.student(torch.rand(1, 3, 49, 49, device=DEVICE)).logits_BKHW).all()
    assert all(value.dtype == torch.float32 for name, value in trainer.student.named_buffers() if "running" in name)
