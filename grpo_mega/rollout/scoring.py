"""Scoring of the rollouts of a prompt shard while its engine still samples.

Asserted by tests/unit/rollout/test_sampler.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from grpo_mega.rewards.inputs import ScoringRow
from grpo_mega.types import Completion, Prompt, Reward, Rollout


class Scorer(Protocol):
    """Interface of the reward workers (rewards/pool.py)."""

    def submit_row(self, key: int, row: ScoringRow) -> None:
        """Start scoring; returns at once.

        Args:
            key: number of the rollout, with which `collect` returns the reward.
            row: everything that a reward may read.
        """
        ...

    def collect(self) -> dict[int, Reward]:
        """Wait for and return the rewards of everything submitted since the last call."""
        ...


class StepEnds(Protocol):
    """Function that maps tokens to the positions in the text at which they end (data/chat.py)."""

    def __call__(self, token_ids: Sequence[int]) -> list[int]:
        """Return for each token the number of characters up to and including it."""
        ...


def locate_step_tokens(
    reward: Reward, completion: Completion, ends_of: StepEnds
) -> tuple[tuple[int, float], ...] | None:
    """Return (end_token, value) of each step of a process reward; None for a reward without steps.

    The end token of a step contains the last character of the step. A step that ends with the text ends with the last
    token of the completion, which may be EOS.
    """
    if reward.steps is None:
        return None
    ends, last = ends_of(completion.token_ids.tolist()), len(completion.token_ids) - 1
    return tuple(
        (last if end >= len(completion.text) - 1 else min(bisect_right(ends, end), last), value)
        for end, value in reward.steps
    )


@dataclass(frozen=True)
class RolloutScoring:
    """Scoring of this rank's rollouts.

    Attributes:
        scorer: reward workers; None on ranks that do not score.
        replica: engine replica of this rank.
        floor_of: returns the reward of a rollout whose environment failed, by the name of the data set.
        ends_of: finds the end tokens of a process reward's steps; None: steps are ignored.
        special_text_of: returns the text of tokens with special tokens; None: no reward reads it.
    """

    scorer: Scorer | None
    replica: int
    floor_of: Callable[[str], Reward] | None = None
    ends_of: StepEnds | None = None
    special_text_of: Callable[[Sequence[int]], str] | None = None

    def submit(self, key: int, prompt: Prompt, completion: Completion) -> None:
        """Start the scoring of a rollout with everything that a reward may read.

        Args:
            key: number of the rollout.
            prompt: its prompt.
            completion: its answer. It is not scored if its environment failed.
        """
        if self.scorer is None or completion.failure is not None:
            return
        special = self.special_text_of(completion.token_ids.tolist()) if self.special_text_of is not None else None
        row = ScoringRow(
            prompt.text,
            completion.text,
            prompt.answer,
            messages=prompt.messages,
            completion_with_special_tokens=special,
            fields=prompt.fields,
            dataset=prompt.data_set,
            index=prompt.index,
        )
        self.scorer.submit_row(key, row)

    def collect(self, sampled: Mapping[int, tuple[Prompt, Completion]]) -> dict[int, Rollout]:
        """Wait for the remaining scores; return the rollouts by key, none on ranks without scorer.

        Args:
            sampled: prompt and completion of everything that was submitted since the last call, by key.
        """
        if self.scorer is None:
            return {}
        rewards = self.scorer.collect()
        found = {}
        for key, (prompt, completion) in sampled.items():
            if completion.failure is not None and self.floor_of is not None:
                reward = self.floor_of(prompt.data_set)
            else:
                reward = rewards[key]
            steps = locate_step_tokens(reward, completion, self.ends_of) if self.ends_of is not None else None
            found[key] = Rollout(prompt, completion, reward, self.replica, steps)
        return found

    def score(self, sampled: Mapping[int, tuple[Prompt, Completion]]) -> dict[int, Rollout]:
        """Score rollouts, wait for the scores, and return the rollouts by key.

        If this fails, the scores of rollouts that were submitted are discarded, so their keys can be used again.

        Args:
            sampled: prompt and completion by key. Nothing else may have been submitted since the last `collect`.
        """
        try:
            for key, (prompt, completion) in sampled.items():
                self.submit(key, prompt, completion)
            return self.collect(sampled)
        except BaseException:
            with suppress(Exception):  # the first error is raised
                self.discard()
            raise

    def discard(self) -> None:
        """Wait for everything that was submitted, and discard the scores."""
        if self.scorer is not None:
            self.scorer.collect()
