"""Every family is built from Transformer Engine's modules of the pinned release, and its checkpoint fits them.

The compiled part of Transformer Engine is mocked (tests/helpers/mocked_transformer_engine.py), so nothing is computed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.family_configs import FAMILY_CONFIGS
from tests.helpers.transformer_engine_sources import REPOSITORY, transformer_engine_wheel

FAMILIES = sorted(FAMILY_CONFIGS)


@pytest.fixture(scope="module")
def built(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Describe the modules of all families, from one process."""
    cache, folder = pytestconfig.cache, tmp_path_factory.mktemp("transformer_engine")
    wheel = transformer_engine_wheel(Path(cache.mkdir("transformer_engine")) if cache else folder)
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    command = [sys.executable, "-m", "tests.helpers.mocked_transformer_engine", str(folder / "unpacked"), *FAMILIES]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_the_family_fits_the_modules_of_every_rank(built: Any, family: str) -> None:
    for layout, found in built[family].items():
        assert found["parameters"], layout
        assert found["faults"] == [], layout


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_part_of_the_projections_and_experts_are_grouped(built: Any, family: str) -> None:
    names = built[family]["one rank"]["parameters"]
    fused = [name for name in names if name.endswith(("layer_norm_weight", "layer_norm_bias"))]
    assert fused, "Transformer Engine fuses the norm before a projection into it"
    experts = [name for name in names if ".experts." in name]
    assert not any("local_experts" in name for name in experts), "one module computes all experts of a rank"


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_on_the_meta_device_allocate_nothing_on_a_gpu(built: Any, family: str) -> None:
    has_experts = any(".experts." in name or "router" in name for name in built[family]["one rank"]["parameters"])
    for found in built[family].values():
        # DotProductAttention allocates the logits of the attention sinks, one per head, wherever the rest is built, and
        # the dispatcher of routed tokens the indices of the fused permutation, one per expert (token_dispatcher.py:428)
        allowed = ({"zeros"} if family == "gpt_oss" else set()) | ({"arange"} if has_experts else set())
        assert set(found["on_cuda"]) == allowed


@pytest.mark.parametrize("family", FAMILIES)
def test_counting_modules_allocates_nothing_on_a_gpu(built: Any, family: str) -> None:
    for found in built[family].values():
        assert found["local_on_cuda"] == []


def test_fp8_weights_keep_only_their_rows_while_the_engine_samples(built: Any) -> None:
    """The columns of MXFP8 cannot be made from its rows again."""
    assert built["kept"] == {
        "tensorwise": {"_data": True, "_transpose": False},
        "blockwise": {"_rowwise_data": True, "_columnwise_data": False},
        "mxfp8": {"_rowwise_data": True, "_columnwise_data": True},
    }


def test_a_checkpoint_holds_the_step_that_adam_counts_per_group(built: Any) -> None:
    """The state of a parameter has no step, which Megatron's own Adam reads there."""
    assert built["adam"] == {
        "state": ["exp_avg", "exp_avg_sq"],
        "saved_step": 2,
        "loaded": {"param": [4.0] * 3, "exp_avg": [5.0] * 3, "exp_avg_sq": [6.0] * 3},
    }


def test_megatron_finds_the_kernels_of_the_fields_that_are_on(built: Any) -> None:
    assert built["kernels"] == {"apply_rope_fusion": True, "moe_permute_fusion": True}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_adds_its_weight_gradient_in_the_matrix_product(built: Any, family: str) -> None:
    for layout, found in built[family].items():
        assert found["accumulates"], layout
        assert all(found["accumulates"].values()), layout
