"""The examples of supervised fine-tuning: read, checked and tokenized once, then selected step by step.

The order is that of prompts (set_stream.py): a pure function of (seed, step). Examples that are longer than
`data.max_example_tokens` are an error, are skipped, or lose their last tokens (`data.overlong`), and are counted.
Asserted by tests/unit/data/test_example_dataset.py.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_mega.config.data_sections import DataConfig, DataSource
from grpo_mega.data.example_rows import ExampleRow, example_sets, read_examples
from grpo_mega.data.example_template import ExampleTemplate, RenderedExample
from grpo_mega.data.set_stream import SetStream
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


@dataclass(frozen=True)
class ExampleSet:
    """One named set of examples. `num_skipped` were left out and `num_truncated` lost tokens: they were too long.

    `num_filtered` rows were removed by the set's own filters.
    """

    name: str
    examples: tuple[Example, ...]
    weight: float = 1.0
    num_skipped: int = 0
    num_truncated: int = 0
    num_filtered: int = 0


@dataclass(frozen=True)
class ExampleDataset:
    """All sets, in the order of the config; `Example.index` is unique over all sets."""

    sets: tuple[ExampleSet, ...]

    def __len__(self) -> int:
        return sum(len(part.examples) for part in self.sets)

    @property
    def digest(self) -> str:
        """SHA-256 of sets, weights, tokens and masks: all that decides the examples of a step."""
        found = hashlib.sha256()
        for part in self.sets:
            found.update(repr((part.name, part.weight, len(part.examples))).encode())
            for example in part.examples:
                found.update(len(example.token_ids).to_bytes(8, "little"))
                found.update(example.token_ids.tobytes() + example.loss_mask)
        return found.hexdigest()

    def batch(self, step: int, num_examples: int, seed: int) -> list[Example]:
        """Return the examples of one step (`SetStream.positions`).

        Args:
            step: counted from 0.
            num_examples: examples per step; the same in every step of a run.
            seed: seed of the shuffles.
        """
        stream = SetStream(tuple(len(part.examples) for part in self.sets), tuple(part.weight for part in self.sets))
        return [self.sets[chosen].examples[row] for chosen, row in stream.positions(step, num_examples, seed)]

    def metrics(self, steps: int, num_examples: int) -> dict[str, float]:
        """Return the metrics after `steps` steps of `num_examples` examples each."""
        return {
            "data/epoch": steps * num_examples / len(self),
            "data/skipped_examples": float(sum(part.num_skipped for part in self.sets)),
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
    sets: list[ExampleSet] = []
    begin = 0
    for key, source in example_sets(config):
        found, num_rows = _load_set(key, source, config, template, begin)
        sets.append(found)
        begin += num_rows
    return ExampleDataset(tuple(sets))


def _load_set(
    key: str, source: DataSource, config: DataConfig, template: ExampleTemplate, begin: int
) -> tuple[ExampleSet, int]:
    """Return the set and its number of rows; the examples are indexed from `begin`."""
    examples: list[Example] = []
    num_skipped, num_truncated, num_filtered, num_rows = 0, 0, 0, 0
    for row in read_examples(source, key, config):
        index, num_rows = begin + num_rows, num_rows + 1
        if row is None:
            num_filtered += 1
            continue
        example = _example_of(index, row, _render(row, template))
        size = len(example.token_ids)
        if size > config.max_example_tokens:
            if config.overlong == "error":
                raise UserError(
                    f"{row.where}: the example has {size} tokens, more than "
                    f"data.max_example_tokens={config.max_example_tokens}",
                    remedy="raise the limit, or set data.overlong=skip or data.overlong=truncate",
                )
            example = _first_tokens(example, config.max_example_tokens)
            if config.overlong == "skip" or not example.num_loss_tokens:
                num_skipped += 1
                continue
            num_truncated += 1
        examples.append(example)
    if num_skipped or num_truncated:
        log.info(
            "%s: of %d examples, %d were skipped and %d truncated, because of data.max_example_tokens=%d",
            source.path, num_rows - num_filtered, num_skipped, num_truncated, config.max_example_tokens,
        )  # fmt: skip
    if num_filtered:
        log.info("%s: filters removed %d of %d rows", source.path, num_filtered, num_rows)
    _check_not_empty(key, source, config, len(examples), num_skipped, num_filtered)
    found = ExampleSet(source.label, tuple(examples), source.weight, num_skipped, num_truncated, num_filtered)
    return found, num_rows


def _check_not_empty(
    key: str, source: DataSource, config: DataConfig, num_examples: int, num_skipped: int, num_filtered: int
) -> None:
    if num_examples:
        return
    if num_skipped:
        raise UserError(
            f"{key}={source.path}: all {num_skipped} examples have more than "
            f"data.max_example_tokens={config.max_example_tokens} tokens",
            remedy="raise the limit",
        )
    if num_filtered:
        raise UserError(
            f"{key}={source.path}: the filters of this set remove all {num_filtered} rows", remedy="widen the filters"
        )
    raise UserError(
        f"{key}={source.path} is empty",
        remedy="write one JSON object per line, with messages, or with a prompt and a completion",
    )


def _render(row: ExampleRow, template: ExampleTemplate) -> RenderedExample:
    try:
        return template.render(row)
    except UserError as error:
        raise UserError(f"{row.where}: {error.message}", remedy=error.remedy) from error
    except Exception as error:  # the tokenizers library and chat templates raise plain Exceptions
        raise UserError(
            f"{row.where}: the model's tokenizer or chat template cannot encode the example ({error})",
            remedy="change the row or the template",
        ) from error


def _example_of(index: int, row: ExampleRow, rendered: RenderedExample) -> Example:
    mask = bytes((False, *rendered.is_answer[1:]))
    if not any(mask):
        raise UserError(
            f"{row.where}: the chat template marks no token of the example as an answer",
            remedy="put {% generation %} around the answers in the template (data.chat_template)",
        )
    return Example(index, array("i", rendered.token_ids), mask)


def _first_tokens(example: Example, num_tokens: int) -> Example:
    return Example(example.index, example.token_ids[:num_tokens], example.loss_mask[:num_tokens])
