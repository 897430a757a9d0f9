"""Every metric of a run: section, chart, unit, meaning, and when it exists.

docs/reference/metrics.md and the TensorBoard dashboard (dashboard.py) are generated from this table.

Logging a name that is not in the table is an error (`require_known`), because scripts and curves rely on the names.
Asserted by tests/unit/observe/test_metrics.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache

from grpo_mega.observe.engine_metric_rows import ENGINE_METRICS
from grpo_mega.observe.hardware.metric_rows import MACHINE_METRICS
from grpo_mega.observe.metric_row import (
    DATA,
    HARDWARE,
    LEARNING,
    MEMORY,
    MISMATCH,
    POLICY,
    ROLLOUTS,
    THROUGHPUT,
    TIME,
    Metric,
)
from grpo_mega.observe.rollout_metric_rows import ROLLOUT_METRICS

_SFT = "`train.objective=sft`"
_CRITIC = "`algorithm.advantage=gae`"
_FP8 = "`precision.fp8`"
_CORRECTION = "with a correction or a veto"
_EVALUATION = "after an evaluation"
_KNOWN_GPU = "on a GPU whose peak is in planner/hardware.py"


METRICS: dict[str, Metric] = {
    "reward/mean": Metric(LEARNING, "reward", "reward", "mean reward of the step's rollouts"),
    "reward/std": Metric(
        LEARNING, "reward deviation", "reward", "standard deviation of the rewards over all rollouts of the step"
    ),
    "reward/p*": Metric(LEARNING, "reward", "reward", "10th, 50th and 90th percentile of the rewards"),
    "reward/accuracy": Metric(LEARNING, "accuracy", "fraction", "rollouts with the correct answer"),
    "reward/failed_fraction": Metric(
        LEARNING,
        "rewards that failed",
        "fraction",
        "rollouts with a reward that timed out, crashed or was not a number",
    ),
    "reward/dropped_fraction": Metric(
        LEARNING,
        "rewards that failed",
        "fraction",
        "rollouts without a reward (`reward.on_failure=drop`), which no mean of rewards and no loss counts",
    ),
    "reward/component/*": Metric(
        LEARNING, "reward terms", "reward", "mean of one reward term, before its weight", "a step in which it applies"
    ),
    "train/loss": Metric(LEARNING, "loss", "loss", "loss, mean over the step's updates"),
    "train/perplexity": Metric(LEARNING, "perplexity", "1", "exp(`train/loss`)", _SFT),
    "eval/accuracy": Metric(LEARNING, "accuracy", "fraction", "pass@1 on the held-out prompts", _EVALUATION),
    "eval/greedy_accuracy": Metric(
        LEARNING, "accuracy", "fraction", "accuracy on the held-out prompts with greedy decoding", _EVALUATION
    ),
    "eval/reward_mean": Metric(LEARNING, "reward", "reward", "mean reward on the held-out prompts", _EVALUATION),
    "eval/failed_fraction": Metric(
        LEARNING, "rewards that failed", "fraction", "samples with a reward that failed", _EVALUATION
    ),
    "eval/length_mean": Metric(
        LEARNING, "held-out length", "tokens", "mean completion length on the held-out prompts", _EVALUATION
    ),
    "eval/pass_at_*": Metric(
        LEARNING, "held-out pass@k", "fraction", "probability that at least one of k samples is correct", _EVALUATION
    ),
    "eval/majority_at_*": Metric(
        LEARNING,
        "held-out majority@k",
        "fraction",
        "probability that the most frequent answer of k samples is correct",
        _EVALUATION,
    ),
    "eval/set/*": Metric(
        LEARNING, "held-out sets", "as above", "the same numbers for one held-out set", "with several held-out sets"
    ),
    "train/kl": Metric(
        POLICY,
        "KL to the reference",
        "nats per token",
        "KL divergence of the policy from the reference",
        "`algorithm.kl_coef` > 0",
    ),
    "train/kl_coef": Metric(
        POLICY, "KL coefficient", "1 / nats", "coefficient of the KL divergence in the loss or the reward"
    ),
    "train/entropy": Metric(POLICY, "entropy", "nats per token", "entropy of the policy"),
    "train/entropy_p10": Metric(
        POLICY, "entropy", "nats per token", "entropy below which 10 % of the tokens lie, to 8 % of its value"
    ),
    "train/clip_fraction": Metric(
        POLICY, "clipped tokens", "fraction", "tokens for which a bound of the surrogate holds"
    ),
    "train/clip_positive_fraction": Metric(
        POLICY, "clipped tokens", "fraction", "part of `train/clip_fraction` with a positive advantage"
    ),
    "train/clip_negative_fraction": Metric(
        POLICY, "clipped tokens", "fraction", "part of `train/clip_fraction` with a negative advantage"
    ),
    "train/ratio_max": Metric(
        POLICY, "ratio", "ratio", "largest probability ratio of a token, policy / policy before the update"
    ),
    "train/grad_norm": Metric(
        POLICY, "gradient norm", "norm", "gradient norm before clipping, mean over the step's updates"
    ),
    "train/learning_rate": Metric(POLICY, "learning rate", "rate", "learning rate of the step's last update"),
    "train/fp8_amax": Metric(
        POLICY,
        "FP8 largest value",
        "value",
        "largest absolute value that was quantized: of any tensor (delayed recipe), of a weight (others)",
        _FP8,
    ),
    "train/fp8_cut_fraction": Metric(
        POLICY,
        "FP8 saturated and zero",
        "fraction",
        "FP8 tensors with values that were saturated by their scale",
        f"{_FP8}, delayed recipe",
    ),
    "train/fp8_zero_fraction": Metric(
        POLICY,
        "FP8 saturated and zero",
        "fraction",
        "FP8 weights with quantized value 0, mostly because a much larger weight sets the scale",
        _FP8,
    ),
    "train/aux_loss": Metric(
        POLICY,
        "balance loss",
        "loss",
        "balance loss of the routers without its coefficient, mean over rollouts and layers; 1 is an equal load",
        "`algorithm.aux_loss_coef` > 0",
    ),
    "train/updates": Metric(POLICY, "updates", "updates", "optimizer steps of the step"),
    "guard/warnings": Metric(
        POLICY, "guard", "count", "rules of `guard.rules` with the action `warn` that held, counted per update"
    ),
    "guard/skipped_updates": Metric(
        POLICY, "guard", "count", "optimizer steps of policy and critic that a rule of `guard.rules` skipped"
    ),
    "guard/quarantined_groups": Metric(
        POLICY, "guard", "count", "groups that a rule of `guard.rules` wrote to `quarantine/`"
    ),
    "guard/rollbacks": Metric(
        POLICY, "guard", "count", "returns of the run to a checkpoint before this step (`rollbacks.jsonl`)"
    ),
    "critic/loss": Metric(
        POLICY, "critic loss", "loss", "loss of the critic, mean over its updates of the step", _CRITIC
    ),
    "critic/clip_fraction": Metric(
        POLICY, "clipped tokens", "fraction", "tokens for which the value clip holds", _CRITIC
    ),
    "critic/grad_norm": Metric(
        POLICY, "gradient norm", "norm", "gradient norm of the critic before clipping, mean over its updates", _CRITIC
    ),
    "critic/learning_rate": Metric(
        POLICY, "learning rate", "rate", "learning rate of the critic's last update of the step", _CRITIC
    ),
    "critic/value_mean": Metric(
        POLICY, "values and returns", "reward", "mean value of a token, before the updates", _CRITIC
    ),
    "critic/return_mean": Metric(
        POLICY, "values and returns", "reward", "mean return of a token, the target of the critic", _CRITIC
    ),
    "critic/explained_variance": Metric(
        POLICY,
        "explained variance",
        "fraction",
        "1 - variance of (return - value) / variance of the returns; 1 is a perfect critic",
        _CRITIC,
    ),
    **ROLLOUT_METRICS,
    "train/unused_rollouts": Metric(
        ROLLOUTS, "unused rollouts", "rollouts", "rollouts that are not trained on: filtered, or of dropped groups"
    ),
    "train/num_loss_tokens": Metric(
        ROLLOUTS, "tokens per step", "tokens", "tokens trained on in one epoch over the step's rollouts or examples"
    ),
    "train/num_tokens": Metric(ROLLOUTS, "tokens per step", "tokens", "tokens of the step's examples", _SFT),
    "train/mismatch_kl": Metric(
        MISMATCH, "mismatch KL", "nats per token", "KL divergence between sampler and policy for the same weights"
    ),
    "train/mismatch_kl_max": Metric(MISMATCH, "mismatch KL", "nats per token", "largest term of `train/mismatch_kl`"),
    "train/mismatch_max": Metric(
        MISMATCH,
        "largest mismatch",
        "nats",
        "largest \\|old_log_probs - sampler_log_probs\\| of a token; of the first minibatch with "
        "algorithm.old_log_probs=sampler",
    ),
    "train/mismatch_likely_max": Metric(
        MISMATCH,
        "largest mismatch",
        "nats",
        "the same over tokens with a probability above 1e-3, which `guard.max_mismatch` bounds",
    ),
    "train/mismatch_tokens": Metric(
        MISMATCH,
        "compared tokens",
        "tokens",
        "tokens of the present weights of which policy and engine were compared: of the rollouts, or of new samples "
        "with train.max_staleness",
    ),
    "train/correction_mean": Metric(
        MISMATCH, "correction", "factor", "mean factor that corrects the mismatch", _CORRECTION
    ),
    "train/masked_fraction": Metric(
        MISMATCH, "masked tokens", "fraction", "tokens that the correction masked", _CORRECTION
    ),
    "train/masked_positive_fraction": Metric(
        MISMATCH, "masked tokens", "fraction", "part of `train/masked_fraction` with a positive advantage", _CORRECTION
    ),
    "train/masked_negative_fraction": Metric(
        MISMATCH, "masked tokens", "fraction", "part of `train/masked_fraction` with a negative advantage", _CORRECTION
    ),
    "train/vetoed_fraction": Metric(
        MISMATCH, "masked tokens", "fraction", "tokens of rollouts that the veto excluded", _CORRECTION
    ),
    "train/unreplayed_fraction": Metric(
        MISMATCH,
        "unreplayed tokens",
        "fraction",
        "trained tokens without a routing record of the engine",
        "`algorithm.routing_replay`",
    ),
    "time/rollout_seconds": Metric(TIME, "phases", "seconds", "sampling"),
    "time/reward_seconds": Metric(TIME, "phases", "seconds", "scoring after the last completion"),
    "time/log_probs_seconds": Metric(
        TIME, "phases", "seconds", "log-probs of the policy before the update and of the reference"
    ),
    "time/critic_seconds": Metric(TIME, "phases", "seconds", "values and updates of the critic", _CRITIC),
    "time/train_seconds": Metric(TIME, "phases", "seconds", "forward, backward and optimizer"),
    "time/sync_seconds": Metric(
        TIME, "phases", "seconds", "weight sync from the policy to the engine, with its verification"
    ),
    "time/checkpoint_seconds": Metric(
        TIME,
        "evaluation and checkpoint",
        "seconds",
        "time for which saving a checkpoint stops the loop; with `checkpoint.asynchronous` mostly a copy",
    ),
    "time/checkpoint_wait_seconds": Metric(
        TIME,
        "evaluation and checkpoint",
        "seconds",
        "part of it in which a save waited until the checkpoint before was written; 0 if none had to wait",
    ),
    "time/evaluation_seconds": Metric(
        TIME, "evaluation and checkpoint", "seconds", "evaluation on held-out prompts", _EVALUATION
    ),
    "time/start_seconds": Metric(
        TIME, "engine rebuilds", "seconds", "engines that were built again after a failure", "in such a step"
    ),
    "time/step_seconds": Metric(TIME, "step", "seconds", "the whole step"),
    "throughput/tokens_per_second": Metric(
        THROUGHPUT, "tokens per second", "tokens / s", "prompt and completion tokens per second of the step"
    ),
    "throughput/update_flops": Metric(
        THROUGHPUT,
        "operations",
        "FLOP",
        "floating-point operations of the step's updates, forward and backward, without padding and recomputation",
    ),
    "throughput/train_flops_per_second": Metric(
        THROUGHPUT, "operations per second", "FLOP / s", "`throughput/update_flops` per second of training and rank"
    ),
    "throughput/train_mfu": Metric(
        THROUGHPUT, "MFU", "fraction", "operations of the updates / peak of all ranks during training", _KNOWN_GPU
    ),
    "throughput/mfu": Metric(
        THROUGHPUT,
        "MFU",
        "fraction",
        "operations of the updates / peak of all devices, with engine servers, during the whole step",
        _KNOWN_GPU,
    ),
    "train/bubble_fraction": Metric(
        THROUGHPUT,
        "pipeline bubble",
        "fraction",
        "idle part of a pipeline of the step's mean number of microbatches",
        "`parallel.pp` > 1, without `train.objective=sft`",
    ),
    "throughput/rollout_tokens_per_second": Metric(
        THROUGHPUT, "tokens per second", "tokens / s", "completion tokens per second of sampling"
    ),
    **ENGINE_METRICS,
    "train/padding_fraction": Metric(
        THROUGHPUT, "padding", "fraction", "tokens of padding of all rows, of all tokens of the rows"
    ),
    "train/imbalance": Metric(
        THROUGHPUT,
        "work of the busiest rank",
        "ratio",
        "estimated operations of the busiest data-parallel rank / mean of the ranks; 1 is an equal load",
    ),
    "sync/bytes": Metric(
        THROUGHPUT, "sync bytes", "bytes", "bytes written into the engine of rank 0, or sent to servers by rank 0"
    ),
    "sync/received_bytes": Metric(THROUGHPUT, "sync bytes", "bytes", "part of `sync/bytes` that came from other ranks"),
    "sync/verify_seconds": Metric(
        THROUGHPUT, "verification of the sync", "seconds", "part of the sync that its verification took"
    ),
    "sync/gb_per_second": Metric(THROUGHPUT, "sync rate", "GB / s", "`sync/bytes` / time of the sync"),
    "host/memory_bytes": Metric(MEMORY, "memory of rank 0", "bytes", "resident memory of the process of rank 0"),
    "memory/peak_*_bytes": Metric(
        MEMORY, "peak by phase", "bytes", "peak memory of rank 0 during one phase", "`observe.memory_peaks`"
    ),
    "memory/*": Metric(MEMORY, "state", "bytes", "memory of rank 0 for one part of the policy's or the critic's state"),
    **MACHINE_METRICS,
    "host/disk_free_fraction": Metric(
        HARDWARE, "free disk", "fraction", "free part of the file system of the run folder"
    ),
    "data/epoch": Metric(
        DATA, "epoch", "passes", "prompts of all steps so far / training prompts of all sets, without refills"
    ),
    "data/skipped_examples": Metric(
        DATA,
        "skipped and truncated examples",
        "examples",
        "examples left out of the training sets: they exceed the limit",
        _SFT,
    ),
    "data/truncated_examples": Metric(
        DATA,
        "skipped and truncated examples",
        "examples",
        "examples that lost their last tokens: they exceed the limit (`data.overlong=truncate`)",
        _SFT,
    ),
    "data/skipped_prompts": Metric(
        DATA, "skipped prompts", "prompts", "prompts left out of the training sets: they exceed the limit"
    ),
}
"""Name, or shell pattern, of a metric -> its row. Of several patterns that match, the first one counts."""


HISTOGRAMS: dict[str, tuple[str, str]] = {
    "reward/distribution": ("reward", "rewards of the step's rollouts"),
    "group/advantage_distribution": ("advantage", "advantages of the rollouts, the mean over tokens where they differ"),
    "rollout/length_distribution": ("tokens", "completion lengths"),
    "train/ratio_distribution": ("ratio", "probability ratios of the loss tokens of all updates"),
    "train/mismatch_distribution": ("nats", "old_log_probs - sampler_log_probs of the tokens that the policy sampled"),
}
"""Name of a TensorBoard histogram -> unit and meaning. Each exists in every step with rollouts and an update."""


@lru_cache(maxsize=4096)
def metric_of(name: str) -> Metric | None:
    """Return the row of a metric, or None for a name that is not in the table."""
    if name in METRICS:
        return METRICS[name]
    return next((METRICS[pattern] for pattern in METRICS if fnmatchcase(name, pattern)), None)


def require_known(metrics: Iterable[str]) -> None:
    """Check that every name is in `METRICS`.

    Raises:
        ValueError: a name is not in the table; the message has the nearest known name.
    """
    for name in metrics:
        if metric_of(name) is None:
            nearest = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"metric={name} is not in observe/metric_table.py; use {nearest}, or add a row to the table"
            )
