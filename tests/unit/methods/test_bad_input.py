"""Bad input, over every method, weighting and gradient rule: a real step stays finite, is skipped whole, or is refused.

Each test runs the trainer's own step: photometric views, forward, both gradients, optimizer, averaged copy, memories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from makers import tiny_run, tiny_segmentor
from torch import nn

from raysemi import config_io
from raysemi.catalogue import describe
from raysemi.data.loader import Stream
from raysemi.data.types import HostBatch
from raysemi.data.views import FAMILIES, ViewsConfig, generator
from raysemi.engine.gradients import GradientsConfig
from raysemi.engine.optim import OptimConfig
from raysemi.engine.trainer import TrainConfig, Trainer
from raysemi.errors import ConfigError
from raysemi.launch.restore import open_pools
from raysemi.methods import METHODS
from raysemi.methods.base import SingleRank
from raysemi.methods.weighting import NoWeightingConfig, RankWeightingConfig, build_weighting
from raysemi.models.decoders import Decoded

CLASSES, SIDE, PERIOD = 4, 33, 5
QUEUE = {"size": 30, "first_size": 40}
TRUSTING = {
    "fixmatch": {"threshold": 0.2},
    "mean_teacher": {"ramp": 0.0},
    "augseg": {"threshold": 0.2},
    "unimatch": {"threshold": 0.2},
    "unimatch_v2": {"threshold": 0.2},
    "corrmatch": {"region": {"segments": 6}, "threshold": {"initial": 0.2}},
    "derprop": {"region": {"segments": 6}, "threshold": {"initial": 0.2}},
    "u2pl": {
        "contrast": {"delta_p": 0.2}, "representation": {"hidden": 5, "dim": 7}, "queue": QUEUE, "warmup_periods": 0,
    },
}  # fmt: skip
"""Settings under which a network that has learned nothing trusts some of its pixels, from the first step on."""
RANK = RankWeightingConfig(confidence=0.2, memory=9, unlabeled=True)


def combinations() -> list[tuple[str, str, str]]:
    """Every method with each weighting and gradient rule that its config takes."""
    found = []
    for name in METHODS:
        about = describe(name)
        rules = [rule for rule in about["gradients"] if rule != "fixed"]
        found += [(name, weighting, rule) for weighting in about["weighting"] for rule in rules]
    return found


every = pytest.mark.parametrize(("name", "weighting", "rule"), combinations())


def start(
    name: str, weighting: str = "none", rule: str = "uniform", settings: dict | None = None, frozen: bool = False
) -> Trainer:
    """A trainer before its first step, around a tiny network."""
    config, kind = METHODS[name]
    method = kind(config(**(TRUSTING.get(name, {}) if settings is None else settings)), CLASSES)
    student = tiny_segmentor(CLASSES, method.heads, frozen=frozen)
    chosen = RANK if weighting == "rank" else NoWeightingConfig()
    method.weighting = build_weighting(chosen, CLASSES, student.penultimate_channels)
    return Trainer(
        student, method, TrainConfig(steps=20), OptimConfig(lr=0.01), across=SingleRank(), device=torch.device("cpu"),
        period=PERIOD, seed=0, gradients=GradientsConfig(name=rule),
    )  # fmt: skip


def share(trainer: Trainer, seed: int = 0) -> HostBatch:
    """What a loader would hand over: two labeled, two unlabeled images, a CutMix box, a padded strip."""
    method, draw = trainer.method, torch.Generator().manual_seed(seed)
    family, views = FAMILIES[method.strong], method.strong_views

    def images() -> torch.Tensor:
        coarse = torch.rand(2, 3, 5, 6, generator=draw)
        return (255 * nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")).to(torch.uint8)

    def photometric(name: str) -> torch.Tensor:
        drawn = [family.draw(generator(seed, 0, f"{u}", name), ViewsConfig()) for u in range(2)]
        return torch.stack([torch.as_tensor(row, dtype=torch.float32) for row in drawn])

    valid_UHW = torch.ones(2, SIDE, SIDE, dtype=torch.bool)
    valid_UHW[1, :, 27:] = False
    boxes_VU4 = torch.zeros(views, 2, 4, dtype=torch.int64)
    boxes_VU4[:, 0] = torch.tensor([3, 5, 20, 22])
    label_LHW = torch.randint(0, CLASSES, (2, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    label_LHW[0, :8] = 255
    second = {}
    if method.second_view:
        second = {
            "second_weak_U3HW": images(),
            "second_valid_UHW": valid_UHW.flip(2),
            "second_photometric_UP": photometric("second"),
        }
    return HostBatch(
        step=trainer.step,
        image_L3HW=images(),
        label_LHW=label_LHW,
        slots_L=torch.arange(2),
        keys_L=("a", "b"),
        weak_U3HW=images(),
        valid_UHW=valid_UHW,
        slots_U=torch.arange(2),
        keys_U=("c", "d"),
        boxes_VU4=boxes_VU4,
        photometric_VUP=torch.stack([photometric(str(v)) for v in range(views)]) if views else torch.zeros(0, 2, 1),
        strong=method.strong,
        **second,
    )


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a step may change, copied; without BatchNorm's counters of batches, which nothing reads."""
    tensors = trainer.snapshot().tensors
    return {
        f"{part}/{name}": value.clone()
        for part, of_part in tensors.items()
        for name, value in of_part.items()
        if "num_batches" not in name
    }


