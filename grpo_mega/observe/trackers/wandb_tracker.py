"""The adapter of Weights & Biases, the only importer of `wandb`.

Without WANDB_MODE the run is offline: `wandb sync RUN_DIR/wandb/offline-run-*` uploads it. A continued run has the same
id, so that an upload shows one run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from grpo_mega.observe.trackers.tracked_run import TrackedRun


class WandbTracker:
    """`Tracker` of Weights & Biases."""

    def __init__(self, run: TrackedRun) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            dir=str(run.folder),
            mode=None if "WANDB_MODE" in os.environ else "offline",
            id=run.identity,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "grpo_mega"),
            name=run.folder.name,
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # the library's own count would reject a step made again

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        self._run.log({"step": step, **metrics})

    def finish(self, *, is_complete: bool) -> None:
        """Mark the run as complete or interrupted."""
        self._run.finish(exit_code=0 if is_complete else 1)
