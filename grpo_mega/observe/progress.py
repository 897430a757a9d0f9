"""Progress display of a run: live on a terminal, otherwise one plain line per step. Used by rank 0.

On a terminal the display replaces `sys.stdout` and `sys.stderr`, so that other output appears above it.
Asserted by tests/unit/observe/test_progress.py.
"""

from __future__ import annotations

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

from grpo_mega.observe.summary import duration

_RECENT_STEPS = 20
# In display order: metric, label, format.
_SHOWN = (
    ("train/perplexity", "perplexity", ".3f"),
    ("reward/mean", "reward", ".2f"),
    ("reward/accuracy", "accuracy", ".2f"),
    ("rollout/length_mean", "length", ".1f"),
    ("train/kl", "kl", ".2g"),
    ("train/mismatch_max", "mismatch", ".1g"),
    ("eval/accuracy", "held-out accuracy", ".2f"),
)


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
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
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

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report a completed step with its metrics."""
        self._step = step
        self._metrics = dict(metrics)
        if "time/step_seconds" in metrics:
            self._recent.append(metrics["time/step_seconds"])
        if self._live is not None:
            self._live.refresh()
        else:
            parts = (f"step {step}/{self._total_steps}", *self._numbers(), self._speed(), self._eta())
            self._write("  ".join(part for part in parts if part))

    def note(self, text: str) -> None:
        """Print a permanent line: above the live display, or among the plain lines."""
        if self._live is not None:
            # `Text` keeps square brackets, which rich would read as markup.
            self._live.console.print(Text(text))
        else:
            self._write(text)

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def _numbers(self) -> list[str]:
        return [f"{name} {_short(self._metrics[m], spec)}" for m, name, spec in _SHOWN if m in self._metrics]

    def _speed(self) -> str:
        """Return for example `1,234 tok/s  2.1 s (rollout 0.9 train 1.0 sync 0.1)`."""
        parts = []
        if "throughput/tokens_per_second" in self._metrics:
            parts.append(f"{self._metrics['throughput/tokens_per_second']:,.0f} tok/s")
        if "time/step_seconds" in self._metrics:
            phases = " ".join(
                f"{name.removeprefix('time/').removesuffix('_seconds')} {seconds:.1f}"
                for name, seconds in self._metrics.items()
                if name.startswith("time/") and name != "time/step_seconds" and seconds >= 0.05
            )
            parts.append(f"{self._metrics['time/step_seconds']:.1f} s" + (f" ({phases})" if phases else ""))
        return "  ".join(parts)

    def _eta(self) -> str:
        """Return the remaining time, estimated from the mean of the last steps."""
        if not self._recent:
            return ""
        return f"ETA {duration((self._total_steps - self._step) * sum(self._recent) / len(self._recent))}"

    def _render(self) -> Group:
        bar = Table.grid(padding=(0, 2))
        now = f"{self._phase} {time.monotonic() - self._phase_start:.0f} s" if self._phase else ""
        bar.add_row(
            Text(f"step {self._step}/{self._total_steps}", style="bold"),
            ProgressBar(total=max(1, self._total_steps), completed=self._step, width=30),
            Text(now, style="cyan"),
            Text(self._eta()),
        )
        lines = ("  ".join(self._numbers()), self._speed())
        return Group(bar, *(Text(line) for line in lines if line))


def _short(value: float, spec: str) -> str:
    """Return for example `0.0012` or `3e-7`."""
    return format(value, spec).replace("e-0", "e-").replace("e+0", "e+")
