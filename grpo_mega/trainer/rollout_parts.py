"""Writes the rollouts of this rank's prompt shard to the part files of each step, in the background.

Asserted by tests/unit/trainer/test_rollout_parts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grpo_mega.config.schema import Config, SampledRollouts
from grpo_mega.data.expert_records import widen_record
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.rollout_files.columns import RaggedColumn, RolloutColumns
from grpo_mega.observe.rollout_files.part_writer import write_part
from grpo_mega.observe.rollout_files.selection import sampled_groups
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.trainer.step_metrics import StepResult
from grpo_mega.types import Rollout


class RolloutParts:
    """Writer of one part per step. The first rank of each engine replica has one.

    Args:
        config: `observe.rollouts`, `run.seed` and the group size.
        folder: the run folder.
        ranks: coordinates of this rank.
        writer: writes the files.
    """

    def __init__(self, config: Config, folder: RunFolder, ranks: Ranks, writer: BackgroundWriter) -> None:
        self._mode, self._seed = config.observe.rollouts, config.run.seed
        self._folder, self._writer = folder, writer
        self._part, self._num_parts = ranks.at.replica, ranks.topology.num_replicas

    def write(self, result: StepResult) -> RolloutColumns:
        """Queue the part of the step; return the columns of all rollouts that this replica sampled.

        Raises:
            RolloutFileError: a part of an earlier step could not be written.
            ValueError: the log-probs of a rollout do not have one entry per token.
        """
        columns = replica_columns(result, self._part)
        if self._mode == "none":
            return columns
        written = columns
        if isinstance(self._mode, SampledRollouts):
            num_groups = len(result.groups.rollouts) // result.groups.group_size
            chosen = sampled_groups(num_groups, self._mode.sample, seed=self._seed, step=result.step)
            written = columns.take(np.flatnonzero(chosen[columns.group]))
        folder: Path = self._folder.rollouts_of(result.step)
        part, num_parts = self._part, self._num_parts
        self._writer.submit(lambda: write_part(folder, part, num_parts, written))
        return columns


def writes_rollouts(ranks: Ranks) -> bool:
    """Return True on the first rank of each engine replica."""
    return ranks.at.engine_tp_rank == 0 and ranks.at.engine_dp_rank == 0


def replica_columns(result: StepResult, replica: int) -> RolloutColumns:
    """Return the columns of the rollouts of a step that one replica sampled, in the order of group and member.

    Raises:
        ValueError: the log-probs of a rollout do not have one entry per token.
    """
    positions = [i for i, rollout in enumerate(result.groups.rollouts) if rollout.replica == replica]
    return rollout_columns(
        result.step,
        [result.groups.rollouts[i] for i in positions],
        np.array(positions, np.int32),
        result.groups.group_size,
        [result.batch.mean_advantages[i] for i in positions],
        [result.old_log_probs[i] for i in positions],
    )


def rollout_columns(
    step: int,
    rollouts: Sequence[Rollout],
    positions: npt.NDArray[np.int32],
    group_size: int,
    advantages: Sequence[float],
    old_log_probs: Sequence[Sequence[float] | None],
) -> RolloutColumns:
    """Return rollouts as columns.

    Args:
        step: number of the step.
        rollouts: N rollouts.
        positions: [N] position of each among all rollouts of the step, group by group.
        group_size: rollouts per group.
        advantages: one per rollout.
        old_log_probs: one list per rollout with an entry per token that the policy sampled; None where not known.

    Raises:
        ValueError: lengths differ.
    """
    completions, rewards = [r.completion for r in rollouts], [r.reward for r in rollouts]
    records = [c.expert_choices for c in completions]
    known = [record for record in records if record is not None]
    pairs = zip(rollouts, old_log_probs, strict=True)
    olds = [None if old is None else _with_zeros(rollout, old) for rollout, old in pairs]
    prompts = [r.prompt for r in rollouts]
    of_rows = RaggedColumn.of_rows
    return RolloutColumns(
        step=step,
        group=positions // group_size,
        member=positions % group_size,
        prompt_index=np.array([prompt.index for prompt in prompts], np.int64),
        replica=np.array([r.replica for r in rollouts], np.int32),
        policy_version=np.array([c.policy_version for c in completions], np.int32),
        num_turns=np.array([c.num_turns for c in completions], np.int32),
        reward=np.array([np.nan if reward.value is None else reward.value for reward in rewards], np.float64),
        advantage=np.array(advantages, np.float64),
        data_set=[prompt.data_set for prompt in prompts],
        prompt=[prompt.text for prompt in prompts],
        completion=[c.text for c in completions],
        answer=[prompt.answer for prompt in prompts],
        stop_reason=[c.stop_reason for c in completions],
        reward_components=[reward.components for reward in rewards],
        reward_failures=[reward.failures for reward in rewards],
        prompt_ids=of_rows([prompt.token_ids for prompt in prompts], np.int32),
        completion_ids=of_rows([c.token_ids for c in completions], np.int32),
        sampler_log_probs=of_rows([c.sampler_log_probs for c in completions], np.float32),
        old_log_probs=None if all(old is None for old in olds) else of_rows(olds, np.float32),
        loss_mask=of_rows([c.loss_mask for c in completions], np.bool_)
        if any(c.loss_mask is not None for c in completions)
        else None,
        steps=[r.steps for r in rollouts] if any(r.steps is not None for r in rollouts) else None,
        expert_choices=of_rows([None if r is None else widen_record(r).numpy() for r in records], np.int16)
        if known
        else None,
        expert_shape=(known[0].shape[1], known[0].shape[2]) if known else None,
    )


def _with_zeros(rollout: Rollout, old_log_probs: Sequence[float]) -> npt.NDArray[np.float32]:
    """Return one value per completion token: 0 for the tokens of an environment."""
    completion = rollout.completion
    if len(old_log_probs) != completion.num_loss_tokens:
        raise ValueError(
            f"old_log_probs of a rollout of prompt {rollout.prompt.index} has {len(old_log_probs)} entries for "
            f"{completion.num_loss_tokens} completion tokens; it must have one per token"
        )
    if completion.loss_mask is None:
        return np.array(old_log_probs, np.float32)
    found = np.zeros(len(completion.token_ids), np.float32)
    found[np.array(completion.loss_mask, np.bool_)] = old_log_probs
    return found
