"""Measure what the memory phases of policy and engine add to a step of a job without CUDA.

    python tools/bench_phases.py configs/quickstart.yaml [section.key=value ...] [--rounds 3] [--json FILE]

One job makes its steps alternately with the phases ("on", as every run) and without them ("off": everything stays in
memory, and only the KV cache is released). Prints the median seconds of both, per round, and the seconds that are spent
inside the moves themselves in a step with phases, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from grpo_mega.trainer.build import BuiltJob

STEPS_PER_ROUND = 3
_EVERYTHING = ("params", "grads", "optimizer")


class Moves:
    """Counts the seconds inside offload and reload of learners and inside release and restore of engine weights."""

    def __init__(self) -> None:
        from grpo_mega.engines.vllm.host_storages import ReleasedStorages
        from grpo_mega.policy.learner import MegatronLearner

        self.seconds = 0.0
        self._owners = [(MegatronLearner, "offload"), (MegatronLearner, "reload")]
        self._owners += [(ReleasedStorages, "release"), (ReleasedStorages, "restore")]  # type: ignore[list-item]

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the calls inside the block."""

        def timed(original: Callable[..., None]) -> Callable[..., None]:
            def call(*args: Any) -> None:
                start = time.perf_counter()
                original(*args)
                self.seconds += time.perf_counter() - start

            return call

        with ExitStack() as stack:
            for owner, name in self._owners:
                stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
            yield

    @contextmanager
    def off(self, engine: Any) -> Iterator[None]:
        """Leave everything but the KV cache in memory inside the block."""
        with ExitStack() as stack:
            for owner, name in self._owners[:2]:
                stack.enter_context(mock.patch.object(owner, name))
            for name in ("release", "restore"):
                stack.enter_context(mock.patch.object(engine._weights, name))
            yield


def measure(built: BuiltJob, rounds: int) -> dict[str, Any]:
    """Make `rounds` rounds of alternating steps and return their seconds."""
    sys.path.insert(0, str(Path(__file__).parent / "step_sides"))
    from no_saves import NoSaves

    from grpo_mega.trainer.loop import push_weights, train

    job, state, moves = built.job, built.state, Moves()
    engine: Any = job.phases._started_engine
    job.observer.started(push_weights(job, state).policy_digest, None)

    def step() -> float:
        nonlocal state
        until = job.config.train.model_copy(update={"steps": state.step + 1})
        config = job.config.model_copy(update={"train": until})
        start = time.perf_counter()
        state = train(replace(job, config=config, saves=NoSaves()), state)
        return time.perf_counter() - start

    step()  # allocates the moments and warms up
    found = []
    for _ in range(rounds):
        seconds: dict[str, list[float]] = {"on": [], "off": []}
        moves.seconds = 0.0
        for i in range(2 * STEPS_PER_ROUND):
            if i % 2:
                built.policy.reload(*_EVERYTHING)  # type: ignore[arg-type]
                with moves.off(engine):
                    seconds["off"].append(step())
            else:
                with moves.counted():
                    seconds["on"].append(step())
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        in_moves = moves.seconds / STEPS_PER_ROUND
        found.append({**medians, "in_moves": in_moves, "share_of_step": in_moves / medians["off"]})
    return {"rounds": found, "state_bytes": built.policy.state_bytes()}


def main() -> None:
    """Run the measurement and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from grpo_mega.config.load import load_config, resolved
    from grpo_mega.observe.run_folder import open_run
    from grpo_mega.parallel.ports import free_port
    from grpo_mega.parallel.ranks import init_ranks
    from grpo_mega.parallel.stop_signal import StopRequests
    from grpo_mega.tiny_base.train import model_folder_of
    from grpo_mega.train import prepare
    from grpo_mega.trainer.build import building

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with tempfile.TemporaryDirectory(prefix="bench_phases_") as folder:
        run_dir = f"run.dir={folder}/run"
        config = load_config(arguments.config, [*arguments.overrides, run_dir, "train.steps=1000000"])
        prepared = prepare(config)
        ranks = init_ranks(prepared.topology, config.guard.timeout_seconds)
        run = open_run(Path(str(config.run.dir)), resolved(config), overwrite=False, train_steps=config.train.steps)
        model = model_folder_of(config)
        with building(config, ranks, run, model, prepared.train_prompts, None, StopRequests()) as built:
            found = measure(built, arguments.rounds)
    text = json.dumps(found, indent=2)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
