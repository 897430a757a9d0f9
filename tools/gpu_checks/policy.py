"""Parts `bf16` and `fp8` of tools/gpu_proof.py: Megatron's step on one GPU."""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from grpo_mega.config.fp8_rules import RECIPES, check_generation
from grpo_mega.config.schema import Config
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.models.digest import slice_digest
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.ranks import Ranks, init_ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.hardware import cluster_of, gpu_named
from grpo_mega.planner.plan import plan_resources
from grpo_mega.policy.inspect.module_sizes import module_counter
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.trainer.batch import TrainBatch
from tools.gpu_checks import subject

LEARNING_RATE = 1e-6
ALL_REDUCE_BYTES = 256 * 2**20


def main() -> None:
    """Measure the part and write its result file."""
    job = subject.job_of(sys.argv[1:])
    subject.require_cuda()
    with tempfile.TemporaryDirectory(prefix="gpu_proof_") as work:
        folder = Path(work) / "model"
        parameters = subject.make_subject(job, folder)
        config, spec = subject.config_of(folder), checkpoint_spec(folder)
        ranks = init_ranks(Topology.of(config, 1), config.guard.timeout_seconds)
        measured, expected = step_of(config, spec, folder, ranks, job.gpu)
        numbers: dict[str, Any] = {"parameters": parameters, "bf16": measured}
        if job.part == "bf16":
            numbers["nccl"] = nccl()
        else:
            numbers["recipes"] = recipes(folder, spec, ranks, job.gpu, expected)
        subject.write(job, numbers)
        dist.destroy_process_group()


def step_of(
    config: Config, spec: ModelSpec, folder: Path, ranks: Ranks, gpu: str
) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the measurements of a step, and the log-probs before the first update. Frees all device memory."""
    torch.cuda.reset_peak_memory_stats()
    before = subject.used_bytes()
    numbers, first = _step(config, spec, folder, ranks, gpu)
    gc.collect()
    torch.cuda.empty_cache()
    return {**numbers, "used_before_bytes": before}, first


def _step(config: Config, spec: ModelSpec, folder: Path, ranks: Ranks, gpu: str) -> tuple[dict[str, Any], torch.Tensor]:
    policy = MegatronPolicy(config, spec, folder, ranks, with_reference=False)
    batch, objective = subject.batch_of(subject.random_groups(spec.vocab_size), config)
    log_probs = policy.log_probs(batch.microbatches)
    assert log_probs is not None, "one rank has every stage"
    first = torch.cat([row.float().cpu() for row in log_probs])
    rows = batch.with_log_probs(old=[row.cpu() for row in log_probs], ref=None).microbatches
    loss = objective.loss()
    seconds = subject.seconds_of(lambda: policy.update(rows, loss, LEARNING_RATE))
    peak, plan = torch.cuda.max_memory_allocated(), planned(config, spec, folder, gpu)
    numbers = {
        "update_seconds": seconds,
        **speed(config, spec, batch, seconds, gpu),
        "peak_allocated_bytes": peak,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "planned": plan,
        "peak_over_planned": peak / plan["train_allocated_bytes"],
        "state_bytes": policy.state_bytes(),
        "offload": offload(policy),
    }
    return numbers, first


def speed(config: Config, spec: ModelSpec, batch: TrainBatch, seconds: float, gpu: str) -> dict[str, float]:
    """Return tokens per second and MFU.

    MFU counts the forward and backward operations of the model, without recomputation.
    """
    plan = plan_resources(config, spec, module_counter(spec), cluster_of(gpu_named(gpu), 1), "model")
    tokens = sum(len(microbatch.token_ids) for microbatch in batch.microbatches)
    flops = plan.time.model_flops * tokens / plan.time.tokens
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "model_flops": flops,
        "mfu": flops / seconds / gpu_named(gpu).bf16_flops,
    }


def planned(config: Config, spec: ModelSpec, folder: Path, gpu: str) -> dict[str, float]:
    """Return the planner's memory and seconds of the phase `train`.

    `train_allocated_bytes` excludes memory that PyTorch's allocator does not count: CUDA, NCCL, a sleeping engine, and
    the allocator's fragmentation.
    """
    plan = plan_resources(config, spec, module_counter(spec), cluster_of(gpu_named(gpu), 1), str(folder))
    items = plan.memory.ranks[0].phases["train"]
    outside = ("CUDA and NCCL", "allocator", "engine asleep")
    return {
        "train_bytes": sum(items.values()),
        "train_allocated_bytes": sum(size for name, size in items.items() if name not in outside),
        "predicted_train_seconds": plan.time.phases["train"],
    }


def offload(policy: MegatronPolicy) -> dict[str, Any]:
    """Offload and reload: return seconds, bytes left on the device, and whether all weights are unchanged."""

    def digest() -> int:
        return sum(slice_digest(held.view, held.hf) for held in policy.source.shards())

    def round_trip() -> None:
        policy.offload("params", "grads", "optimizer")
        policy.reload("params", "grads", "optimizer")

    before, seconds = digest(), subject.seconds_of(round_trip)
    policy.offload("params", "grads", "optimizer")
    torch.cuda.empty_cache()
    left, used = torch.cuda.memory_allocated(), subject.used_bytes()
    policy.reload("params", "grads", "optimizer")
    return {
        "there_and_back_seconds": seconds,
        "allocated_after_bytes": left,
        "used_after_bytes": used,
        "same_weights": digest() == before,
    }


def recipes(folder: Path, spec: ModelSpec, ranks: Ranks, gpu: str, expected: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Measure every recipe that this GPU supports, with weights in bf16 and in FP8.

    A failure of one recipe is recorded and does not affect the others.
    """
    capability = torch.cuda.get_device_capability()
    major, minor = map(int, str(torch.version.cuda).split(".")[:2])
    found: dict[str, dict[str, Any]] = {}
    for name in RECIPES:
        unsupported = check_generation(name, capability, (major, minor))
        for params in (False, True):
            key = f"{name}{' params' if params else ''}"
            if unsupported:
                found[key] = {"status": "not on this GPU", "why": str(unsupported)}
                continue
            overrides = (f"precision.fp8.recipe={name}", f"precision.fp8.params={str(params).lower()}")
            try:
                numbers, log_probs = step_of(subject.config_of(folder, *overrides), spec, folder, ranks, gpu)
            except Exception as error:  # a failure of any kind must not affect the other recipes
                found[key] = {"status": "failed", "why": f"{type(error).__name__}: {error}"[:2000]}
                continue
            difference = (log_probs - expected[: len(log_probs)]).abs()
            found[key] = {
                "status": "measured",
                **numbers,
                "log_prob_difference_mean": float(difference.mean()),
                "log_prob_difference_max": float(difference.max()),
            }
    return found


def nccl() -> dict[str, float]:
    """Measure an all-reduce of one rank: it shows that NCCL works, not how fast links are."""
    values = torch.ones(ALL_REDUCE_BYTES // 2, dtype=torch.bfloat16, device="cuda")
    dist.all_reduce(values)
    return {"all_reduce_seconds": subject.seconds_of(lambda: dist.all_reduce(values)), "bytes": ALL_REDUCE_BYTES}
