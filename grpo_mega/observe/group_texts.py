"""Renders groups of rollouts for TensorBoard's tab "Text": the prompt, and several answers side by side.

TensorBoard removes every style from a text, so a colored square before a token stands for its color. All texts of
model and user are escaped (safe_text.py): they end no cell, run no script and send no terminal escape.
Asserted by tests/unit/observe/test_group_texts.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from grpo_mega.observe.rollout_files.columns import RolloutColumns
from grpo_mega.observe.rollout_files.plain_rows import RolloutRow, rows_of
from grpo_mega.observe.safe_text import html_text, one_line

MAX_ANSWERS = 4
"""Answers of a group that are shown, evenly from the highest to the lowest reward."""
MAX_CHARACTERS = 1500
"""Characters of a prompt or an answer that are shown."""
MAX_TOKENS = 120
"""Tokens of an answer that are shown with their mismatch."""

_LEVELS = ((1.0, "\U0001f7e5"), (0.1, "\U0001f7e7"), (0.01, "\U0001f7e8"))  # red, orange, yellow
_LEGEND = "mismatch of a token: " + ", ".join(f"{square} from {bound:g} nats" for bound, square in reversed(_LEVELS))

T = TypeVar("T")
TokenTexts = Callable[[Sequence[int]], Sequence[str]]
"""Returns the text of each token."""


def shown_groups(rewards: NDArray[np.float64], shown: int) -> list[int]:
    """Return at most `shown` groups of a step, evenly from the highest to the lowest mean reward.

    Args:
        rewards: [P, G] of all groups of the step, on whichever rank they were sampled; NaN: no reward.
        shown: number of groups.
    """
    means = [_mean_reward(row) for row in rewards.tolist()]
    return _spread(sorted(range(len(means)), key=means.__getitem__, reverse=True), shown)


def group_texts(
    parts: Sequence[RolloutColumns], order: Sequence[int], token_texts: TokenTexts | None
) -> dict[str, str]:
    """Return {name: HTML} of groups.

    Args:
        parts: whole groups of a step, each group in one part.
        order: the groups that are shown. Only their rollouts become Python objects.
        token_texts: returns the texts of tokens; None: tokens are not shown.
    """
    rows: dict[int, list[RolloutRow]] = {}
    for part in parts:
        places = np.flatnonzero(np.isin(part.group, order))
        for row in rows_of(part.take(places)) if places.size else ():
            rows.setdefault(row["group"], []).append(row)
    shown = [(position, rows[group]) for position, group in enumerate(order) if group in rows]
    return {f"groups/{position}": render_group(of_group, token_texts) for position, of_group in shown}


def render_group(rows: Sequence[RolloutRow], token_texts: TokenTexts | None) -> str:
    """Return HTML with the prompt of a group, and a table with an answer in each column."""
    first = rows[0]
    answers = _spread(sorted(rows, key=_reward, reverse=True), MAX_ANSWERS)
    of_set = f" of {html_text(first['data_set'], 100)}" if first["data_set"] else ""
    head = (
        f"<p>prompt {first['prompt_index']}{of_set}, reference answer <code>{html_text(first['answer'], 300)}</code>, "
        f"{len(answers)} of {len(rows)} answers</p>"
    )
    lines = [
        [f"<strong>{_square(row['advantage'])} {_numbers(row)}</strong>" for row in answers],
        [html_text(_components(row), 500) for row in answers],
        [f"<pre>{html_text(row['completion'], MAX_CHARACTERS)}</pre>" for row in answers],
    ]
    legend = ""
    if token_texts is not None and any(row["old_log_probs"] is not None for row in answers):
        lines.append([f"<pre>{_tokens(row, token_texts)}</pre>" for row in answers])
        legend = f"<p>{_LEGEND}; \U0001f7e9 positive and \U0001f7e5 negative advantage of an answer</p>"
    table = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f"{head}<pre>{html_text(first['prompt'], MAX_CHARACTERS)}</pre><table>{table}</table>{legend}"


def _numbers(row: RolloutRow) -> str:
    reward = "none" if row["reward"] is None else f"{row['reward']:.3g}"
    tokens = len(row["completion_ids"])
    return f"reward {reward}, advantage {row['advantage']:+.3f}, {tokens} tokens, {row['stop_reason']}"


def _components(row: RolloutRow) -> str:
    parts = [f"{name} {value:.3g}" for name, value in row["reward_components"].items()]
    return ", ".join(parts + [f"{name} failed" for name in row["reward_failures"]]) or "no reward terms"


def _tokens(row: RolloutRow, token_texts: TokenTexts) -> str:
    """Return the first tokens, each after the square of its mismatch, if that is not negligible."""
    ids = row["completion_ids"][:MAX_TOKENS]
    old = row["old_log_probs"] or row["sampler_log_probs"]
    cells = [
        _level(abs(policy - sampler)) + html_text(one_line(text, 40), 50)
        for text, policy, sampler in zip(token_texts(ids), old, row["sampler_log_probs"], strict=False)
    ]
    left_out = len(row["completion_ids"]) - len(ids)
    return "\u00b7".join(cells) + (f" [{left_out:,} more tokens]" if left_out else "")


def _level(mismatch: float) -> str:
    return next((square for bound, square in _LEVELS if mismatch >= bound), "")


def _square(advantage: float) -> str:
    return "\u2b1c" if advantage == 0 else "\U0001f7e9" if advantage > 0 else "\U0001f7e5"


def _reward(row: RolloutRow) -> float:
    return -math.inf if row["reward"] is None else row["reward"]


def _mean_reward(rewards: Sequence[float]) -> float:
    known = [reward for reward in rewards if not math.isnan(reward)]
    return math.fsum(known) / len(known) if known else -math.inf


def _spread(items: Sequence[T], shown: int) -> list[T]:
    """Return `shown` of the items at equal distances, the first and the last among them."""
    if len(items) <= shown:
        return list(items)
    if shown <= 1:
        return list(items[:shown])
    return [items[round(i * (len(items) - 1) / (shown - 1))] for i in range(shown)]
