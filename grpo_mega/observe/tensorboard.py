"""Curves and a few rollouts for TensorBoard. Its package is imported when the first writer is made, and only here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo_mega.observe.rollouts import RolloutRow


class TensorBoardWriter:
    """One event file. On a continued run TensorBoard hides the points from `first_step` on of the files before it.

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
        """A point on the curve of each metric, readable at once."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def rollouts(self, step: int, rows: Sequence[RolloutRow], shown: int) -> None:
        """At most `shown` rollouts as text, spread evenly from the highest reward to the lowest."""
        for position, row in enumerate(_spread(rows, shown)):
            self._writer.add_text(f"rollouts/{position}", render_rollout(row), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _spread(rows: Sequence[RolloutRow], shown: int) -> list[RolloutRow]:
    by_reward = sorted(rows, key=lambda row: -row["reward"])
    if len(by_reward) <= shown:
        return by_reward
    if shown == 1:
        return by_reward[:1]
    return [by_reward[round(i * (len(by_reward) - 1) / (shown - 1))] for i in range(shown)]


def render_rollout(row: RolloutRow) -> str:
    """Markdown: the numbers in one line, then prompt and completion as they are."""
    components = "".join(f" {name} {value:.3g}" for name, value in row["reward_components"].items())
    numbers = (
        f"reward **{row['reward']:.3g}** ({components.strip() or 'no components'}), advantage {row['advantage']:+.3f}, "
        f"{len(row['completion_ids'])} tokens, ended by {row['stop_reason']}, answer `{row['answer']}`"
    )
    return "\n\n".join((numbers, "prompt", _fenced(row["prompt"]), "completion", _fenced(row["completion"])))


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in the text, so that no text can leave it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
