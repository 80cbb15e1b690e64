"""The network passes of a train step: recorded in a real step, and run again with a trivial loss, which is its floor.

A pass is one call of the encoder, the decoder or an extra head: so many images, so large, in train or eval mode, with
so many backward passes through it. The floor makes the same calls with the same networks, lets a gradient that is
already there (that of the outputs' means) run backward as often as the step did, and does the same optimizer step and
teacher update. What a step costs above it are views, targets, losses, mixing and whatever else the method computes.

Axes: B images, H x W pixels, h x w cells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from raysemi.engine.compiled import as_written
from raysemi.engine.trainer import Trainer
from raysemi.models.decoders import Keep
from raysemi.models.encoders import Features
from raysemi.models.segmentor import Prediction, Segmentor


@dataclass(frozen=True)
class Like:
    """What a tensor needs in order to cost a pass as much as the recorded one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    gradient: bool
    """Whether the backward pass goes on into it."""

    @staticmethod
    def of(tensor: Tensor) -> Like:
        """As a given tensor."""
        last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        return Like(tuple(tensor.shape), tensor.dtype, last, tensor.requires_grad)

    def make(self, device: torch.device) -> Tensor:
        """Numbers in [0, 1)."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        made = torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=layout)
        return made.uniform_().requires_grad_(self.gradient)


@dataclass(frozen=True)
class Pass:
    """One call of a part of a network."""

    network: str
    """student or teacher."""
    part: str
    """encoder, decoder, or the name of an extra head."""
    inputs: tuple[Any, ...]
    """encoder: images. decoder: maps. head: arguments, and those by name. A `Like` stands for each tensor."""
    size: tuple[int, int] | None
    """decoder: height and width of the logits."""
    training: bool
    backwards: tuple[int, ...]
    """How many backward passes entered each of its outputs."""
    perturbed: int
    """decoder: images whose features are not as an encoder gave them (dropped channels)."""

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the tensors that it reads, images first."""
        return [like.shape for like in _leaves(self.inputs) if isinstance(like, Like)]

    @property
    def images(self) -> int:
        """B."""
        return self.shapes[0][0]

    @property
    def mode(self) -> str:
        """Of its BatchNorms: train or eval."""
        return "train" if self.training else "eval"

    @property
    def num_backwards(self) -> int:
        """Backward passes through it; 0 = it is computed without gradient."""
        return max(self.backwards, default=0)

    def run(self, network: Segmentor, inputs: tuple[Any, ...]) -> list[Tensor]:
        """The same call with other tensors; its outputs, in the order of `backwards`."""
        if self.part == "encoder":
            return _distinct(network.encode(inputs[0]))
        if self.part == "decoder":
            assert self.size is not None
            return _distinct(network.decode(Features(inputs), self.size))
        positional, named = inputs
        return _distinct(network.heads[self.part](*positional, **named))

    def module(self, network: Segmentor) -> nn.Module:
        """What is called."""
        if self.part in ("encoder", "decoder"):
            return network.get_submodule(self.part)
        return network.heads[self.part]

    def as_json(self) -> dict[str, Any]:
        """For people and programs."""
        return {
            "network": self.network,
            "part": self.part,
            "images": self.images,
            "shapes": [list(shape) for shape in self.shapes],
            "mode": self.mode,
            "backwards": self.num_backwards,
            "perturbed": self.perturbed,
        }


def networks(trainer: Trainer) -> dict[str, Segmentor]:
    """The networks that a step may call, by name."""
    teacher = {} if trainer.average is None else {"teacher": trainer.average.model}
    return {"student": trainer.student, **teacher}


def record(trainer: Trainer, work: Callable[[], object]) -> list[Pass]:
    """The passes of the trainer's networks that some work makes, in their order.

    Args:
        trainer: whose networks are listened to.
        work: such as a train step.
    """
    recorder = _Recorder()
    with as_written(), recorder.listening(networks(trainer)):
        work()
    return [
        replace(call, backwards=tuple(counts)) for call, counts in zip(recorder.calls, recorder.counts, strict=True)
    ]


