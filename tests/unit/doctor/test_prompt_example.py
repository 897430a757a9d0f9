"""The doctor shows the first prompt of a run with its tokens, and what ends an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_mega.config.load import config_from_values, load_config
from grpo_mega.config.schema import Config
from grpo_mega.doctor.finding import Finding, in_words
from grpo_mega.doctor.prompt_example import check_prompt
from tests.helpers.small_tokenizers import bpe_tokenizer

QUICKSTART = Path(__file__).resolve().parents[3] / "configs" / "quickstart.yaml"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.content }}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)


def findings(folder: Path, *overrides: str, eos: object = None) -> tuple[Finding, Finding]:
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "ab", "answer": "1"}) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    config: Config = load_config(
        QUICKSTART,
        ["model.base=null", f"model.path={folder}", f"data.train={folder}/rows.jsonl", "data.eval=null", *overrides],
    )
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = TEMPLATE
    first, second = check_prompt(config, tokenizer)
    assert (first.check, second.check) == ("prompt", "end of an answer")
    return first, second


def test_the_first_prompt_is_shown_with_its_token_ids(tmp_path: Path) -> None:
    prompt, end = findings(tmp_path, "data.template=chat", "sampling.max_tokens=7", eos=[4])
    a, b = bpe_tokenizer().encode("ab")
    assert (prompt.status, end.status) == ("pass", "pass")
    assert (
        prompt.message == f"{tmp_path}/rows.jsonl:1, 5 tokens: '<|start|>ab<|stop|><|start|>'\ntoken ids: 3 {a} {b} 4 3"
    )
    assert end.message == "<|end|> (2), <|stop|> (4) or after 7 tokens"
    assert in_words([prompt]).splitlines()[1].strip() == f"token ids: 3 {a} {b} 4 3"


def test_stop_texts_of_the_environment_are_shown(tmp_path: Path) -> None:
    _, end = findings(
        tmp_path, "data.template=plain", "environment.name=calculator", "environment.after='!'", "sampling.max_tokens=9"
    )
    assert end.message == "<|end|> (2), the stop text '>>', replies are put between '' and '!' or after 9 tokens"


def test_a_template_that_ends_answers_with_a_token_that_is_no_eos_gives_a_warning(tmp_path: Path) -> None:
    _, end = findings(tmp_path, "data.template=chat", eos=[])
    assert end.status == "warn"
    assert "<|stop|> (4), which is not among them" in end.message
    assert "eos_token_id" in end.remedy


@pytest.mark.parametrize(
    ("override", "expected"),
    [("data.prompt_key=question", "rows.jsonl:1: key 'question'"), ("data.chat_template=/none.jinja", "/none.jinja")],
)
def test_a_prompt_that_cannot_be_made_fails_with_its_reason(override: str, expected: str, tmp_path: Path) -> None:
    prompt, _ = findings(tmp_path, "data.template=chat", override)
    assert prompt.status == "fail"
    assert expected in prompt.message


def test_an_eos_that_is_no_token_fails(tmp_path: Path) -> None:
    _, end = findings(tmp_path, "data.template=plain", eos="</s>")
    assert end.status == "fail"
    assert "generation_config.json: eos_token_id='</s>'" in end.message


def test_the_first_example_of_supervised_fine_tuning_is_shown_with_the_parts_that_are_trained(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    config = config_from_values(
        {
            "model": {"path": str(tmp_path)},
            "data": {"train": f"{tmp_path}/chat.jsonl"},
            "train": {"objective": "sft", "steps": 1},
        },
        [],
        [tmp_path],
    )
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (found,) = check_prompt(config, tokenizer)
    assert (found.check, found.status) == ("example", "pass")
    assert found.message.splitlines() == [
        f"{tmp_path}/chat.jsonl:1, 12 tokens, 4 trained",
        *("read: '<|start|>a<|stop|><|start|>'", "trained: 'b<|stop|>'") * 2,
    ]
