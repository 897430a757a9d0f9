"""The adapter of Weights & Biases, the only importer of `wandb`.

Without WANDB_MODE the run is offline: `wandb sync RUN_DIR/wandb/offline-run-*` uploads it. A continued run has the same
id, so that an upload shows one run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WandbTracker:
    """`Tracker` of Weights & Biases.

    Args:
        folder: the run folder.
        identity: id of the run, the same in all its commands.
        config: the resolved config.
    """

    def __init__(self, folder: Path, identity: str, config: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            dir=str(folder),
            mode=None if "WANDB_MODE" in os.environ else "offline",
            id=identity,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "grpo_mega"),
            name=folder.name,
            config=dict(config),
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
