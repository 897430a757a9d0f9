"""The adapter of MLflow, the only importer of `mlflow`.

Without MLFLOW_TRACKING_URI the run is in a database of its own: `mlflow ui --backend-store-uri sqlite:///RUN_DIR/mlflow.db`
shows it. A continued run continues its curves.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from grpo_mega.observe.hyperparameters import hyperparameters
from grpo_mega.observe.trackers.tracked_run import TrackedRun

_NOT_ALLOWED = re.compile(r"[^\w./: -]")  # in the name of a metric
_RUN_TAG = "grpo_mega.run"
_MAX_TEXT = 500  # characters of a parameter


class MlflowTracker:
    """`Tracker` of MLflow."""

    def __init__(self, run: TrackedRun) -> None:
        client: Any = importlib.import_module("mlflow.tracking").MlflowClient
        self._entities: Any = importlib.import_module("mlflow.entities")
        uri = None if "MLFLOW_TRACKING_URI" in os.environ else f"sqlite:///{run.folder.absolute()}/mlflow.db"
        self._client = client(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "grpo_mega")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        known = self._client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{run.identity}'", max_results=1)
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {_RUN_TAG: run.identity}
        self._id = self._client.create_run(experiment_id, run_name=run.folder.name, tags=tags).info.run_id
        parameters = [
            self._entities.Param(key, str(value)[:_MAX_TEXT]) for key, value in hyperparameters(run.config).items()
        ]
        self._client.log_batch(self._id, params=parameters[:100])

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        now = int(time.time() * 1000)
        points = [
            self._entities.Metric(_NOT_ALLOWED.sub("_", name), value, now, step) for name, value in metrics.items()
        ]
        for start in range(0, len(points), 1000):  # the most that one call takes
            self._client.log_batch(self._id, metrics=points[start : start + 1000])

    def finish(self, *, is_complete: bool) -> None:
        """Mark the run as complete or interrupted."""
        self._client.set_terminated(self._id, "FINISHED" if is_complete else "KILLED")
