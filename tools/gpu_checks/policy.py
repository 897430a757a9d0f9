"""Parts `bf16` and `fp8` of tools/gpu_proof.py: Megatron's step on one GPU."""

from __future__ import annotations

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
from grpo_mega.planner.plan import ResourcePlan, plan_resources
from grpo_mega.policy.inspect.module_sizes import module_counter
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.trainer.batch import TrainBatch
from grpo_mega.types import UserError
from tools.gpu_checks import subject
from tools.gpu_checks.part_job import PartJob

LEARNING_RATE = 1e-6
ALL_REDUCE_BYTES = 256 * 2**20
_BF16 = "bf16"
# Memory that PyTorch's allocator does not count.
_OUTSIDE_ALLOCATOR = ("CUDA and NCCL", "allocator", "engine asleep")


def main(job: PartJob) -> None:
    """Measure the part."""
    with tempfile.TemporaryDirectory(prefix="gpu_proof_") as work:
        folder = Path(work) / "model"
        job.result.add(parameters=subject.make_subject(job.size, folder, job.device))
        spec = checkpoint_spec(folder)
        # Modules are counted in a fake process group, which a rank of a job cannot create: plan first.
        plans = plan_configs(configs_of(job, folder), spec, job.gpu, str(folder))
        ranks = init_ranks(Topology(1), 600.0)
        measured, expected = step_of(job, *plans[_BF16], spec, folder, ranks)
        job.result.add(bf16=measured)
        job.result.put(main=f"{measured['update_seconds']:.3f} s a step, MFU {measured['mfu']:.3f}")
        check_step(job, measured)
        if job.part == "bf16":
            job.result.add(nccl=all_reduce(job))
        else:
            check_recipes(job, plans, spec, folder, ranks, expected)
        dist.destroy_process_group()


def configs_of(job: PartJob, folder: Path) -> dict[str, Config]:
    """Return the configs of a part: bf16, and for `fp8` each recipe with weights in bf16 and in FP8."""
    found = {_BF16: subject.config_of(job.size, folder)}
    if job.part == "fp8":
        for name in RECIPES:
            for params in (False, True):
                overrides = (f"precision.fp8.recipe={name}", f"precision.fp8.params={str(params).lower()}")
                found[f"{name}{' params' if params else ''}"] = subject.config_of(job.size, folder, *overrides)
    return found


def plan_configs(
    configs: dict[str, Config], spec: ModelSpec, gpu: str, where: str
) -> dict[str, tuple[Config, ResourcePlan | UserError]]:
    """Return each config with its plan, or with the planner's reason why this GPU does not support it.

    Raises:
        AssertionError: this process is already a rank of a job.
        UserError: the plan of bf16 failed.
    """
    found: dict[str, tuple[Config, ResourcePlan | UserError]] = {}
    for name, config in configs.items():
        try:
            found[name] = (
                config,
                plan_resources(config, spec, module_counter(spec), cluster_of(gpu_named(gpu), 1), where),
            )
        except UserError as error:
            if name == _BF16:
                raise
            found[name] = config, error
    return found


