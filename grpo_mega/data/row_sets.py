"""Weighted sets of rows, prompts or examples: loaded with counts of what was left out, then selected step by step.

Invariants (tests/unit/data/test_dataset.py, test_example_dataset.py): `batch` is a pure function of (seed, step), as
set_stream.py describes. A set without rows is an error that says what removed them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from grpo_mega.config.data_sections import DataSource
from grpo_mega.data.set_stream import SetStream
from grpo_mega.types import UserError

Row = TypeVar("Row")
Rendered = TypeVar("Rendered")

log = logging.getLogger("grpo_mega.data")


@dataclass(frozen=True)
class RowSet(Generic[Row]):
    """One named set of rows. `num_skipped` were left out and `num_truncated` lost tokens: they were too long.

    `num_filtered` rows were removed by the set's own filters.
    """

    name: str
    rows: tuple[Row, ...]
    weight: float = 1.0
    num_skipped: int = 0
    num_truncated: int = 0
    num_filtered: int = 0


@dataclass(frozen=True)
class RowSets(Generic[Row]):
    """All sets, in the order of the config; the index of a row is unique over all sets."""

    sets: tuple[RowSet[Row], ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, set after set."""
        return tuple(row for part in self.sets for row in part.rows)

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.sets)

    @property
    def digest(self) -> str:
        """SHA-256 of sets, weights and `row_bytes`: all that decides the rows of a step and what they train."""
        found = hashlib.sha256()
        for part in self.sets:
            found.update(repr((part.name, part.weight, len(part.rows))).encode())
            for row in part.rows:
                for piece in self.row_bytes(row):
                    found.update(piece)
        return found.hexdigest()

    def row_bytes(self, row: Row) -> Iterator[bytes]:
        """Yield the bytes of a row for `digest`."""
        raise NotImplementedError

    def batch(self, step: int, num_rows: int, seed: int) -> list[Row]:
        """Return the rows of one step (`SetStream.positions`).

        Args:
            step: counted from 0.
            num_rows: rows per step; the same in every step of a run.
            seed: seed of the shuffles.
        """
        stream = SetStream(tuple(len(part.rows) for part in self.sets), tuple(part.weight for part in self.sets))
        return [self.sets[chosen].rows[row] for chosen, row in stream.positions(step, num_rows, seed)]

    def epochs(self, steps: int, num_rows: int) -> float:
        """Return the epochs after `steps` steps of `num_rows` rows each.

        With several sets it is the mean over all rows: a set with a larger weight is further on.
        """
        return steps * num_rows / len(self)

    @property
    def num_skipped(self) -> int:
        """Number of rows of all sets that were left out because they were too long."""
        return sum(part.num_skipped for part in self.sets)


@dataclass(frozen=True)
class RowKind:
    """Kind of the rows of a set, for its limits and messages.

    `noun`: `prompt` or `example`. `limit_key`, `limit`: the config key of the largest number of tokens, and its value.
    `fields`: what a row must hold. `choices`: values of data.overlong that leave out what is too long.
    """

    noun: str
    limit_key: str
    limit: int
    overlong: str
    fields: str
    choices: str


class SetLoader(Generic[Row]):
    """Collects the rows of one set, and counts the rows that are left out.

    Args:
        key: config key of the set, for messages.
        source: the set.
        kind: what its rows are.
        begin: index of its first row.
    """

    def __init__(self, key: str, source: DataSource, kind: RowKind, begin: int) -> None:
        self._key, self._source, self._kind, self._begin = key, source, kind, begin
        self._rows: list[Row] = []
        self.num_rows, self.num_skipped, self.num_truncated, self.num_filtered = 0, 0, 0, 0

    def indexed(self, rows: Iterable[Rendered | None]) -> Iterator[tuple[int, Rendered]]:
        """Yield (index, row) of the rows; None stands for a row that a filter has removed, which is counted."""
        for row in rows:
            self.num_rows += 1
            if row is None:
                self.num_filtered += 1
            else:
                yield self._begin + self.num_rows - 1, row

    def add(self, row: Row) -> None:
        """Keep a row."""
        self._rows.append(row)

    def fits(self, where: str, num_tokens: int) -> bool:
        """Return False if a row is too long.

        Raises:
            UserError: it is too long under `data.overlong=error`.
        """
        kind = self._kind
        if num_tokens > kind.limit and kind.overlong == "error":
            raise UserError(
                f"{where}: the {kind.noun} has {num_tokens} tokens, more than {kind.limit_key}={kind.limit}",
                remedy=f"raise the limit, or set {kind.choices}",
            )
        return num_tokens <= kind.limit

    def finish(self) -> RowSet[Row]:
        """Log what was left out, and return the set.

        Raises:
            UserError: no row is left.
        """
        kind, path = self._kind, self._source.path
        self._check_not_empty()
        if self.num_skipped or self.num_truncated:
            log.info(
                "%s: of %d %ss, %d were skipped and %d truncated, because of %s=%d",
                path, self.num_rows - self.num_filtered, kind.noun, self.num_skipped, self.num_truncated,
                kind.limit_key, kind.limit,
            )  # fmt: skip
        if self.num_filtered:
            log.info("%s: filters removed %d of %d rows", path, self.num_filtered, self.num_rows)
        counts = (self.num_skipped, self.num_truncated, self.num_filtered)
        return RowSet(self._source.label, tuple(self._rows), self._source.weight, *counts)

    def _check_not_empty(self) -> None:
        where, kind = f"{self._key}={self._source.path}", self._kind
        if self._rows:
            return
        if self.num_filtered:
            raise UserError(
                f"{where}: the filters of this set remove {self.num_filtered} of {self.num_rows} rows, and no "
                f"{kind.noun} is left",
                remedy="widen the filters",
            )
        if self.num_skipped:
            raise UserError(
                f"{where}: all {self.num_skipped} {kind.noun}s have more than {kind.limit_key}={kind.limit} tokens",
                remedy="raise the limit",
            )
        raise UserError(f"{where} is empty", remedy=f"write one JSON object per line, with {kind.fields}")


def load_sets(
    keyed: Sequence[tuple[str, DataSource]],
    kind: RowKind,
    load: Callable[[str, DataSource, SetLoader[Row]], None],
) -> tuple[RowSet[Row], ...]:
    """Load several sets; rows are indexed through all of them.

    Args:
        keyed: config key and source of each set.
        kind: what the rows are.
        load: reads the rows of one set into its loader.

    Raises:
        UserError: see `SetLoader`.
    """
    sets: list[RowSet[Row]] = []
    begin = 0
    for key, source in keyed:
        loader: SetLoader[Row] = SetLoader(key, source, kind, begin)
        load(key, source, loader)
        sets.append(loader.finish())
        begin += loader.num_rows
    return tuple(sets)


def rendered(where: str, noun: str, render: Callable[[], Rendered]) -> Rendered:
    """Return the result of a template for the row at `where`.

    Raises:
        UserError: the row cannot be rendered or encoded; the message names it.
    """
    try:
        return render()
    except UserError as error:
        raise UserError(f"{where}: {error.message}", remedy=error.remedy) from error
    except Exception as error:  # the tokenizers library and chat templates raise plain Exceptions
        raise UserError(
            f"{where}: the model's tokenizer or chat template cannot encode the {noun} ({error})",
            remedy=f"change the {noun}, the template or the model",
        ) from error
