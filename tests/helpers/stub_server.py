"""Engine servers without an engine: the real listener, commands and weight sync, with weights in plain memory.

A file `fault` in the server's folder names a fault and when it occurs: `die in sampling`, `stop in a sync`, ...
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.engines.server.claim import inspect_server
from grpo_mega.engines.server.messages import ServingFacts
from grpo_mega.engines.server.protocol import named_servers
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.types import Completion, Prompt, SamplingRequest, TensorSlice
from tests.helpers.memory_ends import MemorySink, values
from tests.helpers.weight_layouts import EngineLayout, engine

FACTS = ServingFacts(
    program_version="0",
    model_digest="0123456789abcdef",
    tokenizer_digest="0",
    dtype="bf16",
    engine_kind="vllm",
    tp=1,
    ep=1,
    fp8=None,
    max_num_seqs=8,
    engine_args="{}",
    kv_cache_tokens=None,
    max_model_len=64,
    routing_replay=False,
)
TOKEN = b"the secret of these tests"


class FaultySink(MemorySink):
    """A sink whose updates can fail."""

    def __init__(self, tp: int, rank: int, inject: Callable[[str], None]) -> None:
        super().__init__(engine(EngineLayout(tp), tp), rank)
        self._inject_fault = inject

    def write(self, hf: TensorSlice, values: Tensor) -> None:
        self._inject_fault("in a sync")
        super().write(hf, values)

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        return None  # so that `write` is called for everything

    def digests(self, slices: Sequence[TensorSlice]) -> list[int]:
        self._inject_fault("in verification")
        return super().digests(slices)


class StubEngine:
    """An engine that returns the seed as token, and as text the number of slices of another policy version."""

    def __init__(self, tp: int, rank: int, folder: Path) -> None:
        self.sink = FaultySink(tp, rank, self._inject_fault)
        self.steps = 0
        self._fault = folder / "fault"

    @property
    def policy_version(self) -> int:
        return self.sink.policy_version

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None],
    ) -> None:
        version = self.policy_version
        wrong = sum(not torch.equal(m, values(hf.name, version)[hf.index]) for hf, m in self.sink.memory.items())
        for position, prompt in enumerate(prompts):
            for member in range(sampling.group_size):
                self.steps += 1
                ids = (*prompt.token_ids, sampling.seed)
                completion = Completion(ids, (-0.1,) * len(ids), "eos", version, f"{wrong} of {len(self.sink.memory)}")
                on_completion(position, member, completion)
                self._inject_fault("in sampling")

    def take_gauges(self) -> EngineGauges:
        return EngineGauges(readings=self.steps)

    def _inject_fault(self, where: str) -> None:
        what = self._fault.read_text() if self._fault.exists() else ""
        if what == f"die {where}":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == f"stop {where}":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == f"make no step {where}":
            time.sleep(600)
        elif what == f"delay {where}":
            time.sleep(1.0)
        elif what == f"fail {where}":
            raise RuntimeError("no more memory")


@dataclass
class StubServer:
    """A server and its ranks. `folder` holds the file `fault`."""

    folder: Path
    processes: list[ForkServerProcess] = field(default_factory=list)

    @property
    def url(self) -> str:
        end = time.monotonic() + 30
        while not (self.folder / "url").exists():
            assert time.monotonic() < end, "the server did not start to listen"
            time.sleep(0.02)
        return (self.folder / "url").read_text()

    def fault(self, what: str) -> None:
        """Inject this fault from now on; empty: none."""
        (self.folder / "fault").write_text(what)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)


@contextmanager
def stub_server(folder: Path, tp: int = 1) -> Iterator[StubServer]:
    """Start a server of `tp` ranks; kill it on exit."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    server = StubServer(folder)
    for rank in range(tp):
        server.processes.append(context.Process(target=_serve, args=(folder, tp, rank), daemon=True))
        server.processes[-1].start()
    try:
        (named,) = named_servers("server", [server.url])
        inspect_server(named, TOKEN)  # tests have short limits for a server that has started
        yield server
    finally:
        server.kill()


def _serve(folder: Path, tp: int, rank: int) -> None:
    from grpo_mega.engines.replica_broadcast import ReplicaBroadcast
    from grpo_mega.engines.server.listener import ServerListener
    from grpo_mega.serve import Server

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=tp)
    ranks, listener = ReplicaBroadcast(tp, 20.0), None
    engine: Any = StubEngine(tp, rank, folder)
    if rank == 0:
        bound = socket.create_server(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        listener = ServerListener(bound, TOKEN, msgspec.structs.replace(FACTS, tp=tp), lambda: engine.steps)
        listener.open()
        (folder / "url.tmp").write_text(f"127.0.0.1:{port}")
        (folder / "url.tmp").rename(folder / "url")
    Server(engine, ranks, listener).run()
