"""Draws lengths of answers for a simulation, from recorded rollouts or a log-normal distribution.

Asserted by tests/unit/planner/simulation/test_lengths.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grpo_mega.types import UserError

LOGNORMAL = "lognormal:"
_SUMMARY_GROUPS = 4096


@dataclass(frozen=True, eq=False)
class AnswerLengths:
    """A source of lengths of whole groups.

    Attributes:
        name: name of the source in `--lengths`.
        max_tokens: `sampling.max_tokens`; longer answers are cut there.
        prompts: recorded lengths; an entry has the lengths of the answers to one prompt. An answer's length depends on
            its prompt, and a group is complete when its longest answer is, so a group is drawn from one entry.
        mean_log: MU of the log-normal distribution, which is used if `prompts` is empty.
        sigma: SIGMA of the log-normal distribution.
    """

    name: str
    max_tokens: int
    prompts: Sequence[NDArray[np.int64]] = ()
    mean_log: float = 0.0
    sigma: float = 0.0

    def draw(self, rng: np.random.Generator, num_groups: int, group_size: int) -> NDArray[np.int64]:
        """Return the lengths of new groups, in tokens.

        Returns:
            [num_groups, group_size] int64, from 1 to `max_tokens`.
        """
        if not self.prompts:
            drawn = rng.lognormal(self.mean_log, self.sigma, (num_groups, group_size))
            return np.clip(np.ceil(drawn), 1, self.max_tokens).astype(np.int64)
        chosen = rng.integers(len(self.prompts), size=num_groups)
        rows = [
            rng.choice(known, group_size, replace=len(known) < group_size)
            for known in (self.prompts[i] for i in chosen.tolist())
        ]
        return np.clip(np.array(rows, dtype=np.int64).reshape(num_groups, group_size), 1, self.max_tokens)

    def summary(self, seed: int = 0) -> LengthSummary:
        """Return the mean and the quantiles of the recorded lengths, or of a large sample of the distribution."""
        if self.prompts:
            known = np.concatenate(self.prompts)
            return LengthSummary.of(np.clip(known, 1, self.max_tokens), self.max_tokens)
        return LengthSummary.of(self.draw(np.random.default_rng(seed), _SUMMARY_GROUPS, 16).ravel(), self.max_tokens)


@dataclass(frozen=True)
class LengthSummary:
    """Mean and quantiles of lengths in tokens, and the fraction that is cut at `sampling.max_tokens`."""

    mean: float
    p50: float
    p99: float
    cut_fraction: float

    @classmethod
    def of(cls, lengths: NDArray[np.int64], max_tokens: int) -> LengthSummary:
        """Return the summary of lengths [N] in tokens, cut at `max_tokens`."""
        p50, p99 = np.percentile(lengths, (50, 99)).tolist()
        return cls(float(lengths.mean()), p50, p99, float((lengths >= max_tokens).mean()))


def lognormal_lengths(text: str, max_tokens: int) -> AnswerLengths:
    """Return the source of `lognormal:MU,SIGMA`: the logarithm of a length has mean MU and standard deviation SIGMA.

    Raises:
        UserError: MU or SIGMA is not a number, or is out of range.
    """
    parts = text.removeprefix(LOGNORMAL).split(",")
    try:
        mean_log, sigma = (float(part) for part in parts)
    except ValueError:
        mean_log = sigma = float("nan")
    if not (0 <= mean_log <= 20 and 0 <= sigma <= 10):
        raise UserError(
            f"--lengths={text} must be lognormal:MU,SIGMA with MU from 0 to 20 and SIGMA from 0 to 10, in natural "
            "logarithms of tokens",
            remedy="use for example --lengths lognormal:6.5,1.0, which has a median of e^6.5 = 665 tokens",
        )
    return AnswerLengths(text, max_tokens, mean_log=mean_log, sigma=sigma)


def text_lengths(name: str, text: str, max_tokens: int) -> AnswerLengths:
    """Return the source of a text file: a length in tokens per line, or the lengths of one prompt's answers per line.

    If every line has a single length, the answers of a group are drawn independently from all lines.

    Args:
        name: of the file.
        text: its content; empty lines are skipped.
        max_tokens: `sampling.max_tokens`.

    Raises:
        UserError: a line has no positive whole number, or there are no lines.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.replace(",", " ").split()
        if not all(word.isdecimal() and word.isascii() and 0 < int(word) < 2**31 for word in words):
            raise UserError(
                f"--lengths={name} line {number}: {line.strip()[:40]!r} is not a length, a whole number of at least 1 "
                "token",
                remedy="write one length per line, or the lengths of the answers to one prompt",
            )
        if words:
            rows.append(np.array([int(word) for word in words], dtype=np.int64))
    return recorded_lengths(name, rows, max_tokens)


def recorded_lengths(name: str, rows: Sequence[NDArray[np.int64]], max_tokens: int) -> AnswerLengths:
    """Return the source of recorded lengths in tokens.

    Args:
        name: of the source.
        rows: for each prompt, [N] lengths of its N answers.
        max_tokens: `sampling.max_tokens`.

    Raises:
        UserError: there are no lengths.
    """
    if not rows:
        raise UserError(
            f"--lengths={name} has no lengths", remedy="name a file with one length per line, or lognormal:MU,SIGMA"
        )
    if all(len(row) == 1 for row in rows):
        rows = [np.concatenate(rows)]
    return AnswerLengths(name, max_tokens, tuple(rows))
