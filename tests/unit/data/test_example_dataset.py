"""Sets of examples: rows, limits, order, and every error of a row with its place and remedy."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.config.data_sections import DataConfig, DataSource
from grpo_mega.data.arithmetic import ALPHABET
from grpo_mega.data.example_dataset import ExampleDataset, load_examples
from grpo_mega.data.example_rows import check_example_rows
from grpo_mega.data.tokenizers import byte_tokenizer, char_tokenizer
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names

ROWS = [{"prompt": f"q{i}", "completion": "a" * (i + 1)} for i in range(6)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def load(folder: Path, rows: list[Any], **settings: Any) -> ExampleDataset:
    config = DataConfig(train=write(folder / "train.jsonl", rows), template="plain", **settings)
    check_example_rows(config)
    return load_examples(config, byte_tokenizer())


def problem(folder: Path, rows: list[Any], **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, rows, **settings)
    return str(caught.value)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_prompt_and_completion_become_tokens_with_a_mask_over_the_completion_and_eos(tmp_path: Path) -> None:
    (first, *_) = load(tmp_path, ROWS).sets[0].examples
    assert list(first.token_ids) == [ord("q") + 2, ord("0") + 2, ord("a") + 2, 1]
    assert list(first.loss_mask) == [0, 0, 1, 1]
    assert first.num_loss_tokens == 2


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a", "x": {"y": "z"}}]
    (example,) = load(tmp_path, rows, completion_key="answer").sets[0].examples
    assert bytes(t - 2 for t in example.token_ids[:-1]) == b"qa"
    (example,) = load(tmp_path, rows, prompt_key="answer", completion_key="x.y").sets[0].examples
    assert bytes(t - 2 for t in example.token_ids[:-1]) == b"az"
    (example,) = load(tmp_path, [{"prompt": [user("a"), user("b")], "completion": [assistant("c")]}]).sets[0].examples
    assert bytes(t - 2 for t in example.token_ids[:-1]) == b"a\n\nbc"


def test_generated_sets_are_examples_too() -> None:
    data = load_examples(DataConfig(train="arithmetic:train", template="plain"), char_tokenizer(ALPHABET))
    assert len(data) == 4200
    texts = {char_tokenizer(ALPHABET).decode(list(e.token_ids)[:-1]) for e in data.sets[0].examples[:50]}
    assert all(eval(text.replace("=", "==")) for text in texts)


def test_too_long_examples_are_an_error_skipped_or_truncated_and_counted(tmp_path: Path) -> None:
    message = problem(tmp_path, ROWS, max_example_tokens=5)
    assert_names(message, "train.jsonl:3", "6 tokens", "data.max_example_tokens=5", "data.overlong=truncate")
    skipped = load(tmp_path, ROWS, max_example_tokens=5, overlong="skip")
    assert [len(e.token_ids) for e in skipped.sets[0].examples] == [4, 5]
    assert skipped.metrics(1, 2) == {"data/epoch": 1.0, "data/skipped_examples": 4, "data/truncated_examples": 0}
    truncated = load(tmp_path, ROWS, max_example_tokens=5, overlong="truncate")
    assert [len(e.token_ids) for e in truncated.sets[0].examples] == [4, 5, 5, 5, 5, 5]
    assert list(truncated.sets[0].examples[-1].loss_mask) == [0, 0, 1, 1, 1]
    assert truncated.metrics(0, 2)["data/truncated_examples"] == 4
    without_answer = load(
        tmp_path, [*ROWS, {"prompt": "long " * 9, "completion": "a"}], max_example_tokens=5, overlong="truncate"
    )
    assert without_answer.metrics(0, 2)["data/skipped_examples"] == 1, "no trained token is left"
    assert "all 6 examples" in problem(tmp_path, ROWS, max_example_tokens=2, overlong="skip")


def test_every_epoch_has_every_example_once_and_the_order_depends_on_seed_and_step_only(tmp_path: Path) -> None:
    data = load(tmp_path, ROWS)
    seen = [e.index for step in range(3) for e in data.batch(step, 4, seed=1)]
    assert Counter(seen[:6]) == Counter(seen[6:]) == Counter(range(6))
    assert [e.index for e in data.batch(1, 4, seed=1)] == seen[4:8]
    assert [e.index for step in range(3) for e in data.batch(step, 4, seed=2)] != seen


def test_the_digest_covers_tokens_masks_and_weights(tmp_path: Path) -> None:
    digests = {
        load(tmp_path, ROWS).digest,
        load(tmp_path, [*ROWS[:-1], {"prompt": "q5", "completion": "b"}]).digest,
        load(tmp_path, [*ROWS[:-1], {"prompt": "q5a", "completion": "aaaaa"}]).digest,  # the same tokens
    }
    assert len(digests) == 3
    assert load(tmp_path, ROWS).digest in digests


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        ({"question": "q", "answer": "a"}, {}, ("'messages'", "'completion'", "answer", "data.completion_key")),
        ({"completion": "a"}, {}, ("'prompt' or 'question'", "data.prompt_key")),
        ({"prompt": "q"}, {"messages_key": "chat"}, ("'chat'", "data.messages_key")),
        ({"prompt": "q", "completion": "  "}, {}, ("answer 1 of 1 is empty",)),
        ({"prompt": "q", "completion": 3}, {}, ("completion=3", "{role, content}")),
        ({"messages": "q"}, {}, ("messages='q'", "{role, content}")),
        ({"messages": [user("q")]}, {}, ("'assistant'", "user", "roles")),
        ({"messages": [user("q"), assistant("a"), user("r"), assistant("")]}, {}, ("answer 2 of 2 is empty",)),
        ({"messages": [{"from": "human", "value": "q"}]}, {}, ("messages=", "{role, content}")),
        ({"messages": [user("q"), assistant("a")]}, {}, ("data.template=plain", "data.template=chat")),
    ],
)
def test_a_wrong_row_is_an_error_with_its_line(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    assert_names(problem(tmp_path, [ROWS[0] if not settings else row, row], **settings), "train.jsonl:", *words)


def test_an_empty_file_and_filters_that_leave_nothing_are_errors(tmp_path: Path) -> None:
    assert "is empty" in problem(tmp_path, [])
    source = DataSource(path=write(tmp_path / "rows.jsonl", ROWS), filters=({"key": "prompt", "any_of": ("x",)},))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="remove all 6 rows"):
        load_examples(DataConfig(train=(source,), template="plain"), byte_tokenizer())
