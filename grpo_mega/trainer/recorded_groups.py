"""Builds the groups of a step from its rollout files, without an engine and without scoring. Works on columns.

The first rank has all tokens, as if it had sampled all. Which rank trains a rollout does not depend on who sampled it.
Asserted by tests/unit/trainer/test_recorded_groups.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from grpo_mega.data.rollout_table import STOP_REASONS, RolloutTable
from grpo_mega.data.rollout_tokens import NOT_SAMPLED, RolloutTokens, no_record, offsets_of, ragged_index
from grpo_mega.observe.rollout_files.reader import StepRollouts, read_step
from grpo_mega.parallel.ranks import Ranks, agreed
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.types import Prompt, TokenValues, UserError


@dataclass(frozen=True)
class RecordedStep:
    """A step as its rollout files have it.

    Attributes:
        groups: its rollouts.
        old_log_probs: of the policy before the update, nats, of the rollouts that have them; on the first rank only.
        advantages: [R] mean advantage of each rollout.
    """

    groups: SampledGroups
    old_log_probs: TokenValues
    advantages: NDArray[np.float64]


def read_recorded_step(
    folder: Path, ranks: Ranks, *, component_names: Sequence[str] = (), num_rollouts: int | None = None
) -> RecordedStep:
    """Read the rollouts of a step. Collective: the first rank reads the files.

    Args:
        folder: `rollouts/step_NNNNNN` of a run.
        ranks: coordinates of this rank.
        component_names: reward terms of the run.
        num_rollouts: number of rollouts that the step must have; None: any.

    Raises:
        UserError: a part is damaged or missing, rollouts are missing, or the groups differ in size.
    """
    own: list[RecordedStep] = []

    def read() -> tuple[Sequence[Prompt], RolloutTable, NDArray[np.float64]]:
        own.append(recorded_step(folder, component_names, num_rollouts))
        return own[0].groups.prompts, own[0].groups.table, own[0].advantages

    prompts, table, advantages = agreed(read, ranks)
    if own:
        return own[0]
    nothing = TokenValues(np.zeros(0, np.int64), offsets_of(np.zeros(0, np.int64)), np.zeros(0, np.float32))
    return RecordedStep(SampledGroups(prompts, table, RolloutTokens.empty(), [], []), nothing, advantages)


def recorded_step(folder: Path, component_names: Sequence[str] = (), num_rollouts: int | None = None) -> RecordedStep:
    """Read the rollouts of a step on one rank; the arguments are those of `read_recorded_step`.

    Raises:
        UserError: as `read_recorded_step`.
    """
    found = read_step(folder)
    if found.problems:
        raise UserError("; ".join(found.problems), remedy="use another step, or let the run make this one again")
    rows = found.table.combine_chunks()
    size = _group_size(rows, folder, num_rollouts)
    tokens = _tokens(found, rows)
    groups = SampledGroups(
        _prompts(rows, size, tokens),
        _table(rows, size, tokens, tuple(component_names)),
        tokens,
        rows["completion"].to_pylist(),
        [tuple(failures) for failures in rows["reward_failures"].to_pylist()],
    )
    return RecordedStep(groups, _old_log_probs(rows, tokens), _numbers(rows["advantage"]))


def _group_size(rows: pa.Table, folder: Path, num_rollouts: int | None) -> int:
    group = _numbers(rows["group"]).astype(np.int64)
    sizes = np.bincount(group) if len(group) else np.zeros(1, np.int64)
    if num_rollouts is not None and len(rows) != num_rollouts:
        raise UserError(
            f"{folder} has {len(rows)} of the {num_rollouts} rollouts of the step",
            remedy="use a step of a run with observe.rollouts=all",
        )
    if len(set(sizes.tolist())) != 1 or sizes[0] == 0:
        raise UserError(
            f"{folder}: all prompts must have the same number of rollouts, and they have {sorted(set(sizes.tolist()))}",
            remedy="name the folder of one whole step",
        )
    return int(sizes[0])


def _tokens(found: StepRollouts, rows: pa.Table) -> RolloutTokens:
    prompts, completions = _lengths(rows["prompt_ids"]), _lengths(rows["completion_ids"])
    offsets = offsets_of(prompts + completions)
    at_prompt = ragged_index(offsets[:-1], prompts)
    at_completion = ragged_index(offsets[:-1] + prompts, completions)
    size = int(offsets[-1])
    token_ids, log_probs = np.zeros(size, np.int32), np.zeros(size, np.float32)
    token_ids[at_prompt], token_ids[at_completion] = _flat(rows["prompt_ids"]), _flat(rows["completion_ids"])
    log_probs[at_completion] = _flat(rows["sampler_log_probs"])
    mask = np.zeros(size, bool)
    mask[at_completion] = _per_token(rows["loss_mask"], np.ones(len(at_completion), bool), completions)
    last_version = np.repeat(_numbers(rows["policy_version"]).astype(np.int32), completions)
    versions = np.full(size, NOT_SAMPLED, np.int32)
    versions[at_completion] = _per_token(rows["policy_versions"], last_version, completions)
    return RolloutTokens(
        np.arange(len(rows)),
        offsets,
        prompts,
        token_ids,
        np.where(mask, log_probs, np.float32(0)),
        mask,
        np.where(mask, versions, np.int32(NOT_SAMPLED)),
        _experts(found, rows, offsets),
    )


def _experts(found: StepRollouts, rows: pa.Table, offsets: NDArray[np.int64]) -> NDArray[Any] | None:
    """Return the routing records [T, L, K] int16; None if no rollout has one."""
    column = rows["expert_choices"]
    if found.expert_shape is None or column.null_count == len(column):
        return None
    layers, choices = found.expert_shape
    known = _lengths(column) // (layers * choices)
    records = no_record((int(offsets[-1]), layers, choices), np.dtype(np.int16))
    records[ragged_index(offsets[:-1], known)] = _flat(column).reshape(-1, layers, choices)
    return np.asarray(records)


def _table(rows: pa.Table, size: int, tokens: RolloutTokens, names: tuple[str, ...]) -> RolloutTable:
    components = np.full((len(rows), len(names)), np.nan)
    for row, pairs in enumerate(rows["reward_components"].to_pylist()):
        for name, value in pairs or ():
            if name in names:
                components[row, names.index(name)] = value
    steps = rows["steps"]
    step_counts, has_steps = _lengths(steps), ~np.asarray(steps.is_null())
    flat_steps = pc.list_flatten(steps).combine_chunks()
    reasons = [STOP_REASONS.index(reason) for reason in rows["stop_reason"].to_pylist()]
    return RolloutTable(
        group_size=size,
        component_names=names,
        prompt_index=_numbers(rows["prompt_index"]).astype(np.int64),
        data_sets=np.array(rows["data_set"].to_pylist()[::size], dtype=np.str_),
        prompt_tokens=tokens.prompt_tokens.astype(np.int32),
        completion_tokens=(tokens.lengths - tokens.prompt_tokens).astype(np.int32),
        loss_tokens=tokens.loss_counts.astype(np.int32),
        reward=_numbers(rows["reward"]),
        components=components,
        has_failed=_lengths(rows["reward_failures"]) > 0,
        stop_reason=np.array(reasons, dtype=np.int8),
        num_turns=_numbers(rows["num_turns"]).astype(np.int32),
        policy_version=_numbers(rows["policy_version"]).astype(np.int32),
        replica=_numbers(rows["replica"]).astype(np.int32),
        prompt_shard=np.zeros(len(rows), np.int32),
        has_experts=~np.asarray(rows["expert_choices"].is_null()),
        has_steps=has_steps,
        step_offsets=offsets_of(step_counts),
        step_ends=_numbers(pc.struct_field(flat_steps, "end_token")).astype(np.int64),
        step_values=_numbers(pc.struct_field(flat_steps, "value")),
    )


def _prompts(rows: pa.Table, size: int, tokens: RolloutTokens) -> list[Prompt]:
    """Return the prompt of each group, from its first rollout."""
    first = rows.take(pa.array(range(0, len(rows), size)))
    ids = first["prompt_ids"].to_pylist()
    columns = (first[name].to_pylist() for name in ("prompt_index", "prompt", "answer", "data_set"))
    return [
        Prompt(index, text, tuple(token_ids), answer, data_set)
        for index, text, answer, data_set, token_ids in zip(*columns, ids, strict=True)
    ]


def _old_log_probs(rows: pa.Table, tokens: RolloutTokens) -> TokenValues:
    column = rows["old_log_probs"]
    ids = np.flatnonzero(~np.asarray(column.is_null()))
    counts = (tokens.lengths - tokens.prompt_tokens)[ids]
    of_rollouts = tokens.select(ids)
    is_completion = np.zeros(len(of_rollouts.token_ids), bool)
    is_completion[ragged_index(of_rollouts.offsets[:-1] + of_rollouts.prompt_tokens, counts)] = True
    return TokenValues(
        ids, offsets_of(of_rollouts.loss_counts), _flat(column)[of_rollouts.loss_mask[is_completion]].astype(np.float32)
    )


def _numbers(column: Any) -> NDArray[np.float64]:
    """Return a column of numbers as float64, NaN for null."""
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the length of each list; 0 for null."""
    return np.asarray(pc.fill_null(pc.list_value_length(column), 0).to_numpy(), dtype=np.int64)


def _flat(column: pa.ChunkedArray) -> NDArray[Any]:
    return np.asarray(pc.list_flatten(column).to_numpy())


def _per_token(column: pa.ChunkedArray, default: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[Any]:
    """Return the entries of a column per completion token; those of `default` for rollouts where it is null."""
    found = default.copy()
    found[np.repeat(~np.asarray(column.is_null()), counts)] = _flat(column)
    return found
