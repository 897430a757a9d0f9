"""Shared by the parts of tools/gpu_proof.py that build a policy: a random model, its config and a batch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo_mega.config.load import load_config
from grpo_mega.config.model_sections import ArchitectureConfig
from grpo_mega.config.schema import Config
from grpo_mega.data.row_plan import RowShape
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.batch import TrainBatch, build_batch
from grpo_mega.trainer.objective import Objective
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.types import Completion, Prompt, Reward, Rollout
from tools.gpu_checks.random_models import dense_fields, write_random_model

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPES = {
    "tiny": ArchitectureConfig(num_layers=2, hidden_size=64, ffn_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
                               max_positions=1024),
    "small": ArchitectureConfig(num_layers=8, hidden_size=1024, ffn_size=3072, num_heads=16, num_kv_heads=8,
                                head_dim=64, max_positions=1024),
    "1b": ArchitectureConfig(num_layers=28, hidden_size=2048, ffn_size=6144, num_heads=16, num_kv_heads=8,
                             head_dim=128, max_positions=1024),
}  # fmt: skip
VOCAB = {"tiny": 128, "small": 8192, "1b": 20000}


@dataclass(frozen=True)
class BatchSize:
    """Rollouts of one step; each has the full length. A row holds `rollouts_per_row` of them."""

    num_prompts: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int
    rollouts_per_row: int

    @property
    def tokens(self) -> int:
        """Tokens of the whole batch."""
        return self.num_prompts * self.group_size * self.rollout_tokens

    @property
    def rollout_tokens(self) -> int:
        """Tokens of one rollout."""
        return self.prompt_tokens + self.completion_tokens


BATCHES = {"tiny": BatchSize(2, 2, 16, 48, 2), "small": BatchSize(8, 4, 64, 448, 8), "1b": BatchSize(8, 4, 64, 448, 8)}


def make_subject(size: str, folder: Path, device: torch.device) -> int:
    """Write a random model to `folder` and return its number of parameters."""
    return write_random_model(folder, dense_fields(SHAPES[size], VOCAB[size]), device)


def config_of(size: str, folder: Path, *overrides: str) -> Config:
    """Return the config of a training step with the batch of `batch_of`."""
    batch = BATCHES[size]
    return load_config(
        REPOSITORY / "configs" / "quickstart.yaml",
        [
            "model.base=null",
            f"model.path={folder}",
            "run.world_size=1",
            "precision.dtype=bf16",
            "algorithm.kl_coef=0",
            f"sampling.group_size={batch.group_size}",
            f"sampling.max_tokens={batch.completion_tokens}",
            f"data.prompts_per_step={batch.num_prompts}",
            f"data.max_prompt_tokens={batch.prompt_tokens}",
            "data.eval=null",
            "train.minibatches_per_epoch=1",
            f"train.max_tokens_per_microbatch={batch.rollouts_per_row * batch.rollout_tokens}",
            *overrides,
        ],
    )


def prompts_of(size: str, vocab_size: int) -> list[Prompt]:
    """Return prompts of random tokens, the same in every call."""
    rng, batch = random.Random(0), BATCHES[size]
    return [
        Prompt(i, "", tuple(rng.randrange(2, vocab_size) for _ in range(batch.prompt_tokens)), "")
        for i in range(batch.num_prompts)
    ]


def random_groups(size: str, vocab_size: int) -> SampledGroups:
    """Return rollouts of full length with random tokens and rewards, the same in every call."""
    rng, batch = random.Random(1), BATCHES[size]
    rollouts = []
    for prompt in prompts_of(size, vocab_size):
        for _ in range(batch.group_size):
            tokens = tuple(rng.randrange(2, vocab_size) for _ in range(batch.completion_tokens))
            completion = Completion(tokens, (-1.0,) * len(tokens), "length", 0, "")
            rollouts.append(Rollout(prompt, completion, Reward(rng.random()), 0))
    return SampledGroups.of(rollouts, batch.group_size)


def batch_of(groups: SampledGroups, config: Config) -> tuple[TrainBatch, Objective]:
    """Return all groups as one minibatch, and the objective that built it."""
    objective = Objective(config.algorithm, config.sampling.max_tokens)
    shape, topology = RowShape.of(config.parallel, config.precision), Topology(1)
    transfer = RolloutTransfer(ArrayCollectives(Ranks(topology, topology.coordinates(0), torch.device("cpu"))))
    batch = build_batch(groups, groups.table.reward, config.train, objective, transfer=transfer, shape=shape)
    return batch, objective
