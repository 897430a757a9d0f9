"""Engine servers started as a user does, and a client that holds whole tensors instead of a policy."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch.distributed as dist
import yaml
from torch import Tensor

from grpo_mega.interfaces import HeldSlice
from grpo_mega.types import TensorSlice
from tests.helpers.jobs import REPOSITORY, clean_environment, kill_with_children

if TYPE_CHECKING:
    from grpo_mega.engines.server.engine import ServerEngine
    from grpo_mega.weight_sync.sync import WeightSync


@dataclass(frozen=True)
class RunningServer:
    """A running server, its address and its log."""

    process: psutil.Popen
    url: str
    log: Path


@contextmanager
def serving(
    arguments: Sequence[str],
    output: Path,
    seconds: float = 120.0,
    module: str = "grpo_mega.serve",
    env: Mapping[str, str] | None = None,
) -> Iterator[RunningServer]:
    """Run `python -m MODULE ARGUMENTS` and wait until it listens; end it on exit."""
    out, err = output.with_suffix(".out"), output.with_suffix(".err")
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = psutil.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            env={**clean_environment(), "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + seconds
        while not (printed := out.read_text()).endswith("\n"):
            assert process.poll() is None, err.read_text()
            assert time.monotonic() < end, f"the server did not listen within {seconds} s: {err.read_text()}"
            time.sleep(0.1)
        yield RunningServer(process, printed.strip().removeprefix("listening at "), err)
    finally:
        kill_with_children(process)


def write_config(path: Path, model: Path, *, max_model_len: int, max_num_seqs: int, tp: int = 1) -> Path:
    """Write a config of this model with the settings that servers read."""
    values = {
        "model": {"path": str(model)},
        "engine": {"max_num_seqs": max_num_seqs, "tp": tp},
        "sampling": {"max_tokens": 8},
        "data": {"train": "arithmetic:train", "max_prompt_tokens": max_model_len - 8},
        "reward": {"terms": [{"name": "exact"}]},
        "train": {"steps": 1},
        "precision": {"dtype": "fp32"},
        "guard": {"timeout_seconds": 60.0},
    }
    path.write_text(yaml.safe_dump(values))
    return path


class WholeTensors:
    """`WeightSource` of one rank that holds all tensors of a checkpoint."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.tensors: dict[str, Tensor] = {}

    def shards(self) -> list[HeldSlice]:
        return [
            HeldSlice(TensorSlice(name, (0,) * len(shape), shape), shape, self.tensors[name])
            for name, shape in self._shapes.items()
        ]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes


class ServerWeightSync:
    """The job's side of the weight sync with one server; created at the first push."""

    def __init__(self, engine: ServerEngine) -> None:
        self._engine = engine
        self._sync: WeightSync | None = None

    @property
    def transfers(self) -> list[int]:
        """Return the size of each transfer, bytes."""
        assert self._sync is not None, "push first"
        return [int(size) for size in self._sync.plan.transfer_bytes]

    def push(self, tensors: dict[str, Tensor], version: int) -> None:
        from grpo_mega.weight_sync.sync import SyncSettings, WeightSync

        if self._sync is None:
            self._source = WholeTensors({name: tuple(tensor.shape) for name, tensor in tensors.items()})
            self._source.tensors = tensors
            peers = self._engine.sync_peers(self._source.hf_shapes(), "the test", bucket_bytes=65536, transport="auto")
            group = dist.group.WORLD
            assert group is not None
            self._sync = WeightSync(
                self._source,
                lambda bucket_bytes: iter(()),
                self._engine.sink,
                source_group=group,
                replicas=peers.replicas,
                replica_group=group,
                settings=SyncSettings(65536, 60.0),
                where="the test",
                world=peers.group,
                announce=peers.announce,
            )
        self._source.tensors = tensors
        self._sync.push(version, verify=True)


def open_servers(config_dir: Path, *, urls: tuple[str, ...], config: Path) -> tuple[ServerEngine, ServerWeightSync]:
    """Open the servers at `urls`, which were started with `config`. Return the engine and its weight sync."""
    from grpo_mega.config.load import load_config
    from grpo_mega.engines.factory import make_engine
    from grpo_mega.engines.server.engine import ServerEngine

    engine = make_engine(load_config(config, ["engine.placement=server", f"engine.urls={list(urls)}"]), config_dir)
    assert isinstance(engine, ServerEngine)
    return engine, ServerWeightSync(engine)
