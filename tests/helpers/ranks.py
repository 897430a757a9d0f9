"""Real gloo ranks for tests: processes forked after the heavy imports, started once and used by all tests of a run.

pytest's own process never joins a process group and never imports Megatron. A failure on one rank, a rank that died or
a call that took too long ends all ranks; the next call starts new ones.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from tests.helpers.rank_processes import RankProcess, collect, end

MAX_RANKS = 8
_PRELOADED = [
    "torch.distributed.checkpoint",
    "grpo_mega.policy.policy",
    "grpo_mega.trainer.batch",
    "grpo_mega.checkpoint.manager",
    "grpo_mega.models.digest",
]


class RankPool:
    """`call(world, f, *args)` runs the module-level function `f(rank, *args)` on ranks 0 to world - 1 of a fresh
    default process group and returns what each returned."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds the stores through which the ranks of a call meet."""
        self._folder = folder
        self._ranks: list[RankProcess] = []
        self._num_calls = 0
        # spawned ranks would import torch and Megatron each: seconds and 300 MB apiece
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)

    @property
    def pids(self) -> list[int | None]:
        """Of the ranks that run now."""
        return [rank.process.pid for rank in self._ranks]

    def call(self, world: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120.0) -> list[Any]:
        """Results in the order of the ranks.

        Raises:
            AssertionError: a rank raised or died; holds every traceback that came, each with its rank.
            TimeoutError: names the ranks that did not answer.
        """
        assert 1 <= world <= MAX_RANKS, f"world={world}; the pool has up to {MAX_RANKS} ranks"
        while len(self._ranks) < world:
            self._ranks.append(self._start())
        self._num_calls += 1
        store = self._folder / f"store_{self._num_calls}"
        for rank, member in enumerate(self._ranks[:world]):
            member.connection.send((rank, world, str(store), function, args, timeout_seconds))
        heard = collect(self._ranks[:world], timeout_seconds)
        if heard.failures:
            self.close(kill=True)
            told = "\n".join(f"--- rank {rank} of {world}:\n{text}" for rank, text in sorted(heard.failures.items()))
            raise AssertionError(f"{function.__name__} failed (no answer from ranks {heard.silent}):\n{told}")
        if heard.silent:
            self.close(kill=True)
            raise TimeoutError(
                f"{function.__name__}: ranks {heard.silent} of {world} gave no answer in {timeout_seconds} s"
            )
        return [heard.results[rank] for rank in range(world)]

    def close(self, *, kill: bool = False) -> None:
        """End the ranks: they leave when their connection closes, or are killed."""
        end(self._ranks, kill=kill)
        self._ranks = []

    def _start(self) -> RankProcess:
        ours, theirs = self._context.Pipe()
        # not a daemon: Megatron writes checkpoints from processes of its own, which a daemon may not have
        process = self._context.Process(target=_serve, args=(theirs,))
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
            process.start()
        theirs.close()
        return RankProcess(process, ours)


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            rank, world, store, function, args, timeout_seconds = connection.recv()
        except EOFError:
            sys.stdout.flush()
            os._exit(0)  # torch and Megatron take long to unload, and nothing here needs it
        try:
            _join(rank, world, store, timeout_seconds)
            answer = False, function(rank, *args)
        except BaseException:  # whatever it is, the test shows it
            answer = True, traceback.format_exc()
        failed = answer[0]
        connection.send(answer)
        if not failed:  # a call that failed ends its processes
            _leave()


def _join(rank: int, world: int, store: str, timeout_seconds: float) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_seconds),
    )


def _leave() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.barrier()  # a rank that is done must not close connections while another still opens them
    # what a call built refers to itself in circles and keeps its process groups, with dozens of gloo threads each call
    gc.collect()
    # and, where experts keep a tensor of the last step, in circles through the graph of autograd, which gc cannot see
    built = sys.modules.get("megatron.core.distributed.distributed_data_parallel")  # a call may have built nothing
    for wrapper in [each for each in gc.get_objects() if built and type(each) is built.DistributedDataParallel]:
        vars(wrapper).clear()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()
