"""Scalars of all rollouts of a step as columns of length R, equal on every rank.

It has everything that must be known of the rollouts of other ranks: lengths, rewards, who sampled them. It is about
sixty bytes per rollout, eight more per reward term, and has nothing per token. Rows `group * G` to
`(group + 1) * G - 1` are a group.
Asserted by tests/unit/data/test_rollout_table.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from grpo_mega.data.rollout_tokens import offsets_of, ragged_index
from grpo_mega.types import Prompt, Rollout, StopReason

STOP_REASONS: tuple[StopReason, ...] = get_args(StopReason)
"""`RolloutTable.stop_reason` is an index into it."""

SumOverRanks = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Function that adds an array of one shape over all ranks; collective."""


@dataclass(frozen=True)
class RolloutTable:
    """Columns of R rollouts. Each is an array of length R unless stated otherwise.

    Attributes:
        group_size: G, rollouts per prompt; R is a multiple of it.
        component_names: reward terms in the order of the config, C names.
        prompt_index: row of the prompt in the run's data sets.
        data_sets: [P] name of the data set of each group's prompt.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens of the completion, with those of environments.
        loss_tokens: tokens that the policy sampled.
        reward: NaN for a rollout that could not be scored.
        components: [R, C] value of each reward term before its weight; NaN where it does not apply or failed.
        has_failed: True if a reward term or the environment failed.
        stop_reason: index into STOP_REASONS.
        num_turns: answers of the policy.
        policy_version: number of updates behind the weights that sampled the last answer.
        replica: engine replica that sampled it.
        prompt_shard: prompt shard that sampled it; the first rank of the shard has its tokens and text.
        has_experts: True if the rollout has a routing record.
        has_steps: True if a process reward scored steps, also if it found none.
        step_offsets: [R + 1] rows of `step_ends` and `step_values`.
        step_ends: [S] position in the completion of the token that ends the step.
        step_values: [S] weighted value of the step.
    """

    group_size: int
    component_names: tuple[str, ...]
    prompt_index: NDArray[np.int64]
    data_sets: NDArray[np.str_]
    prompt_tokens: NDArray[np.int32]
    completion_tokens: NDArray[np.int32]
    loss_tokens: NDArray[np.int32]
    reward: NDArray[np.float64]
    components: NDArray[np.float64]
    has_failed: NDArray[np.bool_]
    stop_reason: NDArray[np.int8]
    num_turns: NDArray[np.int32]
    policy_version: NDArray[np.int32]
    replica: NDArray[np.int32]
    prompt_shard: NDArray[np.int32]
    has_experts: NDArray[np.bool_]
    has_steps: NDArray[np.bool_]
    step_offsets: NDArray[np.int64]
    step_ends: NDArray[np.int64]
    step_values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def num_groups(self) -> int:
        return len(self) // self.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(column.nbytes for column in vars(self).values() if isinstance(column, np.ndarray))

    @property
    def num_tokens(self) -> NDArray[np.int32]:
        """Tokens of prompt and completion, [R]."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def is_scored(self) -> NDArray[np.bool_]:
        """True for rollouts with a reward, [R]."""
        return ~np.isnan(self.reward)

    @property
    def is_truncated(self) -> NDArray[np.bool_]:
        """True for rollouts that reached the token limit, [R]."""
        return np.asarray(self.stop_reason == STOP_REASONS.index("length"))

    def steps_of(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the end tokens and the values of a rollout's steps."""
        part = slice(self.step_offsets[row], self.step_offsets[row + 1])
        return self.step_ends[part], self.step_values[part]

    def is_from(self, data_set: str) -> NDArray[np.bool_]:
        """Return [R]: True for the rollouts whose prompt is from this data set."""
        return np.repeat(self.data_sets == data_set, self.group_size)

    def has_full_marks(self, full_marks: Mapping[str, float]) -> NDArray[np.bool_]:
        """Return [R]: True for a correct answer: its first reward term that applies has its highest value.

        Args:
            full_marks: highest value of each reward term.
        """
        if not self.component_names:
            return np.zeros(len(self), bool)
        first = np.argmax(~np.isnan(self.components), axis=1)
        highest = np.array([full_marks[name] for name in self.component_names])[first]
        with np.errstate(invalid="ignore"):
            reached = self.components[np.arange(len(self)), first] >= highest
        return np.asarray(reached & self.is_scored)

    def take_groups(self, groups: Sequence[int] | NDArray[np.int64]) -> RolloutTable:
        """Return the table of these groups, in this order."""
        chosen_groups = np.asarray(groups, dtype=np.int64)
        rows = (chosen_groups[:, None] * self.group_size + np.arange(self.group_size)).reshape(-1)
        counts = np.diff(self.step_offsets)[rows]
        chosen = ragged_index(self.step_offsets[:-1][rows], counts)
        columns = {name: getattr(self, name)[rows] for name in _COLUMNS}
        return replace(
            self,
            **columns,
            data_sets=self.data_sets[chosen_groups],
            step_offsets=offsets_of(counts),
            step_ends=self.step_ends[chosen],
            step_values=self.step_values[chosen],
        )

    def append(self, other: RolloutTable) -> RolloutTable:
        """Return the rows of this table, then those of the other, whose groups have the same size."""
        assert (self.group_size, self.component_names) == (other.group_size, other.component_names)
        columns = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])
            for name in (*_COLUMNS, "data_sets", "step_ends", "step_values")
        }
        counts = np.concatenate([np.diff(self.step_offsets), np.diff(other.step_offsets)])
        return replace(self, **columns, step_offsets=offsets_of(counts))


