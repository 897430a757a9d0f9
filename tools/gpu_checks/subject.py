"""Shared by the parts of tools/gpu_proof.py: a random model, its config, a batch, and the conditions of a measurement.

Everything that measures raises without CUDA, so that no number of a CPU is taken for a GPU's.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from grpo_mega.config.load import load_config
from grpo_mega.config.schema import Config
from grpo_mega.data.pack import RowShape
from grpo_mega.rollout.sampler import SampledGroups
from grpo_mega.trainer.batch import TrainBatch, build_batch
from grpo_mega.trainer.objective import Objective
from grpo_mega.types import Completion, Prompt, Reward, Rollout
from tools.step_sides.model_folder import Architecture, make_model

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPT_TOKENS, COMPLETION_TOKENS = 64, 448
NUM_PROMPTS, GROUP_SIZE = 8, 4
WARM_UP, REPEATS = 3, 7
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "vllm", "sglang", "transformers", "nvidia-nccl-cu13")
SHAPES = {
    "small": Architecture(num_layers=8, hidden_size=1024, ffn_size=3072, num_heads=16, num_kv_heads=8, head_dim=64,
                          vocab_size=8192, max_positions=1024),
    "1b": Architecture(num_layers=28, hidden_size=2048, ffn_size=6144, num_heads=16, num_kv_heads=8, head_dim=128,
                       vocab_size=20000, max_positions=1024),
}  # fmt: skip


@dataclass(frozen=True)
class PartJob:
    """The arguments of one part: its name, the size of the model, the GPU as the planner names it, the result file."""

    part: str
    size: str
    gpu: str
    answer: Path


def job_of(argv: list[str]) -> PartJob:
    """Return the job of the command line that tools/gpu_proof.py writes."""
    part, size, gpu, answer = argv
    return PartJob(part, size, gpu, Path(answer))


def require_cuda() -> None:
    """Raise RuntimeError if there is no GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: tools/gpu_proof.py measures on GPUs only")


def conditions() -> dict[str, Any]:
    """Return the conditions of every measurement: machine, versions, command, date."""
    require_cuda()
    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "memory_bytes": device.total_memory,
        "capability": f"{device.major}.{device.minor}",
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(job: PartJob, numbers: dict[str, Any]) -> None:
    """Write the result file of a part."""
    answer = {"part": job.part, "status": "measured", "size": job.size, "conditions": conditions(), "numbers": numbers}
    job.answer.write_text(json.dumps(answer, indent=2) + "\n", encoding="utf-8")


def make_subject(job: PartJob, folder: Path) -> int:
    """Write the random model to `folder` and return its number of parameters."""
    return make_model(folder, SHAPES[job.size], mean_length=None)


def config_of(folder: Path, *overrides: str) -> Config:
    """Return the config of a training step with the batch of `batch_of`."""
    return load_config(
        REPOSITORY / "configs" / "quickstart.yaml",
        [
            "model.base=null",
            f"model.path={folder}",
            "run.world_size=1",
            "precision.dtype=bf16",
            "algorithm.kl_coef=0",
            f"sampling.group_size={GROUP_SIZE}",
            f"sampling.max_tokens={COMPLETION_TOKENS}",
            f"data.prompts_per_step={NUM_PROMPTS}",
            f"data.max_prompt_tokens={PROMPT_TOKENS}",
            "data.eval=null",
            "train.minibatches_per_epoch=1",
            f"train.max_tokens_per_microbatch={8 * (PROMPT_TOKENS + COMPLETION_TOKENS)}",
            *overrides,
        ],
    )


def prompts_of(vocab_size: int) -> list[Prompt]:
    """Return prompts of random tokens, the same in every call."""
    rng = random.Random(0)
    return [
        Prompt(i, "", tuple(rng.randrange(2, vocab_size) for _ in range(PROMPT_TOKENS)), "") for i in range(NUM_PROMPTS)
    ]


def random_groups(vocab_size: int) -> SampledGroups:
    """Return rollouts of full length with random tokens and rewards, the same in every call."""
    rng = random.Random(1)
    rollouts = []
    for prompt in prompts_of(vocab_size):
        for _ in range(GROUP_SIZE):
            tokens = tuple(rng.randrange(2, vocab_size) for _ in range(COMPLETION_TOKENS))
            completion = Completion(tokens, (-1.0,) * len(tokens), "length", 0, "")
            rollouts.append(Rollout(prompt, completion, Reward(rng.random()), 0))
    return SampledGroups(rollouts, GROUP_SIZE)


def batch_of(groups: SampledGroups, config: Config) -> tuple[TrainBatch, Objective]:
    """Return all groups as one minibatch, and the objective that built it."""
    objective = Objective(config.algorithm, config.sampling.max_tokens)
    values = [rollout.reward.value for rollout in groups.rollouts]
    shape = RowShape.of(config.parallel, config.precision)
    return build_batch(groups, values, config.train, objective, dp=1, dp_rank=0, shape=shape), objective


def seconds_of(action: Callable[[], object]) -> float:
    """Return the median seconds of REPEATS synchronized calls, after WARM_UP calls."""
    require_cuda()
    times = []
    for i in range(WARM_UP + REPEATS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        action()
        torch.cuda.synchronize()
        if i >= WARM_UP:
            times.append(time.perf_counter() - begin)
    return median(times)


def used_bytes() -> int:
    """Return the bytes in use on the device by all users: allocator, CUDA context, NCCL, other processes."""
    free, total = torch.cuda.mem_get_info()
    return total - free
