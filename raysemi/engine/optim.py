"""Parameter groups, optimizer and learning-rate schedule; a step that is not finite leaves no trace.

Source: the recipes of UniMatch and DeepLab: two groups (encoder, everything else), SGD, poly decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raysemi.base import Config, choices, search
from raysemi.models.detector import Detector
from raysemi.models.segmentor import Segmentor
from raysemi.ops import schedules


class OptimConfig(Config):
    """`optim.*`."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer: SGD for convolutional networks, AdamW for vision transformers."""
    lr: float = Field(0.001, gt=0.0, json_schema_extra=search(3e-4, 1e-2, log=True, requires={"name": ["sgd"]}))
    """Learning rate of the encoder at step 0, for the global batch of the run."""
    head_multiplier: float = Field(10.0, gt=0.0, json_schema_extra=choices([1, 5, 10, 20, 40, 80]))
    """Factor on `lr` for everything that is not the encoder. The papers: 10 with SGD, or 1 on Cityscapes; 40 with AdamW
    and a transformer (UniMatch V2)."""
    weight_decay: float = Field(1e-4, ge=0.0, json_schema_extra=search(1e-5, 5e-4, log=True))
    """Weight decay on all parameters."""
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """Momentum of SGD."""
    power: float = Field(0.9, gt=0.0, json_schema_extra=choices([0.9, 1.0]))
    """Exponent of the poly schedule: lr (1 - step / steps) ** power."""


class Optimizer:
    """torch's fused optimizer over two groups, with the poly schedule.

    Args:
        student: the network; `encoder` gets `lr`, the rest `lr * head_multiplier`.
        config: `optim.*`.
        steps: length of the schedule, in steps.
        warmup: steps over which the learning rate rises linearly to the schedule's.
    """

    def __init__(self, student: Segmentor | Detector, config: OptimConfig, steps: int, warmup: int = 0) -> None:
        self._config = config
        self._steps = steps
        self._warmup = warmup
        self.names: dict[Tensor, str] = {p: name for name, p in student.named_parameters() if p.requires_grad}
        encoder, other = list(student.encoder_parameters()), list(student.other_parameters())
        self.rates: dict[Tensor, float] = {
            **dict.fromkeys(encoder, 1.0),
            **dict.fromkeys(other, config.head_multiplier),
        }
        """Each parameter's learning rate, relative to the encoder's."""
        groups = [{"params": encoder, "factor": 1.0}, {"params": other, "factor": config.head_multiplier}]
        groups = [group for group in groups if group["params"]]
        self._fused = next(iter(self.names)).device.type in ("cpu", "cuda")
        self.kinds = {"sgd": ("momentum_buffer",) if config.momentum else (), "adamw": ("exp_avg", "exp_avg_sq")}[
            config.name
        ]
        """Names of the state that has a parameter's shape."""
        if config.name == "sgd":
            self.torch: torch.optim.Optimizer = torch.optim.SGD(
                groups, config.lr, config.momentum, weight_decay=config.weight_decay, fused=self._fused
            )
            self.begin(self.names)  # torch leaves a fresh buffer uninitialised when found_inf skips the very first step
        else:
            self.torch = torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay, fused=self._fused)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the encoder at a step."""
        rising = schedules.linear(step + 1, self._warmup)
        return rising * self._config.lr * schedules.poly(step, self._steps, self._config.power)

    def set_rates(self, step: int) -> None:
        """Gives each group its learning rate of a step."""
        for group in self.torch.param_groups:
            group["lr"] = self.learning_rate(step) * group["factor"]

    def begin(self, tensors: Iterable[Tensor]) -> None:
        """Drops all state, and makes that of the tensors that are optimized: the parameters, or a rank's shards."""
        self.torch.state.clear()
        for tensor in tensors:
            state = {kind: torch.zeros_like(tensor) for kind in self.kinds}
            if "exp_avg" in state:
                state["step"] = torch.zeros((), device=tensor.device if self._fused else None)
            if state:
                self.torch.state[tensor] = state

    def step(self, step: int, finite: Tensor) -> None:
        """One update with the gradients that stand in the parameters.

        Args:
            step: global step, from 0; sets the learning rate.
            finite: bool scalar on the device; False makes the update leave weights and moments as they are. No
                host wait on CUDA and none worth the name on a CPU; other devices read the flag.
        """
        self.set_rates(step)
        if self._fused:
            self.torch.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
            self.torch.step()
        elif bool(finite):
            self.torch.step()

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self.torch.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """State by `parameter name/state name`, for a checkpoint."""
        return {
            f"{name}/{key}": value
            for parameter, name in self.names.items()
            for key, value in self.torch.state[parameter].items()
            if isinstance(value, Tensor)
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` gave."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        for path, value in tensors.items():
            name, _, key = path.rpartition("/")
            parameter = parameters[name]
            if value.shape == parameter.shape:
                restored = torch.empty_like(parameter)  # in the parameter's memory format
            else:  # AdamW's counter, which only the fused form keeps on the device
                restored = torch.empty_like(value, device=parameter.device if self._fused else None)
            self.torch.state[parameter][key] = restored.copy_(value)
