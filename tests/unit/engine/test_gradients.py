"""From objectives to one direction: the ramp, the rules on real methods, and on losses whose gradients are known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from makers import semi_batch, step_context, tiny_segmentor

from raysemi.engine.gradients import GradientRule, GradientsConfig, SideLosses, side_loss, uniform_loss
from raysemi.engine.strategy import StepModule
from raysemi.methods import METHODS
from raysemi.methods.base import Average, SingleRank
from raysemi.methods.fixmatch import FixMatch, FixMatchConfig
from raysemi.ops.losses import Objective
from raysemi.ops.schedules import rampup

CLASSES = 4
TWO_SIDED = [name for name, (_, method) in METHODS.items() if method.strong_views > 0]


def test_the_factor_touches_the_unsupervised_side_alone():
    one = torch.ones(())
    objectives = {
        "labels": Objective(one, one, 0.5, "supervised"),
        "consistency": Objective(one, one, 0.25, "unsupervised"),
    }
    losses = {"labels": torch.tensor(2.0), "consistency": torch.tensor(8.0)}
    assert uniform_loss(objectives, losses) == 3.0
    assert uniform_loss(objectives, losses, 0.5) == 2.0
    assert side_loss(objectives, losses, "supervised") == 2.0  # twice the sum: the half-sum of both is the total
    assert side_loss(objectives, losses, "unsupervised", 0.5) == 2.0


@pytest.mark.parametrize("step", [0, 10, 20, 99])
def test_a_step_follows_the_ramp(step):
    method = FixMatch(FixMatchConfig(threshold=0.2), 3)
    student, teacher, batch = tiny_segmentor(3), tiny_segmentor(3).eval(), semi_batch(3)
    context = step_context(student, teacher, step=step, steps=100)
    losses = StepModule(student, method, rampup_steps=20)(batch, context)
    values = losses.values
    assert values["consistency"] > 0
    expected = 0.5 * values["supervised"] + 0.5 * rampup(step, 20) * values["consistency"]
    torch.testing.assert_close(losses.total.detach(), expected)
    torch.testing.assert_close((losses.supervised + losses.unsupervised).detach() / 2, expected)


# --- every method -----------------------------------------------------------------------------------------------


class Case:
    """A real step of a method, whose gradients a rule makes anew as often as asked."""

    def __init__(self, name):
        config, kind = METHODS[name]
        self.name = name
        self.method = kind(config(), CLASSES)
        self.student = tiny_segmentor(CLASSES, self.method.heads).to(memory_format=torch.channels_last)
        with torch.no_grad():
            self.student.decoder.classifier.weight.mul_(400)  # sure enough of itself that pixels are trusted
        teacher = None if self.method.average == Average() else copy.deepcopy(self.student).eval()
        self.context = step_context(self.student, teacher, step=50)
        self.batch = semi_batch(CLASSES, second_view=self.method.second_view, views=self.method.strong_views)
        encoder = set(self.student.encoder_parameters())
        self.rates = {p: 1.0 if p in encoder else 10.0 for p in self.student.parameters()}
        self.start = copy.deepcopy((self.student.state_dict(), self.method.state_dict()))
        self.measured = {}

    def losses(self):
        for module, state in zip((self.student, self.method), self.start, strict=True):
            module.load_state_dict(state)
        return StepModule(self.student, self.method)(self.batch, self.context)

    def gradients(self, losses=None, **settings):
        """Of all parameters, by the rule with these settings; None where there is none."""
        self.student.zero_grad(set_to_none=True)
        rule = GradientRule(GradientsConfig(**settings), self.rates, SingleRank(), self.measured.__setitem__)
        rule.backward(self.losses() if losses is None else losses, step=50)
        return [None if p.grad is None else p.grad.clone() for p in self.rates]

    def flat(self, gradients):
        """One vector, missing ones as 0."""
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self.rates, gradients, strict=True)]
        return torch.cat([part.flatten() for part in parts])

    def apart(self, gradients, others):
        """Length of the difference, relative to the second's."""
        others = self.flat(others)
        assert others.norm() > 0.01
        return (self.flat(gradients) - others).norm() / others.norm()

    def plain(self, loss):
        """Flat gradient of a loss, in fp64, and which entries the loss reaches at all."""
        found = torch.autograd.grad(loss, list(self.rates), retain_graph=True, allow_unused=True)
        reached = [torch.full_like(p, g is not None) for p, g in zip(self.rates, found, strict=True)]
        return self.flat(found).double(), self.flat(reached).bool()


@pytest.fixture(params=TWO_SIDED)
def case(request):
    return Case(request.param)


def test_the_half_sum_of_both_sides_is_the_published_total(case):
    losses = case.losses()
    torch.testing.assert_close((losses.supervised + losses.unsupervised) / 2, losses.total)
    assert losses.supervised > 0


def test_equal_weights_are_the_uniform_rule(case):
    """Fixed weights to the last bit; weights forced equal after two backwards up to rounding. Guards the halves."""
    uniform = case.gradients()
    fixed = case.gradients(name="fixed", weights=(0.5, 0.5))
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(uniform, fixed, strict=True))
    forced = case.gradients(name="pareto", min_ratio=1.0)
    assert case.apart(forced, uniform) < 1e-5


