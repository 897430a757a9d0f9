"""Encoding of text in which only some special tokens are special: those of a template, not those that a row spells.

A row may contain the text of a special token, such as `<|im_end|>`. Encoded as that token, it would end a message that
the author of the row did not end. `mark` replaces such texts by private-use characters before the template is applied.
`encode_marked` then encodes the rendered text with a copy of the tokenizer that knows its special tokens under other
names. So the copy runs the tokenizer's own steps (normalization, splitting, merges) on the whole text at once, and a
text without marks gets the same tokens as from the tokenizer.
Asserted by tests/unit/data/test_special_tokens.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from grpo_mega.types import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_REMEDY = "set data.allow_special_tokens=true, or change the row"
# Two planes of private-use characters: a mark for each special token, and its name in the copy of the tokenizer.
_MARKS, _NAMES, _PLANE_SIZE = 0xF0000, 0x100000, 0xFFFE
_PRIVATE = re.compile(f"[{chr(_MARKS)}-{chr(_NAMES + _PLANE_SIZE)}]")


class SpecialTokens:
    """The special tokens of a tokenizer, and the encoding of text that contains their texts.

    Args:
        tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.ids: dict[str, int] = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content
        }
        """Text -> id of each special token."""
        texts = sorted(self.ids, key=len, reverse=True)
        self._mark_of = {text: chr(_MARKS + i) for i, text in enumerate(texts)}
        self._name_of = {text: chr(_NAMES + i) for i, text in enumerate(texts)}
        first = "".join(sorted({re.escape(text[0]) for text in texts}))
        # The look-ahead makes the search fast for tokenizers with thousands of special tokens.
        self._any = re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, texts))})") if texts else None

    def spelled_in(self, value: object) -> list[str]:
        """Return the special tokens whose texts occur in a text, or in the texts of a list or a mapping."""
        found: dict[str, None] = {}
        for text in _texts(value):
            found |= dict.fromkeys(self._any.findall(text) if self._any is not None else ())
        return list(found)

    def mark(self, value: Any) -> Any:
        """Return the value with each text of a special token replaced by its mark."""
        if isinstance(value, str):
            return self._any.sub(lambda found: self._mark_of[found[0]], value) if self._any is not None else value
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list | tuple) else value

    def unmark(self, text: str) -> str:
        """Return the text with each mark replaced by the text of its special token."""
        for special, mark in self._mark_of.items():
            text = text.replace(mark, special)
        return text

    def encode_as_text(self, text: str) -> list[int]:
        """Return the tokens of a text in which nothing is special, without tokens that the tokenizer adds.

        Raises:
            UserError: the vocabulary offers no other encoding of a special token's text.
        """
        spelled = self.spelled_in(text)
        token_ids = list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        self._check_text(token_ids, spelled)
        return token_ids

    def encode_marked(self, marked: str, text: str, spelled: list[str]) -> list[int]:
        """Return the tokens of a rendered text: marks become text, other special tokens stay special.

        Args:
            marked: the rendered text of values that `mark` returned.
            text: the rendered text of the same values without marks.
            spelled: the special tokens that were marked.

        Raises:
            UserError: the two texts differ in more than the marks, or the tokenizer cannot encode the text so.
        """
        return self.encode_marked_spans(marked, text, spelled)[0]

    def encode_marked_spans(
        self, marked: str, text: str, spelled: list[str]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of `encode_marked`, and the characters of `marked` that each of them stands for.

        Characters are given as (begin, end).

        Args:
            marked: as in `encode_marked`.
            text: as in `encode_marked`.
            spelled: as in `encode_marked`.

        Raises:
            UserError: as `encode_marked`.
        """
        assert self._any is not None, "without special tokens nothing is marked"
        if _PRIVATE.search(text):
            raise UserError(
                f"the prompt contains {spelled[0]!r} and also private-use characters of planes 15 or 16, which this "
                "program uses to encode special tokens as text",
                remedy=_REMEDY,
            )
        if self.unmark(marked) != text:
            raise UserError(
                f"the chat template treats {spelled[0]!r} in the row in another way than other text, so it cannot be "
                "encoded as text",
                remedy=_REMEDY,
            )
        copy, ids_of_names = self._renamed
        named, count = self._any.subn(lambda found: self._name_of[found[0]], marked)
        encoded = copy.encode(self.unmark(named), add_special_tokens=False)
        if sum(token_id in ids_of_names for token_id in encoded.ids) != count:
            raise UserError(
                f"the tokenizer cannot encode {spelled[0]!r} of the row as text beside the template's special tokens",
                remedy=_REMEDY,
            )
        self._check_text([token_id for token_id in encoded.ids if token_id not in ids_of_names], spelled)
        origin = self._origin_of_characters(marked)
        spans = [
            (origin[begin], origin[end - 1] + 1 if end > begin else origin[begin]) for begin, end in encoded.offsets
        ]
        return [ids_of_names.get(token_id, token_id) for token_id in encoded.ids], spans

    def _origin_of_characters(self, marked: str) -> list[int]:
        """Return, for each character of the text that is encoded, its position in `marked`; and the end of the text.

        In that text a special token of the template is one character, and a mark is the text of its special token.
        """
        assert self._any is not None, "without special tokens nothing is marked"
        lengths = [1] * len(marked)
        for found in self._any.finditer(marked):
            lengths[found.start() + 1 : found.end()] = [0] * (found.end() - found.start() - 1)
        size_of = {mark: len(text) for text, mark in self._mark_of.items()}
        lengths = [size_of.get(character, length) for character, length in zip(marked, lengths, strict=True)]
        return [at for at, length in enumerate(lengths) for _ in range(length)] + [len(marked)]

    def _check_text(self, token_ids: list[int], spelled: list[str]) -> None:
        """Raise UserError if the text of a special token became that token after all."""
        for text in spelled:
            if self.ids[text] in token_ids:
                raise UserError(f"the tokenizer cannot encode {text!r} of the row as text", remedy=_REMEDY)

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[int, int]]:
        """Return a copy of the tokenizer with renamed special tokens, and its ids of these -> their original ids."""
        from tokenizers import Tokenizer

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                "the row contains the text of a special token, which only fast tokenizers (tokenizer.json) can encode "
                "as text",
                remedy=_REMEDY,
            )
        state = json.loads(backend.to_str())
        state |= {"post_processor": None, "truncation": None, "padding": None}
        for token in state["added_tokens"]:
            if token["special"] and token["content"]:
                token["content"] = self._name_of[token["content"]]
        copy = Tokenizer.from_str(json.dumps(state))
        vocab = copy.get_vocab()
        ids_of_names = {vocab.pop(name): self.ids[text] for text, name in self._name_of.items()}
        if ids_of_names.keys() & set(vocab.values()):  # a vocabulary whose ids have gaps
            raise UserError("the tokenizer cannot encode the text of a special token as text", remedy=_REMEDY)
        return copy, ids_of_names


def _texts(value: object) -> Iterator[str]:
    """Yield every text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
