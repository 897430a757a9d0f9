"""Ranks for engine tests: clean processes that own an engine, so that vLLM never runs in the process of pytest."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.helpers.rank_processes import RankProcess, collect_answers, end_ranks

_ANSWER_SECONDS = 120.0
_OPEN_SECONDS = 400.0  # an engine with separate processes is imported three times


@dataclass
class RankSession:
    """State of a rank that its functions receive; `kept` lives as long as the rank."""

    rank: int
    engine: Any = None
    opened: tuple[Any, ...] | None = None
    kept: dict[str, Any] = field(default_factory=dict)


class EngineRanks:
    """A group of ranks. `call(f, *args)` runs the module-level function `f(session, *args)` on every rank.

    A call that fails on any rank ends all ranks, and the next call starts new ranks without an engine. Therefore one
    failure fails one test only, and a late answer is never returned by another call.
    """

    def __init__(self, world: int, folder: Path, prepare: Callable[[RankSession], None] | None = None) -> None:
        """Store the settings; `folder` is for rendezvous files, and `prepare` runs first on new ranks."""
        self._world, self._folder, self._prepare = world, folder, prepare
        self._context = multiprocessing.get_context("spawn")
        self._ranks: list[RankProcess] = []
        self._starts = 0

    def call(self, function: Callable[..., Any], *args: Any, timeout_seconds: float = _ANSWER_SECONDS) -> list[Any]:
        """Run a function on every rank and return the results in rank order.

        Raises:
            AssertionError: a rank raised or exited (with its traceback), or timed out.
        """
        if not self._ranks:
            self._start()
            if self._prepare is not None:
                self.call(self._prepare)
        for rank in self._ranks:
            rank.connection.send((function, args))
        answers = collect_answers(self._ranks, timeout_seconds)
        if answers.failures or answers.silent:
            self.close(kill=True)
            errors = "".join(f"\n--- rank {rank}:\n{text}" for rank, text in sorted(answers.failures.items()))
            raise AssertionError(f"{function.__name__} failed; no answer from ranks {answers.silent}{errors}")
        return [answers.results[rank] for rank in range(self._world)]

    def open(self, config_dir: Path, *, tp: int, kind: str = "vllm", **settings: Any) -> None:
        """Construct this engine on every rank, after closing another one; do nothing if it is already open."""
        self.call(_open, config_dir, kind, tp, settings, timeout_seconds=_OPEN_SECONDS)

    def close(self, *, kill: bool = False) -> None:
        """End the ranks."""
        end_ranks(self._ranks, kill=kill)
        self._ranks = []

    def _start(self) -> None:
        self._starts += 1
        store = str(self._folder / f"store_{self._starts}")
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
            for rank in range(self._world):
                parent_end, child_end = self._context.Pipe()
                process = self._context.Process(target=_serve, args=(child_end, rank, self._world, store), daemon=True)
                process.start()
                child_end.close()  # otherwise the connection stays open when a rank dies
                self._ranks.append(RankProcess(process, parent_end))


@contextmanager
def engine_ranks(
    world: int, folder: Path, prepare: Callable[[RankSession], None] | None = None
) -> Iterator[EngineRanks]:
    """Yield `world` gloo ranks with one thread each, and end them on exit."""
    ranks = EngineRanks(world, folder, prepare)
    try:
        yield ranks
    finally:
        ranks.close()


def _serve(connection: Connection, rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    session = RankSession(rank)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            os._exit(0)  # vLLM takes seconds to unload, and nothing here needs it
        try:
            answer = False, function(session, *args)
        except Exception:  # any error is reported by the test
            answer = True, traceback.format_exc()
        connection.send(answer)


def _open(session: RankSession, config_dir: Path, kind: str, tp: int, settings: dict[str, Any]) -> None:
    from grpo_mega.engines.sglang.arguments import SglangSettings
    from grpo_mega.engines.sglang.engine import SglangEngine
    from grpo_mega.engines.vllm.arguments import VllmSettings
    from grpo_mega.engines.vllm.engine import VllmEngine
    from tests.helpers.servers import open_servers

    wanted = (config_dir, kind, tp, *sorted(settings.items()))
    if session.opened != wanted:
        if session.engine is not None:
            session.engine.close()
        session.engine, session.opened = None, None
        if kind == "server":
            session.engine, session.kept["served"] = open_servers(config_dir, **settings)
        elif kind == "vllm":
            session.engine = VllmEngine(VllmSettings(config_dir, dtype="fp32", tp=tp, seed=0, **settings))
        else:
            session.engine = SglangEngine(SglangSettings(config_dir, dtype="fp32", tp=tp, seed=0, **settings))
        session.opened = wanted
