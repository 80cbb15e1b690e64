"""The whole config of a run: the components' own configs composed, and the rules that join two of them.

Everything below this file sees its own part alone. A rule names the dotted path that a person would edit.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from raysemi.base import Config
from raysemi.config_shares import Spread, learner_of, next_multiple, pastes_own
from raysemi.data.loader import DataConfig
from raysemi.data.mixture import shares
from raysemi.engine.evaluate import EvalConfig
from raysemi.engine.gradients import GradientsConfig
from raysemi.engine.optim import OptimConfig
from raysemi.engine.trackers import LogConfig
from raysemi.engine.trainer import TrainConfig
from raysemi.engine.zero import missing
from raysemi.engine.zero_config import ZeroConfig
from raysemi.errors import ConfigError
from raysemi.methods import METHODS
from raysemi.methods.weighting import NoWeightingConfig, WeightingConfig
from raysemi.models.encoders import PATCH
from raysemi.models.segmentor import ModelConfig


class RayConfig(Config):
    """`ray.*`: the workers. It stands here because the config is read where Ray need not be installed."""

    num_workers: int | tuple[int, int] = 1
    """Ranks; divides both batches. [min, max]: as many as the cluster has room for, of the numbers between them that
    divide both batches; the run goes on with another number when workers leave or there is room for more."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU a worker; auto: when there are enough."""
    cpus_per_worker: int | Literal["auto"] = "auto"
    """CPU cores, and so threads, a worker; auto: an equal share of this machine, 1 on a cluster with an address."""
    storage: str | None = None
    """Folder or URL for Ray Train's own small files, seen by all nodes; None = a temporary folder. Checkpoints lie in
    the run folder."""
    max_failures: int = Field(3, ge=0)
    """Times in a row that dead workers are started again, from the last checkpoint, without the run getting further
    than before; nodes that the cloud takes back do not count. Mistakes in settings or data end the run at once."""
    start_timeout_s: float = Field(600.0, gt=0.0)
    """Seconds in which the workers must find room on the cluster, which may have to grow first."""
    resize_every_s: float = Field(60.0, gt=0.0)
    """With [min, max]: seconds between two looks for room for more workers."""
    address: str | None = None
    """Cluster to join (`auto`, `ray://host:10001`); None = the one of RAY_ADDRESS, else a new one on this machine."""

    @field_validator("num_workers")
    @classmethod
    def _ordered(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        least = value if isinstance(value, int) else value[0]
        if least < 1:
            raise ValueError(f"must be at least 1; got {least}.")
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"must be [min, max] with min at most max; got {list(value)}. Change their order.")
        return value

    @property
    def min_workers(self) -> int:
        """Fewest ranks."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most ranks."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


if TYPE_CHECKING:
    AnyMethodConfig = Any
else:
    _CONFIGS = tuple(config for config, _ in METHODS.values())
    AnyMethodConfig = Annotated[Union[_CONFIGS], Field(discriminator="name")]  # noqa: UP007 - made from the registry

AnyRayConfig = Annotated[
    Annotated[RayConfig, Tag("cluster")] | Annotated[Literal["none"], Tag("none")],
    Discriminator(lambda value: "none" if isinstance(value, str) else "cluster"),
]


class RunConfig(Config):
    """A run, complete: what `config.yaml` in the run folder holds."""

    run: str = Field(min_length=1)
    """Run folder: a local path or a URL; the same command with the same folder goes on where it stopped."""
    seed: int = Field(0, ge=0)
    """Seed of every draw: weights, order, views, dropout."""
    data: DataConfig = DataConfig()
    """Pools and views."""
    model: ModelConfig = ModelConfig()
    """The network."""
    method: AnyMethodConfig
    """The method, chosen by `method.name`."""
    weighting: WeightingConfig = NoWeightingConfig()
    """Weights of pseudo-labeled pixels."""
    gradients: GradientsConfig = GradientsConfig()
    """The gradient rule."""
    train: TrainConfig = TrainConfig()
    """Steps, batches, strategy."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""
    log: LogConfig = LogConfig()
    """Trackers that a run tells its numbers."""
    ray: AnyRayConfig = RayConfig()
    """Ray's workers; `none`: this process, or the ranks that torchrun started."""

    @model_validator(mode="after")
    def _rules_across_components(self) -> RunConfig:
        faults = broken_rules({name: getattr(self, name) for name in type(self).model_fields})
        if faults:
            raise ConfigError(faults)
        return self


def broken_rules(parts: Mapping[str, Any]) -> list[str]:
    """Faults of the rules that join components.

    Args:
        parts: the sections that are valid by themselves, by name; a rule about a missing one is passed over.
    """
    faults: list[str] = []
    for rule in _RULES:
        needed = list(inspect.signature(rule).parameters)
        if all(name in parts for name in needed):
            faults.extend(rule(**{name: parts[name] for name in needed}))
    for name, part in parts.items():
        faults.extend(_secrets(name, part.model_dump() if isinstance(part, BaseModel) else part))
    return faults


