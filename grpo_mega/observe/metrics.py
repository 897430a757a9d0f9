"""Writes the metrics of a run: the lines of `metrics.jsonl`, TensorBoard and the rollouts.

A name that is not in observe/metric_table.py is an error. The line of a step must be written before the checkpoint of
that step is published; otherwise a run that is killed between the two would never write it.
Asserted by tests/unit/observe/test_metrics.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from grpo_mega.observe.atomic_files import to_json
from grpo_mega.observe.distributions import distributions
from grpo_mega.observe.group_texts import TokenTexts, group_texts
from grpo_mega.observe.metric_table import require_known
from grpo_mega.observe.rollouts import RolloutRow, write_rollouts
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.observe.safe_text import html_text
from grpo_mega.observe.tensorboard import TensorBoardWriter

StepMetrics = dict[str, float]
EndEvaluation = Literal["before", "after"]
"""The evaluation before the first step, or after the last one."""


class MetricsWriter:
    """Writer of `metrics.jsonl`, TensorBoard and rollouts. Rank 0 only.

    Args:
        folder: run folder.
        first_step: first step that will be written.
        tensorboard: also write to this object, which is closed by `close`; None: no TensorBoard.
        groups_shown: groups per step in TensorBoard.
        token_texts: returns the texts of tokens, for TensorBoard; None: no tokens are shown.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        first_step: int,
        tensorboard: TensorBoardWriter | None = None,
        groups_shown: int = 0,
        token_texts: TokenTexts | None = None,
    ) -> None:
        self._folder = folder
        self._next_step = first_step
        self._tensorboard, self._groups_shown, self._token_texts = tensorboard, groups_shown, token_texts
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
        if self._tensorboard is not None:
            texts = {"config_changes": _code_lines(config_changes)} if config_changes else {}
            self._tensorboard.write(step, values, texts=texts)

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
        if self._tensorboard is not None:
            self._tensorboard.write(step, values)

    def write_alarms(self, step: int, texts: Sequence[str]) -> None:
        """Show the alarms that a step raised in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.write(step, {}, texts={"alarms": _code_lines(texts)})

    def write_rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        """Write all rollouts of a step to a file; write their distributions and a few groups to TensorBoard."""
        write_rollouts(self._folder.rollouts_of(step), rows)
        if self._tensorboard is not None:
            texts = group_texts(rows, self._groups_shown, self._token_texts)
            self._tensorboard.write(step, {}, histograms=distributions(rows), texts=texts)

    def finish(self) -> None:
        """Mark the run as complete in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.finish()

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

    def _write_line(self, values: Mapping[str, object]) -> None:
        self._file.write(f"{to_json(values)}\n".encode())

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
