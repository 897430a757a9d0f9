"""The end of an answer: the EOS tokens of a model, and the stop text that ended an answer.

Both engines, the environments and the doctor use these two functions, so they agree on where an answer ends.
Asserted by tests/unit/data/test_answer_ends.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_mega.data.answer_text import answer_text, dropped_ids
from grpo_mega.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EOS_FILES = ("generation_config.json", "config.json")


def eos_ids(config_dir: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Return every token that ends an answer: the union of tokenizer, generation_config.json and config.json.

    Args:
        config_dir: folder of the model; a file that it lacks names no token.
        tokenizer_eos: the tokenizer's EOS token. It comes first.

    Raises:
        UserError: none of the three names a token, or an `eos_token_id` is not a token id or a list of them.
    """
    found = [] if tokenizer_eos is None else [tokenizer_eos]
    for name in _EOS_FILES:
        found += _ids_in(config_dir / name)
    if not found:
        raise UserError(
            f"model.path={config_dir}: neither the tokenizer nor generation_config.json nor config.json names an EOS "
            "token, so rollouts could not end",
            remedy="set eos_token_id in generation_config.json",
        )
    return tuple(dict.fromkeys(found))


def _ids_in(path: Path) -> list[int]:
    """Return the ids of `eos_token_id` in a JSON file; none if the file or the key does not exist."""
    if not path.is_file():
        return []
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a JSON object ({error})", remedy="copy the file again") from error
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in ids):
        raise UserError(
            f"{path}: eos_token_id={value!r} must be a token id or a list of token ids", remedy="correct the file"
        )
    return ids


def cut_at_stop(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], stop: Sequence[str]
) -> tuple[str, str] | None:
    """Return the text of an answer up to and including the stop text that ended it, and that stop text.

    The last token completed the stop text, and may contain further characters: they are cut off. Of several stop texts
    in that token, the one that ends first counts, and of those the longest. Special tokens add no characters, except to
    a stop text that contains one.

    Args:
        tokenizer: the model's tokenizer.
        token_ids: all tokens of the answer.
        stop: the stop texts of the request.

    Returns:
        None if the last token completes none of the stop texts.
    """
    for skip_special_tokens in (True, False):
        text, before = (
            answer_text(tokenizer, ids) if skip_special_tokens else str(tokenizer.decode(list(ids)))
            for ids in (token_ids, token_ids[:-1])
        )
        # A character that is complete only with the last token differs in `before`.
        known = next((i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(before))
        # each stop text is looked for where it ends after the known characters
        begins = ((text.find(each, max(0, known - len(each) + 1)), each) for each in stop)
        ends = [(begin + len(each), -len(each), each) for begin, each in begins if begin >= 0]
        if ends:
            end, _, matched = min(ends)
            answer = text[: end - len(matched)]
            if not skip_special_tokens:
                dropped = dropped_ids(tokenizer, token_ids)
                special = [
                    token.content
                    for token_id, token in tokenizer.added_tokens_decoder.items()
                    if token.special and (dropped is None or token_id in dropped)
                ]
                answer = re.sub("|".join(map(re.escape, sorted(special, key=len, reverse=True))), "", answer)
            return answer + matched, matched
    return None
