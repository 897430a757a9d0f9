"""Rows of the table of metrics (metric_table.py) for the inference engines."""

from __future__ import annotations

from grpo_mega.observe.metric_row import THROUGHPUT, TIME, Metric

_ALL = "every step without `train.objective=sft`"
_READ = "a step in which an engine was read; SGLang publishes its load every few batches"

ENGINE_METRICS: dict[str, Metric] = {
    "engine/running_requests_*": Metric(
        THROUGHPUT, "engine requests", "requests", "requests in an engine's batch, mean and largest reading", _READ
    ),
    "engine/waiting_requests_*": Metric(
        THROUGHPUT,
        "engine requests",
        "requests",
        "requests that wait for a place in an engine's batch, mean and largest reading",
        _READ,
    ),
    "engine/kv_cache_fraction_*": Metric(
        THROUGHPUT,
        "KV cache and prefix cache",
        "fraction",
        "used part of an engine's KV cache, mean and largest reading",
        _READ,
    ),
    "engine/prefix_hit_fraction": Metric(
        THROUGHPUT,
        "KV cache and prefix cache",
        "fraction",
        "prompt tokens whose keys and values were in the prefix cache",
        _ALL,
    ),
    "engine/preemptions": Metric(
        THROUGHPUT,
        "preemptions",
        "count",
        "how often a request lost its KV cache and was computed again; many: raise `engine.kv_cache_tokens`",
        _ALL,
    ),
    "engine/tokens_per_second/*": Metric(
        THROUGHPUT,
        "tokens per second of a replica",
        "tokens / s",
        "tokens that one replica sampled per second of its sampling",
        _ALL,
    ),
    "wait/policy_seconds": Metric(
        TIME, "waiting", "seconds", "time in which the policy waits for rollouts and rewards, mean of the ranks", _ALL
    ),
    "wait/engine_seconds": Metric(
        TIME,
        "waiting",
        "seconds",
        "time in which an engine does not sample, without evaluations: it waits for the policy, or for other replicas",
        _ALL,
    ),
}
