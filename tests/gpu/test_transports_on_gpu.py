"""Two processes on one GPU, which NCCL refuses: buckets go through memory that both have mapped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.helpers.exchange import exchange

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(600)]


def on_rank(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.cuda.set_device(0)
    wrong = exchange(rank, "cuda_ipc")
    Path(folder, f"rank_{rank}").write_text("\n".join(wrong))
    dist.destroy_process_group()


def test_every_byte_of_every_turn_arrives_by_cuda_ipc(tmp_path: Path) -> None:
    mp.spawn(on_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    assert [(tmp_path / f"rank_{rank}").read_text() for rank in (0, 1)] == ["", ""]
