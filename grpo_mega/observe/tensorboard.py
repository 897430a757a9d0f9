"""Writes TensorBoard event files: curves, their dashboard, histograms, texts and hyperparameters.

One object writes the files of a run folder. The only importer of the package, when a writer is created.
Asserted by tests/unit/observe/test_tensorboard.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grpo_mega.observe.dashboard import dashboard_summary
from grpo_mega.observe.event_files import cut_event_files
from grpo_mega.observe.hyperparameters import COMPARED, hyperparameters
from grpo_mega.observe.safe_text import html_text

Array = np.ndarray[Any, np.dtype[Any]]
_BINS = 64
"""Bins of a histogram, of equal width. TensorBoard shows 30; its default on writing, 1,549 of growing width, is most of
the file."""


class TensorBoardWriter:
    """Writer of the event file of one command.

    The files of earlier commands of the run are cut at `first_step` (event_files.py), so that a continued run is one
    curve. TensorBoard processes that have read them already hide the old points from that step on.

    Args:
        directory: folder of the event files, created if it does not exist.
        first_step: first step of this command.
        names: metrics of earlier steps of the run; the dashboard has their charts from the start.
        config: the resolved config, shown as text and as hyperparameters; None: not shown.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        first_step: int,
        names: Iterable[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "observe.trackers names tensorboard, which is not installed: pip install tensorboard, or remove it"
            ) from error
        continued = directory.exists()
        self._last = cut_event_files(directory, first_step) if continued else {}
        self._writer = SummaryWriter(str(directory), purge_step=first_step if continued else None)
        self._first_step = first_step
        self._config = config
        self._names: set[str] = set()
        if config is not None:
            self._write_config(config)
        self._add_to_dashboard(names)

    def write(
        self,
        step: int,
        scalars: Mapping[str, float],
        *,
        histograms: Mapping[str, Array] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Add one point to each curve, histogram and text, and flush.

        A curve that has a point of this step already keeps it: a run that was killed between the last evaluation and
        its summary makes that evaluation again.

        Args:
            step: step of the points.
            scalars: values by metric name; each must be in the metric table.
            histograms: finite values by name, of any shape; one without values is left out.
            texts: Markdown or HTML by name, escaped by the caller.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard.summary import histogram, text

        self._add_to_dashboard(scalars)
        new = {name: value for name, value in scalars.items() if self._last.get(name, step - 1) < step}
        found = [Summary.Value(tag=name, simple_value=value) for name, value in new.items()]
        for name, values in (histograms or {}).items():
            if values.size:
                found += histogram(name, values, _BINS).value
        for name, content in (texts or {}).items():
            found += text(name, content).value
        if found:  # one event for all: an event costs more than its values
            self._summary(Summary(value=found), step)
        self._writer.flush()

    def write_counts(self, step: int, name: str, limits: Sequence[float], counts: Array) -> None:
        """Add a histogram from the counts in its bins; nothing if all are 0.

        Args:
            step: step of the histogram.
            name: its name.
            limits: upper limit of each bin, ascending.
            counts: number of values in each bin.
        """
        found = np.flatnonzero(counts)
        if not found.size:
            return
        first, last = int(found[0]), int(found[-1])
        upper = np.array(limits[first : last + 1])
        lower = np.array([limits[max(0, first - 1)], *upper[:-1]])
        middle, kept = (lower + upper) / 2, counts[first : last + 1]
        self._writer.add_histogram_raw(
            name,
            min=float(lower[0]),
            max=float(upper[-1]),
            num=int(kept.sum()),
            sum=float((middle * kept).sum()),
            sum_squares=float((middle**2 * kept).sum()),
            bucket_limits=upper.tolist(),
            bucket_counts=kept.tolist(),
            global_step=step,
        )
        self._writer.flush()

    def finish(self) -> None:
        """Mark the run as complete in the tab of the hyperparameters."""
        if self._config is not None:
            self._write_hyperparameters(self._config, complete=True)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    def _add_to_dashboard(self, names: Iterable[str]) -> None:
        """Write the layout again when there are new curves; the last layout counts."""
        if new := set(names) - self._names:
            self._names |= new
            self._summary(dashboard_summary(self._names), self._first_step)

    def _write_config(self, config: Mapping[str, Any]) -> None:
        """Write the config as text. It belongs to the first step, so that it is replaced when that is made again."""
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", f"<pre>{html_text(text, 100_000)}</pre>", self._first_step)
        self._write_hyperparameters(config, complete=False)

    def _write_hyperparameters(self, config: Mapping[str, Any], *, complete: bool) -> None:
        from torch.utils.tensorboard.summary import hparams

        experiment, start, end = hparams(hyperparameters(config), dict.fromkeys(COMPARED, 0.0))
        for summary in (end,) if complete else (experiment, start):
            self._summary(summary, self._first_step)

    def _summary(self, summary: Any, step: int) -> None:
        files: Any = self._writer.file_writer
        files.add_summary(summary, step)
