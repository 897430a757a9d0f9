"""Rows of the table of metrics (metric_table.py) for rollouts, groups and training sets."""

from __future__ import annotations

from grpo_mega.observe.metric_row import DATA, LEARNING, ROLLOUTS, Metric

_SETS = "a step with rollouts of the set, with several training sets"
_ASYNC = "with `train.max_staleness`"
_PARTIAL = "with `sampling.partial` or `train.max_staleness`"
_ENVIRONMENT = "every step; 0 without an environment"

ROLLOUT_METRICS: dict[str, Metric] = {
    "rollout/length_mean": Metric(ROLLOUTS, "length", "tokens", "mean completion length"),
    "rollout/length_max": Metric(ROLLOUTS, "length", "tokens", "longest completion"),
    "rollout/length_p*": Metric(
        ROLLOUTS, "length", "tokens", "10th, 50th and 90th percentile of the completion lengths"
    ),
    "rollout/repeated_ngram_fraction": Metric(
        ROLLOUTS,
        "repetition and language drift",
        "fraction",
        "4-grams of tokens that occurred earlier in the same completion",
    ),
    "rollout/other_script_fraction": Metric(
        ROLLOUTS,
        "repetition and language drift",
        "fraction",
        "letters of completions in a script, such as Han, that the prompt does not use",
    ),
    "rollout/prompt_length_mean": Metric(ROLLOUTS, "length", "tokens", "mean prompt length"),
    "rollout/truncated_fraction": Metric(
        ROLLOUTS, "truncated", "fraction", "completions that were truncated at `sampling.max_tokens`"
    ),
    "rollout/tokens": Metric(ROLLOUTS, "tokens per step", "tokens", "completion tokens of the step, all replicas"),
    "rollout/turns_mean": Metric(
        ROLLOUTS, "turns", "turns", "mean answers of the policy per rollout; 1 without an environment"
    ),
    "rollout/environment_failures": Metric(
        ROLLOUTS,
        "errors of environments",
        "count",
        "environments that timed out, crashed or raised; each ends its rollout",
        _ENVIRONMENT,
    ),
    "rollout/tool_errors": Metric(
        ROLLOUTS,
        "errors of environments",
        "count",
        "results of the environment that report an error to the policy",
        _ENVIRONMENT,
    ),
    "rollout/result_tokens": Metric(
        ROLLOUTS, "tokens per step", "tokens", "part of `rollout/tokens` that the environment wrote", _ENVIRONMENT
    ),
    "rollout/last_answers_fraction": Metric(
        ROLLOUTS,
        "waiting for the longest answers",
        "fraction",
        "part of the sampling time in which at most a tenth of a rank's rollouts were left, all ranks",
    ),
    "rollout/staleness_mean": Metric(
        ROLLOUTS,
        "staleness",
        "updates",
        "updates between the weights that sampled a token and those of the step, mean over trained tokens",
        _PARTIAL,
    ),
    "rollout/staleness_max": Metric(ROLLOUTS, "staleness", "updates", "the same for the oldest token", _PARTIAL),
    "rollout/carried_fraction": Metric(
        ROLLOUTS, "carried tokens", "fraction", "trained tokens that weights of earlier steps sampled", _PARTIAL
    ),
    "rollout/dropped_groups": Metric(
        ROLLOUTS,
        "carried groups",
        "groups",
        "groups that were dropped at the start of the step because of their age; their prompts are sampled again",
        _PARTIAL,
    ),
    "rollout/carried_groups": Metric(
        ROLLOUTS, "carried groups", "groups", "groups that are carried into the next step", _PARTIAL
    ),
    "rollout/carried_tokens": Metric(
        ROLLOUTS, "tokens per step", "tokens", "tokens of the groups that are carried into the next step", _PARTIAL
    ),
    "rollout/ready_groups": Metric(
        ROLLOUTS,
        "carried groups",
        "groups",
        "complete and scored groups in the buffer when the step took its groups: the depth of the queue",
        _ASYNC,
    ),
    "rollout/policy_wait_seconds": Metric(
        ROLLOUTS,
        "waits of policy and servers",
        "seconds",
        "time since the step before in which the policy waited for groups or for a pause of sampling, longest rank",
        _ASYNC,
    ),
    "rollout/sampler_wait_seconds": Metric(
        ROLLOUTS,
        "waits of policy and servers",
        "seconds",
        "time since the step before in which a server had nothing to sample or was paused, longest server",
        _ASYNC,
    ),
    "rollout/tokens_per_replica/*": Metric(
        ROLLOUTS, "tokens per replica", "tokens", "completion tokens that one replica sampled"
    ),
    "group/degenerate_fraction": Metric(
        ROLLOUTS,
        "degenerate groups",
        "fraction",
        "sampled groups whose rewards are equal up to rounding: no training signal",
    ),
    "group/all_right_fraction": Metric(
        ROLLOUTS, "degenerate groups", "fraction", "groups in which every rollout with a reward is right"
    ),
    "group/all_wrong_fraction": Metric(
        ROLLOUTS, "degenerate groups", "fraction", "groups in which no rollout with a reward is right"
    ),
    "group/reward_std": Metric(
        ROLLOUTS, "deviation in a group", "reward", "standard deviation of the rewards of a group, mean over groups"
    ),
    "group/advantage_std": Metric(
        ROLLOUTS, "advantages", "advantage", "standard deviation of the advantages over all rollouts of the step"
    ),
    "group/advantage_max": Metric(ROLLOUTS, "advantages", "advantage", "largest absolute advantage of a rollout"),
    "group/pass_at_*": Metric(
        LEARNING,
        "pass@k of training groups",
        "fraction",
        "probability that at least one of k rollouts of a prompt is right, for k = 1, 2, 4, ... (unbiased)",
    ),
    "group/discarded": Metric(
        ROLLOUTS,
        "discarded groups",
        "groups",
        "degenerate groups that were replaced by others; no other metric counts them",
    ),
    "set/*/rollouts": Metric(DATA, "rollouts per set", "rollouts", "rollouts of one training set", _SETS),
    "set/*/reward_mean": Metric(DATA, "reward per set", "reward", "mean reward of one training set", _SETS),
    "set/*/accuracy": Metric(
        DATA, "accuracy per set", "fraction", "rollouts of one training set with the correct answer", _SETS
    ),
    "set/*/length_mean": Metric(DATA, "length per set", "tokens", "mean completion length of one training set", _SETS),
    "set/*/failed_fraction": Metric(
        DATA, "rewards that failed per set", "fraction", "rollouts of one training set with a reward that failed", _SETS
    ),
    "set/*/reward_p*": Metric(
        DATA, "reward per set", "reward", "10th, 50th and 90th percentile of the rewards of one training set", _SETS
    ),
    "set/*/length_p*": Metric(
        DATA, "length per set", "tokens", "10th, 50th and 90th percentile of one training set", _SETS
    ),
}
