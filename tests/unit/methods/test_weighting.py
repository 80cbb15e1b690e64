"""Rank weighting: worked losses, who enters the memories, and that without prototypes nothing changes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from makers import semi_batch, step_context, tiny_segmentor
from pydantic import ValidationError

from raysemi.errors import ConfigError
from raysemi.methods import METHODS
from raysemi.methods.base import Average
from raysemi.methods.queues import ClassQueues
from raysemi.methods.weighting import NoWeighting, RankWeighting, RankWeightingConfig, UnlabeledPass, build_weighting
from raysemi.models.encoders import Features
from raysemi.models.segmentor import Prediction
from raysemi.ops.mixing import paste

CLASSES = 4
WEIGHTED = [name for name, (_, method) in METHODS.items() if method.weighted]
SETTINGS = {
    "fixmatch": {"threshold": 0.2},
    "augseg": {"threshold": 0.2},
    "unimatch": {"threshold": 0.2},
    "unimatch_v2": {"threshold": 0.2},
    "corrmatch": {"region": {"segments": 6}, "threshold": {"initial": 0.2}},
    "derprop": {"region": {"segments": 6}, "threshold": {"initial": 0.2}},
    "u2pl": {"contrast": {"delta_p": 0.2}, "representation": {"hidden": 5, "dim": 7}, "warmup_periods": 0},
    "ael": {"threshold": 0.2},
}


def rank(channels=8, **settings):
    return RankWeighting(RankWeightingConfig(**{"unlabeled": True} | settings), CLASSES, channels)


def prediction(penultimate_BDhw, logits_BKHW=None):
    logits_BKHW = penultimate_BDhw if logits_BKHW is None else logits_BKHW
    return Prediction(logits_BKHW, Features((penultimate_BDhw,)), penultimate_BDhw, penultimate_BDhw)


def context(step=0, **rest):
    return step_context(tiny_segmentor(CLASSES), step=step, **rest)


def filled(weighting, seed=0):
    """Prototypes of all classes, without training for them."""
    generator = torch.Generator().manual_seed(seed)
    for memory in (weighting.labeled, weighting.unlabeled):
        memory.keys_TD[:-1] = torch.rand(memory.keys_TD[:-1].shape, generator=generator).half()
        memory.inserted_K += weighting.config.memory
    return weighting


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "expected"), [("none", 0.875), ("paper", 0.6), ("released", 0.921875)])
def test_worked_losses(preset, expected):
    """CE (2, 1, .5, 4, 9), confidence (.99, .97, .96, .50, .99), the last padded, s (5, 2, 0, 5, 5), k 5, tau .95."""
    weighting = NoWeighting() if preset == "none" else rank(preset=preset)
    surprise = torch.tensor([2.0, 1.0, 0.5, 4.0, 9.0])
    logits = torch.stack((-surprise, (-(-surprise).exp()).log1p()))[None, :, None]
    kept = torch.tensor([True, True, True, False, False])[None, None]
    valid = torch.tensor([True, True, True, True, False])[None, None]
    share = torch.tensor([5.0, 2.0, 0.0, 5.0, 5.0])[None, None] / 5
    weight = torch.ones_like(share) if preset == "none" else weighting.config.offset + share
    labels = torch.zeros(1, 1, 5, dtype=torch.int64)
    total, normaliser = weighting.cross_entropy(logits, labels, valid, kept, weight)
    assert (total / normaliser).item() == pytest.approx(expected, rel=1e-6)


def build(name, weighting=None):
    config, kind = METHODS[name]
    method = kind(config(**SETTINGS.get(name, {})), CLASSES)
    if weighting is not None:
        method.weighting = weighting
    student = tiny_segmentor(CLASSES, method.heads, frozen=True)
    teacher = None if method.average == Average() else copy.deepcopy(student).eval()
    return method, student, teacher


def objectives(name, weighting=None, batch=None):
    method, student, teacher = build(name, weighting)
    batch = semi_batch(CLASSES, views=max(1, method.strong_views)) if batch is None else batch
    seen = {}
    terms = method.objectives(batch, step_context(student, teacher, step=50, listener=seen.__setitem__))
    return terms, seen


def test_the_methods_of_the_paper_and_those_of_propagation_may_be_weighted():
    assert set(WEIGHTED) >= {
        "fixmatch",
        "mean_teacher",
        "unimatch",
        "unimatch_v2",
        "augseg",
        "u2pl",
        "ael",
        "corrmatch",
        "derprop",
    }
    assert not METHODS["supervised"][1].weighted


@pytest.mark.parametrize("name", WEIGHTED)
def test_without_prototypes_the_hosts_losses_stay_to_the_bit(name):
    host, _ = objectives(name)
    weighted, seen = objectives(name, rank(confidence=0.999))  # nothing is sure enough to be remembered
    assert torch.equal(seen["weight"], torch.ones_like(seen["weight"]))
    for title, term in host.items():
        assert torch.equal(term.total, weighted[title].total), title
        assert torch.equal(term.normaliser, weighted[title].normaliser), title


@pytest.mark.parametrize("name", WEIGHTED)
def test_prototypes_weigh_the_unlabeled_terms_alone(name):
    host, _ = objectives(name)
    weighted, seen = objectives(name, filled(rank(confidence=0.999)))
    assert seen["weight"].min() >= 0
    assert 0 < seen["weight"].mean() < 1
    # of features, which no pseudo-label teaches; and what the teacher says of labeled images, whose class is known
    maps = {"contrastive", "derivative_unlabeled", "sparsity_strong", "consistency_labeled"}
    for title, term in host.items():
        same = torch.equal(term.total, weighted[title].total)
        assert same == (term.side == "supervised" or title in maps), title
    released, _ = objectives(name, filled(rank(confidence=0.999, preset="released")))
    for title, term in host.items():
        if term.side == "unsupervised" and title not in maps:
            assert released[title].normaliser > term.normaliser * (1.0 - 1e-6), title


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_step_with_weights_fills_the_memories_and_trains_the_student(name):
    weighting = rank(confidence=0.1, k=3)
    terms, seen = objectives(name, weighting)
    assert weighting.labeled.inserted_K.sum() > 0
    assert weighting.unlabeled.inserted_K.sum() > 0
    assert set((seen["weight"] * 3).round().unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    total = sum(term.weight * term.total / term.normaliser.clamp(min=1) for term in terms.values())
    assert total.isfinite()
    assert total.requires_grad


def test_the_weights_are_mixed_like_the_confidence(monkeypatch):
    """A weight belongs to the pixel and label of the weak view: inside a box it is the partner's."""
    pasted = []

    def record(boxes, tensor, *rest, **more):
        mixed = paste(boxes, tensor, *rest, **more)
        if not rest:
            pasted.append((boxes, tensor, mixed))
        return mixed

    monkeypatch.setattr("raysemi.methods.fixmatch.paste", record)
    method, student, teacher = build("fixmatch", filled(rank(confidence=0.999)))
    batch = semi_batch(CLASSES)
    method.objectives(batch, step_context(student, teacher))
    ((boxes, own, mixed),) = pasted
    left, top, right, bottom = boxes[0].tolist()
    expected = own.clone()
    expected[0, top:bottom, left:right] = own[1, top:bottom, left:right]
    assert torch.equal(boxes, batch.boxes_VU4[0])
    assert torch.equal(mixed, expected)