def assert_finite(trainer: Trainer, values: dict[str, torch.Tensor]) -> None:
    for name, value in (values | state(trainer)).items():
        assert value.isfinite().all(), name


def steps_stay_finite(trainer: Trainer, changed: Callable[[HostBatch], HostBatch], count: int = 2) -> dict:
    """Steps on bad batches, none of them skipped, then one on a good batch; what the last bad one measured."""
    for number in range(count):
        values = trainer.train_step(changed(share(trainer, number)))
        assert values["skipped_steps"] == 0
        assert_finite(trainer, values)
    after = trainer.train_step(share(trainer, count))
    assert after["skipped_steps"] == 0
    assert_finite(trainer, after)
    return values


LABELS = {"one class": 2, "background": 0, "ignored": 255}


@every
@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS.keys())
def test_labels_of_one_class_only_background_or_all_ignored(name, weighting, rule, label):
    trainer = start(name, weighting, rule)
    before = state(trainer)
    values = steps_stay_finite(trainer, lambda host: replace(host, label_LHW=torch.full_like(host.label_LHW, label)))
    assert (values["loss/supervised"] == 0) == (label == 255)
    moved = any(not torch.equal(value, before[key]) for key, value in state(trainer).items() if "student/" in key)
    assert moved


@every
def test_no_annotated_and_no_valid_pixel_at_all(name, weighting, rule):
    """Nothing teaches: losses of labels are 0, and the step still goes through."""

    def nothing(host: HostBatch) -> HostBatch:
        second = {} if host.second_valid_UHW is None else {"second_valid_UHW": torch.zeros_like(host.valid_UHW)}
        empty = torch.full_like(host.label_LHW, 255)
        return replace(host, label_LHW=empty, valid_UHW=torch.zeros_like(host.valid_UHW), **second)

    values = steps_stay_finite(start(name, weighting, rule), nothing)
    regularisers = ("loss/total", "loss/sparsity_labeled", "loss/sparsity_strong")  # of features alone
    for title, value in values.items():
        if title.startswith("loss/") and title not in regularisers:
            assert value == 0, title


UNSURE = {
    "fixmatch": ["consistency"],
    "augseg": ["consistency"],
    "unimatch": ["strong_1", "strong_2", "perturbed"],
    "unimatch_v2": ["strong_1", "strong_2"],
    "corrmatch": ["strong", "kl", "propagated_strong", "propagated_weak", "perturbed"],
    "derprop": ["strong", "kl", "propagated_strong", "propagated_weak", "perturbed"],
}
"""Methods with a threshold, and their terms that then teach nothing."""


@every
def test_no_confident_pixel(name, weighting, rule):
    """At the published thresholds a network that has learned nothing trusts no pixel."""
    settings = {"augseg": {"injection": "never"}, "u2pl": TRUSTING["u2pl"], "mean_teacher": TRUSTING["mean_teacher"]}
    trainer = start(name, weighting, rule, settings.get(name, {}))
    values = steps_stay_finite(trainer, lambda host: host)
    for title in UNSURE.get(name, []):
        assert values[f"loss/{title}"] == 0, title


weighted = pytest.mark.parametrize(
    ("name", "rule"), [(name, rule) for name, weighting, rule in combinations() if weighting == "rank"]
)


@weighted
def test_a_memory_that_is_empty_for_a_class(name, rule):
    """Labels of one class alone: the others have no prototype, and their pseudo-labels weigh 1."""
    trainer = start(name, "rank", rule)
    memory = trainer.method.weighting.labeled
    trainer.student.decoder.classifier.bias.data[1] += 3.0  # right at once, so that its pixels are remembered
    for seed in range(3):
        host = share(trainer, seed)
        values = trainer.train_step(replace(host, label_LHW=torch.full_like(host.label_LHW, 1)))
        assert values["skipped_steps"] == 0
        assert_finite(trainer, values)
    assert (memory.filled_K > 0).tolist() == [False, True, False, False]


@weighted
def test_no_unlabeled_pixel_is_ever_confirmed(name, rule):
    """What no detection means to the memories: labeled vectors alone make the prototypes."""
    trainer = start(name, "rank", rule)
    trainer.method.weighting.config = RANK.model_copy(update={"unlabeled": False})
    steps_stay_finite(trainer, lambda host: host, count=3)
    assert trainer.method.weighting.unlabeled.filled_K.sum() == 0
    assert trainer.method.weighting.labeled.filled_K.sum() > 0


