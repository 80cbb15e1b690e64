"""Objectives of all ranks -> one update direction, by a rule: `gradients.*`.

uniform and fixed: one backward of a weighted sum of the terms. Data-parallel training averages gradients over ranks, so
each rank's share is multiplied by the number of ranks: N ranks give the gradient of one rank with the same global
batch, whatever pixels each of them ignores.

pareto: a backward for each side, both gradients averaged over all ranks, and only then the weights, from global
gradients: a mean of the ranks' own weights, or of what each would have combined, is another method and may climb.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Literal, NamedTuple, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from raysemi.base import Config, choices
from raysemi.engine.distributed import start_average
from raysemi.methods.base import AcrossRanks
from raysemi.ops.losses import Objective
from raysemi.ops.pareto import Mix, Products, inner_products, least_cosine, mix

Side = Literal["supervised", "unsupervised"]
Weight = Annotated[float, Field(ge=0.0)]


class GradientsConfig(Config):
    """`gradients.*`: how the supervised and the unsupervised side become one direction."""

    name: Literal["uniform", "fixed", "pareto"] = Field("uniform", json_schema_extra=choices(["uniform", "pareto"]))
    """uniform: the published sum of the terms. fixed: `weights`. pareto: weights anew in every step, from both sides'
    gradients, so that the step (SGD's, at one learning rate) hurts neither side to first order. With L_side twice the
    sum of a side's terms, uniform is (L_supervised + L_unsupervised) / 2."""
    weights: tuple[Weight, Weight] = (0.5, 0.5)
    """fixed: factors on L_supervised and L_unsupervised, used as they are; [0.5, 0.5] is uniform, and what the paper
    calls 2 : 1, unsupervised to supervised, is [0.5, 1]."""
    meo: bool = Field(True, json_schema_extra=choices([True, False], requires={"name": ["pareto"]}))
    """pareto: the step gets the length of the uniform one; without, it is shorter, as with a smaller learning rate."""
    min_ratio: float = Field(
        1e-3, ge=0.0, le=1.0, json_schema_extra=choices([0.0, 1e-3, 1e-2], requires={"name": ["pareto"]})
    )
    """pareto: a gradient shorter than this share of the other counts as vanished, and the step is uniform; 0 = only
    one that is 0."""
    max_scale: float | None = Field(
        10.0, ge=1.0, json_schema_extra=choices([3.0, 10.0, None], requires={"name": ["pareto"], "meo": [True]})
    )
    """pareto: largest factor of `meo`; null = no limit, as in the paper."""
    every: int = Field(1, ge=1, json_schema_extra={"unit": "steps"})
    """pareto: steps between two computations of the weights; the steps between cost one backward. 1 = the paper's."""
    metric: Literal["euclid", "lr"] = "euclid"
    """pareto: metric in which the direction is the shortest. lr: each coordinate weighs as its learning rate, for
    groups with different ones; lengths stay Euclidean."""
    warmup: int = Field(0, ge=0, json_schema_extra={"unit": "steps"})
    """pareto: uniform steps before; for methods whose unsupervised side holds regularisers long before it trusts a
    pixel. At least as long as the weight of the unsupervised side rises (`train.rampup`, a method's own ramp): Pareto
    weights would undo the ramp, since they make up for a short gradient."""
    exclusive: Literal["uniform", "alpha"] = "uniform"
    """pareto: parameters that one side alone trains. uniform: left out of the products and trained as under uniform.
    alpha: in the products, and weighted like all others."""
    measure_every: int = Field(0, ge=0, json_schema_extra={"unit": "steps"})
    """Steps between two measurements of both gradients, under any rule; 0 = none. Under other rules than pareto it
    costs two more backwards and changes nothing else."""

    @model_validator(mode="after")
    def _check(self) -> GradientsConfig:
        if self.name == "fixed" and not any(self.weights):
            raise ValueError(f"weights must not both be 0; got {list(self.weights)}. Use [0.5, 0.5] for uniform")
        if self.name == "pareto" and self.every > 1 and self.exclusive == "uniform":
            raise ValueError(
                "every must be 1 unless exclusive is alpha, since the steps between have one backward, which weighs "
                f"all parameters alike; got {self.every}. Set exclusive to alpha"
            )
        return self


class SideLosses(NamedTuple):
    """What a step differentiates, as this rank's share: the mean over ranks is the global value."""

    total: Tensor
    """The published total."""
    supervised: Tensor
    """L_supervised, twice the sum of that side: the total is (L_supervised + L_unsupervised) / 2."""
    unsupervised: Tensor
    values: dict[str, Tensor]
    """Each objective without its weight, detached."""

    def detached(self) -> SideLosses:
        """The same values without graph."""
        total, supervised, unsupervised, values = self
        return SideLosses(total.detach(), supervised.detach(), unsupervised.detach(), values)

    def plus(self, other: SideLosses) -> SideLosses:
        """The losses of two parts of a step together."""
        values = {name: value + other.values[name] for name, value in self.values.items()}
        total, supervised, unsupervised = (mine + theirs for mine, theirs in zip(self[:3], other[:3], strict=True))
        return SideLosses(total, supervised, unsupervised, values)


def join_ranks(objectives: dict[str, Objective], across: AcrossRanks, parts: int = 1) -> dict[str, Tensor]:
    """Each objective as a loss whose mean over ranks, of the sum over each rank's micro-batches, is its global value.

    Args:
        objectives: sums and normalisers of a rank's share, or of a micro-batch; the same names in the same order on
            every rank.
        across: sums over ranks; one collective for all normalisers.
        parts: micro-batches of a rank's share, each of which is a rank to `across`.

    Returns:
        name -> total * ranks / max(sum over ranks of normaliser, 1), with gradient, without the objective's weight.
    """
    ranks = across.world // parts
    normalisers = across.sum(stacked_normalisers([objective.normaliser for objective in objectives.values()]))
    normalisers = normalisers.clamp(min=1.0).to(torch.float32)
    return {
        name: objective.total.float() * ranks / normaliser
        for (name, objective), normaliser in zip(objectives.items(), normalisers.unbind(), strict=True)
    }


def stacked_normalisers(normalisers: Sequence[Tensor]) -> Tensor:
    """What ranks add up: one tensor, in which counts of pixels are exact."""
    wide = torch.float32 if normalisers[0].device.type == "mps" else torch.float64  # MPS has no fp64
    return torch.stack([normaliser.detach().to(wide) for normaliser in normalisers])


def uniform_loss(objectives: dict[str, Objective], losses: dict[str, Tensor], unsupervised: float = 1.0) -> Tensor:
    """The published total, the sum of weight * loss; `unsupervised` is a factor on the terms of that side."""
    factor = {"supervised": 1.0, "unsupervised": unsupervised}
    terms = [objectives[name].weight * factor[objectives[name].side] * loss for name, loss in losses.items()]
    return torch.stack(terms).sum()


def side_loss(objectives: dict[str, Objective], losses: dict[str, Tensor], side: Side, factor: float = 1.0) -> Tensor:
    """L_side: twice the sum of weight * loss over one side's terms, times `factor`; 0 without gradient for none."""
    terms = [2.0 * factor * objectives[name].weight * loss for name, loss in losses.items()
             if objectives[name].side == side]  # fmt: skip
    return torch.stack(terms).sum() if terms else next(iter(losses.values())).new_zeros(())


class Into(Protocol):
    """Where a step's gradients go."""

    def of_loss(self, loss: Tensor) -> None:
        """Adds the gradients of a loss of this rank; their mean over ranks is taken on the way."""
        ...

    def given(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Adds gradients by parameter, which are the same on all ranks."""
        ...


class IntoGrad:
    """Into the parameters' `.grad`, where a wrapper's hooks (DistributedDataParallel) average those of a loss."""

    def of_loss(self, loss: Tensor) -> None:
        """One backward pass."""
        loss.backward()

    def given(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """They are the `.grad`, and there is no other."""
        for parameter, gradient in gradients:
            parameter.grad = gradient


class BothGradients:
    """The gradients of both sides, flat and averaged over ranks: two rows of a buffer of twice the parameters' size.

    Args:
        rates: the parameters, each with its learning rate relative to the others'; the same order on every rank.
        across: the ranks.
        set_aside: parameters that one side alone reaches stay out of products and mix, and get half their gradient.
    """

    def __init__(self, rates: Mapping[Tensor, float], across: AcrossRanks, *, set_aside: bool) -> None:
        self._across = across
        self._set_aside = set_aside
        self._parameters = sorted(rates, key=lambda parameter: rates[parameter])
        self._blocks: list[tuple[float, int]] = [
            (rate, sum(parameter.numel() for parameter in block))
            for rate, block in groupby(self._parameters, key=lambda parameter: rates[parameter])
        ]
        """(rate, entries) of the stretches of equal rate."""
        self._flat_2P: Tensor | None = None
        self._views: list[list[Tensor]] = []
        self._reached: list[list[bool]] = []
        self._begun = False
        self._aside: dict[int, Tensor] = {}

    def add(self, losses: SideLosses, *, last: bool = True, keep_graph: bool) -> None:
        """Adds both gradients of a part of a step, and averages the sums over ranks with the last part.

        The parameters' own `.grad` stay as they are, and a hook that reduces when a `.grad` is made
        (DistributedDataParallel) does not fire.

        Args:
            losses: of this rank, for this part: the step's are the sum over its parts.
            last: True when the step has no more parts.
            keep_graph: True when another backward follows.
        """
        flat_2P = self._buffer()
        waits: list[Callable[[], object]] = []
        if not self._begun:
            self._reached = [[False] * len(self._parameters) for _ in range(2)]
        for row, loss in enumerate((losses.supervised, losses.unsupervised)):
            gradients: tuple[Tensor | None, ...] = (None,) * len(self._parameters)
            if loss.requires_grad:
                gradients = torch.autograd.grad(
                    loss, self._parameters, retain_graph=keep_graph or row == 0, allow_unused=True
                )
            found = [(view, g) for view, g in zip(self._views[row], gradients, strict=True) if g is not None]
            views, new = [view for view, _ in found], [gradient for _, gradient in found]
            if not self._begun:
                flat_2P[row].zero_()
            if found:
                (torch._foreach_add_ if self._begun else torch._foreach_copy_)(views, new)
            self._reached[row] = [
                before or g is not None for before, g in zip(self._reached[row], gradients, strict=True)
            ]
            if last:
                waits.append(start_average(flat_2P[row], self._across))  # travels while the other side's is computed
        self._begun = not last
        if not last:
            return
        for wait in waits:
            wait()
        # Whom a side reaches is read off the graph of this very step: the same on all ranks, and after a restart.
        self._aside = {}
        for row in range(2) if self._set_aside else ():
            alone = [i for i in range(len(self._parameters)) if self._reached[row][i] and not self._reached[1 - row][i]]
            for i in alone:
                self._aside[i] = 0.5 * self._views[row][i]
                self._views[row][i].zero_()

    def products(self) -> tuple[Products, Products]:
        """Inner products of the global gradients, plain and with each coordinate weighted by its learning rate.

        Each rank multiplies its own stretch, so that all get the same bits.
        """
        rank, world = self._across.rank, self._across.world
        parts, start = [], 0
        for _, count in self._blocks:
            share = -(-count // world)
            mine = slice(start + min(rank * share, count), start + min((rank + 1) * share, count))
            parts.append(inner_products(self._buffer()[:, mine]))
            start += count
        summed = self._across.sum(torch.stack(parts)).unbind()
        weighted = [rate * part for (rate, _), part in zip(self._blocks, summed, strict=True)]
        return Products(*torch.stack(summed).sum(dim=0)), Products(*torch.stack(weighted).sum(dim=0))

    def combine(self, factor_s: Tensor, factor_u: Tensor) -> list[tuple[Tensor, Tensor]]:
        """factor_s g_s + factor_u g_u by parameter, in place of the first; without those that no side reaches."""
        step_P, other_P = self._buffer()
        step_P.mul_(factor_s.to(step_P.dtype)).addcmul_(other_P, factor_u.to(step_P.dtype))
        for i, half in self._aside.items():
            self._views[0][i].copy_(half)
        reached = [either or other for either, other in zip(*self._reached, strict=True)]
        return [(p, g) for p, g, r in zip(self._parameters, self._views[0], reached, strict=True) if r]

    def _buffer(self) -> Tensor:
        if self._flat_2P is None:
            sizes = [parameter.numel() for parameter in self._parameters]
            first = self._parameters[0]
            self._flat_2P = torch.zeros(2, sum(sizes), dtype=first.dtype, device=first.device)
            self._views = [  # each in the memory format of its parameter, which optimizers want of a gradient
                [part.as_strided(p.shape, p.stride())
                 for part, p in zip(row_P.split(sizes), self._parameters, strict=True)]
                for row_P in self._flat_2P
            ]  # fmt: skip
        return self._flat_2P


_INTO_GRAD = IntoGrad()


class GradientRule:
    """From a step's losses to the gradients that the optimizer reads.

    Args:
        config: `gradients.*`.
        rates: the parameters that train, each with its relative learning rate.
        across: the ranks.
        measured: called with (steps done, scalars) of each measuring step; the scalars, the same on all ranks, are
            norms and cosine of both gradients, the weights, the factor, the least cosine of the step with a gradient.
    """

    def __init__(
        self,
        config: GradientsConfig,
        rates: Mapping[Tensor, float],
        across: AcrossRanks,
        measured: Callable[[int, dict[str, Tensor]], None] = lambda step, values: None,
    ) -> None:
        self._config = config
        self._measured = measured
        self._both = BothGradients(rates, across, set_aside=config.exclusive == "uniform")
        device = next(iter(rates)).device
        weights = config.weights if config.name == "fixed" else (0.5, 0.5)
        self._present_3 = torch.tensor((*weights, 1.0), device=device)
        """alpha_s, alpha_u and the factor of the step: those of the rule, or of the last computation."""
        self._none = torch.zeros((), device=device)

    def backward(
        self, losses: SideLosses, step: int, *, last: bool = True, into: Into = _INTO_GRAD
    ) -> dict[str, Tensor]:
        """Adds the gradients of a part of a step; after the last, every parameter has the step's, averaged over ranks.

        Args:
            losses: of this rank, for this part: the step's are the sum over its parts.
            step: global step, from 0.
            last: True when the step has no more parts.
            into: where they go.

        Returns:
            Scalars to be averaged over steps, from the last part: for pareto, how often each guard was at work.
        """
        config = self._config
        pareto = config.name == "pareto"
        renew = pareto and step >= config.warmup and (step - config.warmup) % config.every == 0
        measure = config.measure_every > 0 and (step + 1) % config.measure_every == 0
        guards = {"fallback": self._none, "capped": self._none}
        if renew or measure:
            self._both.add(losses, last=last, keep_graph=not renew)
        if (renew or measure) and last:
            plain, rated = self._both.products()
        if renew:
            if not last:
                return {}
            found = mix(
                plain,
                rated if config.metric == "lr" else None,
                meo=config.meo,
                min_ratio=config.min_ratio,
                max_scale=config.max_scale,
            )
            into.given(self._both.combine(found.scale * found.alpha_s, found.scale * found.alpha_u))
            guards = {"fallback": found.fallback.float(), "capped": found.capped.float()}
            self._keep(found)
        elif config.name == "fixed" or (pareto and step >= config.warmup):
            alpha_s, alpha_u, scale = self._present_3
            into.of_loss(scale * (alpha_s * losses.supervised + alpha_u * losses.unsupervised))
        else:
            into.of_loss(losses.total)
        if measure and last:
            self._measured(step + 1, _described(plain, *(found[:3] if renew else self._present_3.to(plain.ss.dtype))))
        return {f"gradients/{name}": value for name, value in guards.items()} if pareto and last else {}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs: the weights that later steps use, if any do."""
        return {"weights": self._present_3} if self._config.every > 1 else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state` gave."""
        if "weights" in state:
            self._present_3.copy_(state["weights"])

    def _keep(self, found: Mix) -> None:
        new_3 = torch.stack(found[:3]).to(self._present_3.dtype)
        # not those of a step that is skipped
        self._present_3.copy_(torch.where(torch.isfinite(new_3).all(), new_3, self._present_3))


def _described(products: Products, alpha_s: Tensor, alpha_u: Tensor, scale: Tensor) -> dict[str, Tensor]:
    norm_s, norm_u = products.ss.sqrt(), products.uu.sqrt()
    return {
        "gradients/norm_supervised": norm_s,
        "gradients/norm_unsupervised": norm_u,
        "gradients/cosine": products.su / (norm_s * norm_u),
        "gradients/weight_supervised": alpha_s,
        "gradients/weight_unsupervised": alpha_u,
        "gradients/scale": scale,
        "gradients/least_cosine": least_cosine(scale * alpha_s, scale * alpha_u, products),
    }