# --- memories -------------------------------------------------------------------------------------------------------


def remember(weighting, labeled=None, unlabeled=(), batch=None, **rest):
    batch = semi_batch(CLASSES) if batch is None else batch
    if labeled is None:
        labeled = prediction(torch.zeros(2, 8, 9, 11), torch.zeros(2, CLASSES, 33, 41))
    weighting.remember(labeled, unlabeled, batch, context(**rest))


def sure(labels_BHW, probability):
    """Logits that give the labels a probability, and share the rest equally."""
    rest = (1 - probability) / (CLASSES - 1)
    chosen = torch.nn.functional.one_hot(labels_BHW.clamp(max=CLASSES - 1), CLASSES).permute(0, 3, 1, 2)
    return torch.where(chosen.bool(), torch.tensor(probability), torch.tensor(rest)).log()


def test_labeled_pixels_enter_when_they_are_right_and_confident():
    batch = semi_batch(CLASSES)
    truth = batch.label_LHW.clone()
    truth[truth == 255] = 0
    features = torch.rand(2, 8, 9, 11)
    for logits, entered in (
        (sure(truth, 0.97), True),
        (sure(truth, 0.94), False),
        (sure((truth + 1) % CLASSES, 0.97), False),  # sure and wrong
    ):
        weighting = rank()
        remember(weighting, prediction(features, logits), batch=batch)
        assert bool(weighting.labeled.inserted_K.sum() > 0) == entered
        assert weighting.unlabeled.inserted_K.sum() == 0
    assert torch.equal(weighting.prototypes()[1], torch.zeros(CLASSES, dtype=torch.bool))


