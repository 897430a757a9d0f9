"""Finds what `grpo-mega replay` needs in a run folder: checkpoint, rollouts, metrics and the config of the step.

Nothing in the folder is changed. Asserted by tests/unit/cli/test_replay.py.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo_mega.cli.compare_layouts import Layout
from grpo_mega.config.load import config_from_values
from grpo_mega.config.schema import Config
from grpo_mega.data.hub.fetch import with_hub_inputs
from grpo_mega.observe.history import read_lines
from grpo_mega.observe.run_folder import RunFolder, checkpoint_step
from grpo_mega.observe.summary import read_summary
from grpo_mega.types import UserError


@dataclass(frozen=True)
class ReplayInputs:
    """Inputs of a replay.

    Attributes:
        config: of the steps that are made again, in the layout of the replay.
        model: Hugging Face folder of the base model.
        run: the run folder.
        start: checkpoint from which the steps are made; None: the base model.
        first_step: first step that is made.
        step: last one, which is compared.
        kl_coef_changed: the KL coefficient was changed at the start of the first step.
        same_layout: the layout is that of the run.
    """

    config: Config
    model: Path
    run: Path
    start: Path | None
    first_step: int
    step: int
    kl_coef_changed: bool
    same_layout: bool

    @property
    def start_name(self) -> str:
        """Name of the start for people."""
        return "the base model" if self.start is None else f"{self.start.parent.name}/{self.start.name}"

    def as_job(self) -> dict[str, Any]:
        """Return the values that the ranks need, as JSON."""
        return {
            "config": self.config.model_dump(mode="json"),
            "model": str(self.model),
            "run": str(self.run),
            "start": None if self.start is None else str(self.start),
            "first_step": self.first_step,
            "step": self.step,
            "kl_coef_changed": self.kl_coef_changed,
            "same_layout": self.same_layout,
        }


def find_inputs(run: Path, step: int, layout: Layout | None) -> ReplayInputs:
    """Find the inputs of a replay; `layout` is None for that of the run.

    Raises:
        UserError: `run` is not a run of reinforcement learning, the step was not made, its rollouts or those of a step
            between are missing, no checkpoint before it is left, or the layout is not possible.
    """
    folder = RunFolder(run.absolute())
    if not folder.config.is_file():
        raise UserError(f"RUN_DIR={run} has no config.yaml, so it is not a run", remedy="name the folder of a run")
    values = _read_config(folder)
    made = [number for number, _ in read_lines(folder.metrics)]
    if step not in made:
        known = f"{min(made)} to {max(made)}" if made else "none"
        raise UserError(f"--step={step} is not in metrics.jsonl of {run}", remedy=f"complete steps: {known}")
    start, begin = _find_start(folder, values, step)
    missing = [number for number in range(begin + 1, step + 1) if not folder.rollouts_of(number).is_dir()]
    if missing:
        raise UserError(
            f"--step={step} needs the rollouts of step {missing[0]}: {folder.rollouts_of(missing[0])} was not found",
            remedy="use a step of a run with observe.rollouts=all",
        )
    changes = _read_changes(folder)
    between = [change for change in changes if begin < change["after_step"] < step]
    if between:
        raise UserError(
            f"--step={step}: {between[0]['key']} changed after step {between[0]['after_step']}, and the newest "
            f"checkpoint before the step is that of step {begin}",
            remedy=f"use a step up to {between[0]['after_step']}",
        )
    values = config_before(values, [change for change in changes if change["after_step"] >= step])
    changed = [change["key"] for change in changes if change["after_step"] == begin]
    config = _config_of(folder, values, layout)
    return ReplayInputs(
        config,
        _model_folder(config),
        folder.path,
        start,
        begin + 1,
        step,
        any(key in ("algorithm.kl_coef", "algorithm.kl_target") for key in changed),
        layout is None,
    )


def config_before(values: Mapping[str, Any], later: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the config of a run before these changes, which config_changes.jsonl has in the order of time."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    for change in reversed(later):
        *sections, name = str(change["key"]).split(".")
        section = found
        for each in sections:
            section = section.setdefault(each, {})
        if change["before"] == "unset":
            section.pop(name, None)
        else:
            section[name] = ast.literal_eval(change["before"])
    return found


def _read_config(folder: RunFolder) -> dict[str, Any]:
    try:
        values = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder.config} cannot be read ({error})", remedy="restore the file") from None
    if not isinstance(values, dict):
        raise UserError(f"{folder.config} must be the config of a run", remedy="restore the file")
    return values


def _read_changes(folder: RunFolder) -> list[dict[str, Any]]:
    if not folder.config_changes.is_file():
        return []
    try:
        return [json.loads(line) for line in folder.config_changes.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{folder.config_changes} cannot be read ({error})", remedy="restore the file") from None


def _find_start(folder: RunFolder, values: Mapping[str, Any], step: int) -> tuple[Path | None, int]:
    """Return the newest checkpoint before a step and its number of steps; None and 0 for the base model."""
    before = {number: path for number, path in folder.complete_checkpoints().items() if number < step}
    if before:
        return before[max(before)], max(before)
    resume = str((values.get("checkpoint") or {}).get("resume", "auto"))
    if resume in ("auto", "never"):
        return None, 0
    number = checkpoint_step(Path(resume))
    if number is None or number >= step or not Path(resume).is_dir():
        raise UserError(
            f"--step={step}: the run branched from checkpoint.resume={resume}, which was not found, and has no "
            "checkpoint of its own before the step",
            remedy="restore that checkpoint, or use a later step",
        )
    return Path(resume), number


def _config_of(folder: RunFolder, values: dict[str, Any], layout: Layout | None) -> Config:
    """Return the config in the layout of the replay, after checking its rules. No engine is built."""
    from grpo_mega.doctor.model_rules import check_model
    from grpo_mega.parallel.topology import Topology

    world = (values.get("run") or {}).get("world_size")
    if world is None and folder.summary.is_file():
        world = read_summary(folder.summary).layout.get("world_size")
    values["run"] = {**(values.get("run") or {}), "world_size": world or 1}
    overrides: list[str] = []
    if layout is not None:
        colocated = {"placement": "colocated", "urls": [], "spare_urls": [], "tp": 1, "dp": 1}
        engine = {**(values.get("engine") or {}), **colocated}
        values |= {"parallel": {}, "engine": engine}
        overrides = list(layout.overrides)
    try:
        config = with_hub_inputs(config_from_values(values, overrides, [Path.cwd()]), with_data=False)
        if config.is_sft:
            raise UserError(
                "train.objective=sft has no rollouts to replay", remedy="use a run of reinforcement learning"
            )
        check_model(config, Topology.of(config, config.run.world_size or 1), with_engine=False)
    except UserError as error:
        if layout is None:
            raise
        raise UserError(f"--layout={layout.text}: {error.message}", remedy=error.remedy) from None
    return config


def _model_folder(config: Config) -> Path:
    from grpo_mega.tiny_base.train import model_folder_of

    return model_folder_of(config)
