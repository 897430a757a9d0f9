"""Compare the planner's seconds of a step with steps that other projects published.

    python tools/plan_published.py [--write] [--json]

The rows are those of docs/measurements/published_steps.yaml. Each is planned as a run of this project with the same
model, devices, layout, batch and lengths. One phase is replaced: published systems gather every tensor whole on every
GPU, so `sync` is the time of that (`gathered_sync_seconds`); the time of this project's own sync has a column. `factor`
is the larger of predicted / published and published / predicted. `--write` replaces the tables of
docs/measurements/planner.md.

Exit code 0: the median factor is at most 1.4, and every row above 2 has a reason; 1: it is not; 2: wrong input.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.cli.plan import model_of
from grpo_mega.config.load import load_config
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.config.shipped import shipped_model_folder
from grpo_mega.planner.hardware import gpu_named
from grpo_mega.planner.plan import ResourcePlan
from grpo_mega.planner.rollout_time import decode_step
from grpo_mega.planner.step_time import token_cost
from grpo_mega.types import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS = REPOSITORY / "docs" / "measurements" / "published_steps.yaml"
PAGE = REPOSITORY / "docs" / "measurements" / "planner.md"
BEGIN, END = "<!-- tools/plan_published.py: begin -->", "<!-- tools/plan_published.py: end -->"
MEDIAN_BAR, ROW_BAR = 1.4, 2.0
PUBLISHED_SYNC_SECONDS = 5.0
"""Seconds of a published sync besides the bytes: those of 8B in one node, where the bytes take 0.05 s."""
PROMPT_TOKENS = 128  # most tokens of a prompt where a row does not say it
PHASES = {"rollout": ("rollout",), "log_probs": ("log_probs",), "train": ("train", "optimizer"), "sync": ("sync",)}
"""Phase of a source -> phases of a plan."""


@dataclass(frozen=True)
class ComparedStep:
    """A published step beside its prediction, in seconds."""

    row: dict[str, Any]
    plan: ResourcePlan

    @property
    def published(self) -> float:
        """Published seconds of the step."""
        return float(self.row["published"]["step"])

    @property
    def phases(self) -> dict[str, float]:
        """Predicted seconds of each phase, with the sync of the published systems."""
        return self.plan.time.phases | {"sync": gathered_sync_seconds(self.plan)}

    @property
    def predicted(self) -> float:
        """Predicted seconds of the step."""
        return sum(self.phases.values())

    @property
    def factor(self) -> float:
        """The larger of predicted / published and its inverse."""
        return max(self.predicted / self.published, self.published / self.predicted)

    @property
    def is_fitted(self) -> bool:
        """True if the value of an assumption was chosen with the help of this row."""
        return bool(self.row.get("fitted"))

    def phase(self, name: str) -> tuple[float, float | None]:
        """Return the predicted and the published seconds of a phase of the source."""
        return sum(self.phases[part] for part in PHASES[name]), self.row["published"].get(name)


def gathered_sync_seconds(plan: ResourcePlan) -> float:
    """Return the seconds in which every GPU receives all weights over its link, and the engine is prepared."""
    weights = plan.parameters * plan.inputs.itemsize
    return weights / plan.inputs.cluster.link_speed(plan.inputs.topology.world_size) + PUBLISHED_SYNC_SECONDS


def compare(row: dict[str, Any]) -> ComparedStep:
    """Plan a row of the table.

    Raises:
        UserError: a key or a value of the row is wrong.
    """
    gpu, keys = gpu_named(row["gpu"]), dict(row["config"])
    prompt = keys.setdefault("data.max_prompt_tokens", PROMPT_TOKENS)
    completion = row["max_tokens"] - prompt
    mean = row["mean_tokens"]
    mean_length = mean["tokens"] / (row["max_tokens"] if mean["of"] == "rollout" else completion)
    keys |= {
        "run.world_size": row["nodes"] * gpu.per_node,
        "sampling.max_tokens": completion,
        "precision.dtype": "bf16",
        "engine.max_num_seqs": keys.get("engine.max_num_seqs", 1024),
        "data.train": "unused",
        "train.steps": 1_000_000,  # the checkpoint at the end is no part of a step
        "reward.terms": [{"name": "exact"}],
    }
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        if isinstance(row["model"], dict):
            (folder / "config.json").write_text(json.dumps(row["model"]))
        else:
            folder = shipped_model_folder(Path(row["model"]))
        sections: dict[str, dict[str, Any]] = {"model": {"path": str(folder)}}
        for key, value in keys.items():
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = value
        config_file = Path(work) / "row.yaml"
        config_file.write_text(yaml.safe_dump(sections))
        config = load_config(config_file)
        assumed = {"mean_length": mean_length, "scheduling_ahead": 0.0}  # no source says that its engine did
        return ComparedStep(row, model_of(config, gpu, assumed).plan(config))


def decode_milliseconds(entry: dict[str, Any], step: ComparedStep) -> tuple[float, float]:
    """Return the published and the predicted milliseconds of a decode step."""
    if "running" not in entry:
        longest = step.plan.inputs.config.sampling.max_tokens
        predicted, published = step.phase("rollout")
        assert published is not None, entry
        return 1e3 * published / longest, 1e3 * predicted / longest
    plan = step.plan
    active = token_cost(plan.inputs.spec, plan.inputs.workload.mean).active
    found = decode_step(plan.inputs, plan.memory.engine, entry["running"], active)
    return entry["published"], 1e3 * found.seconds


def compare_all() -> list[ComparedStep]:
    """Plan every row of the table."""
    return [compare(row) for row in _read()["rows"]]


def _read() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(ROWS.read_text(encoding="utf-8"))
    return found


def median_factor(steps: Sequence[ComparedStep]) -> float:
    """Return the median factor."""
    return statistics.median(step.factor for step in steps)


def missed_bars(steps: Sequence[ComparedStep]) -> list[str]:
    """Return one line per bar that is missed."""
    missed = [
        f"{step.row['name']}: factor {step.factor:.2f} is above {ROW_BAR:g}, and the row has no reason"
        for step in steps
        if step.factor > ROW_BAR and not step.row.get("reason")
    ]
    if (median := median_factor(steps)) > MEDIAN_BAR:
        missed.append(f"the median factor {median:.2f} is above {MEDIAN_BAR:g}")
    return missed


def tables(steps: Sequence[ComparedStep]) -> str:
    """Return the tables and the summary, as Markdown."""
    tested = [step for step in steps if not step.is_fitted]
    lines = [
        "| step | devices | fitted | published | predicted | factor | own sync |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in steps:
        own = step.plan.time.phases["sync"]
        fitted = ", ".join(f"`{name}`" for name in step.row.get("fitted", [])) or "no"
        lines.append(
            f"| {step.row['name']} | {step.row['nodes'] * 8} {step.row['gpu']} | {fitted} | {step.published:g} s "
            f"| {step.predicted:.1f} s | {step.factor:.2f} | {own:.1f} s |"
        )
    lines += [
        "",
        f"Median factor {median_factor(steps):.2f} of {len(steps)} rows; {median_factor(tested):.2f} of the "
        f"{len(tested)} rows that no assumption was fitted to; the largest is {max(s.factor for s in steps):.2f}.",
        "",
        "| step | rollout | log-probs | train | sync | offload |",
        "|---|---|---|---|---|---|",
    ]
    for step in steps:
        cells = [_cell(*step.phase(name)) for name in PHASES]
        lines.append(f"| {step.row['name']} | {' | '.join(cells)} | {step.phases['offload']:.1f} |")
    lines += [
        "",
        "Predicted seconds of each phase, and in parentheses the published ones where the source has them.",
        "",
    ]
    lines += ["| decode step | running | published | predicted | source |", "|---|---|---|---|---|"]
    by_name = {step.row["name"]: step for step in steps}
    for entry in _read()["decode_steps"]:
        published, predicted = decode_milliseconds(entry, by_name[entry["row"]])
        running = entry.get("running", "all")
        lines.append(f"| {entry['row']} | {running} | {published:.1f} ms | {predicted:.1f} ms | {entry['source']} |")
    lines.append("")
    for step in steps:
        notes = [f"source: {step.row['source']}"]
        notes += [f"{key}: {step.row[key]}" for key in ("assumed",) if key in step.row]
        if step.factor > ROW_BAR:
            notes.append(f"above {ROW_BAR:g} because {step.row.get('reason', 'no reason is given')}")
        lines.append(f"- {step.row['name']}: {'; '.join(notes)}.")
    return "\n".join(lines)


def _cell(predicted: float, published: float | None) -> str:
    return f"{predicted:.1f}" + (f" ({published:g})" if published is not None else "")


def page_with(text: str, page: str) -> str:
    """Return the page with the text between its two marks.

    Raises:
        UserError: the page lacks a mark.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{PAGE} does not contain {BEGIN} and {END}", remedy="restore both lines")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the tables of docs/measurements/planner.md")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    steps = compare_all()
    text = tables(steps)
    if args.write:
        PAGE.write_text(page_with(text, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(text)
    missed = missed_bars(steps)
    if args.json:
        rows = [
            {
                "name": step.row["name"],
                "published_seconds": step.published,
                "predicted_seconds": step.predicted,
                "factor": step.factor,
                "phase_seconds": step.phases,
            }
            for step in steps
        ]
        print(json.dumps({"rows": rows, "median_factor": median_factor(steps), "missed": missed}))
    for line in missed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
