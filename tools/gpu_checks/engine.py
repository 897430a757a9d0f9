"""Parts `engine`, `engine_fp8` and `engine_sglang` of tools/gpu_proof.py: an engine beside the policy on one GPU.

The engine is vLLM with weights in bf16, vLLM with FP8 values and scales, or SGLang with weights in bf16.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from grpo_mega.config.schema import Config
from grpo_mega.engines.factory import make_engine
from grpo_mega.engines.vllm.engine import VllmEngine
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.interfaces import Engine
from grpo_mega.parallel.ranks import init_ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.build import make_sync
from grpo_mega.trainer.phases import Phases
from grpo_mega.types import Reward, Rollout, SamplingRequest
from grpo_mega.weight_sync.fp8_report import fp8_report
from grpo_mega.weight_sync.sync import WeightSync
from tools.gpu_checks import subject
from tools.gpu_checks.part_job import PartJob
from tools.step_sides.model_folder import Architecture, make_model

CYCLES = 5  # of sleep and wake
_OVERRIDES = {"engine_fp8": ["engine.fp8=scales_fp32"], "engine_sglang": ["engine.kind=sglang"]}


def main(job: PartJob) -> None:
    """Measure the part."""
    with tempfile.TemporaryDirectory(prefix="gpu_proof_") as work:
        folder = Path(work) / "model"
        shape = subject.SHAPES[job.size].model_dump(exclude={"tie_embeddings"})
        architecture = Architecture(**shape, vocab_size=subject.VOCAB[job.size])
        parameters = make_model(folder, architecture, mean_length=None)  # completions of full length
        overrides = _OVERRIDES.get(job.part, [])
        config, spec = subject.config_of(job.size, folder, *overrides), checkpoint_spec(folder)
        ranks = init_ranks(Topology.of(config, 1), config.guard.timeout_seconds)
        policy = MegatronPolicy(config, spec, folder, ranks, with_reference=False)
        phases = Phases(policy)
        engine = phases.start_engine(lambda: make_engine(config, folder))
        try:
            with phases.reading_weights():
                sync = make_sync(config, policy, engine, ranks)
            job.result.add(parameters=parameters, sync=measure_sync(job, sync, phases))
            mismatch = measure_mismatch(job.size, engine, policy, phases, config, spec.vocab_size)
            job.result.add(mismatch=mismatch)
            job.result.add(sleep=measure_sleep(job, engine, sync, phases))
            if config.engine.fp8 is not None:
                with phases.reading_weights():
                    report = fp8_report(policy.source, None, power_of_two=False)
                job.result.add(fp8_error=max(each["relative"] for each in report.values()))
        finally:
            engine.close()
        job.result.put(main=f"KL of engine and policy {mismatch['kl']:.2e}")
        dist.destroy_process_group()


def measure_sync(job: PartJob, sync: WeightSync, phases: Phases) -> dict[str, float]:
    """Measure a push with and without verification, and a device-to-device copy of as many bytes."""
    version = 0

    def push(verify: bool) -> int:
        nonlocal version
        version += 1
        return sync.push(version, verify=verify).written_bytes

    with phases.syncing():
        num_bytes = push(True)
        plain, verified = job.seconds_of(lambda: push(False)), job.seconds_of(lambda: push(True))
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = job.seconds_of(lambda: target.copy_(source))
    return {
        "bytes": num_bytes,
        "seconds": plain,
        "seconds_with_digests": verified,
        "gb_per_second": num_bytes / plain / 1e9,
        "copy_gb_per_second": num_bytes / copied / 1e9,
        "ratio": copied / plain,
    }


def measure_mismatch(
    size: str, engine: Engine, policy: MegatronPolicy, phases: Phases, config: Config, vocab_size: int
) -> dict[str, float]:
    """Return statistics of old - sampler log-probs, in nats, over tokens that the engine sampled."""
    shape = subject.BATCHES[size]
    request = SamplingRequest(group_size=shape.group_size, temperature=1.0, max_tokens=shape.completion_tokens, seed=1)
    prompts = subject.prompts_of(size, vocab_size)
    with phases.sampling():
        groups = engine.generate(prompts, request)
    rng = random.Random(2)
    rollouts = [
        Rollout(prompt, completion, Reward(rng.random()), 0)
        for prompt, group in zip(prompts, groups, strict=True)
        for completion in group
    ]
    batch, _ = subject.batch_of(SampledGroups.of(rollouts, shape.group_size), config)
    with phases.training():
        old = policy.log_probs(batch.microbatches)
    assert old is not None, "one rank has every stage"
    difference = torch.cat(
        [
            (row.float().cpu() - microbatch.sampler_log_probs)[microbatch.loss_mask]
            for row, microbatch in zip(old, batch.microbatches, strict=True)
        ]
    )
    # the metric `train/mismatch_kl` of a run
    kl = float((difference.exp() - 1 - difference).mean())
    return {
        "tokens": len(difference),
        "mean_abs": float(difference.abs().mean()),
        "max_abs": float(difference.abs().max()),
        "kl": kl,
    }


def measure_sleep(job: PartJob, engine: Engine, sync: WeightSync, phases: Phases) -> dict[str, Any]:
    """Return the device memory in use in each phase of several steps; growth between steps is a leak."""
    asleep, awake = [], []
    for cycle in range(CYCLES):
        with phases.training():
            torch.cuda.empty_cache()
            asleep.append(job.memory()["used"])
        with phases.syncing():
            sync.push(1000 + cycle, verify=True)
        with phases.sampling():
            awake.append(job.memory()["used"])
    found = {
        "used_in_training_bytes": asleep,
        "used_in_sampling_bytes": awake,
        "growth_bytes": asleep[-1] - asleep[1],
    }
    return found | ({"kv_cache_bytes": engine.kv_cache_bytes} if isinstance(engine, VllmEngine) else {})
