"""The prompts of a run: read, checked and tokenized once, then selected step by step (row_sets.py).

Asserted by tests/unit/data/test_dataset.py: a malformed line ends the run with `file:line`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from grpo_mega.config.data_sections import DataConfig, DataSource
from grpo_mega.data.prompt_rows import keyed_sets, read_rows
from grpo_mega.data.prompt_template import PromptTemplate
from grpo_mega.data.row_sets import RowKind, RowSets, SetLoader, load_sets, rendered
from grpo_mega.data.set_stream import epoch_order
from grpo_mega.types import Prompt, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("grpo_mega.data")


class PromptDataset(RowSets[Prompt]):
    """All sets of prompts, in the order of the config; `Prompt.index` is unique over all sets."""

    def row_bytes(self, row: Prompt) -> Iterator[bytes]:
        """Yield text, answer and fields: all that decides the prompts and rewards of a step."""
        yield f"{len(row.text)} {row.text}{row.answer}".encode(errors="surrogatepass")
        if row.fields:
            yield json.dumps(row.fields, sort_keys=True).encode()

    def metrics(self, steps: int, num_prompts: int) -> dict[str, float]:
        """Return the metrics after `steps` steps of `num_prompts` prompts each."""
        return {"data/epoch": self.epochs(steps, num_prompts), "data/skipped_prompts": float(self.num_skipped)}

    def shuffled(self, seed: int) -> list[Prompt]:
        """Return all prompts of all sets, each once, in a shuffled order."""
        prompts = self.rows
        return [prompts[i] for i in epoch_order(len(prompts), str(seed), 0)]


def load_train(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, with_fields: bool = False) -> PromptDataset:
    """Load the sets of `data.train`.

    Args:
        config: config section.
        tokenizer: of the model.
        with_fields: keep all columns of the rows (`Prompt.fields`), for rewards that read them.

    Raises:
        UserError: a file is missing or empty, a row is malformed, lacks a key or has a wrong type, or a prompt cannot
            be encoded or is too long under `data.overlong=error`. The message names file and row.
    """
    keyed = [(key, source) for key, source in keyed_sets(config) if key.startswith("data.train")]
    return _load(keyed, config, tokenizer, with_fields=with_fields)


def load_held_out(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, with_fields: bool = False
) -> PromptDataset | None:
    """Load the sets of `data.eval`, or return None if there are none; raises the errors of `load_train`."""
    keyed = [(key, source) for key, source in keyed_sets(config) if key.startswith("data.eval")]
    return _load(keyed, config, tokenizer, with_fields=with_fields) if keyed else None


def _load(
    keyed: list[tuple[str, DataSource]], config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, with_fields: bool
) -> PromptDataset:
    kind = RowKind(
        "prompt",
        "data.max_prompt_tokens",
        config.max_prompt_tokens,
        config.overlong,
        fields="a prompt and an answer",
        choices="data.overlong=skip",
    )
    template = PromptTemplate(config, tokenizer)
    return PromptDataset(
        load_sets(keyed, kind, partial(_load_set, config=config, template=template, with_fields=with_fields))
    )


def _load_set(
    key: str,
    source: DataSource,
    loader: SetLoader[Prompt],
    *,
    config: DataConfig,
    template: PromptTemplate,
    with_fields: bool,
) -> None:
    """Read the prompts of one set into `loader`."""
    spelled: list[str] = []
    for index, row in loader.indexed(read_rows(source, key, config, with_fields=with_fields)):
        found = rendered(row.where, "prompt", partial(template.render, row.prompt))
        size = len(found.token_ids)
        if not size:
            raise UserError(f"{row.where}: the prompt is empty", remedy="write a prompt of at least one token")
        spelled += found.spelled[:1]
        if not (source.min_prompt_tokens or 1) <= size <= (source.max_prompt_tokens or size):
            loader.num_filtered += 1
        elif loader.fits(row.where, size):
            messages = tuple(template.messages(row.prompt))
            loader.add(Prompt(index, found.text, found.token_ids, row.answer, source.label, messages, row.fields))
        else:
            loader.num_skipped += 1
    if spelled:
        log.warning(
            "%s: %d prompts contain special tokens of the tokenizer, for example %s; they are encoded as text. Set "
            "data.allow_special_tokens=true if the rows are rendered already",
            source.path, len(spelled), spelled[0],
        )  # fmt: skip
