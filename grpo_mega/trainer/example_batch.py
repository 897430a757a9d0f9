"""Builds the microbatches of this rank from the examples of a step of supervised fine-tuning.

An example is packed as a rollout is: the tokens before its first answer are the prompt, the rest is the completion, and
tokens of other roles in the completion are masked like the results of an environment. The denominator of an update is
its number of trained tokens over all ranks, which is known before the first microbatch, so loss and gradient are the
same for every layout and packing.
Asserted by tests/unit/trainer/test_example_batch.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo_mega.algorithm.aggregate import token_mean_weights
from grpo_mega.config.schema import Config, TrainConfig
from grpo_mega.data.example_dataset import Example, ExampleDataset
from grpo_mega.data.rollout_tokens import NOT_SAMPLED, RolloutTokens, offsets_of
from grpo_mega.data.row_plan import RowShape, plan_step, split_minibatches
from grpo_mega.parallel.topology import Topology
from grpo_mega.trainer.batch import TrainBatch, rows_of_plan


def example_tokens(examples: Sequence[Example], ids: Sequence[int]) -> RolloutTokens:
    """Return some examples in the form in which rows are packed; the sampler's log-probs are 0.

    Args:
        examples: of the step.
        ids: positions in `examples`, ascending.
    """
    chosen = [examples[i] for i in ids]
    lengths = np.array([len(example.token_ids) for example in chosen], dtype=np.int64)
    columns = [np.asarray(example.token_ids, dtype=np.int32) for example in chosen]
    masks = [np.frombuffer(example.loss_mask, dtype=np.bool_) for example in chosen]
    total = int(lengths.sum())
    return RolloutTokens(
        np.array(ids, dtype=np.int64),
        offsets_of(lengths),
        np.array([mask.argmax() for mask in masks], dtype=np.int64),
        np.concatenate([np.zeros(0, np.int32), *columns]),
        np.zeros(total, np.float32),
        np.concatenate([np.zeros(0, np.bool_), *masks]),
        np.full(total, NOT_SAMPLED, np.int32),
    )


def build_example_batch(
    examples: Sequence[Example], train: TrainConfig, *, dp: int, dp_rank: int, shape: RowShape
) -> TrainBatch:
    """Build this rank's rows. The weight of every trained token is 1 / (trained tokens of its update).

    Args:
        examples: all examples of the step; the same on every rank.
        train: number of minibatches and token budget of a row.
        dp: number of data-parallel ranks.
        dp_rank: data-parallel rank of this rank.
        shape: multiples that the layout requires of row and segment lengths.

    Raises:
        UserError: an example is longer than a row.
    """
    spans = split_minibatches(len(examples), train.minibatches_per_epoch)
    weights = np.concatenate([token_mean_weights([examples[i].num_loss_tokens for i in span]) for span in spans])
    lengths = np.array([len(example.token_ids) for example in examples], dtype=np.int32)
    plan = plan_step(lengths, spans, max_tokens=train.max_tokens_per_microbatch, dp=dp, shape=shape)
    tokens = example_tokens(examples, np.flatnonzero(plan.trainer == dp_rank).tolist())
    zeros = tokens.on_loss_tokens(tokens.sampler_log_probs)
    rows = rows_of_plan(plan, dp_rank, tokens, zeros, weights, segment_multiple=shape.segment_multiple)
    unscored = np.full(len(examples), np.nan)
    return TrainBatch(rows, plan, zeros, unscored, np.ones(len(examples), np.bool_))


def explain_examples(config: Config, topology: Topology, examples: ExampleDataset) -> str:
    """Describe batch sizes, epochs and the denominator of a step in text, for the start of a run."""
    per_step, train = config.data.prompts_per_step, config.train
    sizes = " or ".join(
        str(n) for n in sorted({len(s) for s in split_minibatches(per_step, train.minibatches_per_epoch)})
    )
    trained = sum(e.num_loss_tokens for part in examples.sets for e in part.examples)
    tokens = sum(len(e.token_ids) for part in examples.sets for e in part.examples)
    return "\n".join(
        (
            f"supervised fine-tuning on {len(examples)} examples with {tokens} tokens, {trained} of them trained; "
            f"{train.steps} steps of {per_step} examples are {train.steps * per_step / len(examples):.2f} epochs",
            f"an update: {sizes} examples over {topology.dp} data-parallel rank(s), in rows of at most "
            f"{train.max_tokens_per_microbatch} tokens",
            "its loss: mean over all trained tokens of the update, the same for every layout",
        )
    )
