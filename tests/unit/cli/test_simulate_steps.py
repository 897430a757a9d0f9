"""`plan --lengths`: all modes of a production config, recorded rollouts as the source, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from grpo_mega.cli.plan import main
from grpo_mega.cli.simulate_steps import read_lengths
from grpo_mega.planner.simulation import comparison
from grpo_mega.types import UserError
from tests.helpers.step_columns import write_step

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
QWEN = str(CONFIGS / "qwen2.5-7b-1n8g-tp2-vllm.yaml")


def test_a_production_config_is_simulated_in_all_modes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "STEPS", 6)
    monkeypatch.setattr(comparison, "WARM_STEPS", 3)
    assert main([QWEN, "--lengths", "lognormal:5.5,1.0", "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["simulation"]
    assert found["lengths"]["source"] == "lognormal:5.5,1.0"
    base = found["synchronous"]
    assert 0 <= base["idle_share"] < 0.3
    partial = {row["oversubmit"]: row for row in found["partial"]}
    best = partial[found["best_oversubmit"]]
    assert best["step_seconds"] <= 1.01 * min(row["step_seconds"] for row in partial.values())
    assert best["step_seconds"] < base["step_seconds"]
    assert all(row["staleness_max"] > 0 for row in partial.values())
    splits = {(row["policy_devices"], row["server_devices"]) for row in found["asynchronous"]}
    assert all(policy + servers == 8 for policy, servers in splits)
    assert len(splits) > 1
    assert found["best_split"]["step_seconds"] == min(row["step_seconds"] for row in found["asynchronous"])
    assert any(line.startswith("best oversubmit: ") for line in text)
    assert any(line.startswith("best split: ") for line in text)


def test_servers_of_the_config_have_no_partial_rollouts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "STEPS", 2)
    servers = ["run.world_size=4", "engine.placement=server", "engine.urls=[a:1,b:1,c:1,d:1]"]
    assert main([QWEN, *servers, "--lengths", "lognormal:5.5,1.0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["simulation"]
    assert found["partial"] == []
    assert found["best_oversubmit"] is None
    assert found["synchronous"]["server_devices"] == 4
    assert found["synchronous"]["idle_share"] > 0.3  # each side waits for the other
    assert found["notes"] == ["partial: not simulated, engine.placement=server does not support it"]


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        (["--lengths", "lognormal:x"], "--lengths=lognormal:x must be lognormal:MU,SIGMA"),
        (["--lengths", "/nowhere"], "--lengths=/nowhere was not found"),
        (["--lengths", QWEN], "is not a length"),
        (["--lengths", "lognormal:5,1", "--search"], "is not supported with --search"),
        (["--lengths", "lognormal:5,1", "--nodes", "3", "parallel.tp=5"], "needs one layout"),
    ],
)
def test_wrong_input_is_named_with_exit_code_2(more: list[str], rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([QWEN, *more]) == 2
    errors = capsys.readouterr().err
    assert rule in errors
    assert errors.startswith("error: ")


def test_recorded_rollouts_are_drawn_by_their_groups(tmp_path: Path) -> None:
    rows = [
        {"group": group, "member": member, "completion_ids": [4] * n, "sampler_log_probs": [-1.0] * n}
        | {"old_log_probs": [-1.0] * n}
        for group, lengths in enumerate([[3, 4], [90, 80], [7, 7]])
        for member, n in enumerate(lengths)
    ]
    folder = write_step(tmp_path, 12, rows)
    drawn = read_lengths(str(folder), 85).draw(np.random.default_rng(0), 40, 2)
    assert {tuple(sorted(row)) for row in drawn.tolist()} == {(3, 4), (80, 85), (7, 7)}


def test_a_folder_without_rollouts_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_lengths(str(tmp_path), 100)
