"""Builds the microbatches of this rank from the examples of a step of supervised fine-tuning.

An example is packed as a rollout is: the tokens before its first answer are the prompt, the rest is the completion, and
tokens of other roles in the completion are masked like the results of an environment. The denominator of an update is
its number of trained tokens over all ranks, which is known before the first microbatch, so loss and gradient are the
same for every layout and packing.
Asserted by tests/unit/trainer/test_example_batch.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega.algorithm.aggregate import token_mean_weights
from grpo_mega.config.schema import Config, TrainConfig
from grpo_mega.data.example_dataset import Example, ExampleDataset
from grpo_mega.data.pack import RowShape, split_minibatches
from grpo_mega.parallel.topology import Topology
from grpo_mega.trainer.batch import TrainBatch, pack_minibatches
from grpo_mega.types import Completion, Prompt, Reward, Rollout


def as_rollout(example: Example) -> Rollout:
    """Return the example in the form in which rows are packed; text, reward and sampler log-probs are empty."""
    begin = example.loss_mask.index(1)
    token_ids = tuple(example.token_ids)
    mask = tuple(map(bool, example.loss_mask[begin:]))
    completion = Completion(token_ids[begin:], (0.0,) * len(mask), "eos", 0, "", loss_mask=None if all(mask) else mask)
    return Rollout(Prompt(example.index, "", token_ids[:begin], ""), completion, Reward(None), 0)


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
    weights = [w for span in spans for w in token_mean_weights([examples[i].num_loss_tokens for i in span])]
    rows = pack_minibatches(
        [as_rollout(example) for example in examples],
        spans,
        [0.0] * len(examples),
        weights,
        max_tokens=train.max_tokens_per_microbatch,
        dp=dp,
        dp_rank=dp_rank,
        shape=shape,
    )
    return TrainBatch(rows, [0.0] * len(examples))


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
