"""Save points of a job that never saves: a call of `train`, one step in a benchmark, would save at its end."""

from __future__ import annotations


class NoSaves:
    """Replacement of `grpo_mega.trainer.save_points.SavePoints`."""

    wait_seconds = 0.0

    def start(self, *_: object) -> None:
        """Do nothing."""

    def stop_before_updates(self, *_: object) -> None:
        """Do nothing: there are no stop requests."""

    def after_updates(self, *_: object) -> None:
        """Do nothing: no checkpoint is due."""

    def end_step(self, *_: object) -> None:
        """Do nothing: there is no checkpoint."""
