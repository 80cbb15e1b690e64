"""The loop: fetch, objectives, backward, step, average; log, evaluate, save. No line of a step waits for the device."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raysemi.base import Config, choices
from raysemi.data.types import HostBatch
from raysemi.data.views import on_device
from raysemi.engine import distributed
from raysemi.engine.checkpoint import Snapshot
from raysemi.engine.compiled import as_written, compile_parts
from raysemi.engine.gradients import GradientRule, GradientsConfig, SideLosses
from raysemi.engine.guards import GuardsConfig, SkippedSteps
from raysemi.engine.micro import MicroBatches
from raysemi.engine.optim import OptimConfig, Optimizer
from raysemi.engine.record import Meter, Samples
from raysemi.engine.strategy import Replicas, StepModule, Strategy, synchronise_batch_norm
from raysemi.engine.teacher import AveragedCopy
from raysemi.engine.zero import Shards
from raysemi.engine.zero_config import ZeroConfig
from raysemi.errors import TrainingError
from raysemi.methods.base import AcrossRanks, Method, StepContext
from raysemi.models.segmentor import Segmentor

_log = logging.getLogger(__name__)


class BatchConfig(Config):
    """`train.batch.*`: images of a step over all ranks."""

    labeled: int = Field(4, ge=1)
    """Labeled images of a step, over all ranks."""
    unlabeled: int = Field(4, ge=1)
    """Unlabeled images of a step, over all ranks; unused by methods without unlabeled images."""


class TrainConfig(Config):
    """`train.*`."""

    steps: int = Field(1000, ge=1)
    """Optimizer updates of the whole run; schedules follow it."""
    stop_at: int | None = Field(None, ge=1)
    """Ends cleanly with a checkpoint at this step; the same command without it goes on."""
    batch: BatchConfig = BatchConfig()
    """Global batch."""
    micro_batch: int | None = Field(None, ge=1, json_schema_extra={"unit": "images"})
    """Unlabeled images (of methods without: labeled ones) that a rank passes at once; null, or as many as its share of
    the batch: the share at once. Fewer take less memory and more time, and give the same steps: same batch, learning
    rate, data and draws, same gradient but for rounding. It divides the share; the labeled images are split into as
    many parts, and images that are mixed with each other stay in one. What a method asks of the whole step (thresholds,
    memories, weighting=rank, ohem) is found in passes without gradient before: a half to a whole step's time more, and
    three to six times a step's for ael and u2pl, the more the smaller the parts. BatchNorm in train mode (not
    model.batch_norm=frozen) normalises each part by itself, as a rank of its own would: fewer images share statistics,
    and the numbers are those of as many ranks on CPUs."""
    period: int | None = Field(None, ge=1)
    """Steps that stand for the papers' epoch; None = one pass over the unlabeled pool, at most a 20th of the run."""
    rampup: float = Field(0.0, ge=0.0, le=1.0, json_schema_extra=choices([0.0, 0.25, 0.5]))
    """Share of the run over which the weight of the unsupervised terms rises to 1; 0 = at once, as in the papers. In a
    short run from few labels, rare classes would else be taught away before the labels have taught them."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast: auto is bf16 on CUDA and fp32 elsewhere."""
    strategy: Literal["auto", "single", "ddp", "deepspeed"] = "auto"
    """auto: ddp on several ranks, single on one. deepspeed: ZeRO, for networks that are too large for ddp."""
    zero: ZeroConfig = ZeroConfig()
    """What deepspeed spreads over ranks."""
    channels_last: bool = True
    """Memory layout of images and weights; faster for convolutions on CPUs and recent GPUs."""
    compile: bool = False
    """True: encoder, decoder and heads run as torch.compile makes them: minutes at the first step, faster ones after
    it, results that differ in rounding. Evaluation, whose images have many sizes, stays as it is. The environment
    variable RAYSEMI_COMPILE_BACKEND names another backend than inductor (eager: the same bits, and no compiler)."""
    max_grad_norm: float = Field(0.0, ge=0.0)
    """Largest norm of the gradient; 0 = no clipping, as in the papers."""
    log_every: int = Field(20, ge=1)
    """Steps between two log lines."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between two checkpoints; None = a tenth of the run."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept, beside the best."""
    skip_limit: int = Field(25, ge=0)
    """Steps of the whole run that may be skipped since a loss or gradient is not finite; with one more the run ends,
    with a checkpoint."""
    hang_after_s: float = Field(1200.0, gt=0.0)
    """Seconds without a finished step, evaluated image or checkpoint after which a rank writes where each of its
    threads stands (RUN/stacks) and ends."""
    guards: GuardsConfig = GuardsConfig()
    """Warnings of a collapse."""

    def parts(self, labeled: int, unlabeled: int) -> int:
        """Micro-batches of a rank's share of so many images."""
        share = unlabeled or labeled
        return 1 if self.micro_batch is None else max(1, share // self.micro_batch)


@dataclass(frozen=True)
class Hooks:
    """What the run does at the trainer's periods; called on every rank, equally often."""

    log: Callable[[int, dict[str, float]], None]
    """(steps done, metrics) every `log_every` steps."""
    evaluate: Callable[[int], bool]
    """(steps done) every `eval.every` steps and at the last; True when it is the best so far, which is then saved."""
    save: Callable[[int], None]
    """(steps done) every `checkpoint_every` steps, after the best evaluation and at the end."""
    should_stop: Callable[[], bool]
    """Asked after every step: True ends the loop with a checkpoint (Ctrl-C)."""
    sample: Callable[[int, dict[str, float]], None] = lambda step, values: None
    """(steps done, values) of each step that was measured by itself, before the next `log` or `save`."""


def resolve_period(config: TrainConfig, pass_steps: int) -> int:
    """`train.period` in steps: what is set, else one pass, at most a 20th of the run, at least 1."""
    return config.period or max(1, min(pass_steps, config.steps // 20))


def resolve_precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Autocast type of a device."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


class Trainer:
    """Everything that a step changes: student, averaged copy, method, optimizer and the step counter.

    Args:
        student: the network; moved to `device`.
        method: names the objectives; its buffers are part of the state.
        config: `train.*`.
        optim: `optim.*`.
        gradients: `gradients.*`.
        across: the ranks.
        device: this rank's device.
        period: what stands for an epoch, in steps (`resolve_period`).
        seed: seed of the run.
    """

    def __init__(
        self,
        student: Segmentor,
        method: Method,
        config: TrainConfig,
        optim: OptimConfig,
        *,
        across: AcrossRanks,
        device: torch.device,
        period: int,
        seed: int,
        gradients: GradientsConfig = GradientsConfig(),  # noqa: B008 - frozen
    ) -> None:
        self.config = config
        self.across = across
        self.device = device
        self.period = period
        self.seed = seed
        self.step = 0
        self._skips = SkippedSteps(config.skip_limit, device)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.precision = resolve_precision(config, device)
        student = synchronise_batch_norm(student, across, device)
        student = student.to(device).to(memory_format=self.memory_format)
        self.method = method.to(device)
        average = method.average
        self.average = AveragedCopy(student, average, period) if average.kind != "none" else None
        if config.compile:
            for network in (student, *([] if self.average is None else [self.average.model])):
                compile_parts(network)
        module = StepModule(student, self.method, config.rampup * config.steps).train()
        self.optimizer = Optimizer(student, optim, config.steps)
        self._meter, self._samples = Meter(), Samples()
        ramps = math.ceil(max(config.rampup * config.steps, method.ramp_steps(config.steps)))
        gradients = gradients.model_copy(update={"warmup": max(gradients.warmup, ramps)})
        self.rule = GradientRule(gradients, self.optimizer.rates, across, self._samples.add)
        teacher = self.average.model if self.average is not None and average.buffers == "own" else None
        spread = functools.partial(Shards, config=config.zero) if config.strategy == "deepspeed" else Replicas
        self.strategy: Strategy = spread(
            module, self.optimizer, across, device, self.rule,
            precision=self.precision, max_grad_norm=config.max_grad_norm, teacher=teacher,
        )  # fmt: skip
        self.micro = MicroBatches(module, self.strategy, across, device, precision=self.precision, teacher=teacher)

    @property
    def skipped(self) -> Tensor:
        """Steps of the whole run that were skipped: 0-dim, on the device."""
        return self._skips.total

    @property
    def student(self) -> Segmentor:
        """The network that is trained; outside a step, look at it within `strategy.whole()`."""
        return self.strategy.student

    @property
    def evaluated(self) -> Segmentor:
        """The network that is evaluated, saved as the result and used to predict."""
        return self.average.model if self.average is not None and self.average.started else self.student

    def context(self, listener: Callable[[str, Tensor], None] | None = None) -> StepContext:
        """What the method sees in the present step."""
        return StepContext(
            student=self.student,
            teacher=self.average.model if self.average is not None else None,
            step=self.step,
            steps=self.config.steps,
            period=self.period,
            seed=self.seed,
            across=self.across,
            listener=listener,
        )

    def train_step(self, host: HostBatch) -> dict[str, Tensor]:
        """One optimizer update.

        Args:
            host: this rank's share of the step.

        Returns:
            Scalars on the device whose mean over ranks is the global value: objectives, gradient norm, and what the
            method and gradient rule observed.
        """
        parts = on_device(host, self.device, self.memory_format).parts(
            self.config.parts(len(host.keys_L), len(host.keys_U))
        )
        observed: dict[str, Tensor] = {}

        def listen(name: str, value: Tensor) -> None:
            if value.ndim == 0:  # maps are for pictures
                before = observed.get(f"method/{name}")
                value = value if len(parts) == 1 else value / len(parts)
                observed[f"method/{name}"] = value if before is None else before + value

        if self.average is not None:
            self.average.before_step(self.strategy.parts, self.step)
        each = [
            self.strategy.accumulate(part, context, last=part is parts[-1])
            for part, context in zip(parts, self.micro.contexts(parts, self.context(listen)), strict=True)
        ]
        losses = functools.reduce(SideLosses.plus, each)
        update = self.strategy.update(self.step)
        if self.average is not None:
            self.average.after_step(self.strategy.parts, self.step, update.finite)
        self.step += 1
        self._skips.add(self.step, update.finite, (*host.keys_L, *host.keys_U))
        return {
            "loss/total": losses.total,
            **{f"loss/{name}": value for name, value in losses.values.items()},
            "gradient_norm": update.norm,
            "skipped_steps": self.skipped,
            **update.counted,
            **observed,
        }

    def fit(self, stream: Iterable[HostBatch], hooks: Hooks, eval_every: int) -> bool:
        """Trains until the stream ends.

        Args:
            stream: this rank's shares of the steps from `self.step` on, up to the last.
            hooks: what happens at the periods.
            eval_every: steps between two evaluations.

        Returns:
            True when every step of the stream was done; False when `should_stop` ended it earlier.

        Raises:
            TrainingError: too many steps were skipped; a checkpoint is written.
        """
        config = self.config
        save_every = config.checkpoint_every or max(1, config.steps // 10)
        saved = self.step
        self._meter.restart_clock()
        stopped = False
        for host in self._meter.waiting(stream):
            values = self.train_step(host)
            self._meter.add(values, images=len(host.keys_L) + len(host.keys_U))
            if self.step % config.log_every == 0 or self.step == config.steps:
                self._hand_out_samples(hooks)
                metrics = self._meter.read(self.across)
                metrics["lr"] = self.optimizer.learning_rate(self.step - 1)
                metrics["skipped_steps"] = float(self.skipped)  # counts from the first step on: a mean would be off
                hooks.log(self.step, metrics)
                if (error := self._too_many_skips()) is not None:
                    hooks.save(self.step)
                    raise error
            stopped = hooks.should_stop()
            best = False
            if self.step % eval_every == 0 or self.step == config.steps:
                with self.strategy.whole(), as_written() if config.compile else nullcontext():
                    best = hooks.evaluate(self.step)
                self._meter.restart_clock()
            if self.step % save_every == 0 or best or stopped:
                self._hand_out_samples(hooks)
                hooks.save(self.step)
                saved = self.step
                self._meter.restart_clock()
            if stopped:
                break
        if saved != self.step:
            self._hand_out_samples(hooks)
            hooks.save(self.step)
        return not stopped

    def _too_many_skips(self) -> TrainingError | None:
        """Tells of skipped steps; on all ranks alike."""
        steps = self._skips.read()
        if not steps or self._skips.last is None:
            return None
        keys = distributed.gather(list(self._skips.last[1]), self.across)
        return self._skips.tell(steps, keys, log=self.across.rank == 0)

    def _hand_out_samples(self, hooks: Hooks) -> None:
        for step, values in self._samples.read():
            hooks.sample(step, values)

    def snapshot(self) -> Snapshot:
        """The whole state, for a checkpoint; every rank must ask for it."""
        tensors = dict(self.strategy.tensors())
        if self.average is not None:
            tensors["teacher"] = self.average.model.state_dict()
        if buffers := self.method.state_dict():
            tensors["method"] = buffers
        if weights := self.rule.state():
            tensors["gradients"] = weights
        started = self.average is not None and self.average.started
        return Snapshot(self.step, tensors, {"average_started": started, "skipped_steps": float(self.skipped)})

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from a checkpoint of the same config, on any number of ranks and by any strategy."""
        self.strategy.load(snapshot.tensors)
        self.method.load_state_dict(snapshot.tensors.get("method", {}))
        self.rule.load_state(snapshot.tensors.get("gradients", {}))
        if self.average is not None:
            self.average.model.load_state_dict(snapshot.tensors["teacher"])
            self.average.started = snapshot.state["average_started"]
        self._skips.restore(snapshot.state["skipped_steps"])
        self.step = snapshot.step
