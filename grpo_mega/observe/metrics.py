"""Writes the metrics of a run in the background: the lines of `metrics.jsonl`, TensorBoard, and other trackers.

A name that is not in observe/metric_table.py is an error. The line of a step must be on disk before the checkpoint of
that step is published (trainer/save_points.py); otherwise a run that is killed between the two would never write it.
Asserted by tests/unit/observe/test_metrics.py.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from grpo_mega.observe.atomic_files import to_json
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.distributions import distributions
from grpo_mega.observe.group_texts import TokenTexts, group_texts
from grpo_mega.observe.metric_table import require_known
from grpo_mega.observe.ratio_bins import RATIO_LIMITS
from grpo_mega.observe.rollout_files.columns import RolloutColumns
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.observe.safe_text import html_text
from grpo_mega.observe.tensorboard import TensorBoardWriter
from grpo_mega.observe.trackers.tracker import QueuedTracker

StepMetrics = dict[str, float]
EndEvaluation = Literal["before", "after"]
"""The evaluation before the first step, or after the last one."""


class MetricsFileError(RuntimeError):
    """A line of metrics.jsonl could not be written. Names the file, the step and the reason."""


class MetricsWriter:
    """Writer of `metrics.jsonl` and TensorBoard. Rank 0 only.

    Every method queues its work on the background writer and returns. If an earlier write failed, it raises the
    exception of that write.

    Args:
        folder: run folder.
        writer: writes in the order of the calls.
        first_step: first step that will be written.
        tensorboard: also write to this object, which is closed by `close`; None: no TensorBoard.
        token_texts: returns the texts of tokens, for TensorBoard; None: no tokens are shown.
        trackers: also write the metrics to these, which are closed by `close`.
    """

    def __init__(
        self,
        folder: RunFolder,
        writer: BackgroundWriter,
        *,
        first_step: int,
        tensorboard: TensorBoardWriter | None = None,
        token_texts: TokenTexts | None = None,
        trackers: Sequence[QueuedTracker] = (),
    ) -> None:
        self._trackers = trackers
        self._writer, self._next_step = writer, first_step
        self._tensorboard, self._token_texts = tensorboard, token_texts
        self._evaluated = _end_evaluations(folder.metrics)
        # Unbuffered: a line is written in one call. A crash can leave an incomplete line, which `open_run` removes.
        self._file = Path(folder.metrics).open("ab", buffering=0)  # noqa: SIM115 - closed by `close`

    def write(self, step: int, metrics: Mapping[str, float], config_changes: Sequence[str] = ()) -> None:
        """Write the line of a step: `step` and `wall_time` first, then every metric.

        `wall_time` is in seconds since 1970. A value that is not finite becomes null. Config keys that changed before
        this step are the list `config_changes` of the line, and text in TensorBoard.

        Raises:
            ValueError: a name is unknown, or the step was already written.
        """
        if step < self._next_step:
            raise ValueError(f"step={step} of metrics.jsonl was already written; the next step is {self._next_step}")
        values = self._known_floats(metrics)
        changed = {"config_changes": list(config_changes)} if config_changes else {}
        self._write_line({"step": step, "wall_time": time.time(), **values, **changed})
        self._next_step = step + 1
        self._submit_points(step, values, {"config_changes": _code_lines(config_changes)} if config_changes else None)

    def write_evaluation(self, step: int, which: EndEvaluation, metrics: Mapping[str, float]) -> None:
        """Write a line of its own for an evaluation at one end of the run, with the key `evaluation`.

        An evaluation that a killed run had written and that is made again is not written again.

        Args:
            step: steps that are complete.
            which: which end.
            metrics: the numbers of the evaluation.
        """
        values = self._known_floats(metrics)
        if (step, which) not in self._evaluated:
            self._write_line({"step": step, "wall_time": time.time(), "evaluation": which, **values})
            self._evaluated.add((step, which))
        self._submit_points(step, values)

    def write_alarms(self, step: int, texts: Sequence[str]) -> None:
        """Show the alarms that a step raised in TensorBoard."""
        self._submit_points(step, {}, {"alarms": _code_lines(texts)})

    def show_rollouts(
        self,
        columns: RolloutColumns,
        shown: Sequence[RolloutColumns],
        order: Sequence[int],
        ratio_counts: NDArray[np.float64],
    ) -> None:
        """Write the distributions of the rollouts of this rank, and a few groups of all ranks, to TensorBoard.

        Args:
            columns: rollouts of this rank.
            shown: whole groups of the step, each in one part; groups that are not in `order` are left out.
            order: the groups that are shown, in this order.
            ratio_counts: loss tokens of the step's updates in the bins of ratio_bins.py; empty: there is none.
        """
        if self._tensorboard is not None:
            tensorboard, token_texts = self._tensorboard, self._token_texts

            def write() -> None:
                texts = group_texts(shown, order, token_texts)
                tensorboard.write(columns.step, {}, histograms=distributions(columns), texts=texts)
                tensorboard.write_counts(columns.step, "train/ratio_distribution", RATIO_LIMITS, ratio_counts)

            self._writer.submit(write)

    def finish(self) -> None:
        """Mark the run as complete in TensorBoard."""
        if self._tensorboard is not None:
            self._writer.submit(self._tensorboard.finish)
        for tracker in self._trackers:
            tracker.finish()

    def close(self) -> None:
        """Write what is queued, and close the files. An error of the background writer stays with it."""
        self._writer.wait()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_line(self, values: Mapping[str, object]) -> None:
        self._writer.submit(lambda: self._append(values))

    def _submit_points(self, step: int, values: StepMetrics, texts: Mapping[str, str] | None = None) -> None:
        if self._tensorboard is not None:
            tensorboard = self._tensorboard
            self._writer.submit(lambda: tensorboard.write(step, values, texts=texts))
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for tracker in self._trackers if finite else ():
            tracker.write(step, finite)

    def _append(self, values: Mapping[str, object]) -> None:
        content = f"{to_json(values)}\n".encode()
        try:
            if self._file.write(content) != len(content):
                raise OSError("the file system is full")
        except OSError as error:
            raise MetricsFileError(
                f"the metrics of step {values['step']} cannot be written to {self._file.name} ({error}). The run stops,"
                " and its complete checkpoints are unchanged; after freeing space, the same command continues from the"
                " newest"
            ) from error

    @staticmethod
    def _known_floats(metrics: Mapping[str, float]) -> StepMetrics:
        require_known(metrics)
        return {name: float(value) for name, value in metrics.items()}


def _end_evaluations(path: Path) -> set[tuple[int, str]]:
    """Return step and end of each evaluation line of `metrics.jsonl`."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if '"evaluation": ' in line]
    return {(line["step"], line["evaluation"]) for line in found}


def _code_lines(lines: Sequence[str]) -> str:
    return "".join(f"<pre>{html_text(line, 2000)}</pre>" for line in lines)
