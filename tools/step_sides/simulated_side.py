"""A training job of tools/bench_simulator.py, which makes a step or measures its engine per command.

A step is that of `our_side.py`. Calls of the engine are timed, and described by what their time depends on: rollouts,
decode steps, tokens, and the tokens that each of them reads from the cache.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from our_side import OurSide, built_job, config_of
from protocol import Channel

from grpo_mega.config.schema import Config
from grpo_mega.trainer import build
from grpo_mega.trainer.engine_rebuilds import RebuildableEngine
from grpo_mega.types import Completion, Prompt, SamplingRequest

SIZES, LIMITS, CONTEXTS = (1, 4, 16, 48, 96, 144, 192), (8, 64, 192), (0, 60, 150)
NUM_SLICES = 3


class TimedEngine(RebuildableEngine):
    """Engine that describes each of its calls in `calls`."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__(make)
        self.calls: list[dict[str, float]] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample; see `Engine.generate`."""
        start = time.process_time()
        found = super().generate(prompts, sampling, on_completion)
        seconds = time.process_time() - start
        lengths = np.array([[len(each.token_ids) for each in row] for row in found], dtype=np.float64)
        contexts = np.array([len(prompt.token_ids) for prompt in prompts], dtype=np.float64)[:, None]
        self.calls.append(
            {
                "cpu_seconds": seconds,
                "rollouts": lengths.size,
                "steps": lengths.max(initial=0),
                "tokens": lengths.sum(),
                "cached": float((contexts * lengths + lengths * (lengths - 1) / 2).sum()),
                "recomputed": 0.0,
            }
        )
        return found


class SimulatedSide(OurSide):
    """A built job with a timed engine."""

    def __init__(self, built: Any, prompts: Sequence[Prompt], engine: TimedEngine) -> None:
        super().__init__(built, prompts)
        self.engine = engine

    def step(self) -> dict[str, Any]:
        """Make a step; return its seconds, those of the engine, and the lengths of its groups."""
        self.engine.calls.clear()
        made = self.whole()
        size = self.job.config.sampling.group_size
        lengths = [len(ids) for ids in made["completions"]]
        return {
            "seconds": made["seconds"],
            "cpu_seconds": made["cpu_seconds"],
            "engine_cpu_seconds": sum(call["cpu_seconds"] for call in self.engine.calls),
            "rollout_seconds": made["phases"]["rollout"],
            "groups": [lengths[i : i + size] for i in range(0, len(lengths), size)],
            "calls": len(self.engine.calls),
        }

    def calibrate(self, seed: int) -> dict[str, Any]:
        """Sample random prompts in batches of many sizes and limits; return the descriptions of the calls."""
        rng = random.Random(seed)
        vocabulary = [token for prompt in self.prompts for token in prompt.token_ids]
        self.engine.calls.clear()
        with self.job.phases.sampling():
            for size in SIZES:
                for limit in LIMITS:
                    self._call([self._prompt(rng, vocabulary, 0) for _ in range(size)], limit, rng.random())
                for context in CONTEXTS:  # slices, of which the first computes the tokens so far
                    prompts = [self._prompt(rng, vocabulary, context) for _ in range(size)]
                    for i in range(NUM_SLICES):
                        found = self._call(prompts, 16, rng.random(), continues=i > 0)
                        self.engine.calls[-1]["recomputed"] = 0.0 if i else float(context * size)
                        prompts = [
                            replace(prompt, token_ids=(*prompt.token_ids, *row[0].token_ids))
                            for prompt, row in zip(prompts, found, strict=True)
                        ]
        return {"calls": list(self.engine.calls)}

    def _call(
        self, prompts: list[Prompt], limit: int, seed: float, *, continues: bool = False
    ) -> list[list[Completion]]:
        each = tuple(limit for _ in prompts)
        request = SamplingRequest(1, 1.0, limit, int(seed * 2**31), max_tokens_each=each, continues=continues)
        return self.engine.generate(prompts, request)

    def _prompt(self, rng: random.Random, vocabulary: list[int], context: int) -> Prompt:
        known = self.prompts[rng.randrange(len(self.prompts))]
        prompt: Prompt = replace(known, token_ids=(*known.token_ids, *rng.choices(vocabulary, k=context)))
        return prompt


def main() -> None:
    """Execute commands until the parent closes the stream."""
    channel, settings = Channel(), json.loads(sys.argv[1])
    engines: list[TimedEngine] = []

    def timed(make: Callable[[], Any]) -> TimedEngine:
        engines.append(TimedEngine(make))
        return engines[-1]

    build.RebuildableEngine = timed  # type: ignore[assignment,attr-defined]
    config = config_of(settings)
    raw = config.model_dump(mode="json")
    raw["sampling"]["partial"] = settings["partial"]
    raw["optimizer"] |= {"lr": 1e-9, "min_lr": 0.0}  # lengths do not change
    with built_job(settings, Config.model_validate(raw)) as (built, prompts):
        side = SimulatedSide(built, prompts, engines[0])
        channel.send({"threads": settings["threads"]})
        while (command := channel.receive()) is not None:
            channel.send(side.calibrate(command["seed"]) if command["name"] == "calibrate" else side.step())


if __name__ == "__main__":
    main()
