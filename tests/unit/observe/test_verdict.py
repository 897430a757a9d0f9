"""grpo_mega.observe.verdict: hand-computed errors of accuracies, and the reason of a run that did not learn."""

from __future__ import annotations

from grpo_mega.observe.alarms import Alarms
from grpo_mega.observe.summary import Evaluation
from grpo_mega.observe.verdict import verdict


def after(lines: list[dict[str, float]]) -> Alarms:
    alarms = Alarms()
    for step, line in enumerate(lines, 1):
        alarms.step(step, line)
    return alarms


def evaluation(accuracy: float) -> Evaluation:
    return Evaluation(accuracy, accuracy, 3.0, num_prompts=100)


def text(alarms: Alarms, before: float | None = None, end: float | None = None) -> str:
    found = verdict(
        alarms.history,
        alarms.raised,
        None if before is None else evaluation(before),
        None if end is None else evaluation(end),
    )
    assert found is not None
    return found


RISING = [{"reward/mean": 0.1 * step} for step in range(10)]


def test_a_gain_beyond_two_standard_errors_is_learning() -> None:
    """sqrt(0.5 * 0.5 / 100 * 2) = 0.0707."""
    assert text(after(RISING), 0.5, 0.65).startswith("learned: held-out accuracy 0.500 -> 0.650")
    within = text(after(RISING), 0.5, 0.63)
    assert within.startswith("did not learn: ")
    assert "(0.070)" in within
    assert "which is worse" in text(after(RISING), 0.5, 0.3)


def test_without_held_out_prompts_the_rewards_of_the_first_and_last_steps_count() -> None:
    assert text(after(RISING)).startswith("learned: mean reward 0.05 -> 0.85")
    assert text(after([{"reward/mean": 0.3}] * 10)).startswith("did not learn: mean reward 0.3 -> 0.3")


def test_a_reward_that_is_always_zero_is_the_reason() -> None:
    dead = after([{"reward/mean": 0.0, "reward/accuracy": 0.0, "group/degenerate_fraction": 1.0}] * 10)
    found = text(dead, 0.0, 0.0)
    assert found.startswith("did not learn: held-out accuracy 0.000 -> 0.000")
    assert "rewards of 100% of the groups are equal" in found


def test_a_policy_far_from_its_reference_is_unstable_since_a_step() -> None:
    lines = [{"reward/mean": 0.5, "train/kl": 0.01 if step < 6 else 3e3} for step in range(10)]
    assert text(after(lines), 0.5, 0.9).startswith("unstable since step 7: ")


def test_a_run_that_was_unstable_and_did_not_recover_says_when() -> None:
    kl = [0.01, 0.01, 3e3, 3e3, *[0.01] * 6]
    found = text(after([{"reward/mean": 0.5, "train/kl": value} for value in kl]), 0.5, 0.0)
    assert "which is worse; unstable at step 3: " in found


def test_few_steps_have_no_verdict() -> None:
    alarms = after(RISING[:4])
    assert verdict(alarms.history, alarms.raised, evaluation(0.1), evaluation(0.9)) is None


def test_supervised_fine_tuning_without_held_out_prompts_is_judged_by_its_loss() -> None:
    assert text(after([{"train/loss": 3.0 / step} for step in range(1, 11)])).startswith("learned: loss 2.25 -> 0.317")
    assert text(after([{"train/loss": float(step)} for step in range(10)])).startswith("did not learn: loss 0.5 -> 8.5")
