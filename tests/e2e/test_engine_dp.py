"""Whole jobs with engines whose data-parallel ranks share experts.

They cover waves that leave a rank without prompts, evaluation, several turns, and resuming in another layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.family_configs import raw_family_config
from tests.helpers.jobs import SMALL, read_json, read_lines, rollouts_of, run_job_successfully
from tests.helpers.tiny_models import make_family_model

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

COPIES = ("run.world_size=2", "parallel.ep=2", "engine.dp=2", "engine.ep=2")
KEYS = (
    *SMALL,
    "model.base=null",
    "precision.dtype=fp32",
    "data.template=plain",
    "data.prompts_per_step=5",
    "sampling.prompts_per_wave=3",
    "sampling.max_tokens=24",
    "optimizer.lr=1e-3",
    "reward.terms=[{name: tests.helpers.plain_rewards:digits}]",
)
TURNS = ("environment.name=tests.helpers.plain_environments:asks_on", "environment.max_turns=4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_model(tmp_path_factory.mktemp("models") / "moe", raw_family_config("qwen3_moe"))


def run_training(model: Path, folder: Path, *keys: str) -> list[dict[str, Any]]:
    run_job_successfully(*KEYS, f"model.path={model}", f"run.dir={folder}", *keys, output=folder.with_suffix(".log"))
    assert read_json(folder / "summary.json")["status"] == "done"
    return read_lines(folder / "metrics.jsonl")


def sampled_rows(folder: Path, step: int) -> list[tuple[list[int], list[float]]]:
    return [(row["completion_ids"], row["sampler_log_probs"]) for row in rollouts_of(folder, step)]


def test_a_resumed_job_samples_the_same_rollouts_as_an_uninterrupted_one(model: Path, tmp_path: Path) -> None:
    (tmp_path / "alike.jsonl").write_text('{"prompt": "2+3=", "answer": "5"}\n' * 10)
    # four prompts in waves of three: the last wave leaves the second copy without prompts
    keys = (f"data.train={tmp_path / 'alike.jsonl'}", "data.eval=arithmetic:heldout", "evaluation.max_prompts=4")
    lines = run_training(model, tmp_path / "whole", *COPIES, *keys, "train.steps=2", "checkpoint.every=1")
    for line in lines:
        assert line["train/mismatch_max"] <= 1e-4
        assert line["train/grad_norm"] > 0
        assert line["rollout/tokens_per_replica/0"] == line["rollout/tokens"]
        assert "rollout/tokens_per_replica/1" not in line
    assert read_json(tmp_path / "whole" / "summary.json")["eval_after"]["num_prompts"] == 4
    assert len(rollouts_of(tmp_path / "whole", 2)) == 5 * 4
    answers = [ids for ids, _ in sampled_rows(tmp_path / "whole", 1)]
    assert len({tuple(ids) for ids in answers}) > 15
    assert answers[12:16] != answers[16:]  # one prompt per copy, and the prompts are equal: each copy has its own seed
    for steps in (1, 2):
        run_training(model, tmp_path / "parts", *COPIES, *keys, f"train.steps={steps}", "checkpoint.every=1")
    assert [sampled_rows(tmp_path / "parts", step) for step in (1, 2)] == [
        sampled_rows(tmp_path / "whole", step) for step in (1, 2)
    ]
    other = ("run.world_size=2", "parallel.ep=2", "engine.tp=2", "engine.ep=2")
    lines = run_training(model, tmp_path / "parts", *other, *keys, "train.steps=3", "checkpoint.every=1")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["train/mismatch_max"] <= 1e-4


def test_a_late_reply_of_an_environment_does_not_change_the_rollouts(model: Path, tmp_path: Path) -> None:
    for name, pause in (("prompt", 0.0), ("late", 0.3)):
        pausing = f"environment.args={{pause: {pause}}}"
        lines = run_training(model, tmp_path / name, *COPIES, *TURNS, pausing, "train.steps=1")
        assert lines[0]["train/mismatch_max"] <= 1e-4
    assert {1, 4} <= {row["num_turns"] for row in rollouts_of(tmp_path / "prompt", 1)}
    assert sampled_rows(tmp_path / "late", 1) == sampled_rows(tmp_path / "prompt", 1)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(("engine.tp=2", "engine.ep=2"), id="tp2ep2"),
        pytest.param(("engine.dp=2", "engine.ep=2"), id="dp2ep2"),
    ],
)
def test_an_expert_parallel_policy_learns(model: Path, tmp_path: Path, engine: tuple[str, ...]) -> None:
    """Train with the fraction of digits as reward; half of the characters are digits."""
    keys = ("run.world_size=2", "parallel.ep=2", *engine, "train.steps=12", "data.prompts_per_step=16")
    lines = run_training(model, tmp_path / "learns", *keys, "sampling.group_size=8", "sampling.prompts_per_wave=16")
    assert lines[0]["reward/mean"] < 0.65
    assert lines[-1]["reward/mean"] > 0.9
    assert max(line["train/mismatch_max"] for line in lines) <= 1e-4
