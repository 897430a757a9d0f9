"""config/fp8_rules.py: the table agrees with Transformer Engine's own source of the pinned release; what does not go
together is rejected with its reason, on any machine."""

from __future__ import annotations

import ast
import math
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_mega.config.fp8_rules import RECIPES, check_generation
from grpo_mega.config.load import load_config
from grpo_mega.config.policy_sections import Fp8Config
from grpo_mega.data.row_plan import RowShape
from grpo_mega.doctor import gpus
from grpo_mega.doctor.model_rules import check_model
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import UserError
from tests.helpers.transformer_engine_sources import transformer_engine_wheel

REPOSITORY = Path(__file__).resolve().parents[3]
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
STORAGE = "pytorch/tensor/storage"
MEMBERS = (
    "common/recipe/__init__.py",
    "pytorch/__init__.py",
    "pytorch/constants.py",
    "pytorch/module/base.py",
    "pytorch/quantization.py",
    "pytorch/tensor/float8_blockwise_tensor.py",
    f"{STORAGE}/float8_tensor_storage.py",
    f"{STORAGE}/float8_blockwise_tensor_storage.py",
    f"{STORAGE}/mxfp8_tensor_storage.py",
)
BLOCKWISE = ("precision.dtype=bf16", "precision.fp8.recipe=blockwise")


