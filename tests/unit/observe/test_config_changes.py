"""Changes between the config of a run and that of a command, and the file that keeps those of later steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_mega.observe.config_changes import ConfigChange, ConfigChanges, compare_configs, record_changes

LR = ConfigChange("optimizer.lr", "1e-05", "0.001")
KL = ConfigChange("algorithm.kl_coef", "0.04", "0.0")


def compared(there: dict[str, Any], now: dict[str, Any]) -> ConfigChanges:
    return compare_configs(there, now)


def test_keys_are_sorted_by_what_their_change_means() -> None:
    there = {"run": {"seed": 0}, "optimizer": {"lr": 1e-5}, "reward": {"workers": 1, "terms": [{"weight": 1.0}]}}
    now = {"run": {"seed": 1}, "optimizer": {"lr": 1e-3}, "reward": {"workers": 2, "terms": ({"weight": 2.0},)}}
    changes = compared(there, now)
    assert [str(change) for change in changes.frozen] == ["run.seed (0 there, 1 now)"]
    assert [change.key for change in changes.future] == ["optimizer.lr", "reward.terms"]


def test_a_key_that_is_newer_than_the_run_counts_as_its_default() -> None:
    there = {"algorithm": {"name": "ppo"}, "run": {}}
    assert compared(there, {"algorithm": {"name": "ppo", "kl_coef": 0.02}, "run": {"seed": 0}}) == ConfigChanges((), ())
    changes = compared(there, {"algorithm": {"name": "ppo", "kl_coef": 0.04}, "run": {"seed": 3}})
    assert changes == ConfigChanges(
        (ConfigChange("run.seed", "0", "3"),), (ConfigChange("algorithm.kl_coef", "0.02", "0.04"),)
    )


def test_a_longer_run_changes_later_steps_if_its_schedule_ends_with_the_run() -> None:
    def future(**optimizer: Any) -> list[str]:
        there = {"train": {"steps": 5}, "optimizer": optimizer}
        return [change.key for change in compared(there, {**there, "train": {"steps": 9}}).future]

    assert future(schedule="cosine") == ["train.steps"]
    assert future(warmup_fraction=0.1) == ["train.steps"]
    assert future(schedule="cosine", decay_updates=4) == []
    assert future() == []


def test_a_list_counts_as_the_same_list_of_another_type() -> None:
    assert compared({"engine": {"urls": ["a"]}}, {"engine": {"urls": ("a",)}}) == ConfigChanges((), ())
    assert compared({"engine": {}}, {"engine": {"urls": ()}}) == ConfigChanges((), ())


def test_a_change_is_reported_again_after_a_kill_and_dropped_when_the_run_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "config_changes.jsonl"
    assert record_changes(path, 3, ()) == ()
    assert not path.exists()
    assert record_changes(path, 4, (LR,)) == (LR,)
    assert record_changes(path, 4, ()) == (LR,)  # killed before step 5
    assert record_changes(path, 4, (KL,)) == (LR, KL)
    assert record_changes(path, 6, ()) == ()
    assert record_changes(path, 4, ()) == (LR, KL)
    assert record_changes(path, 3, ()) == ()
    assert path.read_text() == ""
