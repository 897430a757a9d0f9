"""The prompts of a run: read, checked and tokenized once, then selected step by step.

Invariants (tests/unit/data/test_dataset.py): a malformed line ends the run with `file:line`. `batch` is a pure function
of (seed, step), as set_stream.py describes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_mega.config.data_sections import DataConfig, DataSource
from grpo_mega.data.prompt_rows import PromptSource, keyed_sets, read_rows
from grpo_mega.data.prompt_template import PromptTemplate, RenderedPrompt
from grpo_mega.data.set_stream import SetStream, epoch_order
from grpo_mega.types import Prompt, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("grpo_mega.data")


@dataclass(frozen=True)
class DataSet:
    """One named set of prompts.

    `num_skipped` prompts were longer than the limit. `num_filtered` rows were removed by the set's own filters.
    """

    name: str
    prompts: tuple[Prompt, ...]
    weight: float = 1.0
    num_skipped: int = 0
    num_filtered: int = 0


@dataclass(frozen=True)
class PromptDataset:
    """All sets, in the order of the config; `Prompt.index` is unique over all sets."""

    sets: tuple[DataSet, ...]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """All prompts, set after set."""
        return tuple(prompt for part in self.sets for prompt in part.prompts)

    def __len__(self) -> int:
        return sum(len(part.prompts) for part in self.sets)

    @property
    def digest(self) -> str:
        """SHA-256 of sets, weights, prompts, answers and fields: all that decides the prompts and rewards of a step."""
        found = hashlib.sha256()
        for part in self.sets:
            found.update(repr((part.name, part.weight, len(part.prompts))).encode())
            for prompt in part.prompts:
                found.update(f"{len(prompt.text)} {prompt.text}{prompt.answer}".encode(errors="surrogatepass"))
                if prompt.fields:
                    found.update(json.dumps(prompt.fields, sort_keys=True).encode())
        return found.hexdigest()

    def batch(self, step: int, num_prompts: int, seed: int) -> list[Prompt]:
        """Return the prompts of one step (`SetStream.positions`).

        Args:
            step: counted from 0.
            num_prompts: prompts per step; the same in every step of a run.
            seed: seed of the shuffles.
        """
        stream = SetStream(tuple(len(part.prompts) for part in self.sets), tuple(part.weight for part in self.sets))
        return [self.sets[chosen].prompts[row] for chosen, row in stream.positions(step, num_prompts, seed)]

    def metrics(self, steps: int, num_prompts: int) -> dict[str, float]:
        """Return the metrics after `steps` steps of `num_prompts` prompts each.

        With several sets, `data/epoch` is the mean over all prompts: a set with a larger weight is further on.
        """
        return {
            "data/epoch": steps * num_prompts / len(self),
            "data/skipped_prompts": float(sum(part.num_skipped for part in self.sets)),
        }

    def shuffled(self, seed: int) -> list[Prompt]:
        """Return all prompts of all sets, each once, in a shuffled order."""
        prompts = self.prompts
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
    sets: list[DataSet] = []
    begin = 0
    template = PromptTemplate(config, tokenizer)
    for key, source in keyed:
        found, num_rows = _load_set(key, source, config, template, begin, with_fields=with_fields)
        sets.append(found)
        begin += num_rows
    return PromptDataset(tuple(sets))


def _load_set(
    key: str, source: DataSource, config: DataConfig, template: PromptTemplate, begin: int, *, with_fields: bool
) -> tuple[DataSet, int]:
    """Return the set and its number of rows; the prompts are indexed from `begin`."""
    prompts: list[Prompt] = []
    num_skipped, num_filtered, num_rows = 0, 0, 0
    spelled: list[str] = []
    for row in read_rows(source, key, config, with_fields=with_fields):
        index, num_rows = begin + num_rows, num_rows + 1
        if row is None:
            num_filtered += 1
            continue
        rendered = _render(row.where, row.prompt, template)
        token_ids = rendered.token_ids
        spelled += rendered.spelled[:1]
        if not (source.min_prompt_tokens or 1) <= len(token_ids) <= (source.max_prompt_tokens or len(token_ids)):
            num_filtered += 1
        elif len(token_ids) <= config.max_prompt_tokens:
            messages = tuple(template.messages(row.prompt))
            prompts.append(Prompt(index, rendered.text, token_ids, row.answer, source.label, messages, row.fields))
        elif config.overlong == "skip":
            num_skipped += 1
        else:
            raise UserError(
                f"{row.where}: the prompt has {len(token_ids)} tokens, more than "
                f"data.max_prompt_tokens={config.max_prompt_tokens}",
                remedy="raise the limit, or set data.overlong=skip",
            )
    found = DataSet(source.label, tuple(prompts), source.weight, num_skipped, num_filtered)
    _check_not_empty(key, source, found, config)
    if spelled:
        log.warning(
            "%s: %d prompts contain special tokens of the tokenizer, for example %s; they are encoded as text. Set "
            "data.allow_special_tokens=true if the rows are rendered already",
            source.path, len(spelled), spelled[0],
        )  # fmt: skip
    if num_skipped:
        log.info(
            "%s: skipped %d of %d prompts with more than data.max_prompt_tokens=%d tokens",
            source.path, num_skipped, num_rows - num_filtered, config.max_prompt_tokens,
        )  # fmt: skip
    if num_filtered:
        log.info("%s: filters removed %d of %d rows", source.path, num_filtered, num_rows)
    return found, num_rows


def _check_not_empty(key: str, source: DataSource, found: DataSet, config: DataConfig) -> None:
    if found.prompts:
        return
    if found.num_filtered:
        raise UserError(
            f"{key}={source.path}: the filters of this set remove {found.num_filtered} of "
            f"{found.num_filtered + found.num_skipped} rows, and no prompt is left",
            remedy="widen the filters",
        )
    if found.num_skipped:
        raise UserError(
            f"{key}={source.path}: all {found.num_skipped} prompts have more than data.max_prompt_tokens="
            f"{config.max_prompt_tokens} tokens",
            remedy="raise the limit",
        )
    raise UserError(
        f"{key}={source.path} is empty", remedy="write one JSON object per line, with a prompt and an answer"
    )


def _render(where: str, prompt: PromptSource, template: PromptTemplate) -> RenderedPrompt:
    try:
        rendered = template.render(prompt)
    except UserError as error:
        raise UserError(f"{where}: {error.message}", remedy=error.remedy) from error
    except Exception as error:  # the tokenizers library and chat templates raise plain Exceptions
        raise UserError(
            f"{where}: the model's tokenizer cannot encode the prompt ({error})",
            remedy="change the prompt or the model",
        ) from error
    if not rendered.token_ids:
        raise UserError(f"{where}: the prompt is empty", remedy="write a prompt of at least one token")
    return rendered
