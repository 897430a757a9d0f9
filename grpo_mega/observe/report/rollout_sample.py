"""Selects and reads the rollouts that a report shows, by a stated rule and within a budget of bytes.

Asserted by tests/unit/observe/report/test_rollout_sample.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_mega.observe.report.step_table import StepTable, WorstToken, step_folder
from grpo_mega.observe.rollout_files.reader import steps_of
from grpo_mega.observe.safe_text import cut, printable
from grpo_mega.types import UserError

MAX_STEPS, MAX_MISMATCH_STEPS = 60, 10
MAX_GROUPS, MAX_ANSWERS = 6, 8
MAX_CHARACTERS, MAX_TOKENS = 4000, 400
MAX_BYTES = 16_000_000
NUM_WORST = 30

TokenTexts = Callable[[Sequence[int]], Sequence[str]]
"""Returns the text of each token."""


@dataclass
class RolloutSample:
    """The groups of a report.

    Attributes:
        groups: prompt, reference answer, step, data set and answers.
        worst: tokens with the largest mismatch of policy and engine.
        rule: how the groups were chosen, in words.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    worst: list[dict[str, Any]] = field(default_factory=list)
    rule: str = ""
    problems: list[str] = field(default_factory=list)


def sample_rollouts(
    rollouts: Path,
    mismatch: Mapping[int, float],
    special_steps: Sequence[int],
    token_texts: TokenTexts | None,
    max_bytes: int = MAX_BYTES,
) -> RolloutSample:
    """Return the groups that the report of a run shows.

    Args:
        rollouts: folder `rollouts/` of the run.
        mismatch: step -> `train/mismatch_max`.
        special_steps: steps that are shown in any case, such as those of alarms.
        token_texts: decodes tokens; None: tokens cannot be colored.
        max_bytes: budget of the JSON text of all groups.
    """
    found = RolloutSample()
    try:
        steps = steps_of(rollouts)
    except UserError as error:
        found.problems.append(str(error))
        return found
    chosen = _chosen_steps(steps, mismatch, special_steps)
    found.rule = (
        f"{len(chosen)} of {len(steps)} steps: at most {MAX_STEPS} at equal distances, the {MAX_MISMATCH_STEPS} with "
        f"the largest mismatch, the first steps of alarms, and the last step. Of each step at most {MAX_GROUPS} "
        f"groups: the best, the worst, and others at equal distances between them by mean reward. Of each group at "
        f"most {MAX_ANSWERS} answers, best and worst first; of each text {MAX_CHARACTERS:,} characters, of each "
        f"answer the mismatch of {MAX_TOKENS} tokens."
    )
    budget = max_bytes // max(1, len(chosen))
    for step in chosen:
        try:
            of_step = StepTable.read(step_folder(rollouts, step))
        except UserError as error:
            found.problems.append(str(error))
            continue
        found.problems += of_step.problems
        found.worst += [_worst_record(step, worst, token_texts) for worst in of_step.worst_tokens(NUM_WORST)]
        left = budget
        for group in of_step.rows_of(_spread(of_step.groups_by_reward(), MAX_GROUPS)):
            record = _group_record(step, group, token_texts)
            left -= len(json.dumps(record))
            if left < 0:
                break
            found.groups.append(record)
    found.worst = sorted(found.worst, key=lambda item: -abs(item["mismatch"]))[:NUM_WORST]
    return found


def _chosen_steps(steps: Sequence[int], mismatch: Mapping[int, float], special: Sequence[int]) -> list[int]:
    stride = max(1, -(-len(steps) // MAX_STEPS))
    worst = sorted((s for s in steps if s in mismatch), key=lambda s: -abs(mismatch[s]))[:MAX_MISMATCH_STEPS]
    return sorted({*steps[::stride], *worst, *(s for s in special if s in set(steps)), *steps[-1:]})


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _group_record(step: int, group: Sequence[Mapping[str, Any]], token_texts: TokenTexts | None) -> dict[str, Any]:
    first = group[0]
    rewards = [row["reward"] for row in group if row.get("reward") is not None]
    by_reward = sorted(group, key=lambda row: -1e30 if row.get("reward") is None else row["reward"], reverse=True)
    return {
        "step": step,
        "prompt_index": first["prompt_index"],
        "data_set": printable(str(first.get("data_set") or "")),
        "prompt": cut(printable(first["prompt"]), MAX_CHARACTERS),
        "answer": cut(printable(str(first["answer"])), MAX_CHARACTERS),
        "size": len(group),
        "degenerate": len(rewards) < 2 or max(rewards) - min(rewards) < 1e-6,
        "answers": [_answer_record(row, token_texts) for row in _spread(by_reward, MAX_ANSWERS)],
    }


def _answer_record(row: Mapping[str, Any], token_texts: TokenTexts | None) -> dict[str, Any]:
    record = {
        "text": cut(printable(row["completion"]), MAX_CHARACTERS),
        "reward": row.get("reward"),
        "components": {printable(k): round(v, 4) for k, v in (row.get("reward_components") or {}).items()},
        "advantage": round(float(row.get("advantage") or 0.0), 4),
        "stop": row.get("stop_reason"),
        "tokens": len(row["completion_ids"]),
    }
    if token_texts is not None:
        ids = row["completion_ids"][:MAX_TOKENS]
        record["pieces"] = [printable(text)[:40] for text in token_texts(ids)]
        differences = _mismatches(row)
        if differences is not None:
            record["mismatch"] = [float(f"{value:.2g}") for value in differences[:MAX_TOKENS]]
    return record


def _mismatches(row: Mapping[str, Any]) -> list[float] | None:
    """Return old_log_probs - sampler_log_probs per token; None if the policy's are not known."""
    if row.get("old_log_probs") is None:
        return None
    return [old - sampled for old, sampled in zip(row["old_log_probs"], row["sampler_log_probs"], strict=False)]


def _worst_record(step: int, worst: WorstToken, token_texts: TokenTexts | None) -> dict[str, Any]:
    text = "" if token_texts is None else printable(token_texts([worst.token])[0])[:80]
    return {"step": step, "text": text, **vars(worst)}
