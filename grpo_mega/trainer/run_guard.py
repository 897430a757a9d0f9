"""Applies the rules of `guard.rules` to the rollouts, the gradients and the mismatch of a step. Equal on every rank.

A rule is checked in each step by itself (observe/training_faults.py). If several rules hold, the strongest action
counts. The input of a rule is equal on every rank. The ranks agree on the action all the same, so that no rank makes an
update that another one skips. The history has the values of metrics.jsonl. A continued run reads it from there, and
therefore decides as the uninterrupted run does.

`skip_update` and `quarantine` leave the weights and the optimizer state as they are. `rollback` raises
`RollbackRequest`, which trainer/rollback.py executes, and `stop` raises `GuardStopError`.
Asserted by tests/unit/trainer/test_run_guard.py and tests/e2e/test_guard.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from grpo_mega.config.guard_section import GuardConfig, GuardRules
from grpo_mega.observe import training_faults
from grpo_mega.observe.alarm_rule import Found
from grpo_mega.observe.history import History
from grpo_mega.observe.rollbacks import Rollbacks
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.stop_signal import largest_on_all
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.guard_report import GuardReport, HeldRule
from grpo_mega.trainer.step_metrics import IsRight, reward_metrics, update_metrics
from grpo_mega.types import AllowsUpdate, UpdateStats

SumOverRanks = Callable[[NDArray[np.float64]], NDArray[np.float64]]

log = logging.getLogger(__name__)

_ACTIONS = ("warn", "skip_update", "quarantine", "rollback", "stop")
"""From the weakest to the strongest."""
_RULES = tuple(GuardRules.model_fields)
_ON_ROLLOUTS: Mapping[str, Callable[[History, float], Found | None]] = {
    "truncation": training_faults.truncated_rollouts,
    "degenerate": training_faults.equal_rewards,
    "reward_collapse": training_faults.reward_collapse,
}
_ON_GRADIENT: Mapping[str, Callable[[History, float], Found | None]] = {
    "gradient_spike": training_faults.gradient_spike,
    "kl": training_faults.far_from_reference,
    "entropy_collapse": training_faults.entropy_collapse,
}
_ON_MISMATCH: Mapping[str, Callable[[History, float], Found | None]] = {"mismatch": training_faults.mismatch_growth}
_WATCHED = (
    "reward/mean",
    "reward/accuracy",
    "group/degenerate_fraction",
    "rollout/truncated_fraction",
    "train/grad_norm",
    "train/kl",
    "train/entropy",
    "train/mismatch_kl",
)
"""Metrics that the rules read."""
_RETRIED = ("non_finite", "gradient_spike")
"""Rules whose cause may be absent with other rollouts."""


class GuardStopError(RuntimeError):
    """A rule of `guard.rules` stopped the run, before the checkpoint of the step. Raised on every rank.

    `continue_with` is the config override with which the same command continues the run past it.
    """

    def __init__(self, message: str, continue_with: str) -> None:
        super().__init__(message)
        self.continue_with = continue_with


class RollbackRequest(Exception):  # noqa: N818 - it is not an error
    """A rule of `guard.rules` asks for a return to the last checkpoint. Raised on every rank, outside of collectives.

    Args:
        step: step in which the rule held.
        rule: its name.
        reason: what it found.
    """

    def __init__(self, step: int, rule: str, reason: str) -> None:
        super().__init__(f"step {step}: {reason} (guard.rules.{rule}=rollback)")
        self.step, self.rule, self.reason = step, rule, reason


@dataclass
class _Step:
    """State of the rules in the current step. `quarantined` has rollouts that this rank trains or knows of."""

    number: int
    findings: list[HeldRule] = field(default_factory=list)
    skips_all: bool = False
    skipped_updates: int = 0
    quarantined: set[int] = field(default_factory=set)
    quarantined_groups: int = 0


class RunGuard:
    """The rules of one run on this rank.

    Args:
        config: section guard.
        ranks: coordinates of this rank.
        rollbacks: rollbacks of the run so far.
    """

    def __init__(self, config: GuardConfig, ranks: Ranks, rollbacks: Rollbacks = Rollbacks()) -> None:  # noqa: B008 - frozen
        self._rules, self._ranks, self._max_rollbacks = config.rules, ranks, config.max_rollbacks
        self.rollbacks = rollbacks
        self._history = History()
        self._now = _Step(0)

    @property
    def may_roll_back(self) -> bool:
        """True if a rule has the action `rollback`."""
        return "rollback" in self._rules.actions.values()

    @property
    def watches_rollouts(self) -> bool:
        """True if a rule needs the metrics of rewards and rollouts."""
        return any(name in self._rules.actions for name in (*_ON_ROLLOUTS, "entropy_collapse"))

    def returned(self, rollbacks: Rollbacks, lines: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Set the rollbacks and the metrics of all steps so far, (step, metrics), at a start and after a rollback."""
        self.rollbacks, self._history = rollbacks, History()
        for step, metrics in lines:
            self._history.add(step, _watched(metrics))

    def start_step(self, step: int) -> None:
        """Begin a step."""
        self._now = _Step(step)

    def check_groups(self, groups: SampledGroups, is_right: IsRight) -> None:
        """Apply the rules on rollouts, before the updates of a step. Collective.

        Args:
            groups: rollouts of the step; only their table is read.
            is_right: returns True for each rollout whose reward means a right answer.

        Raises:
            GuardStopError, RollbackRequest: a rule has this action.
        """
        if self.watches_rollouts:
            truncated = {"rollout/truncated_fraction": float(groups.table.is_truncated.mean())}
            metrics = reward_metrics(groups, is_right(groups.table)) | truncated
            self.check_rollouts(metrics, lambda rule: offending_rollouts(groups, rule))

    def check_rollouts(
        self,
        metrics: Mapping[str, float],
        offending: Callable[[str], NDArray[np.int64]] = lambda rule: np.zeros(0, int),
    ) -> None:
        """Apply the rules on rollouts to their metrics. Collective.

        Args:
            metrics: of rewards, groups and rollouts.
            offending: returns the rollouts because of which a rule holds, [N] rows of the step's table.

        Raises:
            GuardStopError, RollbackRequest: a rule has this action.
        """
        self._history.add(self._now.number, _watched(metrics))
        found = self._act(self._found(_ON_ROLLOUTS), "all updates of the step are skipped")
        if found is not None and found.action in ("skip_update", "quarantine"):
            self._now.skips_all = True
        if found is not None and found.action == "quarantine":
            self._now.quarantined.update(offending(found.rule).tolist())

    def allows(self, rows: Sequence[Sequence[int]], *, of_critic: bool = False) -> AllowsUpdate:
        """Return the function that applies the rules to the statistics of an update. It is collective.

        Args:
            rows: rollouts of each microbatch of this rank.
            of_critic: only the rule `non_finite` applies.

        Raises:
            GuardStopError, RollbackRequest: by the returned function, if a rule has this action.
        """

        def decide(stats: UpdateStats) -> bool:
            held: dict[str, str] = {}
            if stats.fault is not None:
                held["non_finite"] = stats.fault
            elif not of_critic and any(rule in self._rules.actions for rule in _ON_GRADIENT):
                self._history.add(self._now.number, _gradient_metrics(stats))
                held = self._found(_ON_GRADIENT)
            found = self._act(held, "the update is skipped")
            skips = found is not None and found.action in ("skip_update", "quarantine")
            if found is not None and found.action == "quarantine":
                of_loss = stats.fault is not None and not math.isfinite(stats.sums.get("loss", 0.0))
                chosen = stats.non_finite_rows if of_loss else range(len(rows))
                self._now.quarantined.update(i for row in chosen for i in rows[row])
            if skips or self._now.skips_all:
                self._now.skipped_updates += 1
                return False
            return True

        return decide

    def check_mismatch(self, metrics: Mapping[str, float]) -> None:
        """Apply the rule on the mismatch, after the updates and before the checkpoint. Collective.

        Raises:
            GuardStopError, RollbackRequest: the rule has this action.
        """
        if "mismatch" in self._rules.actions:
            self._history.add(self._now.number, metrics)
            self._act(self._found(_ON_MISMATCH), "")

    def finish_step(
        self,
        groups: SampledGroups,
        updates: Sequence[UpdateStats],
        of_tokens: Mapping[str, float],
        sum_over_ranks: SumOverRanks,
    ) -> GuardReport:
        """Apply the rule on the mismatch, keep the metrics of the step for later ones, and report. Collective.

        Args:
            groups: rollouts of the step.
            updates: statistics of the updates that were made.
            of_tokens: metrics of tokens, equal on every rank.
            sum_over_ranks: adds arrays of all ranks.

        Raises:
            GuardStopError, RollbackRequest: the rule has this action, and holds.
        """
        self.check_mismatch(of_tokens)
        quarantined = None
        if self.has_quarantined:
            quarantined = self.quarantined_groups(len(groups.table), groups.group_size, sum_over_ranks)
        self.end_step({**update_metrics(updates), **of_tokens})
        return self.report(quarantined)

    def end_step(self, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of the complete step, those of its line in metrics.jsonl, for later steps."""
        self._history.add(self._now.number, _watched(metrics))

    @property
    def findings(self) -> Sequence[HeldRule]:
        """Rules that held in the current step."""
        return tuple(self._now.findings)

    @property
    def has_quarantined(self) -> bool:
        """True, on every rank, if rollouts of the current step go to quarantine."""
        return any(finding.action == "quarantine" for finding in self._now.findings)

    @property
    def skipped_non_finite(self) -> bool:
        """True, on every rank, if an update of the current step was skipped because it was not finite."""
        return any(finding.rule == "non_finite" for finding in self._now.findings)

    def quarantined_groups(self, num_rollouts: int, group_size: int, sum_over_ranks: SumOverRanks) -> NDArray[np.bool_]:
        """Return True for each group of the step that goes to quarantine, [P]. Collective."""
        mine = np.zeros(num_rollouts)
        mine[list(self._now.quarantined)] = 1.0
        groups = sum_over_ranks(mine).reshape(-1, group_size).any(axis=1)
        self._now.quarantined_groups = int(groups.sum())
        return np.asarray(groups)

    def report(self, quarantined: NDArray[np.bool_] | None = None) -> GuardReport:
        """Return the report of the current step; `quarantined` is [P], from `quarantined_groups`."""
        step = self._now.number
        return GuardReport(
            self.metrics(),
            self.findings,
            quarantined,
            self.rollbacks.prompts_step_of(step),
            self.rollbacks.attempt_of(step),
        )

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the current step."""
        return {
            "guard/warnings": float(sum(finding.action == "warn" for finding in self._now.findings)),
            "guard/skipped_updates": float(self._now.skipped_updates),
            "guard/quarantined_groups": float(self._now.quarantined_groups),
            "guard/rollbacks": float(self.rollbacks.attempt_of(self._now.number)),
        }

    def _found(self, rules: Mapping[str, Callable[[History, float], Found | None]]) -> dict[str, str]:
        """Return {rule: text} of the rules that are not off and hold in the last step of the history."""
        held = {}
        for name, condition in rules.items():
            if name in self._rules.actions:
                found = condition(self._history, getattr(self._rules, name).threshold)
                if found is not None:
                    held[name] = found.text
        return held

    def _act(self, held: Mapping[str, str], consequence: str) -> HeldRule | None:
        """Execute the strongest action of the rules that hold; return it, or None. Collective."""
        actions = self._rules.actions
        own = max((_ACTIONS.index(actions[rule]) * len(_RULES) + _RULES.index(rule) for rule in held), default=-1)
        (code,) = largest_on_all((own,), self._ranks)
        if code < 0:
            return None
        action, rule = _ACTIONS[code // len(_RULES)], _RULES[code % len(_RULES)]
        step, reason = self._now.number, held.get(rule, "on another rank, whose log has the reason")
        found = HeldRule(rule, action, reason)
        self._now.findings.append(found)
        if action == "stop":
            retry = "rollback" if rule in _RETRIED else "warn"
            raise GuardStopError(
                f"step {step}: {reason}; the run stops before its checkpoint (guard.rules.{rule}=stop)",
                f"guard.rules.{rule}={retry}",
            )
        if action == "rollback":
            self._require_rollbacks_left(found)
            raise RollbackRequest(step, rule, reason)
        if self._ranks.is_first:
            does = f"; {consequence}" if action != "warn" else ""
            log.warning("step %d: %s%s (guard.rules.%s=%s)", step, reason, does, rule, action)
        return found

    def _require_rollbacks_left(self, found: HeldRule) -> None:
        made = len(self.rollbacks.each)
        if made >= self._max_rollbacks:
            raise GuardStopError(
                f"step {self._now.number}: {found.reason}, and the run was rolled back {made} times already, as often "
                f"as guard.max_rollbacks={self._max_rollbacks} allows (guard.rules.{found.rule}=rollback); look at the "
                "rewards, the prompts and optimizer.lr before it continues",
                f"guard.max_rollbacks={made + 3}",
            )


def offending_rollouts(groups: SampledGroups, rule: str) -> NDArray[np.int64]:
    """Return the rollouts because of which a rule on rollouts holds, [N] rows of the table: by default all."""
    if rule == "truncation":
        return np.flatnonzero(groups.table.is_truncated)
    if rule == "degenerate":
        return np.flatnonzero(np.repeat(groups.degenerate, groups.group_size))
    return np.arange(len(groups.table))


def _watched(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in _WATCHED if name in metrics}


def _gradient_metrics(stats: UpdateStats) -> dict[str, float]:
    """Return the metrics of an update on which rules are, by the names of metrics.jsonl."""
    named = {"kl": "train/kl", "entropy": "train/entropy"}
    return {
        "train/grad_norm": stats.grad_norm,
        **{name: stats.sums[key] for key, name in named.items() if key in stats.sums},
    }
