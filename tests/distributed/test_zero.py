"""ZeRO at every stage, on 1, 2 and 4 ranks, equals one process without it: real gloo processes, no Ray.

One process group for each number of ranks runs all its cases; each is compared with a run of one rank.
"""

from __future__ import annotations

import gc
import importlib.util
import math
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forks import FORKS, start
from makers import tiny_run
from torch import nn

from raysemi.data.loader import Stream
from raysemi.data.pool import Pool
from raysemi.engine import distributed
from raysemi.engine.checkpoint import Snapshot
from raysemi.engine.evaluate import inference
from raysemi.engine.gradients import GradientRule, GradientsConfig, SideLosses
from raysemi.engine.optim import OptimConfig, Optimizer
from raysemi.engine.strategy import Replicas
from raysemi.engine.trainer import Trainer
from raysemi.engine.zero import Shards
from raysemi.engine.zero_config import ZeroConfig
from raysemi.launch.restore import build
from raysemi.methods.base import SingleRank
from raysemi.models.encoders import Features
from raysemi.ops.photometric import PARAMETERS

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs deepspeed", allow_module_level=True)
pytestmark = pytest.mark.timeout(900)

STEPS = 3
SEEN = ["method.threshold=0.145"]
RANK = ["weighting=rank", "weighting.confidence=0.145", "weighting.memory=5", "weighting.unlabeled=true"]
WORK = {
    "supervised": ["supervised"],
    "fixmatch": ["fixmatch", *SEEN],
    "mean_teacher": ["mean_teacher"],
    "unimatch": ["unimatch", *SEEN],
    "unimatch_v2": ["unimatch_v2", *SEEN],
    "corrmatch": ["corrmatch", "method.threshold.initial=0.145"],
    "derprop": ["derprop", "method.threshold.initial=0.145"],
    "derprop-momentum": [
        "derprop", "method.threshold.initial=0.145", "method.labeler=momentum", "method.fp.weight=0",
    ],
    "u2pl": [
        "u2pl", "method.group=2", "method.cutmix=1", "method.warmup_periods=0", "method.contrast.delta_p=0.1",
        "method.representation.hidden=6", "method.representation.dim=8", "method.queue.size=150",
        "method.queue.first_size=250", "method.queue.max_new=20",
    ],
    "augseg": ["augseg", *SEEN, "method.group=2"],
    "ael": [
        "ael", *SEEN, "method.group=2", "method.paste.p=0.8", "method.paste.classes=3", "method.momentum=0.9",
        "method.cutmix.per_class=2", "method.cutmix.object_area=0.01",
    ],
    "fixmatch-rank": ["fixmatch", *SEEN, *RANK],
    "derprop-rank": ["derprop", "method.threshold.initial=0.145", *RANK],
    "fixmatch-adamw": ["fixmatch", *SEEN, "optim.name=adamw"],
    "fixmatch-clipped": ["fixmatch", *SEEN, "train.max_grad_norm=0.5"],
    "fixmatch-fixed": ["fixmatch", *SEEN, "gradients=fixed", "gradients.weights=[0.3,0.9]"],
    "fixmatch-measured": ["fixmatch", *SEEN, "gradients.measure_every=1"],
    "fixmatch-pareto": ["fixmatch", *SEEN, "gradients=pareto", "train.max_grad_norm=0.5"],
    "fixmatch-lagged": ["fixmatch", *SEEN, "gradients=pareto", "gradients.every=2", "gradients.exclusive=alpha"],
    "corrmatch-rank-pareto": [
        "corrmatch", "method.threshold.initial=0.145", *RANK, "gradients=pareto", "gradients.measure_every=1",
    ],
    # an auxiliary classifier that one side alone trains
    "u2pl-pareto": [],
}  # fmt: skip
"""Method, and settings beside those of `Run`."""
WORK["u2pl-pareto"] = [*WORK["u2pl"], "gradients=pareto", "gradients.measure_every=2"]
EACH_METHOD = [name for name in WORK if "-" not in name]


