"""The cases of `grpo-mega chaos`: layouts, the process that gets a signal, the signal, and the moment.

A seed determines all cases. Asserted by tests/unit/cli/test_chaos.py.
"""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from typing import Literal

Victim = Literal["rank", "launcher", "engine process", "reward worker", "server"]

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)
_COMMON = (
    "data.prompts_per_step=8",
    "sampling.group_size=4",
    "train.minibatches_per_epoch=2",
    "data.eval=null",
    "train.steps=4",
    "checkpoint.every=1",
    "guard.timeout_seconds=120",
)


@dataclass(frozen=True)
class Scenario:
    """A layout with an engine: the overrides of the quickstart config, and the processes that may get a signal.

    `is_repeatable` is False if a run depends on the speed of its processes: then the use of prompts is counted, and
    nothing is compared.
    """

    name: str
    world_size: int
    overrides: tuple[str, ...]
    victims: tuple[Victim, ...]
    is_repeatable: bool = True

    @property
    def has_server(self) -> bool:
        """True if the engine is a server."""
        return "engine.placement=server" in self.overrides

    @property
    def arguments(self) -> tuple[str, ...]:
        """Overrides of the command."""
        return (*_COMMON, f"run.world_size={self.world_size}", *self.overrides)


_OF_VLLM: tuple[Victim, ...] = ("rank", "launcher", "reward worker")
SCENARIOS = (
    Scenario("DP2 vLLM", 2, (), _OF_VLLM),
    Scenario("TP2 vLLM", 2, ("parallel.tp=2", "engine.tp=2"), _OF_VLLM),
    Scenario("DP2 vLLM server", 2, ("engine.placement=server",), ("rank", "launcher", "server")),
    Scenario(
        "vLLM async server",
        1,
        (
            "engine.placement=server",
            "train.max_staleness=4",
            "train.slice_tokens=1",
            "algorithm.correction=token_truncated",
        ),
        ("rank", "launcher", "server"),
        is_repeatable=False,
    ),
    Scenario(
        "DP2 vLLM partial", 2, ("sampling.partial={oversubmit: 1.5, slice_tokens: 1, max_staleness: 8}",), _OF_VLLM
    ),
    Scenario("TP2 PP2 vLLM", 4, ("parallel.tp=2", "parallel.pp=2", "engine.tp=2"), _OF_VLLM),
    Scenario("TP2 SGLang", 2, ("parallel.tp=2", "engine.kind=sglang", "engine.tp=2"), (*_OF_VLLM, "engine process")),
)


@dataclass(frozen=True)
class ChaosCase:
    """One disturbed run.

    `number`: of the rank or process among those of its kind. `moment`: between the first moment at which the victim can
    exist (0) and the end of the undisturbed run (1).
    """

    index: int
    scenario: Scenario
    victim: Victim
    number: int
    signal: signal.Signals
    moment: float

    def __str__(self) -> str:
        number = f" {self.number}" if self.victim in ("rank", "engine process", "reward worker") else ""
        return f"{self.scenario.name}: {self.signal.name} to {self.victim}{number} at {self.moment:.2f}"


def draw_cases(number: int, seed: int, scenarios: tuple[Scenario, ...] = SCENARIOS) -> list[ChaosCase]:
    """Return `number` cases. Every victim of every scenario appears, if there are enough cases; the rest is random."""
    rng = random.Random(seed)
    pairs = [(scenario, victim) for scenario in scenarios for victim in scenario.victims]
    rng.shuffle(pairs)
    signals = [rng.sample(SIGNALS, len(SIGNALS)) for _ in pairs]
    cases = []
    for index in range(number):
        scenario, victim = pairs[index % len(pairs)]
        number_of_victim = rng.randrange(scenario.world_size)
        chosen = signals[index % len(pairs)][index // len(pairs) % len(SIGNALS)]
        cases.append(ChaosCase(index, scenario, victim, number_of_victim, chosen, rng.uniform(0.0, 0.95)))
    return cases
