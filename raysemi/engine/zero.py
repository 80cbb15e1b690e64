"""ZeRO: optimizer state, gradients and weights spread over ranks by DeepSpeed. The only file that imports it.

DeepSpeed is used for what it is good at, where tensors lie and how they travel; what a step means stays ours: losses,
gradient rule, learning rates, which steps count, and the state that a checkpoint holds. Where a rule makes the step's
gradient itself (Pareto), it takes both sides' gradients out of a graph that the engine has not seen, averages them
over ranks and hands the result over through a node whose gradient is just that.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from raysemi.data.types import SemiBatch
from raysemi.engine import distributed
from raysemi.engine.gradients import GradientRule, SideLosses
from raysemi.engine.optim import Optimizer
from raysemi.engine.strategy import StepBuffers, StepModule, Update, autocast
from raysemi.engine.zero_config import ZeroConfig, deepspeed_settings
from raysemi.errors import ConfigError
from raysemi.methods.base import AcrossRanks, StepContext
from raysemi.models.segmentor import Segmentor

_OLDEST = (0, 19)


def missing() -> str | None:
    """What keeps DeepSpeed from being used here, with what to do about it; None when nothing does."""
    install = "Install it: `pip install 'raysemi[deepspeed]'`, or set train.strategy=auto."
    if importlib.util.find_spec("deepspeed") is None:
        return f"train.strategy=deepspeed must find the package deepspeed; got none. {install}"
    version = importlib.metadata.version("deepspeed")
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return (
            f"train.strategy=deepspeed must find deepspeed {_OLDEST[0]}.{_OLDEST[1]} or later; got {version}. {install}"
        )
    return None


class Shards:
    """A DeepSpeed engine around student and method.

    Args:
        module: student and method, on the device.
        optimizer: over the student's parameters; without state.
        across: the ranks.
        device: this rank's device, a CPU or CUDA.
        rule: makes the gradients.
        config: `train.zero.*`.
        precision: autocast type; float32 switches autocast off.
        max_grad_norm: largest norm of the gradient; 0 = no clipping.
        teacher: a network whose BatchNorm statistics the method's own passes move, besides the student's.

    Raises:
        ConfigError: DeepSpeed is not installed, too old, or has nothing for this device.
    """

    def __init__(
        self,
        module: StepModule,
        optimizer: Optimizer,
        across: AcrossRanks,
        device: torch.device,
        rule: GradientRule,
        config: ZeroConfig,
        *,
        precision: torch.dtype = torch.float32,
        max_grad_norm: float = 0.0,
        teacher: nn.Module | None = None,
    ) -> None:
        self._deepspeed = _import_deepspeed(device)
        self._module = module
        self._optimizer = optimizer
        self._across = across
        self._device = device
        self._rule = rule
        self._config = config
        self._precision = precision
        self._max_grad_norm = max_grad_norm
        self._buffers = StepBuffers(module, across, teacher)
        self._counted: dict[str, Tensor] = {}
        self._named = {name: parameter for parameter, name in optimizer.names.items()}
        module.student.to(memory_format=torch.contiguous_format)  # as DeepSpeed lays weights out, in flat buffers
        self._blank = _without_weights(module.student) if config.stage == 3 else None
        self._whole: Segmentor | None = None
        distributed.join_alone(device)
        optimizer.begin(())  # a parameter's state would stay beside that of the shards
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it; the device is the one given below
        work = _Work(module)
        for part in module.student.modules() if config.stage == 3 else ():
            # A layer fetches its weights when it is called. What lies beside layers (a transformer's class token and
            # positions) may be used by whoever holds them, without a call: fetched with the whole.
            for parameter in part.parameters(recurse=False) if any(part.children()) else ():
                self._deepspeed.zero.register_external_parameter(work, parameter)
        self._engine, *_ = self._deepspeed.initialize(
            args=SimpleNamespace(device_rank=device.index or 0),
            model=work,
            optimizer=optimizer.torch,
            config=deepspeed_settings(config, max_grad_norm),
            dist_init_required=False,
        )
        optimizer.begin(self._flat())
        if config.stage in (1, 2):  # else linked only by the first step
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def student(self) -> Segmentor:
        """The network that is trained; within `whole` at stage 3, a plain one with its weights."""
        return self._module.student if self._whole is None else self._whole

    def accumulate(self, batch: SemiBatch, context: StepContext, *, last: bool = True) -> SideLosses:
        """Adds a part's gradients to the shards."""
        self._buffers.begin()
        self._engine.set_gradient_accumulation_boundary(last)

        def work() -> SideLosses:
            with autocast(self._device, self._precision):  # the engine switches an outer one off
                losses: SideLosses = self._module(batch, context)
            return losses

        # Stage 3 follows the passes. The others take over at the loss: an engine that has seen the outputs
        # would take the rule's own look at the graph for a backward.
        losses: SideLosses = self._engine(work) if self._config.stage == 3 else work()
        self._buffers.note(losses.total)
        self._counted = self._rule.backward(losses, context.step, last=last, into=self)
        return losses.detached()

    def of_loss(self, loss: Tensor) -> None:
        """One backward pass, from which the engine averages over ranks."""
        # A loss that is not finite need not have such a gradient. It must: that is how the engine skips a step.
        loss = loss * torch.where(self._buffers.broken, torch.nan, 1.0)
        self._engine.backward(loss if self._config.stage == 3 else self._engine(lambda: loss))

    def given(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Gradients that are the same on all ranks, as if a loss had them."""
        parameters, values = zip(*gradients, strict=True)
        self.of_loss(_HasGradients.apply(values, *parameters))

    def update(self, step: int) -> Update:
        """One step of the optimizer on each rank's shards; reads on the host whether it counts."""
        finite = self._buffers.settle()
        if self._config.stage == 0:
            parameters = list(self._optimizer.names)
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if self._max_grad_norm > 0:
                nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
            finite = finite & torch.isfinite(norm)
            self._optimizer.step(step, finite)
            self._engine.zero_grad()
        else:
            self._optimizer.set_rates(step)
            self._engine.step()
            finite = torch.tensor(self._engine.was_step_applied(), device=self._device)
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._device)
        self._buffers.end(finite)
        return Update(finite, norm, self._counted)

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """The student's state by name; at stage 3, a bucket's worth at a time."""
        student = self._module.student
        if self._config.stage < 3:
            yield student.state_dict()
            return
        parameters: dict[str, Any] = dict(student.named_parameters())
        for names in _portions({name: p.ds_numel for name, p in parameters.items()}, self._config.bucket):
            with self._gathered(parameters[name] for name in names):
                yield {name: parameters[name].data for name in names}
        yield {name: value for name, value in student.state_dict().items() if name not in parameters}

    @contextmanager
    def _together(self) -> Iterator[None]:
        assert self._blank is not None  # stage 3
        network = copy.deepcopy(self._blank)
        for part in self.parts():
            for name, value in part.items():
                owner, _, leaf = name.rpartition(".")
                if leaf in (module := network.get_submodule(owner))._parameters:
                    setattr(module, leaf, nn.Parameter(value.detach().clone(), requires_grad=False))
        for (_, buffer), (_, present) in zip(
            network.named_buffers(), self._module.student.named_buffers(), strict=True
        ):
            buffer.copy_(present)
        self._whole = network.train(self._module.student.training)
        try:
            yield
        finally:
            self._whole = None

    def whole(self) -> AbstractContextManager[object]:
        """At stage 3 `student` becomes a plain copy with whole weights, made by one gather; else nothing is to do."""
        return nullcontext() if self._config.stage < 3 else self._together()

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """State of student and optimizer; what lies in shards is gathered when it is read, by all ranks."""
        student = self._module.student.state_dict()
        if self._config.stage == 0:
            return {"student": student, "optimizer": self._optimizer.tensors()}
        weights: dict[str, Callable[[], Tensor]] = {name: functools.partial(_same, v) for name, v in student.items()}
        if self._config.stage == 3:
            weights |= {name: functools.partial(self._one, p) for name, p in self._module.student.named_parameters()}
        gather = self._deepspeed.utils.safe_get_full_optimizer_state
        state: dict[str, Callable[[], Tensor]] = {}
        for name, parameter in self._named.items():
            state |= {f"{name}/{key}": functools.partial(gather, parameter, key) for key in self._optimizer.kinds}
            state |= {f"{name}/step": functools.partial(_same, count) for count in self._counts[:1]}  # one for all
        return {"student": _WhenRead(weights), "optimizer": _WhenRead(state)}

    def _one(self, parameter: Tensor) -> Tensor:
        with self._gathered([parameter]):
            return parameter.detach().clone()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores what the `tensors` of any strategy gave."""
        stage, student, state = self._config.stage, self._module.student, tensors["optimizer"]
        if stage == 0:
            student.load_state_dict(tensors["student"])
            self._optimizer.load_tensors(state)
            return
        parameters = dict(student.named_parameters())
        wrong = student.state_dict().keys() ^ tensors["student"].keys()
        assert not wrong, wrong  # the same config made both
        for name, value in student.state_dict().items():
            if name not in parameters:
                value.copy_(tensors["student"][name])
        for name, parameter in parameters.items():
            value = tensors["student"][name].to(self._device)
            with self._gathered([parameter], changed=True):
                parameter.data.copy_(value)
            if name in self._named:
                self._put(parameter, value)
                for key in self._optimizer.kinds:
                    if f"{name}/{key}" in state:
                        self._put(parameter, state[f"{name}/{key}"].to(self._device), key)
        steps = [value for path, value in state.items() if path.endswith("/step")]
        for count in self._counts if steps else ():
            count.copy_(steps[0])

    def _put(self, parameter: Any, value: Tensor, key: str | None = None) -> None:
        """Writes this rank's shard of the weights that the optimizer holds, or of its state `key`."""
        utils = self._deepspeed.utils
        if self._config.stage < 3:
            arguments = (parameter, value.contiguous()) if key is None else (parameter, value.contiguous(), key)
            (utils.safe_set_full_fp32_param if key is None else utils.safe_set_full_optimizer_state)(*arguments)
            return
        # The whole-tensor form refuses a tensor whose entries the ranks do not divide.
        size = parameter.ds_tensor.numel()
        flat = value.contiguous().reshape(-1)
        padded = nn.functional.pad(flat, (0, size * self._across.world - flat.numel()))
        shard = padded.narrow(0, size * self._across.rank, size)
        arguments = (parameter, shard) if key is None else (parameter, shard, key)
        (utils.safe_set_local_fp32_param if key is None else utils.safe_set_local_optimizer_state)(*arguments)

    def _gathered(self, parameters: Iterable[Tensor], changed: bool = False) -> AbstractContextManager[object]:
        if self._config.stage < 3:
            return nullcontext()
        context: AbstractContextManager[object] = self._deepspeed.zero.GatheredParameters(
            list(parameters), modifier_rank=0 if changed else None
        )
        return context

    @property
    def _counts(self) -> list[Tensor]:
        """AdamW's counters of steps."""
        return [state["step"] for state in self._optimizer.torch.state.values() if "step" in state]

    def _flat(self) -> list[Tensor]:
        """What the optimizer holds on this rank in place of the parameters."""
        zero = self._engine.optimizer
        if self._config.stage == 0:
            return list(self._optimizer.names)
        return list(
            zero.fp32_partitioned_groups_flat if self._config.stage == 3 else zero.single_partition_of_fp32_groups
        )


