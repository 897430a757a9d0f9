"""Real gloo ranks for tests: processes forked after the slow imports, started once and used by all tests of a run.

The process of pytest never joins a process group and never imports Megatron. If a rank fails or dies, or a call times
out, all ranks are ended; the next call starts new ones.
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
from typing import Any
from unittest import mock

from grpo_mega.parallel.loopback import open_store
from tests.helpers.rank_processes import RankProcess, collect_answers, end_ranks

MAX_RANKS = 8
_PRELOADED = [
    "torch.distributed.checkpoint",
    "grpo_mega.policy.policy",
    "grpo_mega.trainer.batch",
    "grpo_mega.checkpoint.manager",
    "grpo_mega.models.digest",
    "tests.helpers.frozen_imports",  # the last one
]


class RankPool:
    """A pool of ranks that run functions.

    `call(world, f, *args)` runs the module-level function `f(rank, *args)` on ranks 0 to world - 1 of a new default
    process group and returns the results.
    """

    def __init__(self) -> None:
        self._ranks: list[RankProcess] = []
        self._num_calls = 0
        # Ranks that wait for a file ask every 10 ms, in each of the dozens of groups of a layout.
        self._store = open_store("127.0.0.1", 0, timeout_seconds=60.0)
        # each spawned rank would import torch and Megatron: several seconds and 300 MB per rank
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)

    @property
    def pids(self) -> list[int | None]:
        """Process ids of the ranks that are running."""
        return [rank.process.pid for rank in self._ranks]

    def call(self, world: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120.0) -> list[Any]:
        """Run `function` and return the results in the order of the ranks.

        Raises:
            AssertionError: a rank raised or exited; the message has every traceback, with its rank.
            TimeoutError: names the ranks that did not answer.
        """
        assert 1 <= world <= MAX_RANKS, f"world={world}; the pool has up to {MAX_RANKS} ranks"
        while len(self._ranks) < world:
            self._ranks.append(self._start())
        self._num_calls += 1
        place = (self._store.port, f"call {self._num_calls}")
        for rank, member in enumerate(self._ranks[:world]):
            member.connection.send((rank, world, place, function, args, timeout_seconds))
        answers = collect_answers(self._ranks[:world], timeout_seconds)
        if answers.failures:
            self.close(kill=True)
            tracebacks = "\n".join(
                f"--- rank {rank} of {world}:\n{text}" for rank, text in sorted(answers.failures.items())
            )
            raise AssertionError(f"{function.__name__} failed (no answer from ranks {answers.silent}):\n{tracebacks}")
        if answers.silent:
            self.close(kill=True)
            raise TimeoutError(
                f"{function.__name__}: ranks {answers.silent} of {world} did not answer within {timeout_seconds} s"
            )
        return [answers.results[rank] for rank in range(world)]

    def close(self, *, kill: bool = False) -> None:
        """End the ranks: close their connections, or kill them."""
        end_ranks(self._ranks, kill=kill)
        self._ranks = []

    def _start(self) -> RankProcess:
        parent_end, child_end = self._context.Pipe()
        # not a daemon: Megatron writes checkpoints from child processes, which a daemon must not have
        process = self._context.Process(target=_serve, args=(child_end,))
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
            process.start()
        child_end.close()
        return RankProcess(process, parent_end)


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            rank, world, place, function, args, timeout_seconds = connection.recv()
        except EOFError:
            sys.stdout.flush()
            os._exit(0)  # skip the slow unloading of torch and Megatron
        try:
            _join(rank, world, place, timeout_seconds)
            answer = False, function(rank, *args)
        except BaseException:  # any error is reported to the test
            answer = True, traceback.format_exc()
        failed = answer[0]
        connection.send(answer)
        if not failed:  # after a failed call the processes are ended
            _leave()


def _join(rank: int, world: int, place: tuple[int, str], timeout_seconds: float) -> None:
    """Join a process group; `place` is the port of the pool's store, and the prefix of this call in it."""
    import torch.distributed as dist

    (port, prefix), timeout = place, timedelta(seconds=timeout_seconds)
    store = dist.PrefixStore(prefix, dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)


def _leave() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.barrier()  # a finished rank must not close connections while another rank opens them
    # reference cycles of the call's objects keep its process groups alive, with dozens of gloo threads per call
    gc.collect()
    # expert layers may keep a tensor of the last step: such cycles through the autograd graph are invisible to gc
    built = sys.modules.get("megatron.core.distributed.distributed_data_parallel")  # None if the call built no model
    for wrapper in [each for each in gc.get_objects() if built and type(each) is built.DistributedDataParallel]:
        vars(wrapper).clear()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()
