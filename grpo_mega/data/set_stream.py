"""The endless, shuffled stream of the rows of several weighted sets. Pure arithmetic on numbers of rows.

Invariants (tests/unit/data/test_dataset.py): `positions` is a pure function of (seed, step), so the step in a
checkpoint is the position in the data, and a resumed run replays nothing. In each epoch of a set every row occurs once
before any occurs again. Sets alternate in the ratio of their weights, exactly over each pattern.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from grpo_mega.config.data_rules import pattern_of


@dataclass(frozen=True)
class SetStream:
    """Stream over sets of `sizes` rows with the relative `weights`."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def positions(self, step: int, num_rows: int, seed: int) -> list[tuple[int, int]]:
        """Return (set, row in the set) for the rows of one step.

        They are the places `step * num_rows` and following of the stream. The sets alternate in the ratio of their
        weights. Each set is a stream of epochs, and each epoch is its own shuffle of all rows of the set. So a step may
        contain the end of one epoch and the beginning of the next.

        Args:
            step: counted from 0.
            num_rows: rows per step; the same in every step of a run.
            seed: seed of the shuffles.
        """
        counts = pattern_of(self.weights)
        pattern = _pattern(counts)
        found = []
        for place in range(step * num_rows, (step + 1) * num_rows):
            cycle, at = divmod(place, len(pattern))
            chosen, rank = pattern[at]
            found.append((chosen, self._row(chosen, cycle * counts[chosen] + rank, seed)))
        return found

    def _row(self, chosen: int, position: int, seed: int) -> int:
        """Return the row at a position of the stream of one set."""
        stream = str(seed) if len(self.sizes) == 1 else f"{seed}/{chosen}"
        epoch, at = divmod(position, self.sizes[chosen])
        return epoch_order(self.sizes[chosen], stream, epoch)[at]


@lru_cache(maxsize=4)
def _pattern(counts: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return, for each place of a pattern, its set and the number of earlier places of that set in the pattern.

    Smooth weighted round robin: at every place the credit of each set grows by its count. The set with the most credit
    is chosen and pays the sum of all counts. At any place, each set is less than one place from its exact share.
    """
    total = sum(counts)
    credit, taken = [0] * len(counts), [0] * len(counts)
    places = []
    for _ in range(total):
        credit = [c + count for c, count in zip(credit, counts, strict=True)]
        chosen = credit.index(max(credit))
        credit[chosen] -= total
        places.append((chosen, taken[chosen]))
        taken[chosen] += 1
    return tuple(places)


@lru_cache(maxsize=64)  # two epochs of each set, for many sets
def epoch_order(size: int, stream: str, epoch: int) -> tuple[int, ...]:
    """Return the shuffled order of one epoch; `stream` names the seed and the set."""
    order = list(range(size))
    random.Random(f"prompts/{stream}/{epoch}").shuffle(order)
    return tuple(order)