def test_without_an_unsupervised_gradient_the_step_is_uniform(case):
    """No confident pixel yet: the closed form would stop all learning."""
    losses = case.losses()
    silent = losses._replace(unsupervised=losses.unsupervised * 0, total=losses.supervised / 2)
    made = case.gradients(silent, name="pareto")
    losses = case.losses()
    uniform = case.gradients(losses._replace(total=losses.supervised / 2))
    assert case.apart(made, uniform) < 1e-5


def test_the_step_is_the_papers(case):
    """Against vectors of fp64 and the closed form written out."""
    losses = case.losses()
    (g_s, reached_s), (g_u, reached_u) = case.plain(losses.supervised), case.plain(losses.unsupervised)
    shared = reached_s & reached_u
    s, u = g_s[shared], g_u[shared]
    alpha_u = ((s - u) @ s / ((s - u) @ (s - u))).clamp(0, 1)
    if min(s.norm(), u.norm()) <= 1e-3 * max(s.norm(), u.norm()):
        alpha_u = torch.tensor(0.5).double()
    expected = (g_s + g_u) / 2
    expected[shared] = (1 - alpha_u) * s + alpha_u * u
    expected[shared] *= ((s + u).norm() / 2 / expected[shared].norm()).clamp(max=10)
    made = case.flat(case.gradients(name="pareto", measure_every=1)).double()
    assert (made - expected).norm() < 1e-4 * expected.norm()
    values = case.measured[51]
    assert values["gradients/weight_unsupervised"].item() == pytest.approx(alpha_u.item(), abs=1e-4)
    assert values["gradients/norm_supervised"].item() == pytest.approx(s.norm().item(), rel=1e-4)
    if case.name in ("fixmatch", "derprop"):
        assert shared.all()
        assert 0.01 < alpha_u < 1
        assert values["gradients/least_cosine"] > 0
        assert values["gradients/scale"] > 1


def test_a_gradient_has_the_memory_format_of_its_parameter(case):
    """What fused optimizers want; and a mix in place must not outlive the step."""
    case.gradients(name="pareto")
    for parameter in case.rates:
        assert parameter.grad is None or parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("settings", [{}, {"name": "fixed", "weights": (0.5, 1.0)}, {"name": "pareto", "warmup": 60}])
def test_measuring_changes_not_a_bit(case, settings):
    before = case.gradients(**settings)
    after = case.gradients(**settings, measure_every=1)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(before, after, strict=True))
    values = case.measured[51]
    assert len(values) == 7
    assert values["gradients/norm_supervised"] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_in_one_side_reaches_the_whole_step(case, bad):
    losses = case.losses()
    made = case.flat(case.gradients(losses._replace(unsupervised=losses.unsupervised * bad), name="pareto"))
    assert not torch.isfinite(made.norm())


# --- losses whose gradients are known ---------------------------------------------------------------------------


class Linear:
    """L_s = g_s . x + 3 p and L_u = g_u . x + 5 q: what each parameter's gradient is can be read off."""

    def __init__(self, rates=(1.0, 1.0), **settings):
        self.x = [torch.nn.Parameter(torch.zeros(1)) for _ in rates]
        self.p, self.q, self.nobody = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
        self.measured = {}
        named = dict(zip(self.x, rates, strict=True)) | {self.q: 7.0, self.nobody: 2.0, self.p: 1.0}
        self.rule = GradientRule(GradientsConfig(**settings), named, SingleRank(), self.measured.__setitem__)

    def losses(self, g_s, g_u):
        x = torch.cat(self.x)
        side_s = (torch.tensor(g_s) * x).sum() + 3 * self.p[0]
        side_u = (torch.tensor(g_u) * x).sum() + 5 * self.q[0]
        return SideLosses((side_s + side_u) / 2, side_s, side_u, {})

    def step(self, g_s, g_u, step=0):
        """Gradients of x, and what the rule counted."""
        for parameter in (*self.x, self.p, self.q, self.nobody):
            parameter.grad = None
        counted = self.rule.backward(self.losses(g_s, g_u), step)
        return torch.cat([x.grad for x in self.x]), counted


def close(value, *expected):
    torch.testing.assert_close(value, torch.tensor(expected), atol=1e-6, rtol=0)


CONFLICT = (3.0, -1.0), (-1.0, 1.0)


@pytest.mark.parametrize("exclusive", ["uniform", "alpha"])
def test_parameters_of_one_side(exclusive):
    """Left out they train as under uniform; taken in, p and q lengthen both gradients and are weighted like x."""
    linear = Linear(exclusive=exclusive, name="pareto")
    made, _ = linear.step(*CONFLICT)
    assert linear.nobody.grad is None
    if exclusive == "uniform":
        close(made, 0.447214, 0.894427)  # as if p and q were not there
        close(linear.p.grad, 1.5)
        close(linear.q.grad, 2.5)
    else:
        # ss = 10 + 9, uu = 2 + 25, su = -4: alpha_u = 23 / 54
        alpha_s, alpha_u = 31 / 54, 23 / 54
        scale = math.sqrt((19 + 27 - 8) / 4) / math.sqrt((19 * 27 - 16) / 54)
        close(linear.p.grad, scale * alpha_s * 3)
        close(linear.q.grad, scale * alpha_u * 5)
        close(made, scale * (3 * alpha_s - alpha_u), scale * (alpha_u - alpha_s))


