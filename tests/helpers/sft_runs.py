"""Supervised fine-tuning on ranks: random examples, the gradient of a batch, and whole runs without an engine."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from grpo_mega.algorithm.likelihood import LikelihoodLoss
from grpo_mega.config.data_sections import DataConfig
from grpo_mega.config.load import resolved
from grpo_mega.config.model_sections import ModelConfig
from grpo_mega.config.policy_sections import PrecisionConfig
from grpo_mega.config.schema import CheckpointConfig, Config, ObserveConfig, RunConfig, TrainConfig
from grpo_mega.data.example_dataset import Example, ExampleDataset, ExampleSet
from grpo_mega.data.row_plan import RowShape
from grpo_mega.models.config_readers import read_spec
from grpo_mega.observe.run_folder import open_run
from grpo_mega.parallel.ranks import agreed
from grpo_mega.trainer.example_batch import build_example_batch
from grpo_mega.types import UpdateStats
from tests.helpers.recorded_rollouts import OPTIMIZER, Layout, as_array, ranks_of
from tests.helpers.update_oracle import by_checkpoint_name, load_model

ROW_TOKENS = 48


def random_examples(count: int, vocab: int, seed: int) -> list[Example]:
    """Return examples of different lengths, whose answers are one or several runs of tokens."""
    rng = random.Random(seed)
    examples = []
    for index in range(count):
        size = rng.randint(4, 23)
        mask = [0, *(int(rng.random() < 0.4) for _ in range(size - 2)), 1]
        tokens = array("i", [rng.randrange(2, vocab) for _ in range(size)])
        examples.append(Example(index, tokens, bytes(mask)))
    return examples


def sft_config(model: Path, layout: Layout, folder: Path | None = None, *, steps: int = 1, **more: Any) -> Config:
    """Return the config of a run with this layout; `more` replaces whole sections."""
    return Config(
        run=RunConfig(dir=str(folder)),
        model=ModelConfig(path=str(model)),
        data=DataConfig(train="/unused", prompts_per_step=6, max_example_tokens=24),
        parallel=layout.parallel,
        optimizer=OPTIMIZER,
        train=TrainConfig(objective="sft", steps=steps, minibatches_per_epoch=2, max_tokens_per_microbatch=ROW_TOKENS),
        precision=PrecisionConfig(dtype="fp32"),
        checkpoint=CheckpointConfig(export_hf=False),
        observe=ObserveConfig(trackers=()),
        **more,
    )


def gradient_of_examples(
    rank: int, model: Path, layout: Layout, examples: list[Example]
) -> tuple[UpdateStats, int, dict[str, np.ndarray[Any, Any]]]:
    """Return the statistics of an update of one minibatch, the number of microbatches, and on rank 0 the gradient."""
    from grpo_mega.policy.policy import MegatronPolicy

    config, ranks = sft_config(model, layout), ranks_of(rank, layout)
    policy = MegatronPolicy(config, read_spec(model), model, ranks, with_reference=False)
    train = config.train.model_copy(update={"minibatches_per_epoch": 1})
    batch = build_example_batch(
        examples, train, dp=layout.topology.dp, dp_rank=ranks.at.dp_rank, shape=RowShape.of(layout.parallel)
    )
    stats, _ = policy.backward(batch.microbatches, LikelihoodLoss())
    gradients = {name: as_array(tensor) for name, tensor in policy.full_gradients(1 << 20)}
    return stats, len(batch.microbatches), gradients if rank == 0 else {}


def cross_entropy_of_transformers(model: Path, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradient of transformers in float64: its own loss function, one example at a time.

    transformers divides the sum over an example by `num_items_in_batch`, so that the parts add up to the mean over all
    trained tokens.
    """
    oracle = load_model(model)
    num_trained, total = sum(sum(example.loss_mask) for example in examples), 0.0
    for example in examples:
        token_ids = torch.tensor(list(example.token_ids))[None]
        labels = torch.where(torch.tensor(list(example.loss_mask), dtype=torch.bool)[None], token_ids, -100)
        loss = oracle(input_ids=token_ids, labels=labels, num_items_in_batch=torch.tensor(num_trained)).loss
        loss.backward()
        total += loss.item()
    return total, by_checkpoint_name(oracle, {name: p.grad for name, p in oracle.named_parameters()})


def run_sft(rank: int, config: Config, layout: Layout, examples: list[Example]) -> dict[str, int]:
    """Run a job without an engine in `run.dir`, from its newest checkpoint; return the records of its state's bytes."""
    from grpo_mega.trainer.build_sft import building_sft

    ranks, folder = ranks_of(rank, layout), Path(str(config.model.path))
    run = agreed(
        lambda: open_run(Path(str(config.run.dir)), resolved(config), overwrite=False, train_steps=config.train.steps),
        ranks,
    )
    data = ExampleDataset((ExampleSet("examples", tuple(examples)),))
    no_stops: Any = SimpleNamespace(wanted=lambda: 0, training_starts=lambda: None)
    with building_sft(config, ranks, run, folder, data, None, no_stops) as built:
        built.run()
        return built.policy.resident_bytes()


def start_of_rl(rank: int, model: Path, checkpoint: Path, layout: Layout, rows: list[Example]) -> dict[str, Any]:
    """Return the weights of a policy that starts with `checkpoint`, and its log-probs beside its reference's."""
    from grpo_mega.policy.policy import MegatronPolicy

    config = sft_config(model, layout).model_copy(
        update={"model": ModelConfig(path=str(model), checkpoint=str(checkpoint)), "train": TrainConfig(steps=1)}
    )
    ranks = ranks_of(rank, layout)
    policy = MegatronPolicy(config, read_spec(model), model, ranks, with_reference=True)
    train = TrainConfig(steps=1, max_tokens_per_microbatch=ROW_TOKENS)
    batch = build_example_batch(
        rows, train, dp=layout.topology.dp, dp_rank=ranks.at.dp_rank, shape=RowShape.of(layout.parallel)
    )
    own = policy.log_probs(batch.microbatches)
    with policy.reference():
        ref = policy.log_probs(batch.microbatches)
    weights = {name: as_array(tensor) for name, tensor in policy.full_tensors(1 << 20)}
    return {"own": own, "ref": ref, "weights": weights}
