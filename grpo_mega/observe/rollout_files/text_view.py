r"""Renders rollouts for a terminal: a line of numbers, then prompt and completion side by side.

Texts come from a model, so characters that a terminal would execute or that change the direction of text are escaped.
Asserted by tests/unit/observe/rollout_files/test_text_view.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from rich.cells import cell_len, chop_cells, set_cell_size

from grpo_mega.observe.rollout_files.plain_rows import RolloutRow
from grpo_mega.observe.safe_text import printable

MIN_SIDE_BY_SIDE = 60
"""Narrower terminals show the completion below the prompt."""
_SEPARATOR = " | "
_TAB = "    "


def escape(text: str) -> str:
    """Return printable text (safe_text.py) in which a tab is four spaces. Line feeds stay."""
    return printable(text).replace("\t", _TAB)


def render(row: RolloutRow, width: int) -> str:
    """Return the lines of one rollout for a terminal of `width` columns."""
    lines = [escape(_numbers(row)).replace("\n", " ")]
    prompt, completion = escape(row["prompt"]), escape(row["completion"])
    if width < MIN_SIDE_BY_SIDE:
        lines += ["prompt:", *_wrapped(prompt, max(10, width)), "completion:", *_wrapped(completion, max(10, width))]
        return "\n".join(lines)
    left_width = (width - len(_SEPARATOR)) // 2
    right_width = width - len(_SEPARATOR) - left_width
    for left, right in zip_longest(_wrapped(prompt, left_width), _wrapped(completion, right_width), fillvalue=""):
        lines.append(f"{set_cell_size(left, left_width)}{_SEPARATOR}{right}".rstrip())
    return "\n".join(lines)


def _numbers(row: RolloutRow) -> str:
    reward = "none" if row["reward"] is None else f"{row['reward']:.4g}"
    parts = [f"step {row['step']}, group {row['group']}, member {row['member']}: reward {reward}"]
    parts += [f"{name} {value:.4g}" for name, value in row["reward_components"].items()]
    parts += [f"{name} failed" for name in row["reward_failures"]]
    advantage = "none" if row["advantage"] is None else f"{row['advantage']:+.3f}"
    parts.append(f"advantage {advantage}, {len(row['completion_ids'])} tokens, {row['stop_reason']}")
    if row["num_turns"] > 1:
        parts.append(f"{row['num_turns']} turns")
    parts.append(f"answer {row['answer']}")
    return ", ".join(parts)


def _wrapped(text: str, width: int) -> Iterator[str]:
    """Yield lines of at most `width` cells; a word is cut only where it does not fit a line."""
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if cell_len(longer) <= width:
                line = longer
                continue
            if line:
                yield line
            pieces = chop_cells(word, width) or [""]
            yield from pieces[:-1]
            line = pieces[-1]
        yield line