def step_of(
    job: PartJob, config: Config, plan: ResourcePlan | UserError, spec: ModelSpec, folder: Path, ranks: Ranks
) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the measurements of a step, and the log-probs before the first update. Frees all device memory."""
    if isinstance(plan, UserError):
        raise plan
    job.release_cached()
    before = job.memory()["used"]
    numbers, first = _step(job, config, plan, spec, folder, ranks)
    job.release_cached()
    return {**numbers, "used_before_bytes": before, "used_after_bytes": job.memory()["used"]}, first


def _step(
    job: PartJob, config: Config, plan: ResourcePlan, spec: ModelSpec, folder: Path, ranks: Ranks
) -> tuple[dict[str, Any], torch.Tensor]:
    policy = MegatronPolicy(config, spec, folder, ranks, with_reference=False)
    batch, objective = subject.batch_of(subject.random_groups(job.size, spec.vocab_size), config)
    log_probs = policy.log_probs(batch.microbatches)
    assert log_probs is not None, "one rank has every stage"
    first = torch.cat([row.float().cpu() for row in log_probs])
    rows = batch.with_log_probs(old=[row.cpu() for row in log_probs], ref=None).microbatches
    loss = objective.loss()
    seconds = job.seconds_of(lambda: policy.update(rows, loss, LEARNING_RATE))
    memory, planned = job.memory(), planned_numbers(plan)
    numbers = {
        "modules": policy.parts.config.transformer_impl,
        "update_seconds": seconds,
        **speed(plan, batch, seconds, job.gpu),
        "peak_allocated_bytes": memory["peak"],
        "peak_reserved_bytes": memory["peak_reserved"],
        "planned": planned,
        "peak_over_planned": memory["peak"] / planned["train_allocated_bytes"],
        "state_bytes": policy.state_bytes(),
        "offload": offload(job, policy),
    }
    return numbers, first


def speed(plan: ResourcePlan, batch: TrainBatch, seconds: float, gpu: str) -> dict[str, float]:
    """Return tokens per second and MFU.

    MFU counts the forward and backward operations of the model, without recomputation.
    """
    tokens = sum(len(microbatch.token_ids) for microbatch in batch.microbatches)
    flops = plan.time.model_flops * tokens / plan.time.tokens
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "model_flops": flops,
        "mfu": flops / seconds / gpu_named(gpu).bf16_flops,
    }


def planned_numbers(plan: ResourcePlan) -> dict[str, float]:
    """Return the planner's memory and seconds of the phase `train`.

    `train_allocated_bytes` excludes memory that PyTorch's allocator does not count: CUDA, NCCL, a sleeping engine, and
    the allocator's fragmentation.
    """
    items = plan.memory.ranks[0].phases["train"]
    return {
        "train_bytes": sum(items.values()),
        "train_allocated_bytes": sum(size for name, size in items.items() if name not in _OUTSIDE_ALLOCATOR),
        "predicted_train_seconds": plan.time.phases["train"],
    }


def offload(job: PartJob, policy: MegatronPolicy) -> dict[str, Any]:
    """Offload and reload: return seconds, bytes left on the device, and whether all weights are unchanged."""

    def digest() -> int:
        return sum(slice_digest(held.view, held.hf) for held in policy.source.shards())

    def round_trip() -> None:
        policy.offload("params", "grads", "optimizer")
        policy.reload("params", "grads", "optimizer")

    before, seconds = digest(), job.seconds_of(round_trip)
    policy.offload("params", "grads", "optimizer")
    job.release_cached()
    memory = job.memory()
    policy.reload("params", "grads", "optimizer")
    return {
        "there_and_back_seconds": seconds,
        "allocated_after_bytes": memory["allocated"],
        "used_after_bytes": memory["used"],
        "same_weights": digest() == before,
    }


def check_step(job: PartJob, step: dict[str, Any]) -> None:
    """Check the measurements of a step."""
    result, residue = job.result, step["offload"]["allocated_after_bytes"]
    same = step["offload"]["same_weights"]
    result.check("weights after offload and reload", same, True, passed=same, reason="storages move bit for bit")
    job.check_memory(
        "allocated bytes after offload", residue, 0.1 * max(step["peak_allocated_bytes"], 1),
        reason="what stays is rotary tables and the batch; a buffer that was not moved is larger",
    )  # fmt: skip
    fused = step["modules"] == "transformer_engine"
    ratio = step["peak_over_planned"]
    job.result.check(
        "peak over planned", ratio, [0.6, 1.15], passed=0.6 <= ratio <= 1.15 if job.on_gpu and fused else None,
        reason="a run must fit where the planner says so. The planner knows the activations of Transformer Engine on "
        "CUDA only, so the ratio of other modules is recorded and not checked",
    )  # fmt: skip


def check_recipes(
    job: PartJob,
    plans: dict[str, tuple[Config, ResourcePlan | UserError]],
    spec: ModelSpec,
    folder: Path,
    ranks: Ranks,
    expected: torch.Tensor,
) -> None:
    """Measure every recipe that this GPU supports, with weights in bf16 and in FP8.

    A failure of one recipe is recorded and does not affect the others.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, (config, plan) in plans.items():
        if config.precision.fp8 is None:
            continue
        found[key] = _recipe(job, config, plan, spec, folder, ranks, expected)
        job.result.add(recipes=found)
        status = found[key]["status"]
        if status in ("measured", "failed"):
            job.result.check(
                key, found[key].get("log_prob_difference_mean", found[key].get("why")), 0.1,
                passed=status == "measured" and found[key]["log_prob_difference_mean"] < 0.1,
                reason="nats per token to bf16; weights that are mapped wrongly differ by more than 1",
            )  # fmt: skip
    measured = [entry["log_prob_difference_mean"] for entry in found.values() if entry["status"] == "measured"]
    job.result.put(main=f"{len(measured)} of {len(found)} recipes, log-probs within {max(measured, default=0):.1e}")


def _recipe(
    job: PartJob,
    config: Config,
    plan: ResourcePlan | UserError,
    spec: ModelSpec,
    folder: Path,
    ranks: Ranks,
    expected: torch.Tensor,
) -> dict[str, Any]:
    if not job.on_gpu:
        return {"status": "not rehearsed", "why": "Transformer Engine computes on CUDA devices only"}
    assert config.precision.fp8 is not None, "called for FP8 only"
    major, minor = map(int, str(torch.version.cuda).split(".")[:2])
    unsupported = check_generation(config.precision.fp8.recipe, torch.cuda.get_device_capability(), (major, minor))
    if unsupported:
        return {"status": "not on this GPU", "why": str(unsupported)}
    try:
        numbers, log_probs = step_of(job, config, plan, spec, folder, ranks)
    except Exception as error:  # a failure of any kind must not affect the other recipes
        return {"status": "failed", "why": f"{type(error).__name__}: {error}"[:2000]}
    difference = (log_probs - expected[: len(log_probs)]).abs()
    return {
        "status": "measured",
        **numbers,
        "log_prob_difference_mean": float(difference.mean()),
        "log_prob_difference_max": float(difference.max()),
    }


def all_reduce(job: PartJob) -> dict[str, float]:
    """Measure an all-reduce of one rank: it shows that NCCL works, not how fast links are."""
    values = torch.ones(ALL_REDUCE_BYTES // 2 if job.on_gpu else 1024, dtype=torch.bfloat16, device=job.device)
    dist.all_reduce(values)
    return {"all_reduce_seconds": job.seconds_of(lambda: dist.all_reduce(values)), "bytes": values.nbytes}
