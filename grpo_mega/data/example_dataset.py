"""The examples of supervised fine-tuning: read, checked and tokenized once, then selected step by step (row_sets.py).

Examples that are longer than `data.max_example_tokens` are an error, are skipped, or lose their last tokens
(`data.overlong`), and are counted. Asserted by tests/unit/data/test_example_dataset.py.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from grpo_mega.config.data_sections import DataConfig, DataSource
from grpo_mega.data.example_rows import ExampleRow, example_sets, read_examples
from grpo_mega.data.example_template import ExampleTemplate, RenderedExample
from grpo_mega.data.row_sets import RowKind, RowSets, SetLoader, load_sets, rendered
from grpo_mega.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("grpo_mega.data")


@dataclass(frozen=True)
class Example:
    """Tokens of one example. `loss_mask` has a byte per token: 1 for a token that is trained, else 0.

    The first token is never trained, because nothing predicts it. Arrays take a ninth of the memory of tuples.
    """

    index: int
    token_ids: array[int]
    loss_mask: bytes

    @property
    def num_loss_tokens(self) -> int:
        """Number of tokens that are trained."""
        return sum(self.loss_mask)


class ExampleDataset(RowSets[Example]):
    """All sets of examples, in the order of the config; `Example.index` is unique over all sets."""

    def row_bytes(self, row: Example) -> Iterator[bytes]:
        """Yield tokens and mask: all that decides the examples of a step."""
        yield len(row.token_ids).to_bytes(8, "little")
        yield row.token_ids.tobytes() + row.loss_mask

    def metrics(self, steps: int, num_examples: int) -> dict[str, float]:
        """Return the metrics after `steps` steps of `num_examples` examples each."""
        return {
            "data/epoch": self.epochs(steps, num_examples),
            "data/skipped_examples": float(self.num_skipped),
            "data/truncated_examples": float(sum(part.num_truncated for part in self.sets)),
        }


def load_examples(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> ExampleDataset:
    """Load the sets of `data.train` as examples.

    Args:
        config: config section.
        tokenizer: of the model.

    Raises:
        UserError: a file is missing or empty, a row is malformed or has no answer, the answers cannot be found in the
            rendered row, or it is too long under `data.overlong=error`. The message names file and row.
    """
    template = ExampleTemplate(config, tokenizer)
    if config.template == "chat":
        way = (
            "its {% generation %} blocks"
            if template.marks_answers
            else "the difference of a conversation and its prompt"
        )
        log.info("answers are found in the chat template's text by %s", way)
    kind = RowKind(
        "example",
        "data.max_example_tokens",
        config.max_example_tokens,
        config.overlong,
        fields="messages, or with a prompt and a completion",
        choices="data.overlong=skip or data.overlong=truncate",
    )
    load = partial(_load_set, config=config, template=template)
    return ExampleDataset(load_sets(example_sets(config), kind, load))


def _load_set(
    key: str, source: DataSource, loader: SetLoader[Example], *, config: DataConfig, template: ExampleTemplate
) -> None:
    """Read the examples of one set into `loader`."""
    for index, row in loader.indexed(read_examples(source, key, config)):
        example = _example_of(index, row, rendered(row.where, "example", partial(template.render, row)))
        if not loader.fits(row.where, len(example.token_ids)):
            example = _first_tokens(example, config.max_example_tokens)
            if config.overlong == "skip" or not example.num_loss_tokens:
                loader.num_skipped += 1
                continue
            loader.num_truncated += 1
        loader.add(example)


def _example_of(index: int, row: ExampleRow, found: RenderedExample) -> Example:
    mask = bytes((False, *found.is_answer[1:]))
    if not any(mask):
        raise UserError(
            f"{row.where}: the chat template marks no token of the example as an answer",
            remedy="put {% generation %} around the answers in the template (data.chat_template)",
        )
    return Example(index, array("i", found.token_ids), mask)


def _first_tokens(example: Example, num_tokens: int) -> Example:
    return Example(example.index, example.token_ids[:num_tokens], example.loss_mask[:num_tokens])
