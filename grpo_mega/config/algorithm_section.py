"""Config section `algorithm`: objective, advantages, KL penalty and corrections (docs/algorithms.md)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from grpo_mega.config.algorithm_presets import AlgorithmName, with_defaults
from grpo_mega.config.section import Section


class AlgorithmConfig(Section):
    """Objective of the policy. Defaults are those of `grpo`; another `name` changes some of them.

    config/algorithm_presets.py holds the defaults of each name.
    """

    name: AlgorithmName = "grpo"
    """Name of the algorithm. It sets the defaults of the other keys; keys that are set take precedence."""
    surrogate: str = "clipped_ratio"
    """Objective per token: `clipped_ratio`, `clipped_sequence_ratio`, `geometric_mean`, `clipped_weight`, `soft_gate`
    or `policy_gradient` (formulas: algorithm/surrogates/). Your own: `package.module:function` or
    `./file.py:function` (docs/algorithms.md)."""
    clip_low: float | None = Field(0.2, gt=0, lt=1)
    """Lower clip: the ratio is clamped to at least 1 - clip_low (`geometric_mean`: the log ratio to at least
    -clip_low). null: no lower bound."""
    clip_high: float | None = Field(0.2, gt=0)
    """Upper clip: the ratio is clamped to at most 1 + clip_high (`geometric_mean`: the log ratio to at most clip_high).
    null: for surrogates without a clip."""
    dual_clip: float | None = Field(None, gt=1)
    """Largest ratio that is used for tokens with a negative advantage. null: no such bound."""
    gate_positive: float | None = Field(None, gt=0)
    """`soft_gate`: temperature tau of tokens with a positive advantage. null: for other surrogates."""
    gate_negative: float | None = Field(None, gt=0)
    """`soft_gate`: temperature tau of tokens with a negative advantage. null: for other surrogates."""
    advantage: str = "group_std"
    """Advantage estimator. `group_std`: (reward - group mean) / group standard deviation. `process`: the same for every
    step that a process reward judged; a token gets the sum over the steps that end with or after it. `group_mean`:
    reward - group mean. `leave_one_out`: reward - mean of the other rollouts of the group. `batch`: rewards whitened
    over the tokens of the step. `group_batch`: reward - group mean, then whitened. `gae`: generalized advantage
    estimation with a critic, then whitened. Your own: `package.module:function` or `./file.py:function`
    (docs/algorithms.md)."""
    gamma: float | None = Field(None, gt=0, le=1)
    """`gae`: discount factor per token. null: for other estimators."""
    gae_lambda: float | None = Field(None, ge=0, le=1)
    """`gae`: 0 gives the one-step temporal difference, 1 gives return - value. null: for other estimators."""
    value_clip: float | None = Field(None, gt=0)
    """`gae`: largest difference between a value and its value before the update. null: no bound."""
    critic_lr_factor: float = Field(1.0, gt=0)
    """`gae`: learning rate of the critic / learning rate of the policy. Warm-up and decay are the same."""
    aggregation: Literal["rollout_mean", "token_mean", "rollout_sum", "group_token_mean"] = "rollout_mean"
    """Average of the token losses. `rollout_mean`: mean over the tokens of a rollout, then over rollouts. `token_mean`:
    over all tokens. `rollout_sum`: sum over a rollout / aggregation_length, then the mean over rollouts.
    `group_token_mean`: mean over the tokens of a group, then over groups."""
    aggregation_length: float | None = Field(None, gt=0)
    """`rollout_sum`: divisor of the sum over a rollout, in tokens. null: `sampling.max_tokens`."""
    kl_coef: float = Field(0.04, ge=0)
    """Coefficient of the KL penalty against the reference. 0: no reference is built."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence per token (formulas: algorithm/kl.py)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Add the KL penalty to the loss, or subtract it from the reward of each token."""
    kl_target: float | None = Field(None, gt=0)
    """KL divergence, in nats per token, toward which `kl_coef` is adapted after every step. null: `kl_coef` is
    constant."""
    ref_update_every: int = Field(0, ge=0)
    """Steps between updates of the reference to the current policy. 0: the reference stays the base model."""
    entropy_coef: float = Field(0.0, ge=0)
    """Coefficient of the entropy bonus."""
    old_log_probs: Literal["policy", "sampler"] = "policy"
    """Log-probs in the denominator of the ratio. `policy`: those of the policy before the update; the forward pass of
    the first update gives those of the first minibatch, and a separate pass those of the others. `sampler`: those of
    the engine, without a separate pass. The ratio then contains the mismatch of policy and engine, so `correction` must
    be `token_masked`, which is then the default and masks tokens without weighting the others a second time."""
    correction: Literal["token_truncated", "sequence_truncated", "token_masked"] | None = None
    """Importance weight for policy and engine that differ (formulas: algorithm/mismatch_correction.py). null: none."""
    correction_low: float | None = Field(None, gt=0, lt=1)
    """`token_masked`: tokens with a probability ratio policy / engine below it are masked. null: 0.5."""
    correction_high: float | None = Field(None, ge=1)
    """Largest probability ratio policy / engine. null: 5 for `token_masked`, 2 for the others."""
    correction_veto: float | None = Field(None, gt=0, lt=1)
    """Rollouts with a token whose probability ratio policy / engine is below it are not trained on. null: no veto."""
    routing_replay: bool = False
    """Mixture-of-experts models: route every token to the experts that the engine chose for it. The choices are saved
    beside the rollouts."""
    router_bias_update_rate: float = Field(0.0, ge=0)
    """Mixture-of-experts models with a correction bias (DeepSeek-V3, GLM-4.5): every update moves the bias of each
    expert by this rate, up if the expert computed fewer tokens than the mean and down if more. 0: biases stay."""
    aux_loss_coef: float = Field(0.0, ge=0)
    """Mixture-of-experts models: coefficient of the load-balancing loss of the routers, which is computed per rollout
    without padding, summed over layers, and its mean over the update's rollouts is added to the loss
    (docs/algorithms.md). 0: none."""
    overlong_filter: bool = False
    """Do not train on truncated rollouts."""
    overlong_buffer_fraction: float | None = Field(None, gt=0, le=1)
    """Last part of `sampling.max_tokens`, as a fraction, over which the reward falls linearly. null: no penalty."""
    overlong_penalty: float = Field(1.0, gt=0)
    """Reward that is subtracted from a completion of `sampling.max_tokens` tokens."""
    degenerate: Literal["keep", "drop", "refill"] = "keep"
    """Handling of groups whose rewards are all equal. `keep`: train on them. `drop`: leave them out, also of the
    denominators. `refill`: drop them and sample other prompts in their place."""
    refill_rounds: int | None = Field(None, ge=1)
    """`refill`: most additional sampling rounds per step. null: 8."""

    @property
    def needs_reference(self) -> bool:
        """True if the loss or the reward has a KL penalty against a reference model."""
        return self.kl_coef > 0

    @property
    def needs_critic(self) -> bool:
        """True if advantages are computed from the values of a critic (`advantage: gae`)."""
        return self.advantage == "gae"

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        return with_defaults(values) if isinstance(values, dict) else values