def test_a_labeled_pixel_at_the_limit_stays_out():
    logits = torch.zeros(2, CLASSES, 33, 41)  # probability 1/4 for all
    batch = replace(semi_batch(CLASSES), label_LHW=torch.zeros(2, 33, 41, dtype=torch.int64))
    for limit, entered in ((0.25, 0), (0.2499, 2 * 2)):
        weighting = rank(confidence=limit)
        remember(weighting, prediction(torch.rand(2, 8, 9, 11), logits), batch=batch)
        assert weighting.labeled.inserted_K.tolist() == [entered, 0, 0, 0]


def test_ignored_pixels_never_enter():
    batch = semi_batch(CLASSES)
    batch = replace(batch, label_LHW=torch.full_like(batch.label_LHW, 255))
    weighting = rank(confidence=0.0)
    remember(weighting, prediction(torch.rand(2, 8, 9, 11), torch.randn(2, CLASSES, 33, 41)), batch=batch)
    assert weighting.labeled.inserted_K.sum() == 0


def test_unlabeled_pixels_enter_when_they_are_reliable():
    batch, weighting = semi_batch(CLASSES), rank(per_image=1)
    label = torch.zeros(2, 33, 41, dtype=torch.int64)
    label[:, :, 20:] = 2
    reliable = torch.zeros(2, 33, 41, dtype=torch.bool)
    reliable[0, :, 20:] = True
    features = torch.arange(2.0)[:, None, None, None].expand(2, 8, 9, 11) + 1
    remember(weighting, unlabeled=[UnlabeledPass(prediction(features), label, reliable)], batch=batch)
    assert weighting.unlabeled.inserted_K.tolist() == [0, 0, 1, 0]
    sums = weighting.unlabeled.keys_TD[:-1].view(CLASSES, -1, 8).float().sum(1)
    assert sums[2].tolist() == [1.0] * 8  # of image 0
    assert not weighting.prototypes()[1].any()  # no labeled vector, no prototype


def test_reliable_pixels_are_confident_and_real():
    batch = semi_batch(CLASSES)
    confidence = torch.full((2, 33, 41), 0.95)
    confidence[0, 0] = 0.9499
    reliable = rank().reliable(torch.zeros(2, 33, 41, dtype=torch.int64), confidence, batch)
    assert not reliable[0, 0].any()
    assert torch.equal(reliable[:, 1:], batch.valid_UHW[:, 1:])


def test_without_a_detector_labeled_pixels_alone_make_prototypes():
    assert not RankWeightingConfig().remembers_unlabeled
    sure_of_all = torch.ones(2, 33, 41)
    label = torch.zeros(2, 33, 41, dtype=torch.int64)
    for unlabeled in (None, False):
        assert not rank(unlabeled=unlabeled).reliable(label, sure_of_all, semi_batch(CLASSES)).any()


def with_boxes(batch):
    """Image 0: class 1 in x 4 to 20, y 10 to 20, and class 3 over all of it. Image 1: no box."""
    none = [-1.0] * 5
    boxes = [[[4, 10, 20, 20, 1], [0, 0, 41, 33, 3], none], [none] * 3]
    return replace(batch, found_UN5=torch.tensor(boxes, dtype=torch.float32))


def test_a_box_of_its_class_confirms_a_confident_pixel():
    """Outside, in a box of another class, in padding, unsure, of a class without boxes: never."""
    batch, weighting = with_boxes(semi_batch(CLASSES)), rank(detector="things", unlabeled=None)
    batch.valid_UHW[0, 12] = False
    label = torch.ones(2, 33, 41, dtype=torch.int64)
    label[0, :, 10] = 2  # inside boxes of 1 and 3
    label[0, :, 11] = 0
    label[0, :, 30] = 3
    confidence = torch.full((2, 33, 41), 0.95)
    confidence[0, 14] = 0.9499
    reliable = weighting.reliable(label, confidence, batch)
    expected = torch.zeros_like(reliable)
    expected[0, 10:20, 4:20] = True
    expected[0, :, 10:12] = False
    expected[0, :, 30] = True
    expected[0, [12, 14]] = False
    assert torch.equal(reliable, expected)


