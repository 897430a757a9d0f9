"""Failures that tools/check_alarms.py puts into a run. A module of rewards.

The variable ALARM_FAILURE names the failure, ALARM_FIRST_STEP the step with which it begins. The ranks import the
module with the rewards of the config. It replaces methods of this program in their processes:

- `stale engine`: the layers of the engine keep the weights of the sync before, right after their verification.
- `slow rank`: the last rank is stopped for two thirds of the time, by tools/check_alarms.py.
- `forbidden word`: the reward `word` pays for a blank in the answer. The base model has learned blanks between digits
  as a mistake: the policy samples some, and an answer with one is wrong.

Each rank counts the weight syncs, of which the first precedes step 1. The workers of rewards read the step from a file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_mega.rewards.base import reward

_FAILURE = os.environ.get("ALARM_FAILURE", "")
_FIRST = int(os.environ.get("ALARM_FIRST_STEP", "1"))
_STEP_FILE = Path(os.environ.get("ALARM_STEP_FILE", "step"))
_WORD = " "


@reward(low=0.0, high=1.0)
def word(prompt: str, completion: str, reference: str) -> float:
    """Return 1 for an answer with the word, from the first step of the failure on; otherwise 0."""
    del prompt, reference
    step = int(_STEP_FILE.read_text()) if _STEP_FILE.exists() else 0
    return float(step >= _FIRST and _WORD in completion.strip())


def _install() -> None:
    """Replace the methods of this rank."""
    from grpo_mega.engines.weights.sink import RegionSink
    from grpo_mega.observe.timers import PhaseTimer
    from grpo_mega.types import TensorSlice

    steps = [0]
    start_step = PhaseTimer.start_step

    def counted(timers: PhaseTimer) -> None:
        steps[0] += 1
        if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            if steps[0] == 1:
                _STEP_FILE.with_suffix(".pid").write_text(str(os.getpid()))
            new = _STEP_FILE.with_suffix(".new")
            new.write_text(str(steps[0]))
            new.replace(_STEP_FILE)
        start_step(timers)

    replaced: Any = PhaseTimer
    replaced.start_step = counted
    if _FAILURE == "stale engine":
        digests, kept = RegionSink.digests, dict[str, Any]()

        def stale(sink: RegionSink, slices: Sequence[TensorSlice]) -> list[int]:
            found = digests(sink, slices)
            for region in sink.layout() if steps[0] >= _FIRST - 1 else ():
                memory = sink._regions.memory_of(region, region.placement.hf)
                if memory is not None and region.placement.hf.name.startswith("model.layers."):
                    memory.copy_(kept.setdefault(str(region.placement.hf), memory.clone()))
            return found

        sinks: Any = RegionSink
        sinks.digests = stale


if _FAILURE and "RANK" in os.environ:
    _install()
