"""The prompts of a run: read, checked and tokenised once, then dealt out step by step.

Invariants (tests/unit/test_dataset.py): a malformed line ends the run with `file:line`; `batch` is a pure function of
(seed, step), so a run continues at any step without replaying; in each epoch every prompt comes once before any comes
again.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from grpo_mega.config.schema import DataConfig
from grpo_mega.data.chat import render_prompt
from grpo_mega.data.rows import PromptSource, read_rows, source_key
from grpo_mega.types import Prompt, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("grpo_mega.data")


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
    key = source_key(source, config)
    prompts: list[Prompt] = []
    num_skipped = 0
    for index, (where, prompt, answer) in enumerate(read_rows(source, key, config)):
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
