"""What every method owes, run over the registry: it trains the student and nothing else, repeats itself, and learns."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch
from makers import semi_batch, step_context, tiny_segmentor

from raysemi.methods import METHODS
from raysemi.methods.base import Average
from raysemi.methods.propagation import Targets
from raysemi.methods.weighting import RankWeighting, RankWeightingConfig
from raysemi.models.encoders import Features
from raysemi.models.segmentor import Prediction

CLASSES = 4
QUEUE = {"size": 30, "first_size": 40}
TRUSTING = {
    "fixmatch": {"threshold": 0.2},
    "augseg": {"threshold": 0.2},
    "ael": {"threshold": 0.2},
    "unimatch": {"threshold": 0.2},
    "unimatch_v2": {"threshold": 0.2},
    "corrmatch": {"region": {"segments": 6}, "threshold": {"initial": 0.2}},
    "derprop": {"region": {"segments": 6}, "threshold": {"initial": 0.2}},
    "u2pl": {"contrast": {"delta_p": 0.2}, "representation": {"hidden": 5, "dim": 7}, "queue": QUEUE},
}
"""Settings under which a network that has learned nothing trusts some of its pixels."""
SMALL = {
    "u2pl": {"representation": {"hidden": 16, "dim": 16}, "queue": QUEUE, "contrast": {"queries": 32, "negatives": 10}},
}
"""Sizes for a tiny network: the published ones would take most of its time."""


def build(name, settings, frozen=False):
    config, kind = METHODS[name]
    method = kind(config(**settings), CLASSES)
    student = tiny_segmentor(CLASSES, method.heads, frozen=frozen)
    teacher = None if method.average == Average() else copy.deepcopy(student).eval()
    return method, student, teacher


def batch_for(method, **sizes):
    """A batch as the method asks for it."""
    return semi_batch(CLASSES, views=max(1, method.strong_views), second_view=method.second_view, **sizes)


def published_total(terms):
    return sum(term.weight * term.total / term.normaliser.clamp(min=1) for term in terms.values())


@pytest.mark.parametrize("name", METHODS)
def test_each_objective_trains_the_student_and_none_the_teacher(name):
    method, student, teacher = build(name, TRUSTING.get(name, {}))
    terms = method.objectives(batch_for(method), step_context(student, teacher, step=50))
    for title, term in terms.items():
        learning = list(student.encoder.parameters())  # an auxiliary classifier reads a map before the last
        grads = torch.autograd.grad(term.total, learning, retain_graph=True, allow_unused=title == "auxiliary")
        assert max(g.abs().max() for g in grads if g is not None) > 0, title
    published_total(terms).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    if teacher is not None:
        assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_the_same_step_gives_the_same_bits(name):
    totals = []
    for _ in range(2):
        method, student, teacher = build(name, TRUSTING.get(name, {}))
        terms = method.objectives(batch_for(method), step_context(student, teacher, step=7))
        totals.append({title: term.total.item() for title, term in terms.items()})
    assert totals[0] == totals[1]


COUNTED = [
    ("supervised", {"criterion": {"name": "balanced"}}),
    ("fixmatch", {}),
    ("mean_teacher", {}),
    ("unimatch", {}),
    ("unimatch", {"fp": {"weight": 0.0}, "compat": {"partner_eval": True}}),
    ("unimatch", {"cutmix": {"partner": "second_view"}}),
    ("unimatch_v2", {}),
    ("augseg", {}),
]


@pytest.mark.parametrize(("name", "settings"), COUNTED)
def test_what_the_data_says_is_what_objectives_divide_by(name, settings):
    method, student, teacher = build(name, settings)
    batch, context = batch_for(method, labeled=3, unlabeled=4), step_context(student, teacher, step=50)
    terms = method.objectives(batch, context)
    said = method.normalisers(batch, context)
    assert list(said) == list(terms)
    assert {title: count.item() for title, count in said.items()} == {
        title: term.normaliser.item() for title, term in terms.items()
    }
    if name != "supervised":
        method.weighting = RankWeighting(RankWeightingConfig(k=2), CLASSES, student.penultimate_channels)
        assert method.normalisers(batch, context) is None
    ohem, *_ = build(name, {"criterion": {"name": "ohem"}})
    assert ohem.normalisers(batch, context) is None


def test_what_two_methods_share_they_say_alike():
    """A word means the same in both, and so does a setting that is left out."""
    corrmatch, derprop = (METHODS[name][0] for name in ("corrmatch", "derprop"))
    shared = corrmatch.model_fields.keys() & derprop.model_fields.keys() - {"name", "preset"}
    assert {"threshold", "region", "cutmix", "labeled_propagated_weight", "kl_target", "fp"} <= shared
    for name in shared:
        mine, theirs = corrmatch.model_fields[name], derprop.model_fields[name]
        assert (mine.default, mine.description) == (theirs.default, theirs.description), name
        assert mine.json_schema_extra == theirs.json_schema_extra, name
    for config in (corrmatch, derprop):
        assert config().labeled_weights == (0.5, 0.5)
        assert config(labeled_weight=0.25).labeled_weights == (0.25, 0.25)
        assert config(labeled_propagated_weight=0.1).labeled_weights == (0.5, 0.1)


@pytest.mark.parametrize("name", ["corrmatch", "derprop"])
@pytest.mark.parametrize("unlabeled", [1, 3])
def test_a_second_view_mixes_any_number_of_images(name, unlabeled):
    """Nothing is taken of a neighbour: an image alone gives what it gives beside others."""
    method, student, teacher = build(name, TRUSTING[name] | {"cutmix": {"partner": "second_view"}}, frozen=True)
    batch = batch_for(method, unlabeled=unlabeled)
    batch = replace(batch, boxes_VU4=torch.tensor([7, 5, 36, 22]).expand_as(batch.boxes_VU4))
    method.eval()  # the threshold stays
    each = []
    for rows in [slice(None), *(slice(u, u + 1) for u in range(unlabeled))]:
        given = {name: value for name, value in vars(batch).items() if value is not None}
        share = replace(
            batch,
            **{name: value[rows] for name, value in given.items() if "_U" in name and "_VU" not in name},
            **{name: value[:, rows] for name, value in given.items() if "_VU" in name},
        )
        terms = method.objectives(share, step_context(student, teacher, step=50))
        each.append({title: term.total.item() for title, term in terms.items() if term.side == "unsupervised"})
    assert each[0]["strong"] > 0
    for title, total in each[0].items():
        assert total == pytest.approx(sum(alone[title] for alone in each[1:]), rel=1e-4, abs=1e-5), title


# --- learning: a tiny network, blocks of four colours --------------------------------------------------------------


class Right(torch.nn.Module):
    """A teacher that is sure of the truth."""

    def __init__(self, truth_UHW):
        super().__init__()
        self.logits_UKHW = 20.0 * torch.nn.functional.one_hot(truth_UHW, CLASSES).permute(0, 3, 1, 2)

    def forward(self, images_B3HW):
        return Prediction(self.logits_UKHW, Features((images_B3HW, images_B3HW)), images_B3HW, images_B3HW)


def blocks(seed):
    """(images [4, 3, 48, 72], labels [4, 48, 72]): the colour of a block of 24 x 24 pixels is its class."""
    generator = torch.Generator().manual_seed(seed)
    label_BHW = torch.randint(0, CLASSES, (4, 2, 3), generator=generator)
    label_BHW = label_BHW.repeat_interleave(24, dim=1).repeat_interleave(24, dim=2)
    colours_K3 = torch.tensor([[0.2, 0.2, 0.2], [0.8, 0.2, 0.2], [0.2, 0.8, 0.2], [0.2, 0.2, 0.8]])
    noise = 0.1 * torch.rand(4, 3, 48, 72, generator=generator)
    return colours_K3[label_BHW].permute(0, 3, 1, 2) + noise, label_BHW


def colour_batch(views=1):
    """Four labeled and four unlabeled images of blocks, no padding, no CutMix; and the truth of the unlabeled ones."""
    image_L3HW, label_LHW = blocks(0)
    weak_U3HW, truth_UHW = blocks(1)
    batch = semi_batch(CLASSES, labeled=4, unlabeled=4, height=48, width=72, views=views)
    batch = replace(
        batch,
        image_L3HW=image_L3HW,
        label_LHW=label_LHW,
        weak_U3HW=weak_U3HW,
        strong_VU3HW=torch.stack([(0.9 - 0.1 * view) * weak_U3HW + 0.1 for view in range(views)]),
        valid_UHW=torch.ones_like(batch.valid_UHW),
        boxes_VU4=torch.zeros_like(batch.boxes_VU4),
    )
    return batch, truth_UHW


def learn(method, student, teacher, batch, wanted, steps):
    """Steps of Adam on the wanted terms; the student in eval mode afterwards. A teacher follows it unless frozen."""
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for step in range(steps):
        terms = method.objectives(batch, step_context(student, teacher, step=step, steps=steps))
        optimizer.zero_grad()
        published_total({title: term for title, term in terms.items() if wanted in ("all", title)}).backward()
        optimizer.step()
        if teacher is not None and any(parameter.requires_grad for parameter in teacher.parameters()):
            teacher.load_state_dict(student.state_dict())
    return student.eval()


def accuracy(student, images_B3HW, label_BHW):
    with torch.no_grad():
        return (student(images_B3HW).logits_BKHW.argmax(dim=1) == label_BHW).float().mean().item()


def taught(network, batch, truth_UHW):
    """The network after it has learned the truth of all images of the batch; frozen."""
    images_B3HW = torch.cat((batch.image_L3HW, batch.weak_U3HW))
    label_BHW = torch.cat((batch.label_LHW, truth_UHW))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images_B3HW).logits_BKHW, label_BHW).backward()
        optimizer.step()
    assert accuracy(network, images_B3HW, label_BHW) > 0.95
    return network.eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_it_learns_a_few_images(name):
    method, student, teacher = build(name, SMALL.get(name, {}))
    batch, _ = colour_batch(max(1, method.strong_views))
    assert accuracy(student.eval(), batch.image_L3HW, batch.label_LHW) < 0.6
    learn(method, student.train(), teacher, batch, "all", 120 if name == "u2pl" else 60)
    assert accuracy(student, batch.image_L3HW, batch.label_LHW) > 0.95


TEACHES_CLASSES = {
    "fixmatch": ["consistency"],
    "mean_teacher": ["consistency"],
    "augseg": ["consistency"],
    "unimatch": ["strong_1", "strong_2", "perturbed"],
    "unimatch_v2": ["strong_1", "strong_2"],
    "u2pl": ["consistency"],
    "corrmatch": ["strong", "kl", "perturbed"],
    "derprop": ["strong", "kl", "perturbed"],
}
"""Unsupervised objectives that teach the classifier; what is spread along maps trains the maps alone."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "title"), [(name, title) for name in TEACHES_CLASSES for title in TEACHES_CLASSES[name]]
)
def test_an_unsupervised_objective_alone_teaches_what_a_right_teacher_knows(name, title, monkeypatch):
    """Frozen BatchNorm: its statistics would come from the labeled images too, which this term does not teach."""
    settings = {
        "corrmatch": {"region": {"enable": False}},
        "derprop": {"region": {"enable": False}},
        "u2pl": SMALL["u2pl"] | {"warmup_periods": 0, "cutmix": 0.0},
    }
    method, student, teacher = build(name, settings.get(name, {}), frozen=True)
    batch, truth_UHW = colour_batch(max(1, method.strong_views))
    right = Right(truth_UHW)
    if teacher is None or name == "derprop":  # the student labels: whatever it says, its labels are right
        module = sys.modules[
            "raysemi.methods.propagation" if "threshold" in method.state_dict() else type(method).__module__
        ]
        original = module.confidence_and_label
        monkeypatch.setattr(module, "confidence_and_label", lambda _: original(right.logits_UKHW))
        softmax_of = Targets.of
        monkeypatch.setattr(Targets, "of", lambda _, valid_UHW: softmax_of(right.logits_UKHW, valid_UHW))
    elif method.trains_teacher_statistics:  # it also sees labeled and mixed images, through its heads
        teacher = taught(teacher, batch, truth_UHW)
    else:
        teacher = right
    assert accuracy(student, batch.weak_U3HW, truth_UHW) < 0.6
    learn(method, student, teacher, batch, title, 80)
    assert accuracy(student, batch.weak_U3HW, truth_UHW) > 0.9
