"""Commands that run inside SGLang's scheduler processes, one process per tensor-parallel rank.

SGLang calls `serve` as a custom weight loader (srt/model_executor/model_runner_components/weight_updater.py). It is the
only interface to those processes that receives the model. An exception there would end the whole engine, so results and
errors go to a file, which sglang/engine_process.py reads.
- `share`: records the model's own loader and starts the weight server (sglang/weight_server.py), through which the
  training rank writes slices to where SGLang's kernels read, and receives digests of the present values.
- `finish_update`: checks, once the weights are complete, that the parameters have not moved.
- `load`: gives whole tensors to the model's own loader, if the loader could not be recorded.
- `seed`: seeds the random generators that sampling reads.
Asserted by tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grpo_mega.engines.sglang.weight_server import WeightServer, WeightServerAddress
from grpo_mega.engines.weights.loader_recording import CannotRecordError, LoaderRecord, UnfilledError, record_loader
from grpo_mega.formats.stored_head import EMBEDDING, HEAD

LOADER = f"{__name__}.serve"


@dataclass(frozen=True)
class SharedModel:
    """The model of one scheduler process, as the training ranks use it."""

    address: WeightServerAddress | None
    """Address of its weight server; None if the loader could not be recorded."""
    record: LoaderRecord | str
    """The recorded loader, or the reason why it could not be recorded."""


_addresses: dict[str, int] = {}  # name -> address of every parameter that the weight server writes


def serve(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Run one command. The first name is the command as JSON; the tensors of `load` follow."""
    command: dict[str, Any] = json.loads(named_tensors[0][0])
    try:
        answer = _COMMANDS[command.pop("command")](model, named_tensors[1:], **command)
    except Exception as error:  # any error: SGLang would kill its processes without a report
        answer = error if isinstance(error, RuntimeError) else RuntimeError(f"{type(error).__name__}: {error}")
    path = answer_path(Path(os.environ[ANSWERS]), _tp_rank())
    path.with_suffix(".new").write_bytes(pickle.dumps(answer))
    path.with_suffix(".new").rename(path)


ANSWERS = "GRPO_MEGA_SGLANG_ANSWERS"  # the folder for answers


def answer_path(folder: Path, tp_rank: int) -> Path:
    """Return the file for the answer of one scheduler process."""
    return folder / f"answer_{tp_rank}.pickle"


def _tp_rank() -> int:
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_rank)


def _share(model: nn.Module, _: Sequence[tuple[str, Tensor]], tensors: str) -> SharedModel:
    """Record the loader and start the weight server.

    `tensors` is a file with shape and dtype of every tensor of the checkpoint.
    """
    assert not _addresses, "share runs once"
    _mark_experts_unknown()
    expected = pickle.loads(Path(tensors).read_bytes())  # noqa: S301 - in a private folder
    try:
        tied = {} if HEAD in expected else {HEAD: EMBEDDING}  # Qwen3-MoE has a head even if it is tied
        record = record_loader(model, expected, _padded(model), tied=tied)
    except UnfilledError as error:  # streaming whole tensors would leave the same parameters unfilled
        raise RuntimeError(f"SGLang's model does not match the checkpoint: {error}") from error
    except CannotRecordError as error:
        return SharedModel(None, str(error))
    filled = {copy.local.name for copy in record.copies} | {box.name for box in record.zeros}
    owners = {name: tensor for name, tensor in _tensors_of(model).items() if name in filled}
    _addresses.update({name: tensor.data_ptr() for name, tensor in owners.items()})
    server = WeightServer(record, owners, lambda: _require_unmoved(model))
    return SharedModel(server.start(Path(os.environ[ANSWERS]), _tp_rank(), os.getpid()), record)


def _mark_experts_unknown() -> None:
    """Fill SGLang's buffers of chosen experts with -1.

    They start as zeros, a valid expert id: a layer whose router is not recorded would seem to choose expert 0.
    """
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    if (capturer := get_global_experts_capturer()) is not None:
        capturer.host_cache.buffer.fill_(-1)
        capturer.device_cache.buffer.fill_(-1)


def _finish_update(model: nn.Module, _: Sequence[tuple[str, Tensor]]) -> None:
    _require_unmoved(model)


def _require_unmoved(model: nn.Module) -> None:
    present = {name: tensor.data_ptr() for name, tensor in _tensors_of(model).items()}
    moved = [name for name, address in _addresses.items() if present.get(name) != address]
    if moved:
        raise RuntimeError(
            f"SGLang moved {len(moved)} parameters, such as {', '.join(moved[:3])}, and reads other weights"
        )


def _load(model: nn.Module, tensors: Sequence[tuple[str, Tensor]]) -> None:
    loader: Any = model
    loader.load_weights(list(tensors))


def _seed(_model: nn.Module, _: Sequence[tuple[str, Tensor]], seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def _padded(model: nn.Module) -> set[str]:
    """Return parameters whose last rows may be padding: SGLang rounds the vocabulary up before it splits it."""
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding)
        for own, _ in module.named_parameters(recurse=False)
    }


_COMMANDS: dict[str, Any] = {"share": _share, "finish_update": _finish_update, "load": _load, "seed": _seed}
