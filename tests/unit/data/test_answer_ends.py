"""The end of an answer: EOS from every file that names one, and stop texts inside a larger token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_mega.data.answer_ends import cut_at_stop, eos_ids
from grpo_mega.data.chat import load_tokenizer
from grpo_mega.types import UserError
from tests.helpers.small_tokenizers import bpe_tokenizer


def _write(folder: Path, **files: object) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"eos_token_id": value}))
    return folder


@pytest.mark.parametrize(
    ("files", "tokenizer_eos", "expected"),
    [
        ({}, 4, (4,)),
        ({"config": 3}, 4, (4, 3)),
        ({"config": 3, "generation_config": [1, 2]}, 4, (4, 1, 2, 3)),
        ({"config": 3, "generation_config": [3, 4]}, 4, (4, 3)),
        ({"generation_config": []}, 4, (4,)),
        ({"config": [], "generation_config": None}, 4, (4,)),
        ({"config": 3}, None, (3,)),
    ],
)
def test_eos_is_the_union_of_tokenizer_generation_config_and_config(
    files: dict[str, object], tokenizer_eos: int | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert eos_ids(_write(tmp_path, **files), tokenizer_eos) == expected


def test_a_model_without_any_eos_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path=.*EOS.*set eos_token_id in generation_config\.json"):
        eos_ids(_write(tmp_path, config=[], generation_config=None), None)


@pytest.mark.parametrize("value", ["</s>", [1, "x"], True, -1, 2.0])
def test_an_eos_that_is_no_token_id_names_the_file(value: object, tmp_path: Path) -> None:
    bpe_tokenizer().save_pretrained(_write(tmp_path, generation_config=value))
    for read in (lambda: eos_ids(tmp_path, 1), lambda: load_tokenizer(tmp_path)):
        with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id=.* must be a token id"):
            read()


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("<<1+2>>.", (">>",), ("<<1+2>>", ">>")),
        ("<<1+2>>", (">>",), ("<<1+2>>", ">>")),
        ("a>>. b>>.", (">>", ">>. b>>"), ("a>>. b>>", ">>. b>>")),
        ("no>>.", (">>.", ">>"), ("no>>", ">>")),
        ("x é>", ("é",), None),
        ("x", (">>",), None),
    ],
)
def test_an_answer_is_cut_after_the_stop_text_of_its_last_token(
    text: str, stop: tuple[str, ...], expected: tuple[str, str] | None
) -> None:
    tokenizer = bpe_tokenizer([">>."])
    token_ids = tokenizer.encode(text)
    assert cut_at_stop(tokenizer, token_ids, stop) == expected


def test_of_stop_texts_that_end_together_the_longest_matched() -> None:
    tokenizer = bpe_tokenizer([">>."])
    assert cut_at_stop(tokenizer, tokenizer.encode("a>>."), (">", ">>", "a>")) == ("a>", "a>")


def test_characters_of_several_tokens_do_not_move_the_cut() -> None:
    tokenizer = bpe_tokenizer(["»."])
    halves = [*tokenizer.encode("é"), *tokenizer.encode("».")]
    assert cut_at_stop(tokenizer, halves, ("»",)) == ("é»", "»")
    assert cut_at_stop(tokenizer, tokenizer.encode("aé"), ("é",)) == ("aé", "é")


def test_a_stop_text_may_be_a_special_token_and_only_then_is_in_the_answer() -> None:
    tokenizer = bpe_tokenizer()
    token_ids = tokenizer.encode("<|start|>find<|stop|>")
    assert cut_at_stop(tokenizer, token_ids, ("<|stop|>",)) == ("find<|stop|>", "<|stop|>")


def test_a_stop_text_that_special_tokens_interrupt_does_not_end_an_earlier_answer() -> None:
    tokenizer = bpe_tokenizer([">>."])
    assert cut_at_stop(tokenizer, tokenizer.encode("><|start|>> b>>."), (">>",)) == (">> b>>", ">>")
