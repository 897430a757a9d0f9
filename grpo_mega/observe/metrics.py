"""Writes the metrics of a run: the lines of `metrics.jsonl`, the TensorBoard curves and the rollouts.

A name that is not in observe/metric_table.py is an error. The line of a step must be written before the checkpoint of
that step is published; otherwise a run that is killed between the two would never write it.
Asserted by tests/unit/observe/test_metrics.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from grpo_mega.observe.atomic_files import to_json
from grpo_mega.observe.metric_table import require_known
from grpo_mega.observe.rollouts import RolloutRow, write_rollouts
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.observe.tensorboard import TensorBoardWriter

StepMetrics = dict[str, float]


class MetricsWriter:
    """Writer of `metrics.jsonl`, curves and rollouts. Rank 0 only.

    Args:
        folder: run folder.
        first_step: first step that will be written.
        tensorboard: also write TensorBoard curves, and `rollouts_shown` rollouts per step as text.
        rollouts_shown: rollouts per step in TensorBoard.
    """

    def __init__(self, folder: RunFolder, *, first_step: int, tensorboard: bool, rollouts_shown: int) -> None:
        self._folder = folder
        self._next_step = first_step
        self._rollouts_shown = rollouts_shown
        self._tensorboard = TensorBoardWriter(folder.tensorboard, first_step=first_step) if tensorboard else None
        # Unbuffered: a line is written in one call. A crash can leave an incomplete line, which `open_run` removes.
        self._file = Path(folder.metrics).open("ab", buffering=0)  # noqa: SIM115 - closed by `close`

    def write(self, step: int, metrics: Mapping[str, float], config_changes: Sequence[str] = ()) -> None:
        """Write the line of a step: `step` first, then every metric. A value that is not finite becomes null.

        Config keys that changed before this step are the list `config_changes` of the line, and text in TensorBoard.

        Raises:
            ValueError: a name is unknown, or the step was already written.
        """
        if step < self._next_step:
            raise ValueError(f"step={step} of metrics.jsonl was already written; the next step is {self._next_step}")
        values = self._known_floats(metrics)
        changed = {"config_changes": list(config_changes)} if config_changes else {}
        self._file.write(f"{to_json({'step': step, **values, **changed})}\n".encode())
        self._next_step = step + 1
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, values)
            if config_changes:
                self._tensorboard.config_changes(step, config_changes)

    def write_curves(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write TensorBoard points only, for values without a line: the first and the last evaluation."""
        values = self._known_floats(metrics)
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, values)

    def write_alarms(self, step: int, texts: Sequence[str]) -> None:
        """Show the alarms that a step raised in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.alarms(step, texts)

    def write_rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        """Write all rollouts of a step to a file, and a few as text to TensorBoard."""
        write_rollouts(self._folder.rollouts_of(step), rows)
        if self._tensorboard is not None and self._rollouts_shown:
            self._tensorboard.rollouts(step, rows, self._rollouts_shown)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _known_floats(metrics: Mapping[str, float]) -> StepMetrics:
        require_known(metrics)
        return {name: float(value) for name, value in metrics.items()}
