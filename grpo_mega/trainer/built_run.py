"""A training job that is ready to run: its first evaluation, its steps, its last evaluation, its export.

Both objectives run like this; their classes say how they evaluate and what their steps are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from grpo_mega.checkpoint.export_hf import export_hf
from grpo_mega.checkpoint.manager import LoopState
from grpo_mega.config.schema import Config
from grpo_mega.observe.run_folder import RunState
from grpo_mega.observe.summary import Evaluation
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.trainer.phases import Phases
from grpo_mega.trainer.reporter import Observer


class RunJob(Protocol):
    """The objects of a loop that are used before and after it."""

    @property
    def config(self) -> Config:
        """The checked config."""
        ...

    @property
    def ranks(self) -> Ranks:
        """Layout and coordinates of this rank."""
        ...

    @property
    def phases(self) -> Phases:
        """Moves the objects between host and device."""
        ...

    @property
    def observer(self) -> Observer:
        """Reports the run."""
        ...


@dataclass(frozen=True)
class BuiltRun(ABC):
    """A training job. `state` is the state in which it starts."""

    job: RunJob
    run_state: RunState
    model_folder: Path
    state: LoopState
    policy: MegatronPolicy

    def run(self) -> None:
        """Run the first evaluation, the loop, the last evaluation, the export and the summary."""
        job, observer, run = self.job, self.job.observer, self.run_state
        try:
            digest = self.first_digest()
            known = run.previous is not None and run.previous.eval_before is not None
            is_new = run.status == "fresh" or self.state.step == 0  # a fork starts at a later step
            before = self.evaluate(self.state) if is_new and not known else None
            observer.started(digest, before)
            after = self.evaluate(self.train())
            if job.config.checkpoint.export_hf:
                with job.phases.reading_weights():
                    export_hf(self.policy, self.model_folder, run.folder.path / "hf", job.ranks)
            observer.finished(after, self.last_digest())
        except BaseException as error:
            observer.failed(error)
            raise

    @abstractmethod
    def first_digest(self) -> str:
        """Return one digest of the weights with which the run starts. Collective."""

    @abstractmethod
    def last_digest(self) -> str | None:
        """Return one digest of the trained weights, or None if the last step has reported it. Collective."""

    @abstractmethod
    def evaluate(self, state: LoopState) -> Evaluation | None:
        """Return the evaluation of the weights, or None without held-out prompts. Collective."""

    @abstractmethod
    def train(self) -> LoopState:
        """Run the remaining steps, and return the last state. Collective."""