@dataclass(frozen=True)
class Case:
    """A run: what, by which strategy, and what happens in it."""

    work: str
    strategy: str
    """single, ddp, or zero0 to zero3."""
    offload: str = "none"
    parts: int = 1
    """Micro-batches of a rank's share."""
    broken: bool = False
    """The strong views of the last rank are NaN in the step before the last."""
    resumed: bool = False
    """Goes on from the checkpoint that one rank wrote after its first step."""

    @property
    def settings(self) -> list[str]:
        if not self.strategy.startswith("zero"):
            return [*WORK[self.work], f"train.strategy={self.strategy}"]
        zero = {"stage": self.strategy[-1], "offload": self.offload, "whole_below": 50, "bucket": 3000}
        return [*WORK[self.work], "train.strategy=deepspeed", *(f"train.zero.{key}={zero[key]}" for key in zero)]

    @property
    def reference(self) -> Case:
        return replace(self, strategy="single", offload="none", parts=1, resumed=False)


ON_TWO = [
    *(Case(work, "zero2") for work in EACH_METHOD),
    *(Case(work, "zero3") for work in ("fixmatch", "unimatch", "u2pl", "ael")),
    *(Case("fixmatch", f"zero{stage}") for stage in (0, 1)),
    Case("derprop-rank", "zero2"),
    Case("derprop-rank", "zero3"),
    Case("derprop-momentum", "zero3"),
    Case("fixmatch-adamw", "zero3"),
    Case("fixmatch-adamw", "zero2", offload="optimizer"),
    Case("fixmatch-clipped", "zero1"),
    Case("fixmatch-clipped", "zero3", offload="all"),
    Case("fixmatch-fixed", "zero3"),
    Case("fixmatch-measured", "zero2"),
    *(Case("fixmatch-pareto", f"zero{stage}") for stage in (0, 1, 2)),
    Case("corrmatch-rank-pareto", "zero2"),
    Case("fixmatch-pareto", "zero2", offload="optimizer"),
    Case("fixmatch-lagged", "zero2"),
    Case("u2pl-pareto", "zero2"),
    *(Case("fixmatch", f"zero{stage}", parts=2) for stage in (0, 2, 3)),
    *(Case("corrmatch", f"zero{stage}", parts=2) for stage in (2, 3)),  # whose threshold wants the whole step
    *(Case("fixmatch-pareto", f"zero{stage}", parts=2) for stage in (0, 2)),
    *(Case("fixmatch", f"zero{stage}", broken=True) for stage in (0, 1, 3)),
    *(Case("fixmatch-pareto", strategy, broken=True) for strategy in ("ddp", "zero0", "zero2")),
    Case("fixmatch-adamw", "zero2", offload="optimizer", broken=True, parts=2),
    *(Case("fixmatch-adamw", strategy, resumed=True) for strategy in ("ddp", "zero0", "zero1", "zero2", "zero3")),
]
START = Case("fixmatch-adamw", "single")
"""Of whose first step the checkpoint is that others go on from."""
ON_ONE = [Case("fixmatch-pareto", "zero2"), Case("fixmatch", "zero3"), Case("fixmatch-adamw", "zero1", resumed=True)]
ON_FOUR = [Case("corrmatch-rank-pareto", "zero2"), Case("derprop-rank", "zero3"), Case("fixmatch-pareto", "ddp")]
ON = {1: ON_ONE, 2: ON_TWO, 4: ON_FOUR}
Trace = dict[str, Any]