@pytest.fixture(scope="module")
def read_te_module(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that parses a module of Transformer Engine's pure-Python distribution; it is never imported."""
    cache = pytestconfig.cache
    folder = Path(cache.mkdir("transformer_engine")) if cache else tmp_path_factory.mktemp("transformer_engine")
    wheel = transformer_engine_wheel(folder)
    with zipfile.ZipFile(wheel) as archive:
        return {member: ast.parse(archive.read(f"transformer_engine/{member}")) for member in MEMBERS}


def fields_by_class(tree: ast.Module) -> dict[str, dict[str, ast.expr | None]]:
    """Return class -> its annotated fields and their defaults."""
    return {
        node.name: {
            item.target.id: item.value
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def compared_numbers(tree: ast.Module, function: str) -> list[Any]:
    """Return the constants that a function compares with, in order."""
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    return [
        ast.literal_eval(node.comparators[0])
        for node in ast.walk(found)
        if isinstance(node, ast.Compare) and isinstance(node.comparators[0], ast.Constant | ast.Tuple)
    ]


def test_every_recipe_is_a_class_of_transformer_engine_with_the_fields_that_megatron_sets(read_te_module: Any) -> None:
    found = fields_by_class(read_te_module["common/recipe/__init__.py"])
    for recipe in RECIPES.values():
        fields = found[recipe.te_class]
        assert "fp8_format" in fields, recipe.te_class
        default = fields["fp8_format"]
        assert isinstance(default, ast.Attribute)
        assert default.attr.lower() == recipe.default_format, recipe.te_class
    assert {"margin", "amax_history_len", "amax_compute_algo"} <= set(found["DelayedScaling"])
    assert "fp8_dpa" in found["Float8CurrentScaling"]


def test_the_default_history_is_transformer_engines(read_te_module: Any) -> None:
    from grpo_mega.policy.fp8 import _DEFAULT_HISTORY

    default = fields_by_class(read_te_module["common/recipe/__init__.py"])["DelayedScaling"]["amax_history_len"]
    assert isinstance(default, ast.Constant)
    assert default.value == _DEFAULT_HISTORY


def test_the_gpus_of_each_recipe_are_those_that_transformer_engine_requires(read_te_module: Any) -> None:
    tree = read_te_module["pytorch/quantization.py"]
    of_a_tensor = compared_numbers(tree, "_compute_fp8_support")
    for name in ("delayed", "tensorwise"):
        assert RECIPES[name].least == of_a_tensor[1] == (8, 9)  # GPUs below it are rejected
        assert RECIPES[name].cuda == tuple(map(int, str(of_a_tensor[3]).split(".")))
    capability, cuda = compared_numbers(tree, "_compute_fp8_block_scaling_support")
    assert RECIPES["blockwise"].least == capability
    assert RECIPES["blockwise"].cuda == tuple(map(int, str(cuda).split(".")))
    too_new, least = compared_numbers(tree, "_compute_mxfp8_support")
    assert (RECIPES["mxfp8"].below, RECIPES["mxfp8"].least) == (too_new, least)


def test_the_functions_with_which_megatron_enables_fp8_exist(read_te_module: Any) -> None:
    names = {
        a.name for n in read_te_module["pytorch/__init__.py"].body if isinstance(n, ast.ImportFrom) for a in n.names
    }
    assert {"fp8_autocast", "fp8_model_init"} <= names
    (init,) = [
        n
        for n in ast.walk(read_te_module["pytorch/quantization.py"])
        if isinstance(n, ast.FunctionDef) and n.name == "fp8_model_init"
    ]
    assert {"enabled", "recipe", "preserve_high_precision_init_val"} <= {a.arg for a in init.args.args}


def last_assignments(tree: ast.Module) -> dict[str, str]:
    """Return name or attribute -> the last value assigned to it anywhere, as source."""
    return {
        ast.unparse(target): ast.unparse(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }


def test_fp8_weights_store_what_fp8_scales_reads(read_te_module: Any) -> None:
    of_a_tensor = fields_by_class(read_te_module[f"{STORAGE}/float8_tensor_storage.py"])["Float8TensorStorage"]
    assert {"_data", "_transpose", "_scale_inv"} <= set(of_a_tensor)
    orders = {"_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv"}
    for module, name in (("float8_blockwise", "Float8BlockwiseQTensorStorage"), ("mxfp8", "MXFP8TensorStorage")):
        found = set(fields_by_class(read_te_module[f"{STORAGE}/{module}_tensor_storage.py"])[name])
        assert orders <= found, name
        assert "_scale_inv" not in found, name
    assert last_assignments(read_te_module["pytorch/tensor/float8_blockwise_tensor.py"])["self.block_len"] == "128"
    assert last_assignments(read_te_module["pytorch/constants.py"])["MXFP8_BLOCK_SCALING_SIZE"] == "32"
    assert "self._fp8_workspaces" in last_assignments(read_te_module["pytorch/module/base.py"])


def test_the_scales_of_blocks_of_a_weight_are_padded_at_the_end_and_transposed_with_it(read_te_module: Any) -> None:
    tree = read_te_module["pytorch/tensor/float8_blockwise_tensor.py"]
    scope: dict[str, Any] = {"math": math, "round_up_to_nearest_multiple": lambda value, of: -(-value // of) * of}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in ("get_scale_shape", "get_columnwise_shape"):
            exec("from __future__ import annotations\n" + ast.unparse(node), scope)
    quantizer = SimpleNamespace(block_scaling_dim=2, block_len=128, all_gather_usage=False)
    assert scope["get_scale_shape"](quantizer, (300, 640), False) == (3, 8)  # 3 x 5 blocks
    assert scope["get_columnwise_shape"](quantizer, (300, 640)) == (640, 300)
    assert scope["get_scale_shape"](quantizer, (300, 640), True) == (5, 4)


def test_the_forward_pass_is_in_e4m3_in_either_format(read_te_module: Any) -> None:
    (found,) = [
        node
        for node in read_te_module["pytorch/quantization.py"].body
        if isinstance(node, ast.FunctionDef) and node.name == "get_fp8_te_dtype"
    ]
    types = SimpleNamespace(DType=SimpleNamespace(kFloat8E4M3="e4m3", kFloat8E5M2="e5m2"))
    formats = SimpleNamespace(E4M3="E4M3", HYBRID="HYBRID")
    scope: dict[str, Any] = {"DType": types.DType, "Format": formats}
    exec("from __future__ import annotations\n" + ast.unparse(found), scope)
    for name in ("E4M3", "HYBRID"):
        assert scope["get_fp8_te_dtype"](SimpleNamespace(fp8_format=name)) == "e4m3"
    assert scope["get_fp8_te_dtype"](SimpleNamespace(fp8_format="HYBRID"), False) == "e5m2"


def test_the_table_holds_the_recipes_of_the_config() -> None:
    assert set(RECIPES) == set(Fp8Config.model_fields["recipe"].annotation.__args__)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "message"),
    [
        ("delayed", (8, 0), (13, 0), "this GPU has compute capability 8.0; .*: none, use bf16"),
        ("blockwise", (8, 9), (13, 0), "supported on H100, H200, H20, B200, RTX 5090, .*: delayed, tensorwise"),
        ("mxfp8", (9, 0), (13, 0), "supported on B200, and .*: delayed, tensorwise, blockwise"),
        ("mxfp8", (12, 0), (13, 0), "supported on B200, and"),
        ("blockwise", (9, 0), (12, 8), "needs CUDA 12.9 or later, and torch is built for 12.8"),
    ],
)
def test_the_message_for_an_unsupported_recipe_lists_the_supported_ones(
    recipe: str, capability: tuple[int, int], cuda: tuple[int, int], message: str
) -> None:
    assert re.search(message, str(check_generation(recipe, capability, cuda)))


@pytest.mark.parametrize(("recipe", "capability"), [("delayed", (8, 9)), ("blockwise", (9, 0)), ("mxfp8", (10, 3))])
def test_a_gpu_with_the_recipe_passes(recipe: str, capability: tuple[int, int]) -> None:
    assert check_generation(recipe, capability, (13, 0)) is None


class Nvml:
    def __init__(self, capability: tuple[int, int]) -> None:
        self.nvmlInit = self.nvmlShutdown = lambda: None
        self.nvmlDeviceGetHandleByIndex = lambda index: index
        self.nvmlDeviceGetCudaComputeCapability = lambda handle: list(capability)


def test_the_doctor_finds_a_gpu_or_a_torch_that_lacks_the_recipe() -> None:
    assert gpus.check_recipe("blockwise", (13, 0), Nvml((9, 0))).status == "pass"
    old = gpus.check_recipe("mxfp8", (13, 0), Nvml((9, 0)))
    assert (old.status, old.remedy) == ("fail", "use a recipe that it supports: delayed, tensorwise, blockwise")
    assert gpus.check_recipe("blockwise", (12, 8), Nvml((9, 0))).status == "fail"


def test_the_doctor_finds_a_gpu_on_which_no_engine_computes_with_fp8() -> None:
    assert gpus.check_engine_fp8(Nvml((8, 9))).status == "pass"
    old = gpus.check_engine_fp8(Nvml((8, 0)))
    assert (old.status, old.remedy) == ("fail", "remove engine.fp8")
    assert "compute capability 8.0" in old.message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("precision.fp8.recipe=blockwise",), r"precision\.dtype=fp32 is not supported with precision\.fp8"),
        (
            (*BLOCKWISE, "precision.fp8.recipe=delayed", "precision.fp8.last_layers_bf16=1"),
            r"precision\.fp8\.last_layers_bf16=1 is not supported with precision\.fp8\.recipe=delayed",
        ),
        (
            (
                *BLOCKWISE,
                "precision.fp8.recipe=delayed",
                "parallel.recompute=selective",
                "parallel.recompute_modules=[layernorm]",
            ),
            "parallel.recompute_modules must not hold layernorm",
        ),
        (
            (*BLOCKWISE, "precision.fp8.amax_history=16"),
            r"amax_history=16 does nothing with precision\.fp8\.recipe=blockwise",
        ),
        ((*BLOCKWISE, "precision.fp8.params=true"), r"params=true is not supported with algorithm\.kl_coef=0\.001"),
        (
            (*BLOCKWISE, "precision.fp8.params=true", "algorithm.kl_coef=0", "optimizer.host_fraction=0.5"),
            r"params=true is not supported with optimizer\.host_fraction=0\.5",
        ),
        (("precision.fp8.recipe=nvfp4",), r"precision\.fp8\.recipe"),
    ],
)
def test_unsupported_combinations_of_keys_are_rejected(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(QUICKSTART, overrides)


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="this machine has GPUs")
def test_fp8_without_cuda_is_rejected_before_a_run_starts() -> None:
    config = load_config(QUICKSTART, BLOCKWISE)
    with pytest.raises(UserError, match=r"precision\.fp8\.recipe=blockwise needs CUDA devices, and"):
        check_model(config, Topology.of(config, 1))


def test_more_bf16_layers_than_a_pipeline_stage_has_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda self: True)
    config = load_config(QUICKSTART, (*BLOCKWISE, "parallel.pp=2", "precision.fp8.first_layers_bf16=3"))
    with pytest.raises(UserError, match=r"first_layers_bf16=3 .*2 layers"):
        check_model(config, Topology.of(config, 2))


@pytest.mark.parametrize(
    ("recipe", "parallel", "multiple"),
    [
        ("blockwise", {}, 16),
        ("mxfp8", {}, 32),
        ("blockwise", {"parallel.tp": 2, "parallel.sequence_parallel": True}, 32),
        ("blockwise", {"parallel.cp": 2}, 32),
    ],
)
def test_rows_have_the_multiple_of_tokens_that_products_in_fp8_take(
    recipe: str, parallel: dict[str, Any], multiple: int
) -> None:
    overrides = [f"{key}={value}".lower() for key, value in parallel.items()]
    config = load_config(QUICKSTART, ["precision.dtype=bf16", f"precision.fp8.recipe={recipe}", *overrides])
    assert RowShape.of(config.parallel, config.precision).row_multiple == multiple
    assert RowShape.of(config.parallel, SimpleNamespace(fp8=None)) == RowShape.of(config.parallel)  # type: ignore[arg-type]
