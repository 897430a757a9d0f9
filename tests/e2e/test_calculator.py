"""A run with a tool, started as a user starts it: configs/calculator-tiny.yaml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.data.tokenizers import byte_tokenizer
from tests.helpers.jobs import read_json, read_lines, rollouts_of, run_job_successfully, without_times

CONFIG = "configs/calculator-tiny.yaml"
# a base that produces the form of a call, but not the correct expression
SHORT = (
    CONFIG,
    "train.steps=2",
    "data.prompts_per_step=8",
    "data.eval=null",
    "model.base.steps=100",
    "model.base.batch_size=32",
)


def with_several_turns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["num_turns"] > 1]


def check_rows(rows: list[dict[str, Any]]) -> None:
    """Check that replies are the calculator's, tokenized separately, not trained on, and that answers were sampled."""
    tokenizer = byte_tokenizer()
    for row in rows:
        assert len(row["completion_ids"]) <= 32
        if row["loss_mask"] is None:
            assert row["num_turns"] == 1 or "<<" in row["completion"]
            continue
        pieces: list[tuple[int, list[int]]] = []
        for token, own, sampled, old in zip(
            row["completion_ids"], row["loss_mask"], row["sampler_log_probs"], row["old_log_probs"], strict=True
        ):
            assert own or (sampled, old) == (0.0, 0.0)
            if not pieces or pieces[-1][0] != own:
                pieces.append((own, []))
            pieces[-1][1].append(token)
        assert [own for own, _ in pieces] == [1 - i % 2 for i in range(len(pieces))]
        for (_, answer), (_, reply) in zip(pieces[::2], pieces[1::2], strict=False):
            called = tokenizer.decode(answer, skip_special_tokens=True)
            assert called.endswith(">>")
            expression = called.rpartition("<<")[2].removesuffix(">>")
            text = tokenizer.decode(reply)
            assert reply == tokenizer.encode(text)
            if expression.count("+") == 1 and all(
                part.isdigit() and part == str(int(part)) for part in expression.split("+")
            ):
                first, second = expression.split("+")
                assert text == str(int(first) + int(second))


def test_rollouts_contain_the_calculators_replies_and_do_not_train_on_them(tmp_path: Path) -> None:
    run_job_successfully(*SHORT, f"run.dir={tmp_path / 'run'}", output=tmp_path / "log", timeout_seconds=420)
    run = tmp_path / "run"
    rows = [row for step in (1, 2) for row in rollouts_of(run, step)]
    assert len(with_several_turns(rows)) >= len(rows) // 10
    check_rows(rows)
    for step, line in enumerate(read_lines(run / "metrics.jsonl"), start=1):
        rows = rollouts_of(run, step)
        result_tokens = sum(row["loss_mask"].count(0) for row in rows if row["loss_mask"])
        assert line["rollout/result_tokens"] == result_tokens > 0
        assert line["train/num_loss_tokens"] == line["rollout/tokens"] - result_tokens
        assert line["rollout/turns_mean"] == sum(row["num_turns"] for row in rows) / len(rows)
        # policy and sampler agree on the tokens after a reply, so the engine had the same sequence
        assert line["train/mismatch_max"] < 1e-3


@pytest.mark.long
def test_two_replicas_of_two_ranks_use_the_tool_and_sample_the_same_rollouts_again(tmp_path: Path) -> None:
    layout = (
        "run.world_size=4",
        "engine.tp=2",
        "parallel.tp=2",
        "environment.workers=2",
        "sampling.prompts_per_wave=4",
    )
    runs = []
    for name in ("first", "second"):
        run_job_successfully(
            *SHORT, *layout, "train.steps=1", f"run.dir={tmp_path / name}", output=tmp_path / f"{name}.log"
        )
        runs.append(tmp_path / name)
    rows = [rollouts_of(run, 1) for run in runs]
    check_rows(rows[0])
    assert {row["replica"] for row in with_several_turns(rows[0])} == {0, 1}
    assert rows[0] == rows[1]
    lines = [without_times(read_lines(run / "metrics.jsonl")[0]) for run in runs]
    assert json.dumps(lines[0]) == json.dumps(lines[1])
    assert lines[0]["train/mismatch_max"] < 1e-3


@pytest.mark.long
def test_the_policy_learns_to_call_the_calculator(tmp_path: Path) -> None:
    ended = run_job_successfully(CONFIG, f"run.dir={tmp_path / 'run'}", output=tmp_path / "log", timeout_seconds=900)
    summary = read_json(tmp_path / "run" / "summary.json")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["rollout/turns_mean"] > lines[0]["rollout/turns_mean"] + 0.3, ended.stdout
    assert summary["eval_after"]["accuracy"] >= summary["eval_before"]["accuracy"] + 0.2


@pytest.mark.long
def test_the_calculator_answers_on_the_gsm8k_file(gsm8k_dir: Path, tmp_path: Path) -> None:
    config, data = "configs/gsm8k-calculator-tiny.yaml", f"data.train={gsm8k_dir / 'train.jsonl'}"
    run = tmp_path / "run"
    run_job_successfully(config, data, "train.steps=2", f"run.dir={run}", output=tmp_path / "log", timeout_seconds=600)
    rows = [row for step in (1, 2) for row in rollouts_of(run, step)]
    assert len(with_several_turns(rows)) >= len(rows) // 4
    for row in with_several_turns(rows):
        own = row["loss_mask"] or []
        assert own == [] or (own[0], 0 in own) == (1, True)
    assert all(line["train/mismatch_max"] < 1e-3 for line in read_lines(run / "metrics.jsonl"))
