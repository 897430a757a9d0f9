"""The quickstart, started by its command: its accuracy, its run folder, and a second start of the same command.

The oracles are independent of the code under test: transformers for log-probs and greedy answers, statistics
for advantages.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grpo_mega.cli.plan import model_of
from grpo_mega.config.guard_section import GuardRules
from grpo_mega.config.load import load_config
from grpo_mega.config.schema import Config
from grpo_mega.data.arithmetic import answer, pairs, question
from grpo_mega.models.digest import combined_digest, slice_digest
from grpo_mega.observe import training_faults
from grpo_mega.observe.history import History
from grpo_mega.planner.hardware import gpu_named
from grpo_mega.tiny_base.train import ensure_base
from grpo_mega.types import TensorSlice
from tests.helpers.finished_runs import QUICKSTART_STEPS, Run
from tests.helpers.jobs import REPOSITORY, read_json, read_lines, rollouts_of, run_job

PROMPTS, GROUP, MAX_TOKENS = 16, 16, 8
GUARD_CONDITIONS: dict[str, Callable[[History, float], object]] = {
    "gradient_spike": training_faults.gradient_spike,
    "kl": training_faults.far_from_reference,
    "entropy_collapse": training_faults.entropy_collapse,
    "reward_collapse": training_faults.reward_collapse,
    "truncation": training_faults.truncated_rollouts,
    "degenerate": training_faults.equal_rewards,
    "mismatch": training_faults.mismatch_growth,
}
METRICS = [
    *("reward/mean", "reward/std", "reward/accuracy", "rollout/length_mean", "rollout/truncated_fraction"),
    *("group/degenerate_fraction", "train/loss", "train/kl", "train/entropy", "train/clip_fraction"),
    *("train/grad_norm", "train/mismatch_kl", "throughput/tokens_per_second", "sync/bytes", "sync/gb_per_second"),
    *(f"time/{phase}_seconds" for phase in ("rollout", "reward", "log_probs", "train", "sync", "checkpoint", "step")),
]
ROLLOUT_KEYS = {
    *("prompt", "completion", "answer", "reward", "reward_components", "advantage", "stop_reason", "policy_version"),
    *("prompt_ids", "completion_ids", "sampler_log_probs", "old_log_probs"),
}


@pytest.fixture(scope="module")
def summary(quickstart: Run) -> dict[str, Any]:
    return read_json(quickstart.folder / "summary.json")


@pytest.fixture(scope="module")
def lines(quickstart: Run) -> list[dict[str, Any]]:
    return read_lines(quickstart.folder / "metrics.jsonl")


def test_fifteen_short_steps_gain_at_least_0_15_held_out_accuracy(summary: dict[str, Any]) -> None:
    before, after = summary["eval_before"]["accuracy"], summary["eval_after"]["accuracy"]
    assert 0.2 <= before <= 0.6
    assert after >= before + 0.15


def test_summary_has_its_stable_keys(quickstart: Run, summary: dict[str, Any]) -> None:
    assert summary["status"] == "done"
    assert summary["steps"] == QUICKSTART_STEPS
    for evaluation in (summary["eval_before"], summary["eval_after"]):
        assert evaluation.keys() >= {"accuracy", "reward_mean", "length_mean", "num_prompts"}
        assert evaluation["num_prompts"] == 300
    phases = {"rollout", "log_probs", "train", "sync", "evaluation", "checkpoint"}
    assert summary["seconds"].keys() >= {"total", *phases}
    parts = sum(seconds for phase, seconds in summary["seconds"].items() if phase != "total")
    assert parts <= summary["seconds"]["total"] <= quickstart.ended.seconds
    assert {summary["layout"][axis] for axis in ("tp", "pp", "dp")} == {1}
    assert summary["versions"].keys() >= {"torch", "vllm", "megatron-core", "transformers"}


def test_every_step_has_a_line_with_every_stable_metric(lines: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in lines] == list(range(1, QUICKSTART_STEPS + 1))
    for line in lines:
        assert [name for name in METRICS if not math.isfinite(line.get(name, math.nan))] == []
    assert max(line["train/clip_fraction"] for line in lines) > 0
    assert lines[-1]["train/kl"] > lines[0]["train/kl"] > 0


def test_the_gauges_of_the_engine_are_those_of_the_steps_rollouts(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        num_rollouts = line["engine/running_requests_max"] + line["engine/waiting_requests_max"]
        assert 0 < line["engine/running_requests_mean"] < num_rollouts
        assert num_rollouts == PROMPTS * GROUP
        assert 0 < line["engine/kv_cache_fraction_mean"] < line["engine/kv_cache_fraction_max"] <= 1
        assert line["engine/prefix_hit_fraction"] == 0  # a prompt is shorter than a block of the KV cache
        sampled = line["engine/tokens_per_second/0"] * line["time/rollout_seconds"]
        assert sampled == pytest.approx(line["rollout/tokens"], rel=0.2)  # the phase is longer than sampling itself
        assert line["wait/engine_seconds"] + line["wait/policy_seconds"] <= 1.2 * line["time/step_seconds"]
        assert line["rollout/tool_errors"] == line["rollout/environment_failures"] == line["engine/preemptions"] == 0


def test_no_guard_rule_holds_in_a_healthy_run(lines: list[dict[str, Any]]) -> None:
    """Neither in this run, nor if all rules were on with their default thresholds."""
    assert {line[f"guard/{name}"] for line in lines for name in ("warnings", "skipped_updates", "rollbacks")} == {0}
    rules, history, held = GuardRules(), History(), list[tuple[int, str]]()
    for line in lines:
        history.add(line["step"], {name: value for name, value in line.items() if isinstance(value, float)})
        held += [
            (line["step"], name)
            for name, condition in GUARD_CONDITIONS.items()
            if condition(history, getattr(rules, name).threshold)
        ]
    assert held == []
    assert history.last("train/grad_norm") is not None


def test_sampler_and_policy_agree_to_1e_4_in_every_step(lines: list[dict[str, Any]]) -> None:
    assert max(line["train/mismatch_max"] for line in lines) <= 1e-4


def test_rollout_rows_match_the_metrics(quickstart: Run, lines: list[dict[str, Any]]) -> None:
    seen: set[str] = set()
    for line in lines:
        rows = rollouts_of(quickstart.folder, line["step"])
        assert len(rows) == PROMPTS * GROUP
        for row in rows:
            assert row.keys() >= ROLLOUT_KEYS
            assert len(row["completion_ids"]) == len(row["sampler_log_probs"]) == len(row["old_log_probs"])
            assert row["reward"] == float(row["completion"] == row["answer"])
            assert row["policy_version"] == 4 * (line["step"] - 1)  # four updates a step
            assert row["stop_reason"] == "eos" or len(row["completion_ids"]) == MAX_TOKENS
        assert line["reward/mean"] == pytest.approx(statistics.fmean(row["reward"] for row in rows))
        assert line["rollout/tokens"] == sum(len(row["completion_ids"]) for row in rows)
        worst = max(
            abs(old - sampled)
            for row in rows
            for old, sampled in zip(row["old_log_probs"], row["sampler_log_probs"], strict=True)
        )
        assert line["train/mismatch_max"] == pytest.approx(worst, rel=0.05)  # files have it with five bits
        seen |= {row["prompt"] for row in rows}
    held_out = {question(pair) for pair in pairs("heldout")}
    assert seen.isdisjoint(held_out)


def test_advantages_are_relative_to_the_group_and_exactly_zero_where_all_rewards_are_equal(quickstart: Run) -> None:
    degenerate = 0
    for step in range(1, QUICKSTART_STEPS + 1):
        for _, group in groupby(rollouts_of(quickstart.folder, step), key=lambda row: row["prompt_index"]):
            rows = list(group)
            rewards = [row["reward"] for row in rows]
            assert len(rows) == GROUP
            if len(set(rewards)) == 1:
                degenerate += 1
                assert [row["advantage"] for row in rows] == [0.0] * GROUP
                continue
            mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)  # n - 1
            for row, value in zip(rows, rewards, strict=True):
                assert row["advantage"] == pytest.approx((value - mean) / deviation, rel=1e-5)
    assert degenerate > 0


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_old_log_probs_of_the_first_step_are_those_of_the_base_in_transformers(quickstart: Run) -> None:
    config = Config.model_validate(yaml.safe_load((quickstart.folder / "config.yaml").read_text()))
    assert config.model.base is not None
    recipe = config.model.base.model_copy(update={"cache_dir": str(REPOSITORY / config.model.base.cache_dir)})
    model = transformers_model(ensure_base(recipe, config.data.train_sets[0].path))
    worst = 0.0
    for row in rollouts_of(quickstart.folder, 1):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(1, torch.tensor(row["completion_ids"])[:, None])[:, 0]
        worst = max(worst, float((expected - torch.tensor(row["old_log_probs"])).abs().max()))
    assert worst <= 2e-5


def test_the_export_is_the_final_policy_and_gives_the_same_answers_in_transformers(
    quickstart: Run, summary: dict[str, Any]
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    folder = quickstart.folder / "hf"
    tensors = load_file(folder / "model.safetensors")
    whole = {name: TensorSlice(name, (0,) * t.dim(), tuple(t.shape)) for name, t in tensors.items()}
    assert combined_digest({n: slice_digest(t, whole[n]) for n, t in tensors.items()}) == summary["policy_digest"]
    model, tokenizer = transformers_model(folder), AutoTokenizer.from_pretrained(folder)
    by_length: dict[int, list[tuple[int, int]]] = {}
    for pair in pairs("heldout"):
        by_length.setdefault(len(question(pair)), []).append(pair)
    right = 0
    for same_length in by_length.values():
        ids = torch.tensor([tokenizer.encode(question(pair)) for pair in same_length])
        sampled = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS)
        texts = tokenizer.batch_decode(sampled[:, ids.shape[1] :], skip_special_tokens=True)
        right += sum(text == answer(pair) for text, pair in zip(texts, same_length, strict=True))
    assert (
        abs(right - 300 * summary["eval_after"]["greedy_accuracy"]) <= 1.01
    )  # either of two equal logits may be chosen


def test_tensorboard_reads_the_curves_and_shows_rollouts(quickstart: Run, lines: list[dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(quickstart.folder / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    for name in METRICS:
        points = {event.step: event.value for event in events.Scalars(name)}
        assert points == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-5)
    assert [event.step for event in events.Scalars("eval/accuracy")] == [0, QUICKSTART_STEPS]
    (first, *others) = events.Tensors("groups/0/text_summary")
    assert len(others) == QUICKSTART_STEPS - 1
    text = first.tensor_proto.string_val[0].decode()
    assert "reward 1, advantage" in text
    assert any(
        f"<pre>{row['prompt']}</pre>" in text and f"<pre>{row['completion']}</pre>" in text
        for row in rollouts_of(quickstart.folder, 1)
    )


def test_the_plan_counts_the_bytes_that_the_run_wrote(quickstart: Run) -> None:
    """With the run's own mean length; files of a checkpoint also have names and digests of its tensors.

    Answers of two to four tokens repeat within a group, with their log-probs, and repeated values take no bytes. The
    plan counts distinct ones (tests/unit/planner/test_disk.py compares those), so it is an upper bound here.
    """
    rows = [row for step in range(1, QUICKSTART_STEPS + 1) for row in rollouts_of(quickstart.folder, step)]
    mean_length = statistics.fmean(len(row["completion_ids"]) for row in rows) / MAX_TOKENS
    config = load_config(quickstart.folder / "config.yaml", ["run.world_size=1"])
    assumed = {"mean_length": mean_length, "text_bytes_per_token": 1.0}  # a token is a character
    disk = model_of(config, gpu_named("cpu"), assumed).plan(config).disk

    def written(*names: str) -> int:
        return sum(path.stat().st_size for path in quickstart.folder.joinpath(*names).rglob("*") if path.is_file())

    distinct = {(row["prompt"], row["completion"]) for row in rows}
    assert len(distinct) < 0.7 * len(rows)
    assert 0.7 * disk.rollouts < written("rollouts") < disk.rollouts
    assert written("checkpoints") == pytest.approx(disk.checkpoints, rel=0.05)
    assert (quickstart.folder / "hf" / "model.safetensors").stat().st_size == pytest.approx(disk.export, rel=0.02)


def test_checkpoints_are_complete_and_log_and_config_exist(quickstart: Run) -> None:
    newest = quickstart.folder / "checkpoints" / f"step_{QUICKSTART_STEPS:06d}"
    assert (newest / "complete").is_file()
    assert not list((quickstart.folder / "checkpoints").glob("*.tmp"))
    assert (quickstart.folder / "logs" / "rank_00000.log").stat().st_size > 0


def test_the_same_command_again_prints_the_summary_and_names_run_overwrite(quickstart: Run, tmp_path: Path) -> None:
    before = (quickstart.folder / "summary.json").read_bytes()
    ended = run_job(*quickstart.arguments, output=tmp_path / "again")
    assert ended.code == 0
    assert "run.overwrite=true" in ended.stdout
    assert f"Done: {QUICKSTART_STEPS} steps" in ended.stdout
    assert "held-out accuracy" in ended.stdout
    assert (quickstart.folder / "summary.json").read_bytes() == before


@pytest.mark.long
def test_a_higher_number_of_steps_continues_a_finished_run(quickstart: Run, tmp_path: Path) -> None:
    """Use a copy, because other tests read the folder."""
    import shutil

    folder = Path(shutil.copytree(quickstart.folder, tmp_path / "run"))
    arguments = [a for a in quickstart.arguments if not a.startswith(("train.steps", "run.dir"))]
    ended = run_job(*arguments, f"train.steps={QUICKSTART_STEPS + 1}", f"run.dir={folder}", output=tmp_path / "more")
    assert ended.code == 0
    more, summary = read_lines(folder / "metrics.jsonl"), read_json(folder / "summary.json")
    assert more[:-1] == read_lines(quickstart.folder / "metrics.jsonl")
    assert more[-1]["step"] == summary["steps"] == QUICKSTART_STEPS + 1
    assert summary["eval_before"] == read_json(quickstart.folder / "summary.json")["eval_before"]
