"""One rank of `grpo-mega compare layouts`: computes the gradient of the batch in the layout of its job file.

The first job (one rank) also writes the old and reference log-probs of the batch for all later jobs. They are the
model's own log-probs plus noise, so that ratios differ from 1 and the KL divergence is not 0.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from grpo_mega.algorithm.base import OwnTokens
from grpo_mega.algorithm.likelihood import LikelihoodLoss
from grpo_mega.config.schema import Config
from grpo_mega.data.row_plan import RowShape
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.observe.rollout_files.reader import read_rows
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.batch import TrainBatch, build_batch, kl_penalties
from grpo_mega.trainer.example_batch import build_example_batch
from grpo_mega.trainer.objective import Objective
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.types import Completion, Microbatch, Prompt, Reward, Rollout, UpdateStats, UserError

NUM_PROMPTS, GROUP_SIZE = 4, 4  # of a generated batch
NOISE = 0.1  # standard deviation of the noise on log-probs, in nats
BUCKET_BYTES = 256 * 2**20


def random_groups(config: Config, folder: Path, vocab_size: int) -> SampledGroups:
    """Return the config's first prompts with answers of random tokens and random rewards."""
    from grpo_mega.data.chat import load_tokenizer
    from grpo_mega.data.dataset import load_train

    rng = random.Random(config.run.seed)
    dataset = load_train(config.data, load_tokenizer(str(folder)))
    rollouts = []
    for prompt in dataset.prompts[:NUM_PROMPTS]:
        for _ in range(GROUP_SIZE):
            tokens = tuple(rng.randrange(vocab_size) for _ in range(rng.randint(1, config.sampling.max_tokens)))
            completion = Completion(tokens, (-1.0,) * len(tokens), "length", 0, "")
            rollouts.append(Rollout(prompt, completion, Reward(rng.random()), 0))
    return SampledGroups.of(rollouts, GROUP_SIZE)


def read_rollouts(path: Path) -> SampledGroups:
    """Read the rollouts of a step, `rollouts/step_NNNNNN` of a run.

    Raises:
        UserError: a part is damaged or missing, or the groups differ in size.
    """
    groups: dict[int, list[Rollout]] = {}
    for row in read_rows(path):
        mask = None if row["loss_mask"] is None else tuple(row["loss_mask"])
        prompt = Prompt(row["group"], row["prompt"], tuple(row["prompt_ids"]), row["answer"])
        log_probs = tuple(row["sampler_log_probs"])
        completion = Completion(tuple(row["completion_ids"]), log_probs, "length", 0, "", loss_mask=mask)
        groups.setdefault(row["group"], []).append(Rollout(prompt, completion, Reward(row["reward"]), 0))
    sizes = {len(group) for group in groups.values()}
    if len(sizes) != 1:
        raise UserError(
            f"{path}: all prompts must have the same number of rollouts, and they have {sorted(sizes)}",
            remedy="name the folder of one whole step",
        )
    return SampledGroups.of([r for group in groups.values() for r in group], sizes.pop())


def packed_values(values: list[list[float]], batch: TrainBatch) -> list[Tensor]:
    """Return values per rollout as one tensor [T] per microbatch."""

    def row(microbatch: Microbatch) -> Tensor:
        found = torch.zeros(len(microbatch.token_ids))
        found[microbatch.loss_mask] = torch.tensor([v for i in microbatch.rollout_ids for v in values[i]])
        return found

    return [row(microbatch) for microbatch in batch.microbatches]


def add_noise(values: dict[int, list[float]], seed: int) -> list[list[float]]:
    """Return the log-probs of each rollout plus normal noise with standard deviation NOISE."""
    generator = torch.Generator().manual_seed(seed)
    noisy = [torch.tensor(values[i]) + NOISE * torch.randn(len(values[i]), generator=generator) for i in sorted(values)]
    return [row.tolist() for row in noisy]


def batch_of_rank(groups: SampledGroups, config: Config, objective: Objective, transfer: RolloutTransfer) -> TrainBatch:
    """Return this rank's part of one minibatch with all groups, which every rank has. Collective."""
    train = config.train.model_copy(update={"minibatches_per_epoch": 1})
    shape = RowShape.of(config.parallel, config.precision)
    groups = groups.held_by(is_first=transfer.ranks.is_first)
    return build_batch(groups, groups.table.reward, train, objective, transfer=transfer, shape=shape)


def measure(job: dict[str, Any], config: Config, ranks: Ranks) -> None:
    """Compute the gradient of the batch. Rank 0 writes loss and gradient norm, and the gradients to their own file."""
    if config.is_sft:
        measure_examples(job, config, ranks)
        return
    folder = Path(job["model"])
    spec = checkpoint_spec(folder)
    groups = read_rollouts(Path(job["rollouts"])) if job["rollouts"] else random_groups(config, folder, spec.vocab_size)
    policy = MegatronPolicy(config, spec, folder, ranks, with_reference=False)
    objective = Objective(config.algorithm, config.sampling.max_tokens)
    transfer = RolloutTransfer(ArrayCollectives(ranks))
    batch = batch_of_rank(groups, config, objective, transfer)
    record = Path(job["work"]) / "log_probs.json"
    if not record.exists():
        log_probs = policy.log_probs(batch.microbatches)
        assert log_probs is not None, "the first job has one rank"
        values = batch.completion_values(log_probs).by_rollout()
        record.write_text(json.dumps({"old": add_noise(values, 1), "ref": add_noise(values, 2)}))
    known = json.loads(record.read_text())
    batch = batch.with_log_probs(old=packed_values(known["old"], batch), ref=packed_values(known["ref"], batch))
    if objective.kl_in_reward:
        penalties, totals = kl_penalties(objective, batch, transfer)
        own = OwnTokens(batch.positions, penalties, gather=transfer.collectives.gather_losses)
        batch = batch.with_credit(objective.credit(groups, batch.rewards, own, totals))
    stats, _ = policy.backward(batch.microbatches, objective.loss())
    write_gradient(job, policy, stats, ranks)


def measure_examples(job: dict[str, Any], config: Config, ranks: Ranks) -> None:
    """Compute the gradient of the first examples of a config with `train.objective=sft`, and write it."""
    from grpo_mega.data.chat import load_tokenizer
    from grpo_mega.data.example_dataset import load_examples

    folder, topology = Path(job["model"]), ranks.topology
    dataset = load_examples(config.data, load_tokenizer(str(folder)))
    policy = MegatronPolicy(config, checkpoint_spec(folder), folder, ranks, with_reference=False)
    batch = build_example_batch(
        [example for part in dataset.sets for example in part.examples][: NUM_PROMPTS * GROUP_SIZE],
        config.train.model_copy(update={"minibatches_per_epoch": 1}),
        dp=topology.dp,
        dp_rank=ranks.at.dp_rank,
        shape=RowShape.of(config.parallel, config.precision),
    )
    stats, _ = policy.backward(batch.microbatches, LikelihoodLoss())
    write_gradient(job, policy, stats, ranks)


def write_gradient(job: dict[str, Any], policy: MegatronPolicy, stats: UpdateStats, ranks: Ranks) -> None:
    """Write loss and gradient norm, and the gradients to their own file, on rank 0. Collective."""
    gradients = {name: gradient.clone() for name, gradient in policy.full_gradients(BUCKET_BYTES) if ranks.is_first}
    if ranks.is_first:
        save_file(gradients, job["gradients"])
        Path(job["gradients"]).with_suffix(".json").write_text(json.dumps(list(gradients)))
        Path(job["answer"]).write_text(json.dumps({"loss": stats.sums["loss"], "grad_norm": stats.grad_norm}))
