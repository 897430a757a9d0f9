"""Writes the rollouts of this rank's prompt shard to the part files of each step, in the background.

Asserted by tests/unit/trainer/test_rollout_parts.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grpo_mega.config.schema import Config, SampledRollouts
from grpo_mega.data.expert_records import has_record, widen_record
from grpo_mega.data.rollout_table import STOP_REASONS, RolloutTable
from grpo_mega.data.rollout_tokens import RolloutTokens, join_ranges, offsets_of
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.group_texts import shown_groups
from grpo_mega.observe.rollout_files.columns import RaggedColumn, RolloutColumns
from grpo_mega.observe.rollout_files.part_writer import write_part
from grpo_mega.observe.rollout_files.selection import sampled_groups
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.step_metrics import StepResult
from grpo_mega.types import TokenValues


class RolloutParts:
    """Writer of one part per step. The first rank of each prompt shard has one.

    Args:
        config: `observe.rollouts`, `run.seed` and the group size.
        folder: the run folder.
        ranks: coordinates of this rank.
        writer: writes the files.
    """

    def __init__(self, config: Config, folder: RunFolder, ranks: Ranks, writer: BackgroundWriter) -> None:
        self._mode, self._seed = config.observe.rollouts, config.run.seed
        self._groups_shown = config.observe.groups_shown if "tensorboard" in config.observe.trackers else 0
        self._folder, self._writer = folder, writer
        self._part, self._num_parts = ranks.at.prompt_shard, ranks.topology.num_prompt_shards

    def write(self, result: StepResult) -> RolloutColumns:
        """Queue the part of the step, and that of its quarantine; return the columns of what this shard sampled.

        Raises:
            RolloutFileError: a part of an earlier step could not be written.
            ValueError: the log-probs of a rollout do not have one entry per token.
        """
        columns = shard_columns(result.step, result.groups, result.mean_advantages, result.old_log_probs)
        part, num_parts = self._part, self._num_parts
        if result.guard.quarantined is not None:
            quarantine = self._folder.quarantine_of(result.step)
            aside = columns.take(np.flatnonzero(result.guard.quarantined[columns.group]))
            self._writer.submit(lambda: write_part(quarantine, part, num_parts, aside))
        if self._mode == "none":
            return columns
        written = columns
        if isinstance(self._mode, SampledRollouts):
            num_groups = result.groups.table.num_groups
            chosen = sampled_groups(num_groups, self._mode.sample, seed=self._seed, step=result.step)
            written = columns.take(np.flatnonzero(chosen[columns.group]))
        folder: Path = self._folder.rollouts_of(result.step)
        self._writer.submit(lambda: write_part(folder, part, num_parts, written))
        return columns

    def shown_groups(self, result: StepResult) -> list[int]:
        """Return the groups of the step that TensorBoard shows, the same on every rank."""
        table = result.groups.table
        return shown_groups(table.reward.reshape(table.num_groups, table.group_size), self._groups_shown)


def groups_of(columns: RolloutColumns, groups: Sequence[int]) -> RolloutColumns:
    """Return the rollouts of these groups that `columns` has."""
    return columns.take(np.flatnonzero(np.isin(columns.group, groups)))


def writes_rollouts(ranks: Ranks) -> bool:
    """Return True on the first rank of each prompt shard."""
    return ranks.at.engine_tp_rank == 0


def shard_columns(
    step: int, groups: SampledGroups, mean_advantages: npt.NDArray[np.float64], old_log_probs: TokenValues
) -> RolloutColumns:
    """Return the columns of the rollouts of a step that this rank sampled, in the order of group and member.

    Args:
        step: number of the step.
        groups: rollouts of the step.
        mean_advantages: [R] of all rollouts of the step.
        old_log_probs: of the rollouts that this rank sampled, where they are known.

    Raises:
        ValueError: the log-probs of a rollout do not have one entry per token that the policy sampled.
    """
    table, tokens = groups.table, groups.tokens
    rows, counts = tokens.ids, tokens.completion_tokens
    mask, versions = tokens.of_completions(tokens.loss_mask), tokens.of_completions(tokens.policy_versions)
    prompts = [groups.prompts[group] for group in (rows // groups.group_size).tolist()]
    loss_counts, has_old = tokens.loss_counts, np.isin(rows, old_log_probs.ids)
    has_results = loss_counts < counts
    last_version = table.policy_version[rows]
    has_versions = _has_others(versions, mask, counts, last_version)
    if not np.array_equal(old_log_probs.counts, loss_counts[has_old]):
        raise ValueError("old_log_probs must have one entry per token that the policy sampled")
    old, is_sampled = old_log_probs.values.astype(np.float32, copy=False), _present_entries(mask, counts, has_old)
    if not is_sampled.all():
        old = np.zeros(len(is_sampled), np.float32)
        old[is_sampled] = old_log_probs.values
    return RolloutColumns(
        step=step,
        group=(rows // groups.group_size).astype(np.int32),
        member=(rows % groups.group_size).astype(np.int32),
        prompt_index=table.prompt_index[rows],
        replica=table.replica[rows],
        policy_version=last_version,
        num_turns=table.num_turns[rows],
        reward=table.reward[rows],
        advantage=mean_advantages[rows],
        data_set=[prompt.data_set for prompt in prompts],
        prompt=[prompt.text for prompt in prompts],
        completion=groups.texts,
        answer=[prompt.answer for prompt in prompts],
        stop_reason=[STOP_REASONS[reason] for reason in table.stop_reason[rows].tolist()],
        reward_components=_components(table.component_names, table.components[rows]),
        reward_failures=groups.failures,
        prompt_ids=RaggedColumn(tokens.of_prompts(tokens.token_ids), offsets_of(tokens.prompt_tokens)),
        completion_ids=RaggedColumn(tokens.of_completions(tokens.token_ids), offsets_of(counts)),
        sampler_log_probs=RaggedColumn(tokens.of_completions(tokens.sampler_log_probs), offsets_of(counts)),
        old_log_probs=_with_nulls(old, counts, has_old),
        loss_mask=_with_nulls(_present_entries(mask, counts, has_results), counts, has_results),
        policy_versions=_with_nulls(_present_entries(versions, counts, has_versions), counts, has_versions),
        steps=_steps(table, rows),
        expert_choices=_expert_choices(tokens, table.has_experts[rows]),
        expert_shape=None if tokens.expert_choices is None else tokens.expert_choices.shape[1:],
    )


def _components(names: Sequence[str], values: npt.NDArray[np.float64]) -> list[dict[str, float]]:
    """Return for each rollout {name: value} of the reward terms that have a value; `values` is [R, K] with NaN.

    Rollouts with equal values have the same dictionary: most rewards have few values.
    """
    if not names:
        return [{}] * len(values)
    distinct, place = np.unique(values, axis=0, return_inverse=True)
    found = [
        {name: value for name, value in zip(names, row, strict=True) if not math.isnan(value)}
        for row in distinct.tolist()
    ]
    return [found[i] for i in place.tolist()]


def _present_entries(
    values: npt.NDArray[Any], counts: npt.NDArray[np.int64], present: npt.NDArray[np.bool_]
) -> npt.NDArray[Any]:
    """Return the entries of the rows that are present; `counts` has the entries of each row."""
    if present.all():
        return values
    ends = offsets_of(counts)[1:][present]
    return join_ranges(values, ends - counts[present], ends)


def _has_others(
    versions: npt.NDArray[np.int32],
    mask: npt.NDArray[np.bool_],
    counts: npt.NDArray[np.int64],
    last: npt.NDArray[np.int32],
) -> npt.NDArray[np.bool_]:
    """Return True for each row in which the policy sampled a token with another version than `last`."""
    newest = last.max(initial=0)
    if (last == newest).all() and not ((versions != newest) & mask).any():  # nearly always, and without a loop
        return np.zeros(len(counts), np.bool_)
    ends = offsets_of(counts).tolist()
    rows = zip(ends[:-1], ends[1:], last.tolist(), strict=True)
    return np.array([((versions[a:b] != version) & mask[a:b]).any() for a, b, version in rows], np.bool_)


def _with_nulls(
    values: npt.NDArray[Any], counts: npt.NDArray[np.int64], present: npt.NDArray[np.bool_]
) -> RaggedColumn | None:
    """Return the column of the rows that are present; None if none is."""
    if not present.any():
        return None
    return RaggedColumn(values, offsets_of(np.where(present, counts, 0)), None if present.all() else present)


def _steps(table: RolloutTable, rows: npt.NDArray[np.int64]) -> list[list[tuple[int, float]] | None] | None:
    if not table.has_steps[rows].any():
        return None
    found: list[list[tuple[int, float]] | None] = []
    for row in rows.tolist():
        ends, values = table.steps_of(row)
        pairs = list(zip(ends.tolist(), values.tolist(), strict=True))
        found.append(pairs if table.has_steps[row] else None)
    return found


def _expert_choices(tokens: RolloutTokens, present: npt.NDArray[np.bool_]) -> RaggedColumn | None:
    """Return the routing records up to the last token that has one; they are null for rollouts without a record."""
    if tokens.expert_choices is None:
        return None
    is_known = has_record(tokens.expert_choices)
    positions = np.arange(len(is_known)) - np.repeat(tokens.offsets[:-1], tokens.lengths)
    ends = np.maximum.reduceat(np.where(is_known, positions + 1, 0), tokens.offsets[:-1])
    chosen = positions < np.repeat(np.where(present, ends, 0), tokens.lengths)
    wide = widen_record(torch.from_numpy(tokens.expert_choices[chosen])).numpy()
    size = wide.shape[1] * wide.shape[2]
    return _with_nulls(wide.reshape(-1), ends * size, present)
