"""grpo_mega.observe.alarms: each rule is raised by its fault, once, and not by a healthy run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_mega.observe.alarms import RULES, Alarms


def healthy(step: int) -> dict[str, float]:
    """A run that learns: reward 0.4 to 0.95 in 50 steps, entropy and length fall a little, times vary by a fifth."""
    progress = 1 - math.exp(-step / 12)
    wave = math.sin(step * 1.7)
    return {
        "reward/mean": 0.4 + 0.55 * progress + 0.02 * wave,
        "reward/accuracy": 0.4 + 0.55 * progress + 0.02 * wave,
        "reward/component/exact": 0.4 + 0.55 * progress + 0.02 * wave,
        "reward/failed_fraction": 0.0,
        "group/degenerate_fraction": 0.2 + 0.6 * progress,
        "rollout/length_mean": 100 + 8 * wave,
        "rollout/truncated_fraction": 0.05,
        "rollout/tokens": 10000 + 500 * wave,
        "train/entropy": 1.0 - 0.7 * progress,
        "train/kl": 0.05 * progress,
        "train/grad_norm": 1.0 + 0.3 * wave,
        "train/mismatch_kl": 1e-5 * (1 + wave),
        "time/rollout_seconds": 30.0 + 5 * wave,
        "time/train_seconds": 40.0 - 5 * wave,
        "time/step_seconds": 75.0,
        "host/disk_free_fraction": 0.5,
        "host/memory_bytes": 2.0**31 + step * 1e5,
        "rank/slowest": step % 4.0,
        "rank/slowest_ratio": 1.3 + 0.1 * wave,
        "rank/slowest_seconds": 2.0,
        "gpu/throttled_fraction_mean": 0.0,
        "gpu/throttled_fraction_max": 0.0,
        "gpu/sm_clock_mhz_mean": 1700.0 + 50 * wave,
        "gpu/sm_clock_mhz_min": 1600.0 + 50 * wave,
        "gpu/xid_events_mean": 0.0,
        "gpu/ecc_uncorrected_mean": 0.0,
        "set/easy/accuracy": 0.5,
        "set/hard/accuracy": 0.1,
    }


def names_raised(change: Callable[[int, dict[str, float]], dict[str, float]], steps: int) -> dict[str, int]:
    """Return {name of an alarm: step at which it was raised}."""
    alarms, found = Alarms(), {}
    for step in range(1, steps + 1):
        for alarm in alarms.step(step, change(step, healthy(step))):
            assert alarm.name not in found
            found[alarm.name] = step
    return found


def test_a_healthy_run_raises_no_alarm() -> None:
    assert names_raised(lambda _, line: line, 300) == {}


BAD = 40
"""First step of the fault."""
FAULTS: dict[str, Callable[[int, dict[str, float]], dict[str, float]]] = {
    "unscored rollouts": lambda step, line: {"reward/failed_fraction": 0.3},
    "equal rewards": lambda step, line: {
        "group/degenerate_fraction": 1.0, "reward/mean": 0.0, "reward/accuracy": 0.0, "reward/component/exact": 0.0
    },
    "one set is never right": lambda step, line: {"set/hard/accuracy": 0.0},
    "mismatch of policy and engine": lambda step, line: {"train/mismatch_kl": 0.02},
    "far from the reference": lambda step, line: {"train/kl": 3e3},
    "gradient norm": lambda step, line: {"train/grad_norm": 1000.0},
    "collapse of the entropy": lambda step, line: {"train/entropy": 0.01, "reward/accuracy": 0.5, "reward/mean": 0.5},
    "reward up, accuracy down": lambda step, line: {
        "reward/mean": line["reward/mean"] + 0.3, "reward/accuracy": 0.2, "train/entropy": 0.9
    },
    "a reward term falls": lambda step, line: {"reward/mean": 2.0, "reward/component/exact": 0.1},
    "answers grow": lambda step, line: {"rollout/length_mean": 300.0},
    "truncated answers": lambda step, line: {"rollout/truncated_fraction": 0.9},
    "stalled phase": lambda step, line: {"time/rollout_seconds": 300.0 if step == BAD else 30.0},
    "slow phase": lambda step, line: {"time/train_seconds": 120.0, "time/step_seconds": 155.0},
    "slow rank": lambda step, line: {"rank/slowest": 2.0, "rank/slowest_ratio": 3.0},
    "throttled GPU": lambda step, line: {
        "gpu/throttled_fraction_max": 1.0, "gpu/throttled_fraction_outlier_node": 1.0,
        "gpu/throttled_fraction_outlier_gpu": 5.0,
    },
    "slow GPU": lambda step, line: {"gpu/sm_clock_mhz_min": 1200.0},
    "GPU errors": lambda step, line: {"gpu/xid_events_mean": 0.125, "gpu/xid_events_max": 1.0},
    "disk nearly full": lambda step, line: {"host/disk_free_fraction": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_raises_its_alarm_within_ten_steps(name: str) -> None:
    raised = names_raised(lambda step, line: line | (FAULTS[name](step, line) if step >= BAD else {}), BAD + 15)
    assert BAD <= raised[name] < BAD + 10
    # a fall of the accuracy is a fall of the only term, and the other way round
    related = {"equal rewards", "reward up, accuracy down", "a reward term falls"}
    assert set(raised) - {name} <= related


def test_alarms_of_hardware_name_rank_node_and_gpu() -> None:
    texts: dict[str, str] = {}
    for fault in ("slow rank", "throttled GPU"):
        alarms = Alarms()
        for step in range(1, 20):
            texts |= {a.name: a.text for a in alarms.step(step, healthy(step) | FAULTS[fault](step, healthy(step)))}
    assert texts["slow rank"].startswith("rank 2 works 2.0 s")
    assert "GPU 5 of node 1" in texts["throttled GPU"]


def test_a_slow_rank_is_the_same_rank_in_every_step() -> None:
    assert names_raised(lambda step, line: line | {"rank/slowest_ratio": 3.0}, 60) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"time/train_seconds": 200.0, "time/step_seconds": 235.0},  # for less than ten minutes
        {"time/train_seconds": 8.0, "time/rollout_seconds": 9.0, "time/step_seconds": 20.0},  # for two minutes
    ],
)
def test_a_short_delay_is_no_slow_phase(change: dict[str, float]) -> None:
    is_small = change["time/step_seconds"] < 60
    usual = {"time/train_seconds": 1.0, "time/rollout_seconds": 1.0, "time/step_seconds": 2.5} if is_small else {}
    steps = range(BAD, BAD + (6 if is_small else 2))
    assert names_raised(lambda step, line: line | usual | (change if step in steps else {}), 80) == {}


def test_a_slow_phase_lasts_as_long_as_its_delay() -> None:
    alarms = Alarms()
    slow = FAULTS["slow phase"](0, {})
    for step in range(1, 100):
        alarms.step(step, healthy(step) | (slow if BAD <= step < 70 else {}))
    (alarm,) = alarms.raised
    assert (alarm.name, alarm.since, alarm.until) == ("slow phase", 44, 69)


def test_a_run_without_progress_and_a_process_that_grows_are_named_late() -> None:
    flat = {"reward/mean": 0.3, "reward/accuracy": 0.3, "reward/component/exact": 0.3, "train/entropy": 1.0}
    raised = names_raised(lambda step, line: line | {**flat, "reward/mean": 0.3 + 0.02 * math.sin(step * 1.7)}, 100)
    assert list(raised) == ["no progress"]
    grows = names_raised(lambda step, line: line | {"host/memory_bytes": 2.0**31 + step * 2.0**25}, 150)
    assert list(grows) == ["memory grows"]


def test_every_rule_is_tested() -> None:
    assert {rule.name for rule in RULES} == {*FAULTS, "no progress", "memory grows"}


def test_an_alarm_has_value_limit_first_step_and_ends_with_its_condition() -> None:
    alarms = Alarms()
    for step in range(1, 31):
        alarms.step(step, healthy(step) | ({"rollout/truncated_fraction": 0.75} if 10 <= step < 20 else {}))
    (alarm,) = alarms.raised
    assert (alarm.name, alarm.since, alarm.until, alarm.value, alarm.limit) == ("truncated answers", 10, 19, 0.75, 0.5)
    assert "75%" in str(alarm)
    assert "sampling.max_tokens" in alarm.look_at
    assert alarms.active == ()


def test_missing_and_infinite_values_raise_nothing() -> None:
    alarms = Alarms()
    for step in range(1, 130):
        assert alarms.step(step, {} if step % 2 else dict.fromkeys(healthy(step), math.inf)) == []


def test_the_documentation_lists_every_rule_with_its_patience() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "alarms.md").read_text(encoding="utf-8")
    of_alarms = text.partition("\n## ")[0]
    rows = [line.split("|") for line in of_alarms.splitlines() if line.startswith("| `")]
    assert {row[1].strip(" `"): int(row[3]) for row in rows} == {rule.name: rule.patience for rule in RULES}
