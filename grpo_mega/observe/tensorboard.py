"""Writes curves and a few rollouts for TensorBoard. The only importer of that package, when a writer is created."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo_mega.observe.rollouts import RolloutRow


class TensorBoardWriter:
    """Writer of one event file. In a continued run TensorBoard hides older points from `first_step` on.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, directory: Path, *, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "observe.tensorboard=true needs tensorboard: pip install tensorboard, or observe.tensorboard=false"
            ) from error
        purge_step = first_step if directory.exists() else None
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to the curve of each metric and flush."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def rollouts(self, step: int, rows: Sequence[RolloutRow], shown: int) -> None:
        """Add at most `shown` rollouts as text, evenly selected from the highest to the lowest reward."""
        for position, row in enumerate(_spread(rows, shown)):
            self._writer.add_text(f"rollouts/{position}", render_rollout(row), step)
        self._writer.flush()

    def config_changes(self, step: int, changes: Sequence[str]) -> None:
        """Add the config keys that changed before a step as text."""
        self._writer.add_text("config_changes", "\n\n".join(f"`{change}`" for change in changes), step)
        self._writer.flush()

    def alarms(self, step: int, texts: Sequence[str]) -> None:
        """Add the alarms that a step raised as text."""
        self._writer.add_text("alarms", "\n\n".join(texts), step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def _spread(rows: Sequence[RolloutRow], shown: int) -> list[RolloutRow]:
    by_reward = sorted(rows, key=lambda row: -math.inf if row["reward"] is None else row["reward"], reverse=True)
    if len(by_reward) <= shown:
        return by_reward
    if shown == 1:
        return by_reward[:1]
    return [by_reward[round(i * (len(by_reward) - 1) / (shown - 1))] for i in range(shown)]


def render_rollout(row: RolloutRow) -> str:
    """Return Markdown: one line of numbers, then prompt and completion verbatim."""
    components = "".join(f" {name} {value:.3g}" for name, value in row["reward_components"].items())
    reward = "none" if row["reward"] is None else f"{row['reward']:.3g}"
    numbers = (
        f"reward **{reward}** ({components.strip() or 'no components'}), advantage {row['advantage']:+.3f}, "
        f"{len(row['completion_ids'])} tokens, ended by {row['stop_reason']}, answer `{row['answer']}`"
    )
    return "\n\n".join((numbers, "prompt", _fenced(row["prompt"]), "completion", _fenced(row["completion"])))


def _fenced(text: str) -> str:
    """Return a code block whose fence is longer than any run of backticks in the text, so that no text ends it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
