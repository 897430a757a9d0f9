"""Routing replay in whole jobs with the real engines, compared with runs without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from grpo_mega.observe.rollout_files.reader import read_step
from grpo_mega.observe.run_folder import RunFolder
from tests.helpers.engine_contract import sglang_here
from tests.helpers.family_configs import raw_family_config
from tests.helpers.jobs import SMALL, read_json, read_lines, rollouts_of, run_job_successfully
from tests.helpers.tiny_models import make_family_model

STEPS = 2
# Many experts with similar scores, in bf16: engine and policy often choose different experts.
CONFIG = raw_family_config("qwen3_moe", num_hidden_layers=3, num_experts=32, num_experts_per_tok=4, mlp_only_layers=[1])
ALL_EXPERTS = CONFIG | {"mlp_only_layers": []}  # the model that SGLang builds
SGLANG = "engine.kind=sglang"


def run_training(model: Path, folder: Path, replay: bool, layout: tuple[str, ...]) -> list[dict[str, float]]:
    keys = [
        *SMALL,
        *layout,
        "model.base=null",
        f"model.path={model}",
        "precision.dtype=bf16",
        "data.template=plain",
        "sampling.max_tokens=16",
        "optimizer.lr=1e-3",
        "reward.terms=[{name: tests.helpers.plain_rewards:digits}]",
        f"train.steps={STEPS}",
        f"algorithm.routing_replay={str(replay).lower()}",
        f"run.dir={folder}",
    ]
    run_job_successfully(*keys, output=folder.with_suffix(".log"), timeout_seconds=500)
    assert read_json(folder / "summary.json")["status"] == "done"
    return read_lines(folder / "metrics.jsonl")


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((), id="one-rank"),
        pytest.param(("run.world_size=2", "parallel.ep=2", "engine.tp=2", "engine.ep=2"), id="ep2-and-tp2ep2"),
        pytest.param(("run.world_size=2", "parallel.ep=2", "engine.dp=2", "engine.ep=2"), id="ep2-and-dp2ep2"),
        pytest.param(
            ("run.world_size=4", "parallel.ep=2", "engine.tp=2", "engine.dp=2", "engine.ep=4"), id="ep2-and-tp2dp2ep4"
        ),
        pytest.param(
            ("run.world_size=2", "parallel.pp=2", "parallel.num_layers_first_stage=2"), id="pp2-and-two-engines"
        ),
        pytest.param((SGLANG,), id="one-rank-sglang", marks=sglang_here),
        pytest.param((SGLANG, "run.world_size=2", "parallel.ep=2", "engine.tp=2"), id="ep2-sglang", marks=sglang_here),
    ],
)
def test_with_the_engines_experts_the_policy_is_closer_to_the_sampler(tmp_path: Path, layout: tuple[str, ...]) -> None:
    config = ALL_EXPERTS if SGLANG in layout else CONFIG
    model = make_family_model(tmp_path / "moe", config, router_scale=0.05)
    plain_runs, replay_runs = (
        run_training(model, tmp_path / name, replay, layout) for name, replay in (("plain", False), ("replay", True))
    )
    first = [[row["completion_ids"] for row in rollouts_of(tmp_path / name, 1)] for name in ("plain", "replay")]
    assert first[0] == first[1]  # the tokens are equal; only the policy's routing differs
    for plain, replayed in zip(plain_runs, replay_runs, strict=True):
        assert replayed["train/mismatch_kl"] < 0.6 * plain["train/mismatch_kl"]
        assert replayed["train/unreplayed_fraction"] == 0.0
        assert replayed["train/grad_norm"] > 0
        assert "train/unreplayed_fraction" not in plain
    assert {row["expert_choices"] for row in rollouts_of(tmp_path / "plain", 1)} == {None}
    for step in range(1, STEPS + 1):
        found = read_step(RunFolder(tmp_path / "replay").rollouts_of(step))
        assert found.expert_shape == (3, 4)
        for row in found.rows():
            choices = np.array(row["expert_choices"]).reshape(-1, 3, 4)
            assert len(choices) == len(row["prompt_ids"]) + len(row["completion_ids"]) - 1
            assert choices[:, [0, 2]].max() < 32
        assert max(pc.list_flatten(found.table.column("expert_choices")).to_pylist()) > 16
