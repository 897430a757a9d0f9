"""The text that `grpo-mega watch` shows: sparklines, the phases of the last step, rollouts and alarms.

Every text of a model, a user or a file goes through `one_line`: no escape sequence reaches the terminal.
Asserted by tests/unit/observe/watch/test_view.py.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise

from grpo_mega.observe.safe_text import one_line
from grpo_mega.observe.summary import duration
from grpo_mega.observe.watch.followed_run import FollowedRun

_BARS = "▁▂▃▄▅▆▇█"
_CURVES = (
    ("reward/mean", "reward"),
    ("train/loss", "loss"),
    ("reward/accuracy", "accuracy"),
    ("eval/accuracy", "held-out"),
    ("train/entropy", "entropy"),
    ("train/mismatch_max", "mismatch"),
    ("train/kl", "kl"),
    ("rollout/length_mean", "length"),
    ("throughput/tokens_per_second", "tok/s"),
    ("throughput/mfu", "MFU"),
    ("host/memory_bytes", "memory"),
)
_ONLY_WITHOUT_REWARDS = ("train/loss",)
_FILLS = "█▓▒░▚▞▤▥▦▧"


def view(run: FollowedRun, now: float, width: int = 80) -> list[str]:
    """Return the lines, each at most `width` characters.

    Args:
        run: the run.
        now: seconds since 1970.
        width: of the terminal, in characters.
    """
    lines = [*_head(run, now), *_curves(run, width), *_phases(run, width)]
    for alarm in run.active_alarms:
        lines += _wrapped(f"ALARM {one_line(str(alarm), 10 * width)}", width)
    for row in run.rollouts:
        reward = "none" if row["reward"] is None else f"{row['reward']:.3g}"
        prompt, answer = (one_line(row[key][-4 * width :], 4 * width) for key in ("prompt", "completion"))
        lines.append(f"rollout, reward {reward}, {one_line(str(row['stop_reason']), 20)}: {prompt} -> {answer}")
    if run.verdict is not None:
        lines += _wrapped(f"verdict: {one_line(run.verdict, 10 * width)}", width)
    if run.num_damaged:
        lines.append(f"{run.num_damaged} line(s) of metrics.jsonl cannot be read")
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]


def _wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    """Return the text as lines of at most `width` characters; all but the first are indented."""
    return textwrap.wrap(text, max(width, 20), subsequent_indent=indent, break_on_hyphens=False)


def sparkline(values: Sequence[float], width: int) -> str:
    """Return one character per value, or per mean of neighbors if there are more than `width`."""
    if len(values) > width:
        bounds = [round(i * len(values) / width) for i in range(width + 1)]
        parts = [values[a:b] for a, b in pairwise(bounds)]
        values = [sum(part) / len(part) for part in parts]
    low, high = min(values), max(values)
    if high == low:
        return _BARS[3] * len(values)
    return "".join(_BARS[round((v - low) / (high - low) * (len(_BARS) - 1))] for v in values)


def _head(run: FollowedRun, now: float) -> list[str]:
    steps = run.history.steps
    name = one_line(str(run.folder.path), 200)
    if not steps:
        state = f"status {one_line(run.status, 30)}" if run.status else "no step is written yet"
        return [f"{name}: {state}"]
    of = "" if run.total_steps is None else f"/{run.total_steps}"
    parts = [f"step {steps[-1]}{of}"]
    if run.status == "done" or run.status == "failed":
        parts.append(run.status)
    else:
        recent = run.history.recent("time/step_seconds", 20)
        if run.total_steps is not None and recent:
            remaining = max(0, run.total_steps - steps[-1]) * sum(recent) / len(recent)
            parts.append(f"ETA {duration(remaining)}")
        if run.last_written is not None:
            parts.append(f"last line {duration(max(0.0, now - run.last_written))} ago")
    return [name, "  ".join(parts)]


def _curves(run: FollowedRun, width: int) -> list[str]:
    has_rewards = bool(run.history.all("reward/mean"))
    lines = []
    for name, label in _CURVES:
        values = run.history.all(name)
        if values and not (has_rewards and name in _ONLY_WITHOUT_REWARDS):
            lines.append(f"{label:>9} {values[-1]:>10.4g}  {sparkline(values, max(8, width - 24))}")
    return lines


def _phases(run: FollowedRun, width: int) -> list[str]:
    """Return a bar of the phases of the last step, and its key."""
    steps = run.history.steps
    if not steps:
        return []
    found = {
        name.removeprefix("time/").removesuffix("_seconds"): seconds
        for name, seconds in run.history.of_step(steps[-1]).items()
        if name.startswith("time/") and name not in ("time/step_seconds", "time/checkpoint_wait_seconds")
    }
    total = sum(found.values())
    if total <= 0:
        return []
    room, bar, key = max(8, width - 12), "", []
    for (name, seconds), fill in zip(sorted(found.items(), key=lambda item: -item[1]), _FILLS * 4, strict=False):
        cells = round(room * seconds / total)
        if cells:
            bar += fill * cells
            key.append(f"{fill}\u00a0{name}\u00a0{seconds:.2g}\u00a0s")  # lines break at none of these blanks
    indent = " " * 11
    lines = [line.replace("\u00a0", " ") for line in _wrapped(f"{indent}{'  '.join(key)}", width, indent)]
    return [f"{'phases':>9}  {bar[:room]}", *lines]
