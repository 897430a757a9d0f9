"""Progress display of a run: live on a terminal, otherwise one plain line per step. Used by rank 0.

On a terminal the display replaces `sys.stdout` and `sys.stderr`, so that other output appears above it. All lines are
also in the log file of the rank.
Asserted by tests/unit/observe/test_progress.py.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_mega.observe.log import FILE_ONLY
from grpo_mega.observe.safe_text import printable
from grpo_mega.observe.step_columns import HELD_OUT, StepColumns, phase_seconds, short_number
from grpo_mega.observe.summary import duration

_RECENT_STEPS = 20
_SHOWN_ROWS = 6
_HEADER_EVERY = 25  # plain lines
_BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_TRENDS = (("reward/mean", "reward"), ("train/loss", "loss"))
log = logging.getLogger(__name__)


class Progress:
    """Display of the steps `first_step` to `total_steps`.

    Args:
        total_steps: last step of the run.
        first_step: first step of this command.
        stream: output; None: standard output.
        terminal: live display (True) or plain lines (False); None: live if `stream` is a terminal.
    """

    def __init__(
        self, total_steps: int, first_step: int = 1, stream: TextIO | None = None, terminal: bool | None = None
    ) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._total_steps = total_steps
        self._step = first_step - 1
        self._metrics: Mapping[str, float] = {}
        self._columns = StepColumns(total_steps)
        self._header, self._rows_since_header = "", 0
        self._rows: deque[str] = deque(maxlen=_SHOWN_ROWS)
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._trend: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._held_out: list[tuple[int, float]] = []
        self._phase = ""
        self._phase_start = time.monotonic()
        self._live: Live | None = None
        if self._stream.isatty() if terminal is None else terminal:
            console = Console(file=self._stream, force_terminal=True)
            self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._phase = ""
            self._live.stop()

    def phase(self, name: str) -> None:
        """Set the current phase, which only the live display shows."""
        self._phase = name
        self._phase_start = time.monotonic()
        if self._live is not None:
            self._live.refresh()

    def held_out(self, step: int, accuracy: float) -> None:
        """Set the held-out accuracy after `step` steps, which stays visible until the next evaluation."""
        self._held_out = [*self._held_out[:1], (step, accuracy)]

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report a completed step with its metrics."""
        if HELD_OUT in metrics:
            self.held_out(step, metrics[HELD_OUT])
        known = {HELD_OUT: self._held_out[-1][1]} if self._held_out else {}
        self._step, self._metrics = step, {**metrics, **known}
        if "time/step_seconds" in metrics:
            self._recent.append(metrics["time/step_seconds"])
        if (trend := self._trend_metric()) is not None:
            self._trend.append(metrics[trend[0]])
        self._write_header(self._columns.header(self._metrics))
        row = self._columns.row(step, self._metrics, self._eta_seconds())
        self._rows.append(self._columns.row(step, _without_phases(self._metrics), self._eta_seconds()))
        self._write_step(row)

    def note(self, text: str) -> None:
        """Print a permanent line: above the live display, or among the plain lines."""
        log.info("%s", text, extra=FILE_ONLY)
        if self._live is not None:
            # `Text` keeps square brackets, which rich would read as markup.
            self._live.console.print(Text(printable(text)))
        else:
            self._write(printable(text))

    def _write_header(self, header: str) -> None:
        """Write the labels when they differ from those above, and again every `_HEADER_EVERY` rows."""
        self._rows_since_header += 1
        if header == self._header and self._rows_since_header <= _HEADER_EVERY:
            return
        self._header, self._rows_since_header = header, 1
        self._write_step(header)

    def _write_step(self, line: str) -> None:
        log.info("%s", line, extra=FILE_ONLY)
        if self._live is not None:
            self._live.refresh()
        else:
            self._write(line)

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def _eta_seconds(self) -> float | None:
        """Return the remaining time, estimated from the mean of the last steps."""
        if not self._recent:
            return None
        return (self._total_steps - self._step) * sum(self._recent) / len(self._recent)

    def _trend_metric(self) -> tuple[str, str] | None:
        return next(((metric, label) for metric, label in _TRENDS if metric in self._metrics), None)

    def _render(self) -> Group:
        bar = Table.grid(padding=(0, 2))
        now = f"{self._phase} {time.monotonic() - self._phase_start:.0f} s" if self._phase else ""
        eta = self._eta_seconds()
        bar.add_row(
            Text(f"step {self._step}/{self._total_steps}", style="bold"),
            ProgressBar(total=max(1, self._total_steps), completed=self._step, width=24),
            Text(now, style="cyan"),
            Text("" if eta is None else f"ETA {duration(eta)}"),
        )
        header = self._header.partition("  seconds")[0]
        lines = (*((header, *self._rows) if self._rows else ()), self._trends(), phase_seconds(self._metrics))
        return Group(bar, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines if line))

    def _trends(self) -> str:
        """Return for example `reward <bars> 0.51 -> 0.63   held-out accuracy 0.478 -> 0.950 (step 25)`."""
        parts = []
        trend = self._trend_metric()
        if trend is not None and len(self._trend) > 1:
            first, last = (short_number(self._trend[i], ".3g") for i in (0, -1))
            parts.append(f"{trend[1]} {sparkline(self._trend)} {first} -> {last}")
        if self._held_out:
            values = " -> ".join(f"{value:.3f}" for _, value in self._held_out)
            parts.append(f"held-out accuracy {values} (step {self._held_out[-1][0]})")
        return "   ".join(parts)


def sparkline(values: deque[float]) -> str:
    """Return one bar per value, from the lowest to the highest; a value that is not finite is a space."""
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(_BARS) - 1
    return "".join(
        (_BARS[round(top * (value - low) / span)] if span else _BARS[0]) if abs(value) < float("inf") else " "
        for value in values
    )


def _without_phases(metrics: Mapping[str, float]) -> dict[str, float]:
    return {n: v for n, v in metrics.items() if not n.startswith("time/") or n == "time/step_seconds"}
