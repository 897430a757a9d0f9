"""Transports between GPUs: CUDA IPC, which runs on one GPU, and NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tools.gpu_checks.exchange import exchange_on_two_ranks

pytestmark = pytest.mark.timeout(600)


def on_rank(rank: int, kind: str, gpus: int, store: str, folder: str) -> None:
    torch.cuda.set_device(rank % gpus)
    backend = "cpu:gloo,cuda:nccl" if kind == "nccl" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    wrong = exchange_on_two_ranks(rank, kind)
    Path(folder, f"rank_{rank}").write_text("\n".join(wrong))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "gpus"),
    [
        pytest.param("cuda_ipc", 1, marks=pytest.mark.gpu(1)),  # NCCL rejects a GPU that appears twice
        pytest.param("cuda_ipc", 2, marks=pytest.mark.gpu(2)),
        pytest.param("nccl", 2, marks=pytest.mark.gpu(2)),
    ],
)
def test_every_byte_of_every_round_arrives(tmp_path: Path, kind: str, gpus: int) -> None:
    mp.spawn(on_rank, (kind, gpus, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    assert [(tmp_path / f"rank_{rank}").read_text() for rank in (0, 1)] == ["", ""]