def test_a_stream_without_boxes_is_refused():
    with pytest.raises(ConfigError, match=r"weighting\.detector must be null for a stream without boxes; got things"):
        rank(detector="things").reliable(torch.zeros(2, 33, 41).long(), torch.ones(2, 33, 41), semi_batch(CLASSES))


def test_a_detector_turns_unlabeled_pixels_on():
    assert RankWeightingConfig(detector="things").remembers_unlabeled
    assert RankWeightingConfig(detector="off") == RankWeightingConfig()
    for settings, expected in (
        ({"detector": "things", "unlabeled": False}, "unlabeled must be null or true with a detector"),
        ({"score": 0.95}, "score must be left out without a detector"),
        ({"detector": "../things"}, "the name of boxes must hold"),
    ):
        with pytest.raises(ValueError, match=expected):
            RankWeightingConfig(**settings)


@pytest.mark.parametrize("name", WEIGHTED)
def test_boxes_change_what_is_remembered_and_not_what_is_taught(name):
    """All losses are the same with boxes and without; the memories differ."""
    kind = METHODS[name][1]
    first = []
    for boxes in (True, False):
        batch = semi_batch(CLASSES, views=kind.strong_views)
        if boxes:
            everywhere = torch.tensor([[0.0, 0.0, 41.0, 33.0, float(k)] for k in range(CLASSES)])
            batch = replace(batch, found_UN5=everywhere.expand(2, CLASSES, 5))
        else:
            batch = replace(batch, found_UN5=torch.full((2, 1, 5), -1.0))
        method = kind(METHODS[name][0](**SETTINGS.get(name, {})), CLASSES)
        method.weighting = rank(detector="things", confidence=0.0, start_step=5)  # all weigh 1: memories alone differ
        student = tiny_segmentor(CLASSES, method.heads)
        teacher = None if method.average.kind == "none" else tiny_segmentor(CLASSES, method.heads, seed=1).eval()
        seen = step_context(student, teacher, steps=100, step=0)
        objectives = method.objectives(batch, seen)
        first.append((objectives, method.weighting.unlabeled.inserted_K.sum()))
    (with_, remembered), (without, nothing) = first
    assert remembered > 0
    assert nothing == 0
    for term, objective in with_.items():
        assert torch.equal(objective.total, without[term].total), term
        assert torch.equal(torch.as_tensor(objective.normaliser), torch.as_tensor(without[term].normaliser)), term


def test_first_in_first_out_and_the_mean_is_of_what_is_held():
    """300 insertions of one class, one a step: the last 256 stay."""
    weighting = rank(per_image=1)
    batch = replace(semi_batch(CLASSES), label_LHW=torch.full((2, 33, 41), 255))
    batch.label_LHW[0] = 3
    logits = sure(torch.full((2, 33, 41), 3), 0.99)
    for step in range(300):
        remember(weighting, prediction(torch.full((2, 8, 9, 11), float(step)), logits), batch=batch, step=step)
    assert weighting.labeled.filled_K.tolist() == [0, 0, 0, 256]
    prototypes, has = weighting.prototypes()
    assert has.tolist() == [False, False, False, True]
    assert prototypes[3].tolist() == pytest.approx([sum(range(44, 300)) / 256] * 8, rel=1e-3)
    assert not prototypes[:3].any()


def test_a_step_brings_at_most_so_many():
    batch = semi_batch(CLASSES, labeled=12)
    batch = replace(batch, label_LHW=torch.zeros_like(batch.label_LHW))
    weighting = rank(per_step=6, per_image=2)
    features = torch.arange(1.0, 13.0)[:, None, None, None].expand(12, 8, 9, 11)
    remember(weighting, prediction(features, sure(batch.label_LHW, 0.99)), batch=batch)
    assert weighting.labeled.inserted_K.tolist() == [6, 0, 0, 0]
    held = weighting.labeled.keys_TD[:6, 0].tolist()
    assert held == sorted(held)  # in the order of their slots, two of each
    assert held[::2] == held[1::2]


