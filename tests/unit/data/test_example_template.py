"""Tokens and masks of examples: equal to transformers, to each other, and to what was worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_mega.config.data_sections import DataConfig
from grpo_mega.data.example_rows import ExampleRow
from grpo_mega.data.example_template import ExampleTemplate, RenderedExample
from grpo_mega.data.prompt_template import PromptTemplate
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names
from tests.helpers.small_tokenizers import bpe_tokenizer

LOOP = "{% for m in messages %}<|start|>{{ m.role }}{{ '\\n' }}"
OPEN = "{% if add_generation_prompt %}<|start|>assistant{{ '\\n' }}{% endif %}"
PLAIN_TURN = "{{ m.content }}<|stop|>{{ '\\n' }}{% endfor %}"
MARKED_TURN = (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|stop|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|stop|>{% endif %}{{ '\\n' }}{% endfor %}"
)
MARKED, UNMARKED = LOOP + MARKED_TURN + OPEN, LOOP + PLAIN_TURN + OPEN
# as templates of reasoning models do: thoughts of earlier turns are left out
FORGETFUL = (
    "{% for m in messages %}<|start|>{{ m.role }}{{ '\\n' }}"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|stop|>{{ '\\n' }}"
    "{% endfor %}" + OPEN
)

MULTI_TURN: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße 🙂"},
    {"role": "assistant", "content": "Hi 🙂 there"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]


def template_of(template: str, folder: Path, **settings: Any) -> tuple[ExampleTemplate, Any]:
    path = folder / "template.jinja"
    path.write_text(template, encoding="utf-8")
    tokenizer = bpe_tokenizer(["there", "you", "Be"])
    return ExampleTemplate(DataConfig(train="x", chat_template=str(path), **settings), tokenizer), tokenizer


def conversation(*messages: dict[str, Any]) -> ExampleRow:
    return ExampleRow("file:1", (), messages)


def trained_text(tokenizer: Any, rendered: RenderedExample) -> str:
    ids = [token for token, own in zip(rendered.token_ids, rendered.is_answer, strict=True) if own]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def test_the_mask_of_a_template_with_generation_blocks_is_that_of_transformers(tmp_path: Path) -> None:
    template, tokenizer = template_of(MARKED, tmp_path)
    assert template.marks_answers
    rendered = template.render(conversation(*MULTI_TURN))
    expected = tokenizer.apply_chat_template(
        MULTI_TURN, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert list(rendered.token_ids) == expected["input_ids"]
    assert [int(own) for own in rendered.is_answer] == expected["assistant_masks"]
    assert trained_text(tokenizer, rendered) == "Hi 🙂 there<|stop|>See you<|stop|>"


def test_an_unmarked_template_gives_the_same_tokens_and_mask_by_difference(tmp_path: Path) -> None:
    marked, _ = template_of(MARKED, tmp_path)
    unmarked, _ = template_of(UNMARKED, tmp_path)
    assert not unmarked.marks_answers
    for messages in (MULTI_TURN, MULTI_TURN[:3], MULTI_TURN[1:], MULTI_TURN[:4]):
        assert marked.render(conversation(*messages)) == unmarked.render(conversation(*messages))


def test_a_template_that_changes_earlier_turns_is_an_error_for_several_turns(tmp_path: Path) -> None:
    template, tokenizer = template_of(FORGETFUL, tmp_path)
    thinking = [dict(m) for m in MULTI_TURN]
    thinking[2]["content"] = "<think>hm</think>Hi"
    with pytest.raises(UserError) as caught:
        template.render(conversation(*thinking))
    assert_names(caught.value, "message 3 of 5", "{% generation %}", "data.chat_template")
    rendered = template.render(conversation(*thinking[:3]))
    assert trained_text(tokenizer, rendered) == "<think>hm</think>Hi<|stop|>"


def test_a_conversation_that_begins_with_an_answer_needs_generation_blocks(tmp_path: Path) -> None:
    row = conversation({"role": "assistant", "content": "Hello"})
    template, tokenizer = template_of(MARKED, tmp_path)
    assert trained_text(tokenizer, template.render(row)) == "Hello<|stop|>"
    with pytest.raises(UserError, match="begins with an answer"):
        template_of(UNMARKED, tmp_path)[0].render(row)


@pytest.mark.parametrize("source", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_answers_in_the_prompt_are_not_trained(tmp_path: Path, source: str) -> None:
    template, tokenizer = template_of(source, tmp_path)
    rendered = template.render(ExampleRow("file:1", tuple(MULTI_TURN[:4]), (MULTI_TURN[4],)))
    assert trained_text(tokenizer, rendered) == "See you<|stop|>"


@pytest.mark.parametrize("source", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_special_tokens_that_a_row_spells_are_text_also_inside_an_answer(tmp_path: Path, source: str) -> None:
    template, tokenizer = template_of(source, tmp_path)
    question, answer = "what is <|stop|><|start|>?", "It is <|stop|>, see <|start|>assistant"
    rendered = template.render(
        conversation({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    )
    assert trained_text(tokenizer, rendered) == f"{answer}<|stop|>"
    stop, start = tokenizer.convert_tokens_to_ids(["<|stop|>", "<|start|>"])
    assert (rendered.token_ids.count(stop), rendered.token_ids.count(start)) == (2, 2)
    assert rendered.spelled == ("<|stop|>", "<|start|>")


def test_with_allow_special_tokens_the_texts_of_a_row_are_special(tmp_path: Path) -> None:
    template, tokenizer = template_of(UNMARKED, tmp_path, allow_special_tokens=True)
    rendered = template.render(
        conversation({"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|stop|>c"})
    )
    assert rendered.token_ids.count(tokenizer.convert_tokens_to_ids("<|stop|>")) == 3
    assert trained_text(tokenizer, rendered) == "b<|stop|>c<|stop|>"


def test_the_prompt_of_an_example_has_the_tokens_that_the_engine_would_get(tmp_path: Path) -> None:
    for source in (MARKED, UNMARKED):
        template, tokenizer = template_of(source, tmp_path, system_prompt="Be brief.")
        config = DataConfig(train="x", chat_template=str(tmp_path / "template.jinja"), system_prompt="Be brief.")
        prompt = PromptTemplate(config, tokenizer).render("Grüße").token_ids
        user, answer = {"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "Hi"}
        rendered = template.render(ExampleRow("file:1", (user,), (answer,)))
        assert rendered.token_ids[: len(prompt)] == prompt
        assert rendered.is_answer.index(True) == len(prompt)


def test_a_plain_example_is_the_prompt_the_completion_and_eos() -> None:
    tokenizer = bpe_tokenizer(["four"], add_bos=True)
    template = ExampleTemplate(DataConfig(train="x", template="plain"), tokenizer)
    row = ExampleRow("f:1", ({"role": "user", "content": "2+2="},), ({"role": "assistant", "content": "four<|end|>"},))
    rendered = template.render(row)
    bos, eos = tokenizer.convert_tokens_to_ids(["<|begin|>", "<|end|>"])
    assert rendered.token_ids[0] == bos
    assert (rendered.token_ids.count(bos), rendered.token_ids.count(eos)) == (1, 1)
    assert trained_text(tokenizer, rendered) == "four<|end|><|end|>"
    with pytest.raises(UserError, match=r"data\.template=plain"):
        template.render(conversation(*MULTI_TURN))
