"""What watches over a run: skipped steps and their batches with a limit, and warnings of a collapse.

Nothing here makes a step wait for the device: flags stay there until a log line reads its metrics, and a collapse is
told from numbers that log lines and evaluations have measured anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from raysemi.base import Config
from raysemi.errors import TrainingError

_log = logging.getLogger(__name__)
_SHOWN_STEPS = 10


class GuardsConfig(Config):
    """`train.guards.*`: warnings of a collapse. Each is given once, and again when it comes back."""

    warn: bool = True
    """False: no warnings."""
    kept: tuple[float, float] = (0.001, 0.999)
    """Kept ratios of unlabeled pixels between which all is well."""
    kept_steps: int | None = Field(None, ge=1)
    """Steps in a row outside of it after which it is told; null: a tenth of the run."""
    others: float = Field(0.1, ge=0.0, le=1.0)
    """One class is everywhere when the network predicts the others, together, on less than this share of the pixels
    that the labels of `data.val` give them."""
    behind: float = Field(10.0, gt=0.0, le=100.0)
    """Points of mIoU by which the averaged copy may be behind the student."""
    images: int = Field(16, ge=0)
    """Images of `data.val` on which the two are compared at each evaluation but the last, which measures both on all;
    0: only at the last."""


class SkippedSteps:
    """The steps whose loss or gradient was not finite, with their batches' keys.

    Args:
        limit: how many a run may have.
        device: where the flags are.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self._limit = limit
        self._steps: list[tuple[int, Sequence[str]]] = []
        self._flags: list[Tensor] = []
        self._total = torch.zeros((), device=device)
        self.last: tuple[int, Sequence[str]] | None = None
        """Step, from 1, and keys of this rank's share of its batch, of the last one that was found."""

    @property
    def total(self) -> Tensor:
        """Skipped steps of the whole run: 0-dim, on the device."""
        return self._total

    def restore(self, total: float) -> None:
        """Goes on counting where a checkpoint stands."""
        self._total.fill_(total)

    def add(self, step: int, finite: Tensor, keys: Sequence[str]) -> None:
        """Notes what became of a step; no host wait.

        Args:
            step: steps done, this one included.
            finite: bool scalar on the device, the same on all ranks.
            keys: of this rank's share of the batch.
        """
        self._total += (~finite).to(self._total.dtype)
        self._steps.append((step, keys))
        self._flags.append(finite)

    def read(self) -> list[int]:
        """The steps that were skipped since the last reading, in one transfer. Resets."""
        flags = torch.stack(self._flags).tolist() if self._flags else []
        found = [one for one, finite in zip(self._steps, flags, strict=True) if not finite]
        self._steps, self._flags = [], []
        if found:
            self.last = found[-1]
        return [step for step, _ in found]

    def tell(self, steps: Sequence[int], keys: Sequence[str], log: bool) -> TrainingError | None:
        """What a log line says of them.

        Args:
            steps: that were skipped since the last one; at least one.
            keys: of the whole batch of the last of them.
            log: whether this rank speaks.

        Returns:
            The error that ends the run, where there were too many.
        """
        total, batch = int(self._total), ", ".join(keys)
        shown = ", ".join(map(str, steps[-_SHOWN_STEPS:]))
        if len(steps) > _SHOWN_STEPS:
            shown = f"..., {shown}"
        if total > self._limit:
            return TrainingError(
                f"steps with a loss or gradient that is not finite must be at most train.skip_limit, {self._limit}; "
                f"got {total}, lately {shown}. The batch of the last: {batch}. Weights are as before these steps, and "
                "a checkpoint is written. Look at these images; lower optim.lr, set train.max_grad_norm, or "
                "train.precision=fp32 in a new run; or go on from here with a larger train.skip_limit."
            )
        if log:
            message = "skipped, since a loss or gradient is not finite: steps %s (%d of %d allowed). The last batch: %s"
            _log.warning(message, shown, total, self._limit, batch)
        return None


class Guards:
    """Warnings of a run that no longer learns.

    Args:
        config: `train.guards.*`.
        start: steps done when this launch began.
        steps: of the whole run.
        warn: takes a text and its arguments, as a logger does; ranks other than 0 give none.
    """

    def __init__(
        self, config: GuardsConfig, start: int, steps: int, warn: Callable[..., object] | None = _log.warning
    ) -> None:
        self._config = config
        self._warn = warn if config.warn else None
        self._kept_steps = config.kept_steps or max(1, steps // 10)
        self._begin = steps // 10
        self._outside: dict[str, int] = {}
        """What is wrong with the kept ratio -> the step since which it is."""
        self._was_below = False
        self._told: set[str] = set()
        self._last_step = start

    def training(self, step: int, metrics: Mapping[str, float]) -> None:
        """Looks at the metrics of a log line: means over the steps since the last one."""
        kept = metrics.get("method/kept_ratio")
        before, self._last_step = self._last_step, step
        if kept is None:
            return
        low, high = self._config.kept
        self._was_below |= kept < high  # a method that keeps every pixel by design is well at 1
        for what, wrong in (("none", kept < low), ("all", kept > high and self._was_below)):
            if not wrong:
                self._outside.pop(what, None)
                self._told.discard(what)
                continue
            since = self._outside.setdefault(what, before)
            if step - since >= self._kept_steps:
                self._tell(
                    what,
                    f"step {step}: {100 * kept:.1f} % of the unlabeled pixels were kept for {step - since} steps. "
                    + (
                        "The unlabeled images teach nothing: lower the method's threshold, or train longer on the "
                        "labels first."
                        if what == "none"
                        else "Every pseudo-label counts, right or wrong: raise the method's threshold, and look at the "
                        "pictures and at eval.pseudo_images."
                    ),
                )

    def evaluation(self, step: int, matrix_KK: Tensor, classes: Sequence[str], behind: float | None) -> None:
        """Looks at an evaluation; in the first tenth of a run nothing is told.

        Args:
            step: steps done.
            matrix_KK: confusion matrix of the evaluated network, rows labels.
            classes: K names.
            behind: points of mIoU that the averaged copy is behind the student; None where it was not measured.
        """
        if step < self._begin:
            return
        counts = matrix_KK.cpu().double()
        predicted_K, true_K = counts.sum(0), counts.sum(1)
        most = int(predicted_K.argmax())
        pixels = float(counts.sum().clamp(min=1))
        others, expected = (float(1 - sizes_K[most] / pixels) for sizes_K in (predicted_K, true_K))
        self._judge(
            "one class",
            others < self._config.others * expected,
            f"step {step}: the network predicts {classes[most]} on {100 * (1 - others):.1f} % of the pixels of "
            f"data.val, whose labels are it on {100 * (1 - expected):.1f} %. Give the labels time before the unlabeled "
            "images count (train.rampup=0.25), lower optim.lr, or raise the method's threshold.",
        )
        if behind is not None:
            self._judge(
                "behind",
                behind > self._config.behind,
                f"step {step}: the averaged copy, which teaches, is {behind:.1f} points of mIoU behind the student. "
                "Lower method.average.decay (or train longer): it averages over more steps than the run has had.",
            )

    def _judge(self, what: str, wrong: bool, text: str) -> None:
        if wrong:
            self._tell(what, text)
        else:
            self._told.discard(what)

    def _tell(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            if self._warn is not None:
                self._warn("%s", text)
