"""Text of special tokens becomes ordinary tokens, and nothing else of the encoding changes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_mega.data.special_tokens import SpecialTokens
from grpo_mega.types import UserError

START, END = "<s>", "</s>"
MERGES = [("▁", "a"), ("▁a", "b"), ("<", "/"), ("</", "s"), ("a", "b")]


def make(kind: str, special: Sequence[str], **flags: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer in the form of a family, in which only `special` are special tokens."""
    characters = ["<unk>", START, END, *sorted({*"</s>ab c\n▁é"})]
    vocab = {token: i for i, token in enumerate([*characters, *("".join(pair) for pair in MERGES)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=MERGES, unk_token="<unk>", fuse_unk=False))
    if kind == "prepend":  # Llama 2
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "first":  # Llama 2, converted anew
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif kind == "always":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    elif kind == "normalized":
        core.normalizer = normalizers.NFD()
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(each, special=True, **({"normalized": False} | flags)) for each in special])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END if END in special else None)


KINDS = ("plain", "prepend", "first", "always", "normalized")
FLAGS: tuple[dict[str, bool], ...] = ({}, {"lstrip": True}, {"rstrip": True}, {"normalized": True})
# A normalizer that prepends a space to the name of a special token hides it: none is ever found.
CASES = [(kind, flags) for kind in KINDS for flags in FLAGS if (kind, flags) != ("prepend", {"normalized": True})]


@pytest.mark.parametrize(("kind", "flags"), CASES)
def test_marked_text_gets_the_tokens_of_a_tokenizer_without_that_special_token(
    kind: str, flags: dict[str, bool]
) -> None:
    special = SpecialTokens(make(kind, [START, END], **flags))
    without_end = make(kind, [START], **flags)
    draw = random.Random(f"{kind} {flags}")
    for _ in range(200):
        row = "".join(draw.choice(["a", "b", " ", "ab", END, "<", "é"]) for _ in range(draw.randint(1, 8))) + END
        before, after = (draw.choice(["", " ", "a", f"{START} ", f" {START}", f"{START}{START}b"]) for _ in range(2))
        text = f"{before}{row}{after}"
        found = special.encode_marked(f"{before}{special.mark(row)}{after}", text, special.spelled_in(row))
        assert found == without_end.encode(text, add_special_tokens=False), text


def test_text_in_nested_values_is_marked_and_restored() -> None:
    special = SpecialTokens(make("plain", [START, END]))
    value = {"content": f"a{END}", "calls": [{"name": START, "count": 3}], "none": None}
    marked = special.mark(value)
    assert marked["calls"][0]["count"] == 3
    assert marked["none"] is None
    assert len(marked["calls"][0]["name"]) == 1
    assert special.unmark(marked["content"]) == f"a{END}"
    assert special.spelled_in(value) == [END, START]


def test_a_vocabulary_that_has_only_the_special_token_for_its_text_is_an_error() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, END: 1, "a": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([END])
    special = SpecialTokens(PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END))
    assert special.encode_as_text("a a") == [2, 2]
    for encode in (special.encode_as_text, lambda row: special.encode_marked(special.mark(row), row, [END])):
        with pytest.raises(UserError, match=r"cannot encode '</s>' of the row as text; set data\.allow_special_tokens"):
            encode(f"a {END}")


def test_private_use_characters_beside_a_special_token_are_an_error() -> None:
    special = SpecialTokens(make("plain", [START, END]))
    row = f"{END}\U000f0000"
    with pytest.raises(UserError, match="private-use characters"):
        special.encode_marked(special.mark(row), row, [END])


def test_a_tokenizer_without_special_tokens_finds_none() -> None:
    special = SpecialTokens(make("plain", []))
    assert special.spelled_in(f"a{END}") == []
    assert special.mark(f"a{END}") == f"a{END}"
