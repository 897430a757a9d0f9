"""The config section `guard`: limits of waiting, the bound of the mismatch, and the rules of `guard.rules`.

`guard.rules.NAME=ACTION` sets the action of a rule alone; `guard.rules.NAME={action: ACTION, threshold: X}` sets both.
trainer/run_guard.py applies the rules.
Asserted by tests/unit/config/test_guard_section.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from grpo_mega.config.section import Section, off_from_yaml

Phase = Literal["start", "rollout", "reward", "log_probs", "critic", "train", "sync", "evaluation", "checkpoint"]
"""Phases of a step, as timers and heartbeats name them."""
StepAction = Literal["skip_update", "quarantine", "rollback", "stop"]
GuardAction = Annotated[Literal["off", "warn", StepAction], BeforeValidator(off_from_yaml)]


class GuardRule(Section):
    """A rule of `guard.rules`. Instead of the section, the config may give the action alone."""

    @model_validator(mode="before")
    @classmethod
    def _from_action(cls, value: Any) -> Any:
        return value if isinstance(value, dict | Section) else {"action": value}

    @model_validator(mode="after")
    def _threshold_has_an_action(self) -> Self:
        fields = type(self).model_fields
        if "threshold" not in fields or getattr(self, "action", None) != "off":
            return self
        threshold = getattr(self, "threshold", None)
        if threshold != fields["threshold"].default:
            raise ValueError(f"threshold={threshold:g} has no effect with action=off; set the action of the rule")
        return self


class NonFiniteRule(GuardRule):
    """A loss or a gradient of policy or critic that is not finite. No update is made with it."""

    action: StepAction = "stop"
    """What the run does when the rule holds."""


class GradientSpikeRule(GuardRule):
    """The gradient norm of an update is larger than `threshold` times the median of the 20 steps before."""

    action: GuardAction = "off"
    """What the run does when the rule holds."""
    threshold: float = Field(30.0, gt=1)
    """Factor over the median."""


class KlRule(GuardRule):
    """The KL divergence of the policy from the reference, mean over the tokens of an update, is larger than
    `threshold`."""

    action: GuardAction = "off"
    """What the run does when the rule holds."""
    threshold: float = Field(3.0, gt=0)
    """Nats per token."""


class MismatchRule(GuardRule):
    """The mismatch of policy and engine (`train/mismatch_kl`) is more than 0.001 nats per token and more than
    `threshold` times the median of the first 10 steps."""

    action: Annotated[Literal["off", "warn", "rollback", "stop"], BeforeValidator(off_from_yaml)] = "off"
    """What the run does when the rule holds. It cannot skip updates: the mismatch is known after them."""
    threshold: float = Field(10.0, gt=1)
    """Factor over the median."""


class EntropyCollapseRule(GuardRule):
    """The entropy of an update is less than `threshold` times the mean of the first 5 steps, after 10 steps and with an
    accuracy below 0.9."""

    action: GuardAction = "off"
    """What the run does when the rule holds."""
    threshold: float = Field(0.02, gt=0, lt=1)
    """Fraction of the first steps' mean. In the quickstart, which is healthy, an update may have 0.07."""


class RewardCollapseRule(GuardRule):
    """The mean reward of the last 5 steps is below the best mean of 5 steps by more than `threshold` times the range of
    the rewards of all steps, after 20 steps."""

    action: GuardAction = "off"
    """What the run does when the rule holds."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """Fraction of the range, which is the largest minus the smallest mean reward of a step."""


class TruncationRule(GuardRule):
    """More than a fraction `threshold` of the rollouts of a step are truncated at `sampling.max_tokens`."""

    action: GuardAction = "off"
    """What the run does when the rule holds. `quarantine` writes the groups with a truncated rollout."""
    threshold: float = Field(0.5, ge=0, lt=1)
    """Fraction of the rollouts."""


class DegenerateRule(GuardRule):
    """At least a fraction `threshold` of the groups of a step have equal rewards, with an accuracy below 0.9."""

    action: GuardAction = "off"
    """What the run does when the rule holds. `quarantine` writes the groups with equal rewards."""
    threshold: float = Field(0.98, gt=0, le=1)
    """Fraction of the groups."""


class GuardRules(Section):
    """Conditions on the rollouts and the gradient of a step, and what a run does in the first step in which one holds.

    `warn`: a line in the log. `skip_update`: the optimizer step is not made. `quarantine`: the same, and the rollouts
    go to `quarantine/` of the run folder. `rollback`: the run returns to its last checkpoint and continues with the
    next prompts. `stop`: the run ends. docs/guards.md describes them.
    """

    non_finite: NonFiniteRule = NonFiniteRule()
    """Loss or gradient that is not finite."""
    gradient_spike: GradientSpikeRule = GradientSpikeRule()
    """Gradient norm of an update."""
    kl: KlRule = KlRule()
    """Distance to the reference."""
    mismatch: MismatchRule = MismatchRule()
    """Difference between policy and engine. `guard.max_mismatch` is a bound for single tokens."""
    entropy_collapse: EntropyCollapseRule = EntropyCollapseRule()
    """Entropy of the policy."""
    reward_collapse: RewardCollapseRule = RewardCollapseRule()
    """Mean reward."""
    truncation: TruncationRule = TruncationRule()
    """Truncated rollouts."""
    degenerate: DegenerateRule = DegenerateRule()
    """Groups with equal rewards."""

    @property
    def actions(self) -> dict[str, str]:
        """Action of each rule that is not off, by the name of the rule."""
        every = {name: str(getattr(self, name).action) for name in type(self).model_fields}
        return {name: action for name, action in every.items() if action != "off"}


class GuardConfig(Section):
    """Limits of waiting, of the difference between policy and engine, and rules on each step."""

    timeout_seconds: float = Field(600.0, gt=0)
    """Longest wait of one rank for another, in seconds."""
    phase_limits: dict[Phase, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Longest time without progress in a phase, in seconds, by phase. Progress: a rank enters a phase or a collective,
    or its engine makes a step. After it the launcher reports the rank that the others wait for, and ends the job.
    Default: the larger of 60 and 6 times the median of the phase; before it is known, `guard.timeout_seconds`, and none
    for `start`. While ranks wait for what is sampled during training: 60 more than `guard.timeout_seconds`."""
    max_mismatch: Literal["auto"] | Annotated[float, Field(gt=0)] | None = "auto"
    """Largest difference between the log-probs of policy and engine in a step, in nats, over tokens with a probability
    above 1e-3 in one of them. In fp32 one token beyond it stops the run. In bf16 and FP8, and for experts without
    `algorithm.routing_replay`, the run stops if more than 2 tokens and more than 0.1 % of them exceed it, if one token
    exceeds four times the bound, or if any token and more than 0.01 % exceed it in 3 of the last 5 steps. Of the tokens
    that exceed it, those of equal rollouts of one prompt count once.
    `auto`: 0.01 with `precision.dtype=fp32` and 0.5 with `bf16`; 2 with FP8, and for experts without
    `algorithm.routing_replay`. A positive number is a bound of yours. null: no bound."""
    rules: GuardRules = GuardRules()
    """Conditions on the rollouts and the gradient of a step, and their actions."""
    max_rollbacks: int = Field(3, ge=0)
    """Number of rollbacks of the run (`rollback`) before a rule with this action stops it."""
    max_engine_rebuilds: int = Field(2, ge=0)
    """How often the engines are rebuilt per start of the run, after a failure of sampling or of a weight sync, before
    the run ends."""
