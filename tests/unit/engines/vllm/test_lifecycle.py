"""vLLM takes LOCAL_RANK as the index of its device, also where each task of a machine sees only its own GPU."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch

from grpo_mega.engines.pass_through import installed_fields
from grpo_mega.engines.vllm.arguments import VllmSettings
from grpo_mega.engines.vllm.lifecycle import environment_of_ranks
from tests.helpers.one_process import run


def ranks_that_vllm_reads(local_rank: str | None, device: int | None) -> tuple[int, int, str | None]:
    """Return (rank, index of the device) as vLLM's executor reads them, and LOCAL_RANK afterwards.

    Args:
        local_rank: LOCAL_RANK of the task.
        device: index of the current device; None: no CUDA.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    environment = {"RANK": "5"} | ({} if local_rank is None else {"LOCAL_RANK": local_rank})
    settings = VllmSettings(Path(), "bf16", 1, 96, 8, None, 0)
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(torch.cuda, "is_available", return_value=device is not None),
        mock.patch.object(torch.cuda, "current_device", return_value=device),
    ):
        if local_rank is None:
            os.environ.pop("LOCAL_RANK", None)
        with environment_of_ranks(settings):
            _, rank, index = ExecutorWithExternalLauncher._distributed_args(mock.Mock())
        return rank, index, os.environ.get("LOCAL_RANK")


@pytest.mark.parametrize(
    ("local_rank", "device", "index"),
    [
        ("3", 0, 0),  # Slurm's --gpus-per-task=1: the task sees one device
        ("3", 3, 3),
        (None, 2, 2),
        ("3", None, 3),
        (None, None, 0),
    ],
)
def test_vllm_gets_the_index_of_the_current_device(
    recorder: ProcessPoolExecutor, local_rank: str | None, device: int | None, index: int
) -> None:
    if installed_fields("vllm") is None:
        pytest.skip("vLLM is not installed here")
    assert run(recorder, ranks_that_vllm_reads, local_rank, device) == (5, index, local_rank)
