"""The prompts of a run: read, checked and tokenised once, then dealt out step by step.

Invariants (tests/unit/test_dataset.py): a malformed line ends the run with `file:line`; `batch` is a pure function of
(seed, step), so a run continues at any step without replaying; in each epoch every prompt comes once before any comes
again.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_mega.config.schema import DataConfig
from grpo_mega.data import arithmetic
from grpo_mega.data.chat import PromptSource, render_prompt
from grpo_mega.types import Prompt, UserError

log = logging.getLogger("grpo_mega.data")

_ARITHMETIC = "arithmetic:"
_PROMPT_KEYS = ("prompt", "question")


@dataclass(frozen=True)
class PromptDataset:
    """Prompts in the order of their source; `num_skipped` were longer than the limit and left out."""

    source: str
    prompts: tuple[Prompt, ...]
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, step: int, num_prompts: int, seed: int) -> list[Prompt]:
        """The prompts of one step: positions `step * num_prompts` and following of an endless stream of epochs.

        Each epoch is a shuffle of all prompts of its own, so a step may hold the end of one epoch and the beginning
        of the next.

        Args:
            step: counted from 0.
            num_prompts: prompts of a step; the same in every step of a run.
            seed: moves the shuffles.
        """
        size = len(self.prompts)
        positions = range(step * num_prompts, (step + 1) * num_prompts)
        return [self.prompts[_epoch_order(size, seed, position // size)[position % size]] for position in positions]


def load_prompts(source: str, *, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> PromptDataset:
    """Read `source`: a JSONL file, or `arithmetic:train` / `arithmetic:heldout`.

    Each line of a file is an object with a prompt (a string or a list of `{role, content}` messages) and an answer (a
    string or a number); blank lines are passed over. GSM8K's `question` and `answer` are read as they are.

    Raises:
        UserError: the file is missing or empty, a line is malformed, lacks a key or holds a wrong type, a prompt
            cannot be encoded, or is too long under `data.overlong=error`. Names file and line.
    """
    key = "data.eval" if source == config.eval and source != config.train else "data.train"
    rows = _arithmetic_rows(source, key) if source.startswith(_ARITHMETIC) else _jsonl_rows(source, key, config)
    prompts: list[Prompt] = []
    num_skipped = 0
    for index, (where, prompt, answer) in enumerate(rows):
        text, token_ids = _render(where, prompt, tokenizer, config)
        if len(token_ids) <= config.max_prompt_tokens:
            prompts.append(Prompt(index=index, text=text, token_ids=token_ids, answer=answer))
        elif config.overlong == "skip":
            num_skipped += 1
        else:
            raise UserError(
                f"{where}: the prompt has {len(token_ids)} tokens, more than "
                f"data.max_prompt_tokens={config.max_prompt_tokens}; raise the limit, or set data.overlong=skip"
            )
    if num_skipped and not prompts:
        raise UserError(
            f"{key}={source}: all {num_skipped} prompts have more than data.max_prompt_tokens="
            f"{config.max_prompt_tokens} tokens; raise the limit"
        )
    if not prompts:
        raise UserError(f"{key}={source} is empty; put one JSON object per line there, with a prompt and an answer")
    if num_skipped:
        log.info(
            "%s: left out %d of %d prompts with more than data.max_prompt_tokens=%d tokens",
            source, num_skipped, num_skipped + len(prompts), config.max_prompt_tokens,
        )  # fmt: skip
    return PromptDataset(source=source, prompts=tuple(prompts), num_skipped=num_skipped)


@lru_cache(maxsize=4)
def _epoch_order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"prompts/{seed}/{epoch}").shuffle(order)
    return tuple(order)


def _render(
    where: str, prompt: PromptSource, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[str, tuple[int, ...]]:
    try:
        text, token_ids = render_prompt(
            prompt, tokenizer=tokenizer, template=config.template, system_prompt=config.system_prompt
        )
    except UserError:
        raise
    except Exception as error:  # the tokenizers library and chat templates raise bare Exceptions of their own
        raise UserError(
            f"{where}: the model's tokenizer cannot encode the prompt ({error}); change the prompt or the model"
        ) from error
    if not token_ids:
        raise UserError(f"{where}: the prompt is empty; every prompt needs at least one token")
    return text, token_ids


def _arithmetic_rows(source: str, key: str) -> Iterator[tuple[str, PromptSource, str]]:
    name = source.removeprefix(_ARITHMETIC)
    if name not in ("train", "heldout"):
        raise UserError(f"{key}={source} is no set of the arithmetic task; use arithmetic:train or arithmetic:heldout")
    for index, pair in enumerate(arithmetic.pairs("train" if name == "train" else "heldout")):
        yield f"{source}:{index + 1}", arithmetic.question(pair), arithmetic.answer(pair)


def _jsonl_rows(source: str, key: str, config: DataConfig) -> Iterator[tuple[str, PromptSource, str]]:
    path = Path(source)
    if not path.is_file():
        raise UserError(_missing(path, key))
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                record = _parse(where, line)
                yield where, _prompt_of(where, record, config), _answer_of(where, record, config)


def _missing(path: Path, key: str) -> str:
    if path.exists():
        return f"{key}={path} is not a file; give a JSONL file"
    if "gsm8k" in path.parts and path.name in ("train.jsonl", "test.jsonl"):
        return (
            f"{key}={path}: no such file; put GSM8K's {path.name} there (grade_school_math/data/{path.name} of "
            f"openai/grade-school-math), or set {key} to where it is"
        )
    return (
        f"{key}={path}: no such file; give a JSONL file with a prompt and an answer per line, or arithmetic:train / "
        f"arithmetic:heldout"
    )


def _parse(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as error:  # malformed JSON or UTF-8
        raise UserError(f"{where}: not valid JSON ({error}); each line is one JSON object") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: got a {type(record).__name__}; each line is one JSON object")
    return record


def _prompt_of(where: str, record: dict[str, Any], config: DataConfig) -> PromptSource:
    accepted = (config.prompt_key,) if config.prompt_key else _PROMPT_KEYS
    name = next((name for name in accepted if name in record), None)
    if name is None:
        raise UserError(
            f"{where}: no key {' or '.join(repr(name) for name in accepted)} among {sorted(record)}; set "
            f"data.prompt_key to the one that holds the prompt"
        )
    value = record[name]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return value
    raise UserError(
        f"{where}: {name}={_short(value)} is neither a string nor a list of {{role, content}} messages; correct it"
    )


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)


def _answer_of(where: str, record: dict[str, Any], config: DataConfig) -> str:
    name = config.answer_key or "answer"
    if name not in record:
        raise UserError(
            f"{where}: no key {name!r} among {sorted(record)}; set data.answer_key to the one that holds the answer"
        )
    value = record[name]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{where}: {name}={_short(value)} is neither a string nor a number; correct it")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
