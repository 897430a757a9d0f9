"""Hugging Face -> Megatron -> Hugging Face is bit-equal in every layout; a broken checkpoint is rejected."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo_mega.models.digest import slice_digest, wrap_int64
from grpo_mega.types import TensorSlice, UserError
from tests.helpers.ranks import RankPool
from tests.helpers.recorded_rollouts import VOCAB, Layout, Recorded, as_array, open_policy
from tests.helpers.tiny_models import make_tiny_model
from tests.parallel.conftest import MODELS, Laboratory, every_case


def checkpoint_bytes(folder: Path, *, tied: bool) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    if tied:
        tensors.pop("lm_head.weight", None)
    return tensors


@every_case
def test_gathered_tensors_are_bit_equal_to_the_checkpoint_files(
    laboratory: Laboratory, model: str, layout: Layout
) -> None:
    wanted = checkpoint_bytes(laboratory.recorded(model).model, tied=MODELS[model].tied)
    assert VOCAB % 2 == 1, "VOCAB must be odd, so that tp=2 pads it"
    records = laboratory.run(model, layout)
    found = records[0].tensors[0]
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert found[name].tobytes() == tensor.numpy().tobytes(), name
        assert np.signbit(found[name].flat[-1]), f"{name}: the -0.0 is lost"
        assert found[name].flat[-1] == 0
    assert all(record.small_buckets_equal for record in records), "buckets of 1 KiB give other bytes than one bucket"


@every_case
def test_digests_of_the_shards_add_up_to_that_of_the_whole_tensor(
    laboratory: Laboratory, model: str, layout: Layout
) -> None:
    wanted = {
        name: slice_digest(tensor, TensorSlice(name, (0,) * tensor.dim(), tuple(tensor.shape)))
        for name, tensor in checkpoint_bytes(laboratory.recorded(model).model, tied=MODELS[model].tied).items()
    }
    records = laboratory.run(model, layout)
    at = [layout.topology.coordinates(rank) for rank in range(layout.world)]
    for copy in {(c.dp_rank, c.cp_rank) for c in at}:
        sums = dict.fromkeys(wanted, 0)
        for rank, record in enumerate(records):
            if (at[rank].dp_rank, at[rank].cp_rank) == copy:
                for name, digest in record.shard_digests.items():
                    sums[name] = wrap_int64(sums[name] + digest)
        assert sums == wanted


def count_bytes(rank: int, recorded: Recorded, layout: Layout) -> tuple[int, int]:
    """Return the bytes that this rank reads from the files, and the bytes of its parameters."""
    policy = open_policy(rank, recorded, layout)
    return policy.weights.load_from_hf(recorded.model), sum(p.nbytes for p in policy.parts.parameters)


@pytest.mark.parametrize("layout", [Layout(1), Layout(4, tp=2, pp=2)], ids=str)
def test_each_rank_reads_only_the_bytes_that_it_holds(laboratory: Laboratory, layout: Layout) -> None:
    recorded = laboratory.recorded("qwen3")
    padding_row = 4 * 64  # the last of two ranks has one row less of an odd vocabulary
    for rank, (read, held) in enumerate(laboratory.pool.call(layout.world, count_bytes, recorded, layout)):
        padded = layout.tp == 2 and layout.topology.coordinates(rank).tp_rank == 1
        assert held - read == (padding_row if padded else 0)


def stream_tensors(rank: int, recorded: Recorded, layout: Layout) -> dict[str, bytes]:
    return {name: as_array(t).tobytes() for name, t in open_policy(rank, recorded, layout).full_tensors(4096)}


@pytest.mark.parametrize("vocab", [20, 22, 23])
def test_a_padded_or_even_vocabulary_and_bf16_are_restored_bit_for_bit(
    laboratory: Laboratory, tmp_path: Path, vocab: int
) -> None:
    folder = make_tiny_model(
        tmp_path, "llama", tie=vocab == 23, vocab=vocab, seed=3, num_key_value_heads=4, num_hidden_layers=2
    )
    recorded = replace(laboratory.recorded("llama"), model=folder, dtype="bf16")
    wanted = checkpoint_bytes(folder, tied=vocab == 23)
    for found in laboratory.pool.call(4, stream_tensors, recorded, Layout(4, tp=4)):
        assert found == {name: as_array(t.bfloat16()).tobytes() for name, t in wanted.items()}


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def truncate_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def enlarge_ffn(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))


NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "shape": (change_tensors(lambda t: t.update({UP: torch.zeros(96, 63)})), rf"{UP} has shape \(96, 63\).*\(96, 64\)"),
    "missing": (change_tensors(lambda t: t.pop(NORM)), rf"{NORM} of shape \(64,\) missing"),
    "left over": (change_tensors(lambda t: t.update(extra=torch.zeros(2))), r"extra of shape \(2,\) unknown"),
    "truncated": (truncate_file, r"model\.safetensors: cannot be read"),
    "no file": (remove_weights, r"has no model\.safetensors"),
    "other config": (enlarge_ffn, r"model\.layers\.0\.mlp\.gate_proj\.weight has shape \(96, 64\).*\(128, 64\)"),
}


def errors_of_broken_checkpoints(rank: int, recorded: Recorded, layout: Layout, folders: list[Path]) -> list[str]:
    messages = []
    for folder in folders:
        try:
            open_policy(rank, replace(recorded, model=folder), layout)
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def broken_checkpoint_errors(
    rank_pool: RankPool, laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Return the error of each rank for each broken checkpoint."""
    root, recorded = tmp_path_factory.mktemp("broken"), laboratory.recorded("qwen3")
    folders = []
    for name, (break_checkpoint, _) in BROKEN.items():
        folders.append(root / name)
        shutil.copytree(recorded.model, folders[-1])
        break_checkpoint(folders[-1])
    by_rank = rank_pool.call(2, errors_of_broken_checkpoints, recorded, Layout(2, tp=2), folders)
    return {name: [messages[i] for messages in by_rank] for i, name in enumerate(BROKEN)}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_is_rejected_on_every_rank_with_the_reason(
    broken_checkpoint_errors: dict[str, list[str]], fault: str
) -> None:
    for message in broken_checkpoint_errors[fault]:
        assert re.search(BROKEN[fault][1], message), message
        assert ";" in message or "(" in message