class Floor:
    """The passes of a step and nothing else around them: a call is one step.

    Args:
        trainer: its networks, optimizer and averaged copy are used, and changed, as a step would.
        passes: of `record`.
    """

    def __init__(self, trainer: Trainer, passes: list[Pass]) -> None:
        self._trainer = trainer
        made = functools.partial(_mapped, of=lambda like: like.make(trainer.device), kind=Like)
        self._work = [(one, made(one.inputs)) for one in passes]
        self._num_backwards = max((one.num_backwards for one in passes), default=0)
        self._gradients: dict[int, Tensor] = {}
        self._finite = torch.ones((), dtype=torch.bool, device=trainer.device)

    def __call__(self) -> None:
        """One floor step: passes, backward passes, optimizer, averaged copy."""
        trainer = self._trainer
        named = networks(trainer)
        modes = {name: network.training for name, network in named.items()}
        outputs: list[Tensor] = []
        mixed = trainer.precision != torch.float32
        with torch.autocast(trainer.device.type, trainer.precision, enabled=mixed):
            for one, inputs in self._work:
                network = named[one.network]
                if one.module(network).training != one.training:
                    network.train(one.training)
                with torch.set_grad_enabled(one.num_backwards > 0):
                    outputs += one.run(network, inputs)
        counts = [count for one, _ in self._work for count in one.backwards]
        # made once, in the outputs' layout: mean() itself would send back a gradient without one, which slows kernels
        self._gradients = self._gradients or {
            place: torch.full_like(output, 1.0 / output.numel())
            for place, (output, count) in enumerate(zip(outputs, counts, strict=True))
            if count > 0
        }
        for number in range(self._num_backwards):
            taken = [place for place, count in enumerate(counts) if count > number]
            torch.autograd.backward(
                [outputs[place] for place in taken],
                [self._gradients[place] for place in taken],
                retain_graph=number + 1 < self._num_backwards,
            )
        del outputs
        for _, inputs in self._work:
            for tensor in _leaves(inputs):
                if isinstance(tensor, Tensor):
                    tensor.grad = None
        for name, network in named.items():
            network.train(modes[name])
        trainer.optimizer.step(trainer.step, self._finite)
        trainer.optimizer.zero_grad()
        if trainer.average is not None:
            trainer.average.after_step(trainer.student, trainer.step, self._finite)


class _Recorder:
    def __init__(self) -> None:
        self.calls: list[Pass] = []
        self.counts: list[list[int]] = []
        self._seen: dict[str, list[Tensor]] = {}

    @contextmanager
    def listening(self, named: dict[str, Segmentor]) -> Iterator[None]:
        """Every call of these networks' parts is recorded."""
        hooks = []
        for name, network in named.items():
            self._seen[name] = []
            # on the instance, above the class's own
            vars(network).update(
                encode=functools.partial(self._encode, name, network),
                decode=functools.partial(self._decode, name, network),
            )
            for title, head in network.heads.items():
                hook = functools.partial(self._head, name, title)
                hooks.append(head.register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for network in named.values():
                del vars(network)["encode"], vars(network)["decode"]
            for handle in hooks:
                handle.remove()
            self._seen.clear()

    def _encode(self, name: str, network: Segmentor, images_B3HW: Tensor) -> Features:
        features = Segmentor.encode(network, images_B3HW)
        self._seen[name].append(features.high_BDhw.detach())
        self._add(name, "encoder", (images_B3HW,), network.encoder)
        return self._counted(features)

    def _decode(
        self, name: str, network: Segmentor, features: Features, size: Any, keep: Keep | None = None
    ) -> Prediction:
        prediction = Segmentor.decode(network, features, size, keep)
        own = sum(self._is_encoders(name, row_Dhw) for row_Dhw in features.high_BDhw.detach())
        perturbed = len(features.high_BDhw) - own
        self._add(name, "decoder", features.maps, network.decoder, (int(size[0]), int(size[1])), perturbed)
        return self._counted(prediction)

    def _head(
        self, name: str, title: str, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        self._add(name, title, (args, kwargs), head)
        return self._counted(output)

    def _is_encoders(self, name: str, row_Dhw: Tensor) -> bool:
        return any(
            row_Dhw.shape == map_BDhw.shape[1:] and bool((map_BDhw == row_Dhw).flatten(1).all(dim=1).any())
            for map_BDhw in self._seen[name]
        )

    def _add(
        self,
        name: str,
        part: str,
        inputs: tuple[Any, ...],
        module: nn.Module,
        size: tuple[int, int] | None = None,
        perturbed: int = 0,
    ) -> None:
        likes = _mapped(inputs, of=Like.of, kind=Tensor)
        self.calls.append(Pass(name, part, likes, size, module.training, (), perturbed))

    def _counted(self, output: Any) -> Any:
        """The output with its tensors behind aliases, which a gradient enters only from outside of the pass."""
        aliases: dict[int, Tensor] = {}
        counts: list[int] = []
        for place, tensor in enumerate(_distinct(output)):
            counts.append(0)
            aliases[id(tensor)] = alias = tensor.view_as(tensor)
            if alias.requires_grad:
                alias.register_hook(functools.partial(_count, counts, place))
        self.counts.append(counts)
        return _mapped(output, of=lambda tensor: aliases.get(id(tensor), tensor), kind=Tensor)


def _count(counts: list[int], place: int, _: Tensor) -> None:
    counts[place] += 1


def _mapped(value: Any, of: Callable[[Any], Any], kind: type) -> Any:
    """The same nest with every leaf of a kind replaced."""
    if isinstance(value, kind):
        return of(value)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(item, of, kind) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, of, kind) for key, item in value.items()}
    if isinstance(value, Features | Prediction):
        return replace(value, **{name: _mapped(item, of, kind) for name, item in vars(value).items()})
    return value


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | Features | Prediction):
        value = tuple((value if isinstance(value, dict) else vars(value)).values())
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _distinct(output: Any) -> list[Tensor]:
    """Tensors that a pass has made, each once; of a prediction without the features that it was made of."""
    if isinstance(output, Prediction):
        output = output.logits_BKHW, output.penultimate_BDhw, output.joined_BDhw
    found = {id(leaf): leaf for leaf in _leaves(output) if isinstance(leaf, Tensor)}
    return list(found.values())