def spread_of(config: RunConfig, world: int, *, gpu: bool = False) -> Spread:
    """A run's batch over a number of ranks; `gpu` as in `check_world`."""
    return Spread(config.train, config.method, config.data, config.model, world, gpu)


def check_world(config: RunConfig, world: int, *, gpu: bool = False) -> None:
    """Refuses a number of ranks that the run cannot be spread over.

    Args:
        config: the run.
        world: ranks.
        gpu: each has a GPU; then BatchNorm is one over several ranks.

    Raises:
        ConfigError: a batch cannot be divided or leaves too few images, micro-batches would change the steps, the
            strategy is for one rank, or it needs DeepSpeed, which is not installed.
    """
    faults = list(spread_of(config, world, gpu=gpu).faults())
    if config.train.strategy == "deepspeed" and (fault := missing()):
        faults.append(fault)
    if faults:
        raise ConfigError(faults)


def fitting_workers(config: RunConfig, settings: RayConfig, *, gpu: bool = False) -> list[int]:
    """Numbers of workers, of those that `ray.num_workers` allows, that the run can be spread over; ascending."""
    parts = config.train, config.method, config.data, config.model
    allowed = range(settings.min_workers, settings.max_workers + 1)
    return [world for world in allowed if not list(Spread(*parts, world, gpu).faults())]


def _crop_holds_whole_patches(data: DataConfig, model: ModelConfig) -> Iterator[str]:
    if model.name == "dpt" and data.crop % PATCH:
        yield (
            f"data.crop must be a multiple of {PATCH}, the patches of {model.encoder}; got {data.crop}. "
            f"Set it to {next_multiple(data.crop, PATCH)} (UniMatch V2: 518, Cityscapes 798)."
        )


def _window_holds_whole_patches(eval: EvalConfig, model: ModelConfig) -> Iterator[str]:
    if model.name == "dpt" and eval.window is not None and eval.window % PATCH:
        yield (
            f"eval.window must be a multiple of {PATCH}, the patches of {model.encoder}; got {eval.window}. "
            f"Set it to {next_multiple(eval.window, PATCH)} (UniMatch V2 on Cityscapes: 798)."
        )


def _stop_within_steps(train: TrainConfig) -> Iterator[str]:
    if train.stop_at is not None and train.stop_at > train.steps:
        yield (
            f"train.stop_at must be at most train.steps ({train.steps}); got {train.stop_at}. "
            "Lower it, or raise train.steps for a longer run."
        )


def _pools_are_named(data: DataConfig, method: Any) -> Iterator[str]:
    for name in ("labeled", "val"):
        if not getattr(data, name):
            yield (
                f"data.{name} must name a pool; got nothing. Make pools with `raysemi pack ... --out DIR` and add "
                "data.pools=DIR (short for its three pools)."
            )
    learner = learner_of(method)
    if learner.uses_unlabeled and data.unlabeled is None and not learner.unlabeled_optional:
        yield (
            f"data.unlabeled must name a pool for method {method.name}; got nothing. "
            "Add data.unlabeled=FOLDER, or set method=supervised."
        )


def _teacher_has_statistics(method: Any) -> Iterator[str]:
    average = getattr(method, "average", None)
    if average is not None and average.buffers == "own" and not learner_of(method).trains_teacher_statistics:
        yield (
            f"method.average.buffers must be averaged for method {method.name}, which makes no pass that would move "
            "the copy's own statistics; got own. Remove it."
        )


def _may_be_weighted(weighting: Any, method: Any, model: ModelConfig, data: DataConfig) -> Iterator[str]:
    if weighting.name == "none":
        return
    if weighting.k > model.penultimate_channels:
        what = f"the width of dpt with {model.encoder}" if model.name == "dpt" else "model.channels"
        way = "take a larger encoder" if model.name == "dpt" else "raise model.channels"
        yield (
            f"weighting.k must be at most {what}, {model.penultimate_channels}; got {weighting.k}. Lower it, or {way}."
        )
    if not learner_of(method).weighted:
        yield (
            f"weighting.name must be none, since method {method.name} has no pseudo-labels to weigh; got "
            f"{weighting.name}. Set weighting=none, or take a method that has some."
        )
    elif data.unlabeled is None and learner_of(method).unlabeled_optional:
        yield (
            f"weighting.name must be none in a run without unlabeled images, which has no pseudo-labels; got "
            f"{weighting.name}. Set weighting=none, or data.unlabeled."
        )
    if getattr(getattr(method, "compat", None), "partner_eval", False):
        yield (
            f"method.compat.partner_eval must be false with weighting {weighting.name}, whose weights belong to the "
            "labels of the pass in train mode; got true. Set it to false, or weighting=none."
        )
    if not pastes_own(method):
        yield (
            f"method.cutmix.partner must be pair with weighting {weighting.name}, since what another view pastes has "
            f"no weights; got {method.cutmix.partner}. Set it to pair, or weighting=none."
        )


