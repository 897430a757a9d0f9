"""Every metric of a run: unit, meaning, and when it exists. docs/reference/metrics.md is generated from this table.

Logging a name that is not in the table is an error (`require_known`), because scripts and curves rely on the names.
Asserted by tests/unit/observe/test_metrics.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

_ALWAYS = "every step"
_SFT = "`train.objective=sft`"
_CRITIC = "`algorithm.advantage=gae`"
_FP8 = "`precision.fp8`"
_CORRECTION = "with a correction or a veto"
_EVALUATION = "after an evaluation"
_SETS = "a step with rollouts of the set, with several training sets"
_ENVIRONMENT = "every step; 0 without an environment"


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
        unit: unit of the value; "fraction" is 0 to 1.
        meaning: what the value is.
        when: when the metric exists.
    """

    unit: str
    meaning: str
    when: str = _ALWAYS


METRICS: dict[str, Metric] = {
    "reward/mean": Metric("reward", "mean reward of the step's rollouts"),
    "reward/std": Metric("reward", "standard deviation of the rewards over all rollouts of the step"),
    "reward/accuracy": Metric("fraction", "rollouts with the correct answer"),
    "reward/failed_fraction": Metric("fraction", "rollouts with a reward that timed out, crashed or was not a number"),
    "reward/dropped_fraction": Metric(
        "fraction", "rollouts without a reward (`reward.on_failure=drop`), which no mean of rewards and no loss counts"
    ),
    "reward/component/*": Metric("reward", "mean of one reward term, before its weight", "a step in which it applies"),
    "set/*/rollouts": Metric("rollouts", "rollouts of one training set", _SETS),
    "set/*/reward_mean": Metric("reward", "mean reward of one training set", _SETS),
    "set/*/accuracy": Metric("fraction", "rollouts of one training set with the correct answer", _SETS),
    "set/*/length_mean": Metric("tokens", "mean completion length of one training set", _SETS),
    "set/*/failed_fraction": Metric("fraction", "rollouts of one training set with a reward that failed", _SETS),
    "rollout/length_mean": Metric("tokens", "mean completion length"),
    "rollout/length_max": Metric("tokens", "longest completion"),
    "rollout/prompt_length_mean": Metric("tokens", "mean prompt length"),
    "rollout/truncated_fraction": Metric("fraction", "completions that were truncated at `sampling.max_tokens`"),
    "rollout/tokens": Metric("tokens", "completion tokens of the step, all replicas"),
    "rollout/turns_mean": Metric("turns", "mean answers of the policy per rollout; 1 without an environment"),
    "rollout/result_tokens": Metric("tokens", "part of `rollout/tokens` that the environment wrote", _ENVIRONMENT),
    "rollout/tokens_per_replica/*": Metric("tokens", "completion tokens that one replica sampled"),
    "group/degenerate_fraction": Metric(
        "fraction", "sampled groups whose rewards are equal up to rounding: no training signal"
    ),
    "group/discarded": Metric("groups", "degenerate groups that were replaced by others; no other metric counts them"),
    "train/loss": Metric("loss", "loss, mean over the step's updates"),
    "train/perplexity": Metric("1", "exp(`train/loss`)", _SFT),
    "train/kl": Metric("nats per token", "KL divergence of the policy from the reference", "`algorithm.kl_coef` > 0"),
    "train/kl_coef": Metric("1 / nats", "coefficient of the KL divergence in the loss or the reward"),
    "train/entropy": Metric("nats per token", "entropy of the policy"),
    "train/clip_fraction": Metric("fraction", "tokens for which a bound of the surrogate holds"),
    "train/ratio_max": Metric("ratio", "largest probability ratio of a token, policy / policy before the update"),
    "train/grad_norm": Metric("norm", "gradient norm before clipping, mean over the step's updates"),
    "train/learning_rate": Metric("rate", "learning rate of the step's last update"),
    "train/mismatch_kl": Metric("nats per token", "KL divergence between sampler and policy for the same weights"),
    "train/mismatch_max": Metric(
        "nats",
        "largest \\|old_log_probs - sampler_log_probs\\| of a token; of the first minibatch with "
        "algorithm.old_log_probs=sampler",
    ),
    "train/mismatch_likely_max": Metric(
        "nats", "the same over tokens with a probability above 1e-3, which `guard.max_mismatch` bounds"
    ),
    "train/correction_mean": Metric("factor", "mean factor that corrects the mismatch", _CORRECTION),
    "train/masked_fraction": Metric("fraction", "tokens that the correction masked", _CORRECTION),
    "train/vetoed_fraction": Metric("fraction", "tokens of rollouts that the veto excluded", _CORRECTION),
    "train/fp8_amax": Metric(
        "value", "largest absolute value that was quantized: of any tensor (delayed recipe), of a weight (others)", _FP8
    ),
    "train/fp8_cut_fraction": Metric(
        "fraction", "FP8 tensors with values that were saturated by their scale", f"{_FP8}, delayed recipe"
    ),
    "train/fp8_zero_fraction": Metric(
        "fraction", "FP8 weights with quantized value 0, mostly because a much larger weight sets the scale", _FP8
    ),
    "train/unreplayed_fraction": Metric(
        "fraction", "trained tokens without a routing record of the engine", "`algorithm.routing_replay`"
    ),
    "train/aux_loss": Metric(
        "loss",
        "balance loss of the routers without its coefficient, mean over rollouts and layers; 1 is an equal load",
        "`algorithm.aux_loss_coef` > 0",
    ),
    "train/unused_rollouts": Metric("rollouts", "rollouts that are not trained on: filtered, or of dropped groups"),
    "train/updates": Metric("updates", "optimizer steps of the step"),
    "train/num_loss_tokens": Metric("tokens", "tokens trained on in one epoch over the step's rollouts or examples"),
    "train/num_tokens": Metric("tokens", "tokens of the step's examples", _SFT),
    "critic/loss": Metric("loss", "loss of the critic, mean over its updates of the step", _CRITIC),
    "critic/clip_fraction": Metric("fraction", "tokens for which the value clip holds", _CRITIC),
    "critic/grad_norm": Metric("norm", "gradient norm of the critic before clipping, mean over its updates", _CRITIC),
    "critic/learning_rate": Metric("rate", "learning rate of the critic's last update of the step", _CRITIC),
    "critic/value_mean": Metric("reward", "mean value of a token, before the updates", _CRITIC),
    "critic/return_mean": Metric("reward", "mean return of a token, the target of the critic", _CRITIC),
    "critic/explained_variance": Metric(
        "fraction", "1 - variance of (return - value) / variance of the returns; 1 is a perfect critic", _CRITIC
    ),
    "time/rollout_seconds": Metric("seconds", "sampling"),
    "time/reward_seconds": Metric("seconds", "scoring after the last completion"),
    "time/log_probs_seconds": Metric("seconds", "log-probs of the policy before the update and of the reference"),
    "time/critic_seconds": Metric("seconds", "values and updates of the critic", _CRITIC),
    "time/train_seconds": Metric("seconds", "forward, backward and optimizer"),
    "time/sync_seconds": Metric("seconds", "weight sync from the policy to the engine, with its verification"),
    "time/checkpoint_seconds": Metric(
        "seconds", "time for which saving a checkpoint stops the loop; with `checkpoint.asynchronous` mostly a copy"
    ),
    "time/checkpoint_wait_seconds": Metric(
        "seconds", "part of it in which a save waited until the checkpoint before was written; 0 if none had to wait"
    ),
    "time/evaluation_seconds": Metric("seconds", "evaluation on held-out prompts", _EVALUATION),
    "time/step_seconds": Metric("seconds", "the whole step"),
    "throughput/tokens_per_second": Metric("tokens / s", "prompt and completion tokens per second of the step"),
    "throughput/rollout_tokens_per_second": Metric("tokens / s", "completion tokens per second of sampling"),
    "sync/bytes": Metric("bytes", "bytes written into the engine of rank 0, or sent to servers by rank 0"),
    "sync/received_bytes": Metric("bytes", "part of `sync/bytes` that came from other ranks"),
    "sync/verify_seconds": Metric("seconds", "part of the sync that its verification took"),
    "sync/gb_per_second": Metric("GB / s", "`sync/bytes` / time of the sync"),
    "eval/accuracy": Metric("fraction", "pass@1 on the held-out prompts", _EVALUATION),
    "eval/greedy_accuracy": Metric("fraction", "accuracy on the held-out prompts with greedy decoding", _EVALUATION),
    "eval/reward_mean": Metric("reward", "mean reward on the held-out prompts", _EVALUATION),
    "eval/failed_fraction": Metric("fraction", "samples with a reward that failed", _EVALUATION),
    "eval/length_mean": Metric("tokens", "mean completion length on the held-out prompts", _EVALUATION),
    "eval/pass_at_*": Metric("fraction", "probability that at least one of k samples is correct", _EVALUATION),
    "eval/majority_at_*": Metric(
        "fraction", "probability that the most frequent answer of k samples is correct", _EVALUATION
    ),
    "eval/set/*": Metric("as above", "the same numbers for one held-out set", "with several held-out sets"),
    "data/epoch": Metric("passes", "prompts of all steps so far / training prompts of all sets, without refills"),
    "data/skipped_examples": Metric("examples", "examples left out of the training sets: they exceed the limit", _SFT),
    "data/truncated_examples": Metric(
        "examples", "examples that lost their last tokens: they exceed the limit (`data.overlong=truncate`)", _SFT
    ),
    "data/skipped_prompts": Metric("prompts", "prompts left out of the training sets: they exceed the limit"),
    "host/memory_bytes": Metric("bytes", "resident memory of the process of rank 0"),
    "host/disk_free_fraction": Metric("fraction", "free part of the file system of the run folder"),
    "memory/peak_*_bytes": Metric("bytes", "peak memory of rank 0 during one phase", "`observe.memory_peaks`"),
    "memory/*": Metric("bytes", "memory of rank 0 for one part of the policy's or the critic's state"),
}
"""Name, or shell pattern, of a metric -> its description. The section is the part of the name before the slash."""


def require_known(metrics: Mapping[str, float]) -> None:
    """Check that every name is in `METRICS`.

    Raises:
        ValueError: a name is not in the table; the message has the nearest known name.
    """
    for name in metrics:
        if name not in METRICS and not any(fnmatchcase(name, pattern) for pattern in METRICS):
            nearest = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"metric={name} is not in observe/metric_table.py; use {nearest}, or add a row to the table"
            )