def test_queues_that_are_empty_for_a_class():
    """U2PL with labels of one class alone that the teacher has right: nothing is surely not of the other classes."""
    trainer = start("u2pl", settings=TRUSTING["u2pl"] | {"alpha0": 0.0})
    queues = trainer.method.contrast.queues
    for seed in range(3):
        host = share(trainer, seed)
        values = trainer.train_step(replace(host, label_LHW=torch.full_like(host.label_LHW, 3)))
        assert_finite(trainer, values)
        assert queues.filled_K[3] == 0 < queues.filled_K.max()


# --- what is not a number -------------------------------------------------------------------------------------------


@contextmanager
def poisoned(network: nn.Module, call: int, row: int) -> Iterator[list[int]]:
    """In the given call of the decoder (from 0), the scores of one image are NaN, as an overflow would make them."""
    calls = [0]

    def poison(_: nn.Module, __: tuple, output: Decoded) -> Decoded:
        number, calls[0] = calls[0], calls[0] + 1
        if number != call:
            return output
        factor_B = torch.ones(len(output[0]))
        factor_B[row] = torch.nan
        return output._replace(logits_BKhw=output.logits_BKhw * factor_B[:, None, None, None])

    handle = network.decoder.register_forward_hook(poison)
    try:
        yield calls
    finally:
        handle.remove()


def student_passes(name: str) -> int:
    trainer = start(name)
    with poisoned(trainer.student, -1, 0) as calls:
        trainer.train_step(share(trainer))
    return calls[0]


BRANCHES = [
    (name, weighting, rule, call, row)
    for name, weighting, rule in combinations()
    for call, row in sorted({(0, 0), (0, -1), (student_passes(name) - 1, -1)})
]


@pytest.mark.parametrize(("name", "weighting", "rule", "call", "row"), BRANCHES)
def test_a_nan_in_one_branch_skips_the_step_whole(name, weighting, rule, call, row):
    """Weights, moments, averaged copy, statistics, thresholds, memories and queues stay as they were to the bit."""
    trainer = start(name, weighting, rule)
    for seed in range(2):
        trainer.train_step(share(trainer, seed))
    before = state(trainer)
    with poisoned(trainer.student, call, row):
        values = trainer.train_step(share(trainer, 2))
    assert values["skipped_steps"] == 1
    after = state(trainer)
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []

    clean = trainer.train_step(share(trainer, 3))
    assert clean["skipped_steps"] == 1
    assert clean["loss/total"].isfinite()
    moved = [key for key, value in state(trainer).items() if not torch.equal(value, after[key])]
    assert any(key.startswith("student/") for key in moved)
    assert_finite(trainer, {})


TAUGHT_BY_THE_COPY = [
    (name, weighting, rule, call)
    for name, weighting, rule in combinations()
    for call in range(2 if name == "u2pl" else 1)  # passes of the copy in a step
    if getattr(METHODS[name][0](), "average", None) is not None and METHODS[name][0]().average.kind == "ema"
]


@pytest.mark.parametrize(("name", "weighting", "rule", "call"), TAUGHT_BY_THE_COPY)
def test_a_nan_of_the_teacher_reaches_no_state(name, weighting, rule, call):
    """Either it is trusted nowhere, or the step is skipped; the next step is a good one."""
    trainer = start(name, weighting, rule)
    for seed in range(2):
        trainer.train_step(share(trainer, seed))
    before = state(trainer)
    assert trainer.average is not None
    with poisoned(trainer.average.model, call, -1) as calls:
        values = trainer.train_step(share(trainer, 2))
    assert calls[0] > call
    skipped = values["skipped_steps"].clone()
    after = state(trainer)
    if skipped:
        assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    assert_finite(trainer, {})
    assert trainer.train_step(share(trainer, 3))["skipped_steps"] == skipped
    assert_finite(trainer, {})


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_images_smaller_than_the_crop(scenes, tmp_path, name):
    """64 px images, shrunk and padded to a crop of 97: most of what is trained on is padding."""
    config = tiny_run(scenes, tmp_path / "run", name, "data.crop=97", "data.views.scale=[0.25, 0.5]")
    pools = open_pools(config)
    trainer = start(name)
    read = {"labeled": pools.labeled} | ({"unlabeled": pools.unlabeled} if pools.unlabeled is not None else {})
    method = trainer.method
    stream = Stream(
        config.data, read, 0, 2, 2, 0, 1, method.strong_views, method.second_view, 0, 2,
        strong=method.strong, given=method.given,
    )  # fmt: skip
    for host in stream:
        assert (host.label_LHW == 255).float().mean() > 0.8
        keep = replace(host, label_LHW=torch.where(host.label_LHW == 255, 255, host.label_LHW % CLASSES))
        values = trainer.train_step(keep)
        assert values["skipped_steps"] == 0
        assert_finite(trainer, values)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("crop", [321, 13])
def test_a_transformer_refuses_a_crop_that_is_no_multiple_of_its_patch(name, crop):
    settings = ["run=x", "data.pools=x", f"method={name}", "model.name=dpt", f"data.crop={crop}"]
    with pytest.raises(ConfigError) as caught:
        config_io.load(None, [*settings, "model.encoder=vit_small_patch14_dinov2"])
    assert any(fault.startswith("data.crop must be a multiple of 14") for fault in caught.value.faults)