class Deaf(distributed.ProcessGroup):
    """Ranks that do not hear each other's counts: what a forgotten sum over ranks would look like."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value


class Run:
    """A trainer of a case, and the rank's share of each step."""

    def __init__(self, pools: Path, folder: Path, case: Case, across: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        part = 8 // across.world // case.parts if case.parts > 1 else "null"
        name = "-".join(map(str, (*astuple(case), across.rank)))
        config = tiny_run(
            pools, folder / name, *case.settings, "model.batch_norm=frozen",
            "train.batch.labeled=4", "train.batch.unlabeled=8", f"train.micro_batch={part}",
            "optim.lr=0.001", "train.steps=20",
        )  # fmt: skip
        student, learner = build(config, 7)
        self.across = across
        self.trainer = Trainer(
            student, learner, config.train, config.optim,
            across=across, device=torch.device("cpu"), period=1, seed=config.seed, gradients=config.gradients,
        )  # fmt: skip
        read = ("labeled", "unlabeled") if learner.uses_unlabeled else ("labeled",)
        stream = Stream(
            config.data, {name: Pool.open(pools / name) for name in read}, config.seed, 4, 8,
            across.rank, across.world, learner.strong_views, learner.second_view, 0, STEPS + 1,
            strong=learner.strong, given=learner.given,
        )  # fmt: skip
        self.hosts = list(stream)
        self.losses: list[list[float]] = []

    def step(self, host: Any, case: Case) -> None:
        if case.broken and self.across.rank == self.across.world - 1 and self.trainer.step == STEPS - 2:
            host.photometric_VUP[..., PARAMETERS.index("brightness")] = math.nan
        values = self.trainer.train_step(host)
        losses = torch.stack([value for name, value in values.items() if name.startswith("loss/")])
        self.losses.append((self.across.sum(losses) / self.across.world).tolist())


def traced(pools: Path, folder: Path, case: Case, across: Any, start: Any = None) -> Trace:
    """The run of a case: its losses in each step, and all it holds after the first and after the last."""
    run = Run(pools, folder, case, across)
    found: Trace = {}
    for number, host in enumerate(run.hosts[:STEPS]):
        if case.resumed and number == 0:
            run.trainer.restore(start)
            run.losses.append([])
        else:
            run.step(host, case)
        if number == 0 and case == START:
            found["first"] = held(run.trainer)
    found |= {"losses": run.losses, "held": held(run.trainer), "skipped": float(run.trainer.skipped)}
    found["measured"] = [list(values.values()) for _, values in run.trainer._samples.read()]
    if case.strategy.startswith("zero"):
        found["slipped"] = slipped(run.trainer.strategy._engine)
    if case.work == "fixmatch" and not case.broken:
        found["logits"] = seen_alone(run)
    return found


def held(trainer: Trainer) -> Snapshot:
    snapshot = trainer.snapshot()
    snapshot.tensors = {stem: {k: v.clone() for k, v in of.items()} for stem, of in snapshot.tensors.items()}
    return snapshot


def seen_alone(run: Run) -> torch.Tensor:
    """What the student says of an image, asked twice by rank 0 alone: no other rank may be needed for it."""
    trainer, images_B3HW = run.trainer, torch.rand(1, 3, 49, 49, generator=torch.Generator().manual_seed(0))
    with trainer.strategy.whole(), inference(trainer.student, trainer.device, torch.float32):
        for _ in range(1 if run.across.rank else 3):
            logits_BKHW = trainer.student(images_B3HW).logits_BKHW
    return logits_BKHW


class Sides(nn.Module):
    """A student of two weights, whose two losses have the given gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Module()
        self.student.x = nn.Parameter(torch.zeros(2))
        self.student.encoder_parameters = lambda: [self.student.x]
        self.student.other_parameters = list
        self.method = nn.Module()

    def forward(self, sides: torch.Tensor, context: Any) -> SideLosses:
        side_s, side_u = sides @ self.student.x
        return SideLosses((side_s + side_u) / 2, side_s, side_u, {})


def counterexample(number: int, across: Any, stage: int | None) -> Trace:
    """The first direction of two ranks whose own weights, or own mixes, would climb (the specification's vectors)."""
    module, device, measured = Sides(), torch.device("cpu"), {}
    optimizer = Optimizer(module.student, OptimConfig(lr=1.0, weight_decay=0.0), 1000)
    rule = GradientRule(
        GradientsConfig(name="pareto", meo=False, measure_every=1), optimizer.rates, across, measured.__setitem__
    )
    module_rule = (module, optimizer, across, device, rule)
    strategy = Replicas(*module_rule) if stage is None else Shards(*module_rule, ZeroConfig(stage=stage))
    vectors = torch.tensor([[[-1.0, 1.0], [-1.0, 0.0]], [[1.0, 0.0], [-1.0, -1.0]]])
    strategy.accumulate(vectors[number], SimpleNamespace(step=0))
    update = strategy.update(0)
    x = strategy.tensors()["student"]["x"]
    return {"x": x.clone(), "norm": update.norm, "alpha_u": measured[1]["gradients/weight_unsupervised"]}


class Tokens(nn.Module):
    """As a transformer's encoder: its parameter lies beside a layer, in a part that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.token = nn.Parameter(torch.ones(1, 1, 3))
        self.net.layer = nn.Linear(3, 1)
        nn.init.constant_(self.net.layer.weight, 0.5)
        nn.init.zeros_(self.net.layer.bias)

    def forward(self, rows_N3: torch.Tensor) -> Features:
        net: Any = self.net
        return Features((net.layer(rows_N3[None] + net.token.expand(1, len(rows_N3), -1)),))


class Beside(nn.Module):
    """A student with such an encoder, and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Module()
        self.student.encoder = Tokens()
        self.student.encoder_parameters = self.student.encoder.parameters
        self.student.other_parameters = list
        self.method = nn.Module()

    def forward(self, rows_N3: torch.Tensor, context: Any) -> SideLosses:
        loss = self.student.encoder(rows_N3).maps[0].square().mean()
        return SideLosses(loss, 2 * loss, torch.zeros(()), {})


def beside(across: Any, stage: int | None) -> dict[str, torch.Tensor]:
    """The weights of `Beside` after three steps."""
    module = Beside()
    optimizer = Optimizer(module.student, OptimConfig(lr=0.03), 1000)
    rule = GradientRule(GradientsConfig(), optimizer.rates, across)
    parts = (module, optimizer, across, torch.device("cpu"), rule)
    strategy = Replicas(*parts) if stage is None else Shards(*parts, ZeroConfig(stage=stage, whole_below=100))
    share = torch.arange(12.0).view(4, 3).chunk(across.world)[across.rank] / 12
    for step in range(3):
        strategy.accumulate(share, SimpleNamespace(step=step))
        strategy.update(step)
    return {name: value.clone() for name, value in strategy.tensors()["student"].items()}


SECTIONS = {
    "zero_config", "float16_config", "bfloat16_config", "activation_checkpointing_config", "comms_config",
    "monitor_config", "flops_profiler_config", "autotuning_config", "hybrid_engine", "pipeline",
    "data_efficiency_config", "aio_config", "datastates_config", "checkpoint_config", "compile_config",
    "timers_config", "tensor_parallel_config", "expert_parallel_config",
}  # fmt: skip
"""Parts of DeepSpeed's config: the first is compared field by field; of the others it must be known that they are off,
or that they serve only what is: models in a pipeline, checkpoints of its own, NVMe."""
KNOWN = {
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "managed_gradient_accumulation": True,
    "communication_data_type": torch.float32,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "float16_config.enabled": False,
    "bfloat16_config.enabled": False,
    "torch_autocast_enabled": False,
    "torch_autocast_dtype": None,
    "torch_autocast_lower_precision_safe_modules": None,
    "grad_accum_dtype": "fp32",
    "param_dtype": "fp32",
    "buffer_dtype": None,
    "keep_in_fp32_modules": "auto",
    "optimizer_name": None,
    "optimizer_params": None,
    "optimizer_legacy_fusion": False,
    "scheduler_name": None,
    "scheduler_params": None,
    "comms_config.comms_logger_enabled": False,
    "monitor_config.enabled": False,
    "flops_profiler_config.enabled": False,
    "autotuning_config.enabled": False,
    "hybrid_engine.enabled": False,
    "data_efficiency_enabled": False,
    "datastates_config.enabled": False,
    "compile_config.deepcompile": False,
    "tensor_parallel_config.autotp_size": 0,
    "expert_parallel_config.enabled": False,
    "timers_config.enabled": False,
    "weight_quantization_config": None,
    "use_data_before_expert_parallel_": False,
    "dataloader_drop_last": False,
    "log_level": None,
    "load_universal_checkpoint": False,
    "use_node_local_storage": False,
    "checkpoint_tag_validation_enabled": True,
    "checkpoint_tag_validation_fail": False,
    "checkpoint_parallel_write_pipeline": False,
}
OF_THE_RUN = {"global_rank", "world_size", "train_batch_size", "zero_optimization_stage", "zero_enabled"}


def slipped(engine: Any) -> list[str]:
    """What the engine's config holds that nobody chose, by path: there a default of DeepSpeed's decides."""
    config = engine._config
    names = {name for name in vars(config) if not name.startswith("_")}
    found = [*names - set(engine.config) - SECTIONS - OF_THE_RUN - {path for path in KNOWN if "." not in path}]
    for path, value in KNOWN.items():
        present: Any = config
        for name in path.split("."):
            present = getattr(present, name)
        found += [] if present == value else [f"{path}={present}"]
    sections = {"zero_optimization": config.zero_config}
    for part in ("offload_param", "offload_optimizer"):
        sections[f"zero_optimization.{part}"] = getattr(config.zero_config, part)
    for path, section in sections.items():
        given: Any = engine.config
        for name in path.split("."):
            given = given[name]
        for name, field in ({} if section is None else type(section).model_fields).items():
            old = (field.json_schema_extra or {}).get("deprecated")
            # leaf_module: classes of language models that are fetched whole
            if not old and name != "leaf_module" and name not in given and field.alias not in given:
                found.append(f"{path}.{name}")
    return found


def rank(number: int, world: int, pools: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # ZeRO 3 collects for each engine, and need not look at all that was imported
    store = f"file://{folder / f'store-{world}'}"
    if world > 1:  # else the strategy makes its own
        torch.distributed.init_process_group("gloo", store, rank=number, world_size=world)
    across = distributed.ProcessGroup() if world > 1 else SingleRank()
    start = torch.load(folder / "start.pt", weights_only=False)
    traces: Trace = {case: traced(pools, folder / str(world), case, across, start) for case in ON[world]}
    if world == 2:
        traces["deaf"] = traced(pools, folder / "deaf", Case("fixmatch", "zero2"), Deaf())
        traces["beside"] = beside(across, 3)
        traces["counterexample"] = {stage: counterexample(number, across, stage) for stage in (None, 0, 1, 2)}
    torch.save(traces, folder / f"{world}-{number}.pt")
    distributed.leave()


@pytest.fixture(scope="module")
def alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Trace]:
    """The references, and traces of all ranks by number of ranks."""
    folder = tmp_path_factory.mktemp("zero")
    wanted = {case.reference for cases in ON.values() for case in cases}
    found: dict[Any, Any] = {case: traced(scenes, folder / "alone", case, SingleRank()) for case in wanted}
    torch.save(found[START]["first"], folder / "start.pt")
    for world in ON:
        found[world] = ranks(world, scenes, folder)
    return found


def ranks(world: int, pools: Path, folder: Path) -> list[Trace]:
    start()
    started = [FORKS.Process(target=rank, args=(number, world, pools, folder)) for number in range(world)]
    for process in started:
        process.start()
    for process in started:
        process.join(600)
        assert process.exitcode == 0
    return [torch.load(folder / f"{world}-{number}.pt", weights_only=False) for number in range(world)]


def apart(one: Trace, other: Trace) -> float:
    """The largest difference of anything that the two hold; of the optimizer's state relative to its largest entry."""
    differences = [abs(a - b) for a_s, b_s in zip(one["losses"], other["losses"], strict=True)
                   for a, b in zip(a_s, b_s, strict=bool(b_s)) if not math.isnan(a)]  # fmt: skip
    ours, theirs = one["held"].tensors, other["held"].tensors
    assert ours.keys() == theirs.keys()
    for stem, tensors in ours.items():
        assert tensors.keys() == theirs[stem].keys()
        for name, value in tensors.items():
            against = theirs[stem][name]
            assert (value.shape, value.dtype) == (against.shape, against.dtype), name
            scale = max(1.0, value.abs().max().item()) if stem == "optimizer" and value.numel() else 1.0
            differences.append(((value.double() - against.double()).abs().max() / scale).item() if value.numel() else 0)
    return max(differences)


@pytest.mark.parametrize(("world", "case"), [(world, case) for world, cases in ON.items() for case in cases])
def test_shards_equal_one_process(alone, world, case):
    one = alone[case.reference]
    moved = one["held"].tensors["optimizer"]
    assert max(value.abs().max() for name, value in moved.items() if not name.endswith("/step")) > 1e-3
    assert one["skipped"] == float(case.broken)
    for trace in alone[world]:
        assert trace[case]["skipped"] == one["skipped"]
        assert trace[case]["held"].step == one["held"].step == STEPS
        assert apart(one, trace[case]) < 1e-5
        assert len(trace[case]["measured"]) == len(one["measured"])
        for measured, expected in zip(trace[case]["measured"], one["measured"], strict=True):
            assert measured == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "case", [Case("fixmatch-adamw", "zero2", offload="optimizer"), Case("fixmatch-adamw", "zero3")]
)
def test_one_process_goes_on_where_two_ranks_stopped(alone, scenes, tmp_path, case):
    after = []
    for name, trace in (("two", alone[2][0][case]), ("one", alone[case.reference])):
        run = Run(scenes, tmp_path / name, case.reference, SingleRank())
        run.trainer.restore(trace["held"])
        run.step(run.hosts[STEPS], case.reference)
        after.append({"losses": run.losses, "held": held(run.trainer)})
    assert apart(*after) < 1e-5


def test_the_comparison_fails_without_the_sum_over_ranks(alone):
    assert apart(alone[Case("fixmatch", "single")], alone[2][0]["deaf"]) > 1e-3


@pytest.mark.parametrize("stage", [None, 0, 1, 2])
def test_two_ranks_that_would_climb_by_themselves(alone, stage):
    """alpha_u = 1 and 0.4 on their own; 0.25 for the mean gradients (0, 0.5) and (-1, -0.5)."""
    for trace in alone[2]:
        found = trace["counterexample"][stage]
        assert found["alpha_u"].item() == pytest.approx(0.25, abs=1e-9)
        torch.testing.assert_close(found["x"], torch.tensor([0.25, -0.25]))  # a step of length 1 against it
        assert found["norm"].item() == pytest.approx(math.hypot(0.25, 0.25))


def test_no_default_of_deepspeed_decides(alone):
    """A new version may add a setting, or change one that nobody wrote down: then this fails, and tells which."""
    for world, cases in ON.items():
        for case in cases:
            slips = alone[world][0][case].get("slipped", [])
            asked = {"gradient_clipping=0.5"} if "train.max_grad_norm=0.5" in WORK[case.work] else set()
            assert set(slips) <= asked, case


def test_what_lies_beside_layers_is_fetched_too(alone):
    expected = beside(SingleRank(), None)
    assert (expected["encoder.net.token"] != 1).all()
    for trace in alone[2]:
        for name, value in expected.items():
            torch.testing.assert_close(trace["beside"][name], value)


def test_a_student_is_looked_at_by_each_rank_alone(alone):
    expected = alone[Case("fixmatch", "single")]["logits"]
    for stage in range(4):
        for trace in alone[2]:
            torch.testing.assert_close(
                trace[Case("fixmatch", f"zero{stage}")]["logits"], expected, rtol=1e-4, atol=1e-5
            )