def test_a_side_that_reaches_nothing_leaves_the_uniform_step():
    linear = Linear(name="pareto")
    losses = linear.losses(*CONFLICT)
    linear.rule.backward(losses._replace(unsupervised=torch.zeros(())), 0)
    close(torch.cat([x.grad for x in linear.x]), 1.5, -0.5)
    assert linear.q.grad is None


@pytest.mark.parametrize(("metric", "expected"), [("euclid", (0.2, 0.4)), ("lr", (0.714286, 0.142857))])
def test_the_metric_of_learning_rates(metric, expected):
    made, _ = Linear(rates=(1.0, 10.0), name="pareto", metric=metric, meo=False).step(*CONFLICT)
    close(made, *expected)


def test_fixed_weights_are_used_as_they_are():
    made, counted = Linear(name="fixed", weights=(1.0, 0.5)).step(*CONFLICT)
    close(made, 2.5, -0.5)
    assert counted == {}


def test_uniform_until_the_warmup_is_over():
    linear = Linear(name="pareto", warmup=3)
    for step in range(3):
        close(linear.step(*CONFLICT, step)[0], 1.0, 0.0)
    close(linear.step(*CONFLICT, 3)[0], 0.447214, 0.894427)


def test_weights_between_two_computations_and_after_a_restart():
    settings = {"name": "pareto", "every": 3, "warmup": 2, "exclusive": "alpha", "meo": False}
    linear = Linear(**settings)

    def rule():  # of x alone: p and q would be products of their own
        return GradientRule(GradientsConfig(**settings), dict.fromkeys(linear.x, 1.0), SingleRank())

    linear.rule = rule()
    other = (1.0, 0.0), (0.0, 4.0)
    close(linear.step(*other, 1)[0], 0.5, 2.0)
    close(linear.step(*CONFLICT, 2)[0], 0.2, 0.4)
    close(linear.step(*other, 3)[0], 0.3, 2.8)
    state = {name: value.clone() for name, value in linear.rule.state().items()}
    close(state["weights"], 0.3, 0.7, 1.0)
    linear.rule = rule()
    linear.rule.load_state(state)
    close(linear.step(*other, 4)[0], 0.3, 2.8)
    linear.step((math.nan, 0.0), (0.0, 4.0), 5)  # skipped: its weights are not kept
    close(linear.rule.state()["weights"], 0.3, 0.7, 1.0)
    assert Linear(name="pareto").rule.state() == {}


def test_guards_are_counted():
    linear = Linear(name="pareto")
    names = {"gradients/fallback", "gradients/capped"}
    for pair, fallback, capped in (
        (CONFLICT, 0, 0),
        (((3.0, 4.0), (0.0, 0.0)), 1, 0),
        (((2.0, 0.0), (-1.0, 0.0)), 0, 1),
    ):
        counted = linear.step(*pair)[1]
        assert counted.keys() == names
        assert [counted["gradients/fallback"].item(), counted["gradients/capped"].item()] == [fallback, capped]
    assert Linear(name="pareto", warmup=9).step(*CONFLICT)[1].keys() == names


@pytest.mark.parametrize(
    ("settings", "weights", "scale", "least"),
    [
        ({}, (0.5, 0.5), 1.0, -0.707107),
        ({"name": "fixed", "weights": (1.0, 0.0)}, (1.0, 0.0), 1.0, -0.894427),
        ({"name": "pareto"}, (0.3, 0.7), 2.236068, 0.141421),
        ({"name": "pareto", "meo": False}, (0.3, 0.7), 1.0, 0.141421),
        ({"name": "pareto", "warmup": 9}, (0.5, 0.5), 1.0, -0.707107),
    ],
)
def test_what_is_measured(settings, weights, scale, least):
    linear = Linear(**settings, measure_every=2)
    for step in range(4):
        linear.step(*CONFLICT, step)
    assert list(linear.measured) == [2, 4]
    values = {name.partition("/")[2]: value.item() for name, value in linear.measured[2].items()}
    expected = {
        "norm_supervised": math.sqrt(10),
        "norm_unsupervised": math.sqrt(2),
        "cosine": -4 / math.sqrt(20),
        "weight_supervised": weights[0],
        "weight_unsupervised": weights[1],
        "scale": scale,
        "least_cosine": least,
    }
    assert values == pytest.approx(expected, abs=1e-6)


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"name": "fixed", "weights": (0, 0)}, r"weights must not both be 0; got \[0\.0, 0\.0\]"),
        ({"weights": (-1, 1)}, "greater than or equal to 0"),
        ({"name": "pareto", "every": 2}, "every must be 1 unless exclusive is alpha.*got 2"),
        ({"max_scale": 0.5}, "greater than or equal to 1"),
        ({"min_ratio": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        GradientsConfig(**settings)
