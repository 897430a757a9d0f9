"""Gauges of an inference engine: its load, its KV cache, its prefix cache, and preemptions.

Imports no other module of this program, so that the processes of every engine can use it.
Asserted by tests/unit/observe/test_engine_metrics.py and tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineGauges:
    """Sums and maxima over the readings of one engine, and over the requests that it completed.

    vLLM is read after each of its engine steps; SGLang's scheduler publishes its load every few batches.

    Attributes:
        readings: number of readings.
        running, waiting: requests, summed over the readings.
        kv_cache: used fraction of the KV cache, summed over the readings.
        most_running, most_waiting, most_kv_cache: largest readings.
        prompt_tokens: of the completed requests.
        cached_tokens: part of `prompt_tokens` whose keys and values were in the prefix cache.
        completion_tokens: of the completed requests.
        preemptions: how often a completed request had lost its KV cache and was computed again.
    """

    readings: int = 0
    running: int = 0
    waiting: int = 0
    kv_cache: float = 0.0
    most_running: int = 0
    most_waiting: int = 0
    most_kv_cache: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    preemptions: int = 0

    def add_reading(self, running: int, waiting: int, kv_cache: float) -> None:
        """Add the requests that run and wait, and the used fraction of the KV cache."""
        self.readings += 1
        self.running += running
        self.waiting += waiting
        self.kv_cache += kv_cache
        self.most_running = max(self.most_running, running)
        self.most_waiting = max(self.most_waiting, waiting)
        self.most_kv_cache = max(self.most_kv_cache, kv_cache)

    def add_request(self, *, prompt_tokens: int, cached_tokens: int, completion_tokens: int, preemptions: int) -> None:
        """Add a completed request."""
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.completion_tokens += completion_tokens
        self.preemptions += preemptions

    def add(self, other: EngineGauges) -> None:
        """Add the sums of other readings, and keep the larger maxima."""
        self.readings += other.readings
        self.running += other.running
        self.waiting += other.waiting
        self.kv_cache += other.kv_cache
        self.most_running = max(self.most_running, other.most_running)
        self.most_waiting = max(self.most_waiting, other.most_waiting)
        self.most_kv_cache = max(self.most_kv_cache, other.most_kv_cache)
        self.add_request(
            prompt_tokens=other.prompt_tokens,
            cached_tokens=other.cached_tokens,
            completion_tokens=other.completion_tokens,
            preemptions=other.preemptions,
        )
