"""Ranks for engine tests: clean processes that hold an engine, so that vLLM never lives in pytest's own process."""

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

_ANSWER_SECONDS = 120.0


@dataclass
class RankSession:
    """What a function sees on its rank; `kept` lives as long as the rank."""

    rank: int
    engine: Any = None
    opened: tuple[Any, ...] | None = None
    kept: dict[str, Any] = field(default_factory=dict)


class EngineRanks:
    """A world of ranks. `call(f, *args)` runs the module-level function `f(session, *args)` on every rank."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for connection in self._connections:
            connection.send((function, args))
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(_ANSWER_SECONDS):
                raise TimeoutError(f"rank {rank} did not answer {function.__name__} in {_ANSWER_SECONDS} s")
            answers.append(connection.recv())
        for rank, (failed, answer) in enumerate(answers):
            if failed:
                raise AssertionError(f"{function.__name__} failed on rank {rank}:\n{answer}")
        return [answer for _, answer in answers]

    def open(self, config_dir: Path, *, tp: int, **settings: Any) -> None:
        """Have this engine open on every rank: nothing to do if it is, else the present one is closed first."""
        self.call(_open, config_dir, tp, settings)


@contextmanager
def engine_ranks(world: int, folder: Path) -> Iterator[EngineRanks]:
    """`world` gloo ranks with one thread each, ended on exit."""
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world, str(folder / "store")), daemon=True)
            process.start()
            connections.append(ours)
            processes.append(process)
    try:
        yield EngineRanks(connections)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


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
        except Exception:  # whatever it is, the test shows it
            answer = True, traceback.format_exc()
        connection.send(answer)


def _open(session: RankSession, config_dir: Path, tp: int, settings: dict[str, Any]) -> None:
    from grpo_mega.engines.vllm_engine import VllmEngine

    wanted = (config_dir, tp, *sorted(settings.items()))
    if session.opened != wanted:
        if session.engine is not None:
            session.engine.close()
        session.engine, session.opened = None, None
        session.engine = VllmEngine(config_dir, dtype="fp32", tp=tp, seed=0, **settings)
        session.opened = wanted
