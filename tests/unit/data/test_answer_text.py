"""Special tokens are no text of an answer, except the tags around a thought."""

from __future__ import annotations

import pytest

from grpo_mega.data.answer_ends import cut_at_stop
from grpo_mega.data.answer_text import answer_text
from grpo_mega.data.chat import token_ends
from grpo_mega.rewards.builtin.exact import exact
from grpo_mega.rewards.thought import THOUGHT_TAGS
from tests.helpers.small_tokenizers import bpe_tokenizer


def test_special_tokens_are_left_out() -> None:
    tokenizer = bpe_tokenizer(special=["<tool>"])
    ids = tokenizer.encode("a<tool>é<|end|>", add_special_tokens=False)
    assert answer_text(tokenizer, ids) == "aé"
    assert token_ends(tokenizer, ids) == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("name", THOUGHT_TAGS)
def test_the_tags_of_a_thought_stay_although_they_are_special_tokens(name: str) -> None:
    """A prompt that ends with the tag would otherwise be a thought that no completion closes."""
    tokenizer = bpe_tokenizer(special=[f"<{name}>", f"</{name}>", "<tool>"])
    ids = tokenizer.encode(f"4?</{name}><tool>5<|end|>", add_special_tokens=False)
    text = answer_text(tokenizer, ids)
    assert text == f"4?</{name}>5"
    assert exact(f"2+3=<{name}>\n", text, "5") == 1.0
    tag_end = len(f"4?</{name}>")
    assert token_ends(tokenizer, ids) == [1, 2, tag_end, tag_end, tag_end + 1, tag_end + 1]


@pytest.mark.parametrize(("stop", "answer"), [("5", "</think>5"), ("<tool>", "</think>5<tool>")])
def test_the_tags_of_a_thought_stay_before_a_stop_text(stop: str, answer: str) -> None:
    tokenizer = bpe_tokenizer(special=["</think>", "<tool>"])
    ids = tokenizer.encode(f"</think><|stop|>{'' if stop == '5' else '5'}{stop}", add_special_tokens=False)
    assert cut_at_stop(tokenizer, ids, [stop]) == (answer, stop)
