"""Alarms: conditions in the metrics of a run that a person should look at.

A rule compares the metrics so far with a limit. An alarm is raised when its condition holds in `patience` steps in
succession, and ends when it has not held for as many. Limits are relative to the run's own steps where a run may have
any scale (lengths, times, norms). Advice on speed (tuning.py) is only given to a run without alarms.
Asserted by tests/unit/observe/test_alarms.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from grpo_mega.observe.alarm_rule import AlarmRule, Found
from grpo_mega.observe.hardware.alarm_rules import MACHINE_RULES
from grpo_mega.observe.history import History, mean
from grpo_mega.observe.training_faults import (
    SOLVED,
    entropy_collapse,
    equal_rewards,
    far_from_reference,
    gradient_spike,
    mismatch_growth,
    truncated_rollouts,
)


@dataclass(frozen=True)
class Alarm:
    """One alarm.

    Attributes:
        name: of the rule.
        since: first step of the condition.
        until: last step of the condition, or None while it holds.
        value: value at the step at which the alarm was raised.
        limit: that it must not pass.
        text: what is wrong, with value and limit.
        look_at: what to look at first.
    """

    name: str
    since: int
    until: int | None
    value: float
    limit: float
    text: str
    look_at: str

    def __str__(self) -> str:
        return f"{self.name} since step {self.since}: {self.text}; look at {self.look_at}"


def _no_progress(history: History) -> Found | None:
    """The best 20 steps are no better than the first 20, after 60 steps."""
    rewards = history.all("reward/mean")
    if len(rewards) < 60 or (history.last("reward/accuracy") or 0.0) >= SOLVED:
        return None
    first = rewards[:20]
    best = max(mean(rewards[start : start + 20]) for start in range(20, len(rewards) - 19, 10))
    needed = mean(first) + 2 * (statistics.stdev(first) * (2 / 20) ** 0.5)
    if best > needed:
        return None
    text = f"the best mean reward of 20 steps is {best:.3g}, that of the first 20 {mean(first):.3g}"
    return Found(best, needed, text)


def _reward_against_accuracy(history: History) -> Found | None:
    """The training reward rises while the accuracy falls: the policy has found a reward that is not the aim."""
    name = "eval/accuracy" if len(history.all("eval/accuracy")) >= 2 else "reward/accuracy"
    rewards = history.recent("reward/mean", 5)
    earlier = history.all("reward/mean")[:-5]
    values = history.all(name)
    if len(rewards) < 5 or len(earlier) < 3 or len(values) < (2 if name == "eval/accuracy" else 8):
        return None
    last = values[-1] if name == "eval/accuracy" else mean(values[-5:])
    best = max(values) if name == "eval/accuracy" else max(mean(values[i : i + 5]) for i in range(len(values) - 4))
    limit = best - 0.1
    if last >= limit or mean(rewards) <= mean(earlier[-5:]) - statistics.pstdev(earlier):
        return None
    if mean(rewards) <= mean(earlier[:5]):
        return None
    which = "held-out accuracy" if name == "eval/accuracy" else "accuracy in training"
    return Found(last, limit, f"the mean reward rises ({mean(rewards):.3g}), and the {which} fell to {last:.3g}")


def _component_falls(history: History) -> Found | None:
    """The mean reward rises while one reward term falls."""
    rewards = history.all("reward/mean")
    if len(rewards) < 10 or mean(rewards[-5:]) <= mean(rewards[:5]) + 0.02 * max(1.0, abs(mean(rewards[:5]))):
        return None
    for name in history.names("reward/component/"):
        values = history.all(name)
        if len(values) < 10:
            continue
        spread = max(values) - min(values)
        last = mean(values[-5:])
        best = max(mean(values[i : i + 5]) for i in range(len(values) - 4))
        limit = best - max(0.1, 0.5 * spread)
        if spread > 0 and last < limit:
            term = name.removeprefix("reward/component/")
            text = f"the mean reward rises, and its term {term} fell from {best:.3g} to {last:.3g}"
            return Found(last, limit, text)
    return None


def _dead_set(history: History) -> Found | None:
    """No rollout of one training set is right, while another set is learned."""
    accuracy = {name: history.recent(name, 5) for name in history.names("set/") if name.endswith("/accuracy")}
    known = {name: values for name, values in accuracy.items() if len(values) >= 4}
    if not known or max(mean(values) for values in known.values()) < 0.2:
        return None
    dead = [name.split("/")[1] for name, values in known.items() if max(values) == 0.0]
    if not dead:
        return None
    return Found(0.0, 0.0, f"no rollout of the training set {dead[0]} was right in 5 steps")


def _longer(history: History) -> Found | None:
    """The answers became twice as long within 10 steps."""
    before, now = history.recent("rollout/length_mean", 10, skip=10), history.last("rollout/length_mean")
    if now is None or len(before) < 5:
        return None
    limit = 2 * statistics.median(before)
    if now <= limit or now < statistics.median(before) + 16:
        return None
    return Found(now, limit, f"the mean length is {now:.0f} tokens, more than twice that of 10 to 20 steps before")


def _failed_rewards(history: History) -> Found | None:
    value = history.last("reward/failed_fraction")
    if value is None or value <= 0.05:
        return None
    return Found(value, 0.05, f"{value:.0%} of the rollouts could not be scored")


RULES: tuple[AlarmRule, ...] = (
    AlarmRule("unscored rollouts", 3, "the tracebacks of rewards in logs/", _failed_rewards),
    AlarmRule("equal rewards", 5, "the rollouts and rewards of one group: are they ever different?", equal_rewards),
    AlarmRule("one set is never right", 3, "the references and prompts of that set", _dead_set),
    AlarmRule("mismatch of policy and engine", 3, "train/mismatch_max, engine.args and precision", mismatch_growth),
    AlarmRule("far from the reference", 2, "optimizer.lr and algorithm.kl_coef", far_from_reference),
    AlarmRule("gradient norm", 3, "optimizer.lr, and the rollouts with the largest advantages", gradient_spike),
    AlarmRule("collapse of the entropy", 5, "optimizer.lr and the variety of the rollouts", entropy_collapse),
    AlarmRule("reward up, accuracy down", 2, "the rollouts with the largest rewards", _reward_against_accuracy),
    AlarmRule("a reward term falls", 3, "the weights in reward.terms", _component_falls),
    AlarmRule("answers grow", 3, "the longest rollouts: do they repeat themselves?", _longer),
    AlarmRule("truncated answers", 5, "sampling.max_tokens and the end of truncated rollouts", truncated_rollouts),
    AlarmRule("no progress", 1, "group/degenerate_fraction, optimizer.lr and the prompts", _no_progress),
    *MACHINE_RULES,
)


class Alarms:
    """Applies the rules to each step of a run."""

    def __init__(self, rules: Sequence[AlarmRule] = RULES) -> None:
        self.history = History()
        self._rules = rules
        self._holding: dict[str, list[int]] = {}  # steps in succession in which the condition held
        self._missing: dict[str, int] = {}  # steps in succession in which it did not, for an alarm that was raised
        self._raised: list[Alarm] = []

    def step(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Add the metrics of a step and return the alarms that this step raises."""
        self.history.add(step, metrics)
        return [alarm for rule in self._rules if (alarm := self._apply(rule, step)) is not None]

    @property
    def raised(self) -> tuple[Alarm, ...]:
        """All alarms so far, in the order in which they were raised."""
        return tuple(self._raised)

    @property
    def active(self) -> tuple[Alarm, ...]:
        """Alarms whose condition holds."""
        return tuple(alarm for alarm in self._raised if alarm.until is None)

    def _apply(self, rule: AlarmRule, step: int) -> Alarm | None:
        found = rule.check(self.history)
        position = next((i for i, a in enumerate(self._raised) if a.name == rule.name and a.until is None), None)
        if found is None:
            self._holding.pop(rule.name, None)
            if position is not None:
                self._missing[rule.name] = self._missing.get(rule.name, 0) + 1
                if self._missing[rule.name] >= rule.patience:
                    self._raised[position] = replace(self._raised[position], until=step - rule.patience)
            return None
        self._missing[rule.name] = 0
        held = self._holding.setdefault(rule.name, [])
        held.append(step)
        if position is not None or len(held) < rule.patience:
            return None
        alarm = Alarm(rule.name, held[0], None, found.value, found.limit, found.text, rule.look_at)
        self._raised.append(alarm)
        return alarm