def test_the_choice_is_uniform_and_follows_seed_step_and_slot():
    counts = torch.zeros(99)
    batch = replace(semi_batch(CLASSES, labeled=50), label_LHW=torch.zeros(50, 33, 41, dtype=torch.int64))
    cells = torch.arange(99.0).view(1, 1, 9, 11).expand(50, 8, 9, 11)
    seen = prediction(cells, sure(batch.label_LHW, 0.99))
    for step in range(200):
        weighting = rank(per_image=2, per_step=100)
        remember(weighting, seen, batch=batch, step=step)
        counts += torch.bincount(weighting.labeled.keys_TD[:100, 0].long(), minlength=99)
    assert (counts / (50 * 200)).tolist() == pytest.approx([2 / 99] * 99, abs=0.006)
    twins = [rank(per_image=2, per_step=100) for _ in range(2)]
    for twin in twins:
        remember(twin, seen, batch=batch, step=7)
    assert torch.equal(twins[0].labeled.keys_TD, twins[1].labeled.keys_TD)


def test_ranks_hold_what_one_rank_holds():
    """Two halves of a step, gathered: the same vectors in the same order."""
    batch = replace(semi_batch(CLASSES, labeled=4), label_LHW=torch.randint(0, CLASSES, (4, 33, 41)))
    features = torch.rand(4, 8, 9, 11)
    logits = sure(batch.label_LHW, 0.99)
    alone = rank(per_step=4)
    remember(alone, prediction(features, logits), batch=batch)

    packed = []

    class Pause(Exception):
        pass

    class Recording:
        rank, world = 0, 2

        def gather(self, value):
            packed.append(value)
            raise Pause

    halves = [
        replace(batch, label_LHW=batch.label_LHW[part], slots_L=batch.slots_L[part])
        for part in (slice(0, 2), slice(2, 4))
    ]
    for number, half in enumerate(halves):
        part = slice(2 * number, 2 * number + 2)
        with pytest.raises(Pause):
            remember(rank(), prediction(features[part], logits[part]), batch=half, across=Recording())

    class Joined(Recording):
        def gather(self, value):
            return torch.stack(packed)

    both = rank(per_step=4)
    remember(both, prediction(features[:2], logits[:2]), batch=halves[0], across=Joined())
    for mine, theirs in zip(alone.state_dict().values(), both.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_memory_is_saved_with_the_method():
    method, _, _ = build("fixmatch", rank())
    assert {name.split(".")[1] for name in method.state_dict() if name.startswith("weighting.")} == {
        "labeled", "unlabeled", "step",
    }  # fmt: skip
    assert isinstance(method.weighting.labeled, ClassQueues)


def test_it_starts_when_it_is_told_to():
    weighting = filled(rank(start_step=5))
    features, label = torch.rand(2, 8, 9, 11), torch.zeros(2, 33, 41, dtype=torch.int64)
    for step, ones in ((4, True), (5, False)):
        weighting.step.fill_(step)
        weight = weighting.weigh(prediction(features), label, context())
        assert torch.equal(weight, torch.ones_like(weight)) == ones


def test_full_resolution_agrees_at_the_cells():
    features, label = torch.rand(2, 8, 9, 11), torch.randint(0, CLASSES, (2, 33, 41))
    native, full = (
        filled(rank(resolution=name)).weigh(prediction(features), label, context()) for name in ("native", "full")
    )
    assert torch.equal(native[:, ::4, ::4], full[:, ::4, ::4])
    assert not torch.equal(native, full)


def test_config_refuses():
    with pytest.raises(ConfigError, match=r"weighting\.k must be at most the channels"):
        build_weighting(RankWeightingConfig(k=9), CLASSES, 8)
    with pytest.raises(ValidationError, match="per_step must be at least per_image"):
        RankWeightingConfig(per_image=8, per_step=4)
    assert RankWeightingConfig(preset="released").offset == 1.0
    assert RankWeightingConfig(preset="released", offset=0.5).offset == 0.5


@pytest.mark.parametrize("name", WEIGHTED)
def test_it_runs_under_autocast(name):
    with torch.autocast("cpu", torch.bfloat16):
        terms, seen = objectives(name, rank(confidence=0.1))
    assert seen["weight"].dtype == torch.float32
    assert all(term.total.isfinite() for term in terms.values())
