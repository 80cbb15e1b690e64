"""`train.zero.*`, and what DeepSpeed is told: every value that could matter, so that no default of its decides.

DeepSpeed's own defaults clip gradients at norm 1, refuse SGD, refuse torch's optimizers on offloaded state and let the
buckets' size follow the version. tests/distributed/test_zero.py compares what its engine ends up with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from raysemi.base import Config
from raysemi.engine.footprint import Footprint


class ZeroConfig(Config):
    """`train.zero.*`: what `train.strategy=deepspeed` spreads over ranks. The mathematics is that of ddp."""

    stage: Literal[0, 1, 2, 3] = 2
    """0: nothing, as ddp. 1: the optimizer's state. 2: gradients too. 3: weights too, gathered layer by layer when a
    pass needs them; no Pareto gradients."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """optimizer: its state and its step on the CPU (stages 1 to 3). all: the weights too, while unused (stage 3)."""
    bucket: int = Field(20_000_000, ge=1000, json_schema_extra={"unit": "entries"})
    """Entries of gradients that travel together, 4 bytes each; less memory, more messages with less."""
    whole_below: int = Field(100_000, ge=0, json_schema_extra={"unit": "entries"})
    """Stage 3: parameters with fewer entries stay whole on every rank, which saves many small messages."""

    @model_validator(mode="after")
    def _check(self) -> ZeroConfig:
        if self.offload == "optimizer" and self.stage == 0:
            raise ValueError(
                "offload must be none with stage 0, which keeps the optimizer's state where the weights are; got "
                "optimizer. Set stage to 1, 2 or 3"
            )
        if self.offload == "all" and self.stage != 3:
            raise ValueError(
                f"offload must be none or optimizer below stage 3, since the other stages keep the weights whole; got "
                f"all with stage {self.stage}. Set it to optimizer, or stage to 3"
            )
        return self


def spread(found: Footprint, config: ZeroConfig, world: int, *, pareto: bool, cuda: bool) -> Footprint:
    """What a step takes of each rank when DeepSpeed spreads it.

    From stage 1 on the optimizer has weights of its own, in shards, beside those of the network.

    Args:
        found: of a rank that has all.
        config: `train.zero.*`.
        world: ranks.
        pareto: the rule holds both sides' gradients, whole on every rank.
        cuda: what is offloaded lies elsewhere than the rest.
    """
    stage, away = config.stage, config.offload if cuda else "none"
    if stage == 0:
        return found
    one = found.gradients // (2 if pareto else 1)
    bucket = 4 * config.bucket
    own = 0 if away != "none" else found.parameters // world
    weights = found.parameters if stage < 3 else min(2 * bucket, found.parameters)
    weights += found.parameters // world if stage == 3 and away != "all" else 0
    return replace(
        found,
        parameters=weights + own,
        gradients=(found.gradients if pareto else 0) + (one if stage == 1 else one // world) + min(bucket, one),
        optimizer=0 if away != "none" else found.optimizer // world,
        held=True,
    )


_ON_CPU = {"device": "cpu", "nvme_path": None, "pin_memory": True}
_OFFLOADED_WEIGHTS = _ON_CPU | {"buffer_count": 5, "buffer_size": 100_000_000, "max_in_cpu": 1_000_000_000}
_OFFLOADED_STATE = _ON_CPU | {
    "buffer_count": 4,
    "pipeline_read": False,
    "pipeline_write": False,
    "fast_init": False,
    "ratio": 1.0,
    "super_offload": False,
    "cpuadam_cores_perc": 0.8,
}


def deepspeed_settings(config: ZeroConfig, max_grad_norm: float) -> dict[str, Any]:
    """The config that a DeepSpeed engine is made from.

    Args:
        config: `train.zero.*`.
        max_grad_norm: largest norm of the gradient; 0 = no clipping. Stage 0 is clipped by us.
    """
    bucket = config.bucket + config.bucket % 2  # DeepSpeed wants an even number
    return {
        # Batches are ours: to DeepSpeed a step is one part, and `accumulate(last=...)` says which is the last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": True,
        "gradient_clipping": max_grad_norm if config.stage else 0.0,
        # Weights, gradients and moments are fp32 wherever they lie; bf16 is torch's autocast in the passes, as in ddp.
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32", "param_dtype": "fp32", "buffer_dtype": None},
        "communication_data_type": "fp32",
        "seq_parallel_communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "disable_allgather": False,
        # The optimizer is ours.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "use_multi_rank_bucket_allreduce": True,
            "allgather_partitions": True,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,
            "compute_grad_norm": True,
            "load_from_fp32_weights": True,
            "elastic_checkpoint": False,
            "offload_param": _OFFLOADED_WEIGHTS if config.offload == "all" else None,
            "offload_optimizer": _OFFLOADED_STATE if config.offload != "none" else None,
            "zenflow": None,
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": config.whole_below,
            "stage3_model_persistence_threshold": 2**62,
            "stage3_max_live_parameters": 2 * bucket,
            "stage3_max_reuse_distance": bucket,
            "stage3_gather_16bit_weights_on_model_save": False,
            "stage3_module_granularity_threshold": 0,
            "stage3_use_all_reduce_for_fetch_params": False,
            "stage3_allgather_sequential": False,
            "ignore_unused_parameters": True,
            "legacy_stage1": False,
            "round_robin_gradients": False,
            "parameter_alignment": False,
            "zero_hpz_partition_size": 1,
            "zero_quantized_weights": False,
            "zero_quantized_nontrainable_weights": False,
            "zero_quantized_gradients": False,
            "memory_efficient_linear": False,  # it would replace torch's own function, for everybody
            "pipeline_loading_checkpoint": False,
            "override_module_apply": False,
            "log_trace_cache_warnings": False,
            "enable_sanity_checks": False,
            "save_muon_momentum_buffer_in_memory": False,
        },
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "disable_python_gc": False,
    }
