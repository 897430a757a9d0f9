"""`model.init: random`: every layout starts with the same weights, and no weights are needed in the folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from grpo_mega.config.model_sections import ModelConfig
from grpo_mega.formats.random_tensors import RandomTensors
from grpo_mega.models.config_readers import read_spec
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.types import TensorSlice
from tests.helpers.family_configs import raw_family_config
from tests.helpers.recorded_rollouts import ONE, VOCAB, Layout, as_array, ranks_of
from tests.helpers.sft_runs import random_examples, run_sft, sft_config
from tests.helpers.tiny_models import make_family_model
from tests.parallel.conftest import Laboratory

LAYOUTS = (ONE, Layout(4, tp=2, pp=2), Layout(4, tp=2, pp=2, ep=2, sequence_parallel=True))


def untrained(model: Path, folder: Path) -> Path:
    """Copy a model folder without its weights."""
    return Path(shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*")))


def random_start(rank: int, model: Path, layout: Layout) -> dict[str, Any]:
    """Return the full tensors with which a policy starts."""
    from grpo_mega.policy.policy import MegatronPolicy

    config = sft_config(model, layout).model_copy(update={"model": ModelConfig(path=str(model), init="random")})
    policy = MegatronPolicy(config, read_spec(model), model, ranks_of(rank, layout), with_reference=False)
    return {name: as_array(tensor) for name, tensor in policy.full_tensors(1 << 20)}


@pytest.fixture(scope="module")
def folders(laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Return folders without weights: without and with experts."""
    root = tmp_path_factory.mktemp("untrained")
    experts = make_family_model(root / "whole", raw_family_config("qwen3_moe"))
    return {
        False: untrained(laboratory.recorded("qwen3").model, root / "dense"),
        True: untrained(experts, root / "experts"),
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_starts_with_the_same_random_weights(
    laboratory: Laboratory, folders: dict[bool, Path], layout: Layout
) -> None:
    for model in [folders[True]] if layout.parallel.ep > 1 else folders.values():
        spec = read_spec(model)
        tensors = RandomTensors(spec, seed=0)
        for found in laboratory.pool.call(layout.world, random_start, model, layout):
            assert found.keys() == hf_shapes(spec).keys()
            for name, shape in hf_shapes(spec).items():
                wanted = torch.empty(shape)
                tensors.read_into(TensorSlice(name, (0,) * len(shape), shape), wanted)
                assert np.array_equal(found[name], wanted.numpy()), name


def test_a_run_from_random_weights_trains_and_exports_a_whole_model(
    laboratory: Laboratory, folders: dict[bool, Path], tmp_path: Path
) -> None:
    model = folders[False]
    config = sft_config(model, ONE, tmp_path / "run", steps=2)
    config = config.model_copy(
        update={
            "model": ModelConfig(path=str(model), init="random"),
            "checkpoint": config.checkpoint.model_copy(update={"export_hf": True}),
        }
    )
    laboratory.pool.call(1, run_sft, config, ONE, random_examples(11, VOCAB, seed=3))
    spec, exported = read_spec(model), load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert exported.keys() == hf_shapes(spec).keys()
    start = torch.empty(hf_shapes(spec)["lm_head.weight"])
    RandomTensors(spec, seed=0).read_into(TensorSlice("lm_head.weight", (0, 0), tuple(start.shape)), start)
    moved = (exported["lm_head.weight"] - start).abs().max()
    assert 0 < moved < 0.1, "the trained weights are not those of a few updates of the random ones"