_COLUMNS = tuple(
    f.name
    for f in fields(RolloutTable)
    if not f.name.startswith("step_") and f.name not in ("group_size", "component_names", "data_sets")
)
SCALARS: Mapping[str, type[np.generic]] = {
    "count": np.int32,
    "completion_tokens": np.int32,
    "loss_tokens": np.int32,
    "reward": np.float64,
    "has_failed": np.bool_,
    "stop_reason": np.int8,
    "num_turns": np.int32,
    "policy_version": np.int32,
    "replica": np.int32,
    "prompt_shard": np.int32,
    "has_experts": np.bool_,
    "num_steps": np.int32,
}
"""What the ranks exchange of a rollout besides its reward terms, and the types of these columns."""
_NO_STEPS = -1
"""`num_steps` of a rollout without a process reward."""
_BLOCK_ROWS = 1 << 14
"""Rollouts that are exchanged at once, so that the memory of the exchange does not grow with the step."""


def gather_table(
    prompts: Sequence[Prompt],
    group_size: int,
    own: Mapping[int, Rollout],
    *,
    prompt_shard: int,
    component_names: Sequence[str],
    sum_over_ranks: SumOverRanks,
) -> RolloutTable:
    """Build the table of a step from the rollouts of each rank. Collective.

    Every rank fills the rows of its own rollouts of a matrix of zeros, and the matrices are added: one all-reduce of
    float64 per 16,384 rollouts, which is exact because every row has one source. Another one follows if a reward scored
    steps.

    Args:
        prompts: of the step, the same on every rank.
        group_size: rollouts per prompt.
        own: rollouts by row, on the first rank of the prompt shard that sampled them; empty on other ranks.
        prompt_shard: prompt shard of this rank.
        component_names: reward terms of the run.
        sum_over_ranks: adds the matrices.

    Raises:
        RuntimeError: a rollout of the step is missing, or two ranks have it.
        ValueError: the reward of a rollout is not a number.
    """
    size, names = len(prompts) * group_size, tuple(component_names)
    rows = np.array(sorted(own), dtype=np.int64)
    rollouts = [own[row] for row in rows.tolist()]
    columns: dict[str, NDArray[Any]] = {name: np.empty(size, kind) for name, kind in SCALARS.items()}
    components = np.empty((size, len(names)))
    for begin in range(0, size, _BLOCK_ROWS):
        part = slice(begin, min(begin + _BLOCK_ROWS, size))
        mine = slice(*np.searchsorted(rows, (part.start, part.stop)).tolist())
        block = np.zeros((part.stop - begin, len(SCALARS) + len(names)))
        for row, rollout in zip(rows[mine].tolist(), rollouts[mine], strict=True):
            block[row - begin] = _scalars(rollout, prompt_shard) + _components(rollout, names)
        block = sum_over_ranks(block)
        for place, column in enumerate(columns.values()):
            column[part] = block[:, place]
        components[part] = block[:, len(SCALARS) :]
    count, num_steps = columns.pop("count"), columns.pop("num_steps")
    if (count != 1).any():
        found = int((count > 0).sum())
        raise RuntimeError(f"the engines returned {found} of {size} rollouts, {int(count.sum())} rows in all")
    offsets = offsets_of(np.maximum(num_steps, 0))
    steps = np.zeros((int(offsets[-1]), 2))
    for row, rollout in zip(rows.tolist(), rollouts, strict=True):
        if rollout.steps:
            steps[offsets[row] : offsets[row + 1]] = rollout.steps
    if len(steps):
        steps = sum_over_ranks(steps)
    return RolloutTable(
        group_size=group_size,
        component_names=names,
        prompt_index=np.repeat(np.array([p.index for p in prompts], dtype=np.int64), group_size),
        data_sets=np.array([p.data_set for p in prompts], dtype=np.str_),
        prompt_tokens=np.repeat(np.array([len(p.token_ids) for p in prompts], dtype=np.int32), group_size),
        components=components,
        has_steps=num_steps != _NO_STEPS,
        step_offsets=offsets,
        step_ends=steps[:, 0].astype(np.int64),
        step_values=steps[:, 1].copy(),
        **columns,
    )


def _scalars(rollout: Rollout, prompt_shard: int) -> list[float]:
    completion, value = rollout.completion, rollout.reward.value
    if value is not None and np.isnan(value):
        raise ValueError(f"the reward of a rollout of prompt {rollout.prompt.index} is {value}; it must be a number")
    return [
        1,
        len(completion.token_ids),
        completion.num_loss_tokens,
        np.nan if value is None else value,
        bool(rollout.reward.failures),
        STOP_REASONS.index(completion.stop_reason),
        completion.num_turns,
        completion.policy_version,
        rollout.replica,
        prompt_shard,
        completion.expert_choices is not None,
        _NO_STEPS if rollout.steps is None else len(rollout.steps),
    ]


def _components(rollout: Rollout, names: tuple[str, ...]) -> list[Any]:
    found = rollout.reward.components
    assert found.keys() <= set(names), f"reward components {list(found)} are not among the terms {list(names)}"
    return [found.get(name, np.nan) for name in names]