class _WhenRead(Mapping[str, Tensor]):
    """Tensors by name, each made when it is read."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _same(value: Tensor) -> Tensor:
    return value


class _Work(nn.Module):
    """What the engine takes for the model: it holds the parameters and runs whatever it is given."""

    def __init__(self, module: StepModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class _HasGradients(torch.autograd.Function):
    """A loss, 0, with the given gradients."""

    @staticmethod
    def forward(ctx: Any, values: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.values = values
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *torch._foreach_mul(ctx.values, upstream[0])


def _import_deepspeed(device: torch.device) -> Any:
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"train.strategy must be auto or single on this device; got deepspeed on {device.type}. Set it to auto."
        )
    if fault := missing():
        raise ConfigError(fault)
    # Else it looks for an accelerator by itself, and finds one that this run does not use.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    if device.type == "cpu":
        # None of its own operations is used. One would be: an all-reduce among CPU ranks, compiled at the first use,
        # which takes minutes and a compiler; and looking for what could be compiled takes seconds.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def _without_weights(network: Segmentor) -> Segmentor:
    """A copy whose parameters take no memory."""
    blank = copy.deepcopy(network)
    for module in blank.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
    return blank


def _portions(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Names in order, in lists of at most `most` entries, or of one name."""
    portion: list[str] = []
    for name, size in sizes.items():
        if portion and sum(sizes[one] for one in portion) + size > most:
            yield portion
            portion = []
        portion.append(name)
    if portion:
        yield portion
