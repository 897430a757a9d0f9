"""Checks of converted checkpoints: equal tensors, logits of transformers, and Megatron's own loader and saver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.jobs import REPOSITORY
from tests.helpers.stock_megatron import token_ids

VOCAB = 21  # odd: under tp=2 it is padded


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("model*.safetensors")) for k, v in load_file(file).items()}


def assert_same_tensors(found: Path, wanted: Path) -> None:
    left, right = read_tensors(found), read_tensors(wanted)
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype, name
        assert torch.equal(left[name].view(torch.uint8), tensor.view(torch.uint8)), name


def run_stock(action: str, config: Path, checkpoint: Path, out: Path, tp: int, pp: int, ep: int = 1) -> Tensor:
    command = [sys.executable, str(REPOSITORY / "tests/helpers/stock_megatron.py"), action]
    command += [str(config), str(checkpoint), str(out), str(tp), str(pp), str(ep)]
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"}
    ended = subprocess.run(
        command, cwd=out.parent, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    logits: Tensor = torch.load(out)
    return logits


def hf_logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: Tensor = model(token_ids(VOCAB)).logits
    return logits
