"""Reading of prompts, their order over the steps, and the message for each error."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_mega.checkpoint.manager import LoopState
from grpo_mega.config.data_rules import check_data
from grpo_mega.config.data_sections import DataConfig
from grpo_mega.data.arithmetic import ALPHABET
from grpo_mega.data.chat import load_tokenizer
from grpo_mega.data.dataset import DataSet, PromptDataset, load_held_out, load_train
from grpo_mega.data.tokenizers import byte_tokenizer, char_tokenizer
from grpo_mega.types import Prompt, UserError

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)


def _write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def _load(source: Any, **settings: Any) -> PromptDataset:
    config = DataConfig.model_validate({"train": source, "template": "plain", **settings})
    check_data(config)
    return load_train(config, byte_tokenizer())


def _numbered(*counts: int, weights: tuple[float, ...] = ()) -> PromptDataset:
    """Return sets of the given sizes, whose prompts have the tokens (set, position)."""
    sets, begin = [], 0
    for i, count in enumerate(counts):
        prompts = tuple(Prompt(begin + j, str(j), (i, j), "") for j in range(count))
        sets.append(DataSet(str(i), prompts, weights[i] if weights else 1.0))
        begin += count
    return PromptDataset(tuple(sets))


@pytest.mark.parametrize(("count", "per_step"), [(10, 3), (7, 7), (5, 8), (12, 4)])
def test_every_prompt_occurs_once_per_epoch_before_any_occurs_again(count: int, per_step: int) -> None:
    dataset = _numbered(count)
    stream = [p.index for step in range(4 * count) for p in dataset.batch(step, per_step, seed=5)]
    epochs = [stream[at : at + count] for at in range(0, len(stream) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "each epoch has an order of its own"


def test_metrics_count_passes_over_all_prompts_and_skipped_prompts(tmp_path: Path) -> None:
    assert _numbered(6, 4).metrics(5, 3) == {"data/epoch": 1.5, "data/skipped_prompts": 0.0}
    path = _write(tmp_path / "rows.jsonl", *({"prompt": text, "answer": ""} for text in ("a" * 90, "b", "c" * 90)))
    found = _load(path, max_prompt_tokens=50, overlong="skip").metrics(2, 3)
    assert found == {"data/epoch": 6.0, "data/skipped_prompts": 2.0}


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    straight = [_numbered(50).batch(step, 8, seed=3) for step in range(30)]
    fresh = _numbered(50)
    assert [fresh.batch(step, 8, seed=3) for step in reversed(range(30))] == straight[::-1]
    assert [p.index for p in fresh.batch(0, 8, seed=3)] != [p.index for p in fresh.batch(0, 8, seed=4)]


def test_gsm8k_lines_are_read_unchanged(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", {"question": "How many?", "answer": "6*7 = <<6*7=42>>42.\n#### 42"})
    (prompt,) = _load(source).prompts
    assert (prompt.text, prompt.answer) == ("How many?", "6*7 = <<6*7=42>>42.\n#### 42")
    assert prompt.token_ids == tuple(b + 2 for b in b"How many?")


def test_named_keys_take_precedence_and_numbers_become_text(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", {"prompt": "no", "q": "yes", "answer": "no", "a": 12})
    (prompt,) = _load(source, prompt_key="q", answer_key="a").prompts
    assert (prompt.text, prompt.answer) == ("yes", "12")


def test_index_is_the_row_also_after_a_skipped_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * n, "answer": ""} for n in (3, 9, 4)]
    dataset = _load(_write(tmp_path / "a.jsonl", *rows), max_prompt_tokens=5, overlong="skip")
    assert [p.index for p in dataset.prompts] == [0, 2]
    assert (len(dataset), dataset.sets[0].num_skipped) == (2, 1)


def test_chat_template_opens_the_answer_and_takes_the_system_prompt(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "b"}]
    source = _write(tmp_path / "a.jsonl", {"prompt": "a", "answer": ""}, {"prompt": messages, "answer": ""})
    config = DataConfig(train=source, template="chat", system_prompt="short")
    texts = [p.text for p in load_train(config, tokenizer).prompts]
    assert texts == ["[system]short\n[user]a\n[answer]", "[system]own\n[user]b\n[answer]"]


def test_a_prompt_keeps_its_messages_with_the_system_prompt(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path = _write(tmp_path / "rows.jsonl", {"prompt": "1+1", "answer": "2"}, {"prompt": chat, "answer": "d"})
    system = {"role": "system", "content": "Be short."}
    found = _load(path, system_prompt="Be short.").prompts
    assert [list(p.messages) for p in found] == [[system, {"role": "user", "content": "1+1"}], [system, *chat]]
    assert found[0].text == "Be short.\n\n1+1"


def test_the_other_columns_are_kept_on_request_as_json_values(tmp_path: Path) -> None:
    rows = [
        {"question": f"{i}+{i}", "meta": {"answer": str(2 * i), "level": i}, "tags": ["sum"], "when": None}
        for i in range(2)
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.Table.from_pylist(
            [row | {"when": datetime.date(2024, 1, 1 + i), "raw": bytes([i])} for i, row in enumerate(rows)]
        ),
        path,
    )
    config = DataConfig(train=str(path), template="plain", answer_key="meta.answer")
    with_fields, without = (load_train(config, byte_tokenizer(), with_fields=on) for on in (True, False))
    assert [p.answer for p in with_fields.prompts] == ["0", "2"]
    assert [dict(p.fields) for p in with_fields.prompts] == [
        {"meta": {"answer": str(2 * i), "level": i}, "tags": ["sum"], "when": f"2024-01-0{1 + i}", "raw": raw}
        for i, raw in enumerate(["AA==", "AQ=="])
    ]
    assert [dict(p.fields) for p in without.prompts] == [{}, {}]
    assert with_fields.digest != without.digest  # a column that a reward reads decides its values


def test_plain_template_joins_contents_with_blank_lines(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    source = _write(tmp_path / "a.jsonl", {"prompt": messages, "answer": ""})
    assert _load(source, system_prompt="s").prompts[0].text == "s\n\na\n\nb"


def test_arithmetic_sources_are_the_sets_of_the_task() -> None:
    config = DataConfig(train="arithmetic:train", eval="arithmetic:heldout", template="plain")
    tokenizer = char_tokenizer(ALPHABET)
    heldout, train = load_held_out(config, tokenizer), load_train(config, tokenizer)
    assert heldout is not None
    assert len(heldout) == 300
    assert not {p.text for p in heldout.prompts} & {p.text for p in train.prompts}
    first = heldout.prompts[0]
    a, b = first.text.removesuffix("=").split("+")
    assert first.answer == str(int(a) + int(b))


GOOD = {"prompt": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "p", ', r"a\.jsonl:2: not valid JSON"),
        ("[1, 2]", r"a\.jsonl:2: a line must be a JSON object"),
        (
            {"answer": "a", "text": "t"},
            r"a\.jsonl:2: key 'prompt' or 'question' .* \['answer', 'text'\].*prompt_key",
        ),
        ({"prompt": "p"}, r"a\.jsonl:2: key 'answer' .* \['prompt'\]; set data\.answer_key"),
        ({"prompt": 7, "answer": "a"}, r"a\.jsonl:2: prompt=7 must be a string or a list of"),
        ({"prompt": [], "answer": "a"}, r"a\.jsonl:2: prompt=\[\] must be"),
        ({"prompt": [{"role": "user"}], "answer": "a"}, r"a\.jsonl:2: prompt=\[\{'role': 'user'\}\] must be"),
        ({"prompt": "p", "answer": True}, r"a\.jsonl:2: answer=True must be a string or a number"),
        ({"prompt": "p", "answer": None}, r"a\.jsonl:2: answer=None must be"),
        ({"prompt": "", "answer": "a"}, r"a\.jsonl:2: the prompt is empty"),
        (
            {"prompt": "123456", "answer": "a"},
            r"a\.jsonl:2: the prompt has 6 tokens, more than data\.max_prompt_tokens=5",
        ),
    ],
)
def test_malformed_line_names_file_and_line(row: Any, message: str, tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", GOOD, row)
    with pytest.raises(UserError, match=message):
        _load(source, max_prompt_tokens=5)


def test_bytes_that_are_not_utf8_name_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:3: not valid JSON"):
        _load(str(tmp_path / "a.jsonl"))


def test_a_prompt_that_cannot_be_encoded_names_the_line(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", {"prompt": "1+x=", "answer": ""})
    with pytest.raises(UserError, match=r"a\.jsonl:1: the model's tokenizer cannot encode"):
        load_train(DataConfig(train=source, template="plain"), char_tokenizer(ALPHABET))


def test_empty_file_and_nothing_left_after_skipping_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train=.*is empty"):
        _load(_write(tmp_path / "a.jsonl", ""))
    with pytest.raises(UserError, match=r"all 1 prompts have more than data\.max_prompt_tokens=2"):
        _load(_write(tmp_path / "b.jsonl", {"prompt": "long", "answer": ""}), max_prompt_tokens=2, overlong="skip")


def test_the_error_for_a_missing_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train=.*none\.jsonl: no such file; give a JSONL file"):
        _load(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"put GSM8K's train\.jsonl there \(.*openai/grade-school-math"):
        _load("data/gsm8k-of-nowhere/gsm8k/train.jsonl")
    with pytest.raises(UserError, match=r"contains neither state\.json nor dataset_dict\.json nor \*\.parquet"):
        _load(str(tmp_path))
    config = DataConfig(train="arithmetic:train", eval=str(tmp_path / "e.jsonl"), template="plain")
    with pytest.raises(UserError, match=r"^data\.eval="):
        load_held_out(config, byte_tokenizer())


def test_unknown_arithmetic_set_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"arithmetic:test is not a set.*arithmetic:train or arithmetic:heldout"):
        _load("arithmetic:test")


def test_chat_without_a_chat_template_names_plain(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.template=chat needs .* use data\.template=plain"):
        _load(_write(tmp_path / "a.jsonl", GOOD), template="chat")


def test_model_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path=.*nowhere is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(UserError, match=r"model\.path=.* contains no tokenizer"):
        load_tokenizer(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("a") == [99]


def test_tokenizer_without_eos_is_an_error(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(tmp_path)


def test_the_whole_gsm8k_file_is_read(gsm8k_dir: Path) -> None:
    dataset = _load(str(gsm8k_dir / "train.jsonl"), max_prompt_tokens=256, overlong="skip")
    assert len(dataset) + dataset.sets[0].num_skipped == 7473
    assert all("####" in prompt.answer for prompt in dataset.prompts)


def _set_of(prompt: Prompt) -> int:
    return prompt.token_ids[0]


def test_sets_alternate_in_the_ratio_of_their_weights() -> None:
    dataset = _numbered(40, 7, 300, weights=(0.3, 0.5, 0.2))
    stream = [_set_of(p) for step in range(25) for p in dataset.batch(step, 16, seed=1)]
    assert [stream.count(i) for i in range(3)] == [120, 200, 80]
    for length in range(1, len(stream)):
        assert all(abs(stream[:length].count(i) - share * length) < 1 for i, share in enumerate((0.3, 0.5, 0.2)))


def test_each_of_several_sets_is_a_stream_of_its_own_epochs() -> None:
    dataset = _numbered(5, 12, weights=(3, 1))
    stream = [p.token_ids for step in range(40) for p in dataset.batch(step, 8, seed=1)]
    first = [place for i, place in stream if i == 0]
    assert all(sorted(first[at : at + 5]) == list(range(5)) for at in range(0, 200, 5))
    assert len({tuple(first[at : at + 5]) for at in range(0, 200, 5)}) > 1


def test_a_resumed_run_gets_the_prompts_of_the_uninterrupted_run() -> None:
    straight = [_numbered(11, 30, weights=(0.9, 0.1)).batch(step, 6, seed=2) for step in range(50)]
    continued = _numbered(11, 30, weights=(0.9, 0.1))
    assert [continued.batch(step, 6, seed=2) for step in range(20, 50)] == straight[20:]


def test_shuffled_returns_every_prompt_of_every_set_once() -> None:
    dataset = _numbered(5, 12, weights=(3, 1))
    assert sorted(p.index for p in dataset.shuffled(4)) == list(range(17))
    assert dataset.shuffled(4) != dataset.shuffled(5)


def test_indices_are_unique_over_sets_and_names_are_kept(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * n, "answer": "", "level": n} for n in (3, 9, 4)]
    first, second = (_write(tmp_path / name, *rows) for name in ("a.jsonl", "b.jsonl"))
    sets = [
        {"path": first, "max_prompt_tokens": 5},
        {"path": second, "name": "hard", "filters": [{"key": "level", "min": 4}]},
    ]
    dataset = _load(sets)
    assert [(p.index, p.data_set) for p in dataset.prompts] == [(0, "a"), (2, "a"), (4, "hard"), (5, "hard")]
    assert [part.num_filtered for part in dataset.sets] == [1, 1]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([], r"data\.train=\[\] must list at least one"),
        ([{"path": "a.jsonl"}, {"path": "b/a.jsonl"}], r"data\.train\[1\]\.name='a' must be unique: data\.train\[0\]"),
        ([{"path": "a.jsonl", "name": "a/b"}], r"data\.train\[0\]\.name='a/b' must consist of"),
        ([{"path": "a.jsonl", "weight": 2}], r"data\.train\[0\]\.weight=2\.0 does nothing with one set"),
        ([{"path": "a", "weight": 0.12345678}, {"path": "b"}], r"data\.train: the weights .* at most 100000; round"),
        ([{"path": "a", "min_prompt_tokens": 9, "max_prompt_tokens": 8}], r"min_prompt_tokens=9 must be at most .* 8"),
        ([{"path": "a", "max_prompt_tokens": 9999}], r"max_prompt_tokens=9999 must be at most data\.max_prompt_tokens"),
        (
            [{"path": "a", "filters": [{"key": "level"}]}],
            r"filters\[0\]\.key='level' needs either",
        ),
        ([{"path": "a", "filters": [{"key": "level", "any_of": []}]}], r"any_of=\[\] must list at least one value"),
        ([{"path": "a", "filters": [{"key": "level", "min": 3, "max": 2}]}], r"min=3\.0 must be at most .*max=2\.0"),
        ([{"path": "arithmetic:train", "split": "x"}], r"split has no effect"),
        ([{"path": "none.jsonl"}], r"data\.train\[0\]\.path=none\.jsonl: no such file"),
    ],
)
def test_the_error_for_a_wrong_list_of_sets_names_its_key(sets: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _load(sets)


def test_a_held_out_set_has_no_weight(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.eval\[0\]\.weight=2\.0 does nothing"):
        _load("arithmetic:train", eval=[{"path": "arithmetic:heldout", "weight": 2}])


def test_filters_that_leave_nothing_are_an_error(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(UserError, match=r"the filters of this set remove 1 of 1 rows"):
        _load([{"path": source, "min_prompt_tokens": 3}])


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), "\ud800"])
def test_invalid_answers_name_the_line(answer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1: answer"):
        _load(_write(tmp_path / "a.jsonl", {"prompt": "p", "answer": answer}))


def test_a_run_is_not_resumed_with_different_prompts() -> None:
    dataset = _numbered(5, 12, weights=(3, 1))
    assert dataset.digest == _numbered(5, 12, weights=(3, 1)).digest
    others = [_numbered(5, 12, weights=(3, 2)), _numbered(5, 11, weights=(3, 1)), _numbered(12, 5, weights=(3, 1))]
    assert len({other.digest for other in (dataset, *others)}) == 4
    state = LoopState(step=7, policy_version=9, kl_coef=0.1).over(dataset.digest, same_run=True)
    assert state == LoopState(7, 9, 0.1, dataset.digest)
    assert state.after(8, 2, None) == LoopState(8, 11, None, dataset.digest)
    assert state.over(dataset.digest, same_run=True) == state
    with pytest.raises(UserError, match=r"data\.train holds other prompts than in the 7 steps so far"):
        state.over(others[0].digest, same_run=True)
    # a run that starts from another one's weights may have prompts of its own
    assert state.over(others[0].digest, same_run=False).prompts_digest == others[0].digest