def _auxiliary_has_a_map(method: Any, model: ModelConfig) -> Iterator[str]:
    weight = getattr(method, "auxiliary_weight", 0.0)
    if weight > 0.0 and model.name == "dpt":
        yield (
            f"method.auxiliary_weight must be 0 with {model.encoder}, which has no map before its last; got {weight}. "
            "Set it to 0, or take a convolutional network."
        )


def _correlation_has_a_map(method: Any, model: ModelConfig) -> Iterator[str]:
    corr = getattr(method, "corr", None)
    if corr is not None and corr.source == "aspp" and model.name == "dpt":
        yield (
            "method.corr.from must be encoder, fusion or classifier with dpt, which has no atrous pyramid; got aspp. "
            "Change it, or take a convolutional network."
        )


def _mixture_fits_batch(data: DataConfig, train: TrainConfig) -> Iterator[str]:
    if data.unlabeled_weights is not None:
        try:
            shares(data.unlabeled_weights, train.batch.unlabeled)
        except ConfigError as error:
            yield from error.faults


def _two_sides(gradients: GradientsConfig, method: Any, data: DataConfig) -> Iterator[str]:
    learner = learner_of(method)
    if not learner.uses_unlabeled:
        why, way = f"method {method.name}", "another method"
    elif data.unlabeled is None and learner.unlabeled_optional:
        why, way = "a run without unlabeled images", "data.unlabeled"
    else:
        return
    one = f"since all terms of {why} are supervised and there is no second gradient"
    if gradients.name != "uniform":
        yield f"gradients.name must be uniform, {one}; got {gradients.name}. Set gradients=uniform, or {way}."
    if gradients.measure_every:
        yield f"gradients.measure_every must be 0, {one}; got {gradients.measure_every}. Set it to 0, or {way}."


def _zero_fits(train: TrainConfig, gradients: GradientsConfig) -> Iterator[str]:
    if train.strategy != "deepspeed":
        if train.zero != ZeroConfig():
            yield (
                f"train.strategy must be deepspeed with settings of train.zero; got {train.strategy}. Set it to "
                "deepspeed, or remove train.zero."
            )
        return
    if train.zero.stage < 3:
        return
    both = "since its weights are gone when the second side's gradient asks for them"
    if gradients.name == "pareto":
        yield (
            f"gradients.name must be uniform or fixed with train.zero.stage=3, {both}; got pareto. Set "
            "train.zero.stage=2, which spreads everything but the weights themselves."
        )
    if gradients.measure_every:
        yield (
            f"gradients.measure_every must be 0 with train.zero.stage=3, {both}; got {gradients.measure_every}. Set it "
            "to 0, or train.zero.stage to 2."
        )
    if train.compile:
        yield (
            "train.compile must be false with train.zero.stage=3, whose layers fetch their weights while they run; got "
            "true. Set it to false, or train.zero.stage to 2."
        )


def _ranks_fit(
    train: TrainConfig, method: Any, data: DataConfig, model: ModelConfig, ray: RayConfig | Literal["none"]
) -> Iterator[str]:
    if not isinstance(ray, RayConfig):
        return
    gpu = ray.use_gpu is not False  # `auto` is known when the workers are; here it may still mean GPUs
    if isinstance(ray.num_workers, int):
        yield from Spread(train, method, data, model, ray.num_workers, gpu).faults()
        return
    found = {
        world: next(iter(Spread(train, method, data, model, world, gpu).faults()), None)
        for world in range(ray.min_workers, ray.max_workers + 1)
    }
    wrong = next((fault for world in ray.num_workers if (fault := found[world]) is not None), None)
    if wrong is not None:
        fitting = ", ".join(str(world) for world, fault in found.items() if fault is None) or "none"
        yield (
            f"ray.num_workers must begin and end with a number of workers that fits the batches; got "
            f"{list(ray.num_workers)}, of which fit: {fitting}. Change it, or the batches: {wrong}"
        )


_SECRET = re.compile(r"://[^/@\s]*:[^/@\s]+@|[?&](secret_key|access_key|password|token|session_token)=", re.IGNORECASE)


def _secrets(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _secrets(f"{path}.{key}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _secrets(path, inner)
    elif isinstance(value, str) and _SECRET.search(value):
        yield (
            f"{path} must not hold a password or key, because config.yaml is written out; got a URL with one. "
            "Give credentials by environment variables or the cloud's own configuration."
        )


_RULES = (
    *(_stop_within_steps, _pools_are_named, _teacher_has_statistics, _may_be_weighted, _two_sides, _ranks_fit),
    _zero_fits,
    *(_crop_holds_whole_patches, _window_holds_whole_patches, _auxiliary_has_a_map, _correlation_has_a_map),
    _mixture_fits_batch,
)
