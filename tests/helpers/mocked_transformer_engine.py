"""Builds the policy's modules from Transformer Engine's Python code with its compiled part mocked.

    python -m tests.helpers.mocked_transformer_engine FOLDER FAMILY...

FOLDER holds the unpacked wheel. Run it in a process of its own: it replaces parts of torch. Prints one JSON object:
family -> layout -> {"parameters": names of rank 0, "faults": of the mapping of a checkpoint, "on_cuda": names of the
functions that allocated memory on the GPU, "local_on_cuda": the same while local modules are counted, "accumulates":
names of the linear layers -> True if they add weight gradients in the matrix product}; "kept": kind of FP8 weight ->
its orders that are left while the engine samples; "kernels": field of Megatron's config -> True if Megatron finds its
kernels; and "adam": what a checkpoint saves of Transformer Engine's Adam, and loads.

Recipe: NVTE_PROJECT_BUILDING keeps Transformer Engine from loading its libraries; `transformer_engine_torch`, triton,
onnx and onnxscript are modules whose every attribute is a mock, except for the two enumerations that Transformer Engine
compares with its own at import; torch reports eight H100 GPUs; what would be allocated on one is allocated on the meta
device.
"""

from __future__ import annotations

import ast
import enum
import importlib.machinery
import json
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch

_MOCKED = ("transformer_engine_torch", "triton", "onnxscript", "onnx", "onnx_ir")
_ENUMERATIONS = (  # module, class, name in the compiled part, prefix of the members there
    ("constants.py", "DType", "DType", ""),
    ("cpp_extensions/fused_attn.py", "FusedAttnBackend", "NVTE_Fused_Attn_Backend", "NVTE_"),
)


class MockedModule(types.ModuleType):
    """A module whose every public attribute is a mock."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = mock.MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class MockFinder:
    """Finds the modules of `_MOCKED` and everything below them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if name.split(".")[0] not in _MOCKED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return MockedModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "triton":
            module.__version__ = "3.5.1"  # type: ignore[attr-defined]
            module.jit = _identity_decorator  # type: ignore[attr-defined]
            module.autotune = module.heuristics = lambda *_, **__: _identity_decorator  # type: ignore[attr-defined]


def _identity_decorator(function: Any = None, **_: Any) -> Any:
    return function if function is not None else _identity_decorator


class OnMeta(torch.overrides.TorchFunctionMode):
    """Allocates on the meta device what is asked for on CUDA, and keeps the names of the functions."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if str(device).startswith("cuda") or isinstance(device, int):
            self.names.append(function.__name__)
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def _member_names(path: Path, class_name: str) -> list[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return [ast.unparse(t) for entry in node.body if isinstance(entry, ast.Assign) for t in entry.targets]
    raise AssertionError(f"{path} has no class {class_name}")


def import_transformer_engine(folder: Path) -> None:
    """Import Transformer Engine from `folder` with its compiled part mocked and a GPU that only seems to be there."""
    import torch._dynamo
    import torch._inductor.runtime.hints  # before triton is mocked: torch imports real parts of it
    import torch._inductor.utils

    os.environ |= {"NVTE_PROJECT_BUILDING": "1", "NVTE_TORCH_COMPILE": "0"}
    sys.path.insert(0, str(folder))
    sys.meta_path.append(MockFinder())  # type: ignore[arg-type]
    import transformer_engine_torch as compiled

    for module, class_name, name, prefix in _ENUMERATIONS:
        names = _member_names(folder / "transformer_engine" / "pytorch" / module, class_name)
        setattr(compiled, name, enum.IntEnum(name, {prefix + member: i for i, member in enumerate(names)}))
    properties = types.SimpleNamespace(major=9, minor=0, name="H100", multi_processor_count=132, total_memory=80 << 30)
    replaced = {
        "is_available": lambda: True, "device_count": lambda: 8, "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0), "get_device_properties": lambda *_: properties,
        "Stream": mock.MagicMock, "Event": mock.MagicMock, "manual_seed": lambda *_: None,
        "get_rng_state": lambda *_, **__: torch.zeros(1, dtype=torch.uint8), "set_rng_state": lambda *_, **__: None,
    }  # fmt: skip
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.compile = _identity_decorator  # type: ignore[assignment]
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = torch.cuda.get_rng_state
    random._set_cuda_rng_state = torch.cuda.set_rng_state


def describe(family: str) -> dict[str, Any]:
    """Return parameters, faults of the mapping and allocations on CUDA of one family, per layout."""
    from grpo_mega.config.policy_sections import ParallelConfig
    from grpo_mega.models.config_readers import spec_from_config
    from grpo_mega.models.parameter_tables import hf_shapes
    from grpo_mega.parallel.topology import Topology
    from grpo_mega.policy.inspect.module_sizes import meta_models, module_sizes
    from grpo_mega.policy.inspect.slice_mapping import faults_of_mapping, held_by_ranks
    from tests.helpers.family_configs import raw_family_config
    from tests.helpers.module_choices import TRANSFORMER_ENGINE

    spec = spec_from_config(raw_family_config(family), "config.json")
    axes: dict[str, Any] = {"tp": 2, "pp": 2, "sequence_parallel": True}
    layouts = {"one rank": ({}, 1), "tp2pp2": (axes | ({"ep": 2} if spec.moe is not None else {}), 4)}
    found = {}
    for name, (given, world) in layouts.items():
        parallel = ParallelConfig(**given)
        topology = Topology(world, tp=parallel.tp, pp=parallel.pp, ep=parallel.ep)
        with OnMeta() as allocations:
            models = meta_models(spec, parallel, world, 0, TRANSFORMER_ENGINE)
            parameters = [n for m in models for n, _ in m.named_parameters()]
            faults = faults_of_mapping(hf_shapes(spec), held_by_ranks(spec, parallel, topology, TRANSFORMER_ENGINE))
        with OnMeta() as local_allocations:
            module_sizes(spec, tp=parallel.tp, ep=parallel.ep, etp=parallel.etp)
        found[name] = {
            "parameters": parameters,
            "faults": faults,
            "on_cuda": allocations.names,
            "local_on_cuda": local_allocations.names,
            "accumulates": {
                name: module.fuse_wgrad_accumulation
                for model in models
                for name, module in model.named_modules()
                if hasattr(module, "fuse_wgrad_accumulation")
            },
        }
    return found


def kept_orders() -> dict[str, dict[str, bool]]:
    """Return kind of FP8 weight -> order of its values -> True if it is left after `forget_copies`."""
    import transformer_engine_torch as compiled
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Tensor
    from transformer_engine.pytorch.tensor.storage import float8_tensor_storage

    from grpo_mega.policy.fp8 import forget_copies

    def both(columns: tuple[int, int]) -> dict[str, Any]:
        return {
            "rowwise_data": torch.zeros(128, 256, dtype=torch.uint8), "rowwise_scale_inv": torch.ones(1, 4),
            "columnwise_data": torch.zeros(*columns, dtype=torch.uint8), "columnwise_scale_inv": torch.ones(2, 4),
            "quantizer": None,
        }  # fmt: skip

    float8_tensor_storage.is_non_tn_fp8_gemm_supported = lambda: False  # Hopper
    common = {"fp8_dtype": compiled.DType.kFloat8E4M3, "dtype": torch.bfloat16, "device": "cpu"}
    scale, shape = torch.ones(1), (128, 256)
    whole = {"data": torch.zeros(128, 256, dtype=torch.uint8), "data_transpose": torch.zeros(256, 128), **common}
    weights = {
        "tensorwise": Float8Tensor(shape, fp8_scale_inv=scale, **whole),
        "blockwise": Float8BlockwiseQTensor(shape, is_2D_scaled=True, **both((256, 128)), **common),
        "mxfp8": MXFP8Tensor(shape, with_gemm_swizzled_scales=False, **both((128, 256)), **common),
    }
    found = {}
    for kind, weight in weights.items():
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        forget_copies([module])
        orders = ("_data", "_transpose", "_rowwise_data", "_columnwise_data")
        found[kind] = {name: getattr(module.weight, name) is not None for name in orders if hasattr(weight, name)}
    return found


def found_kernels() -> dict[str, bool]:
    """Return field of Megatron's config -> True if Megatron finds the kernels that the field switches on."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils

    chunks = "sort_chunks_by_index"
    permutations = ("permute", "permute_with_probs", chunks, f"{chunks}_with_probs", "unpermute")
    return {
        "apply_rope_fusion": rope_utils.fused_apply_rotary_pos_emb_thd is not None,
        "moe_permute_fusion": all(getattr(moe_utils, f"fused_{name}") is not None for name in permutations),
    }


def saved_and_loaded_adam() -> dict[str, Any]:
    """Return the tensors of a parameter's state after two steps of Adam, the saved step, and the loaded state."""
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from transformer_engine.pytorch.optimizers import FusedAdam

    from grpo_mega.policy.megatron_patches import fixes

    fixes.install()
    assert distrib_optimizer.USING_TE_OPTIMIZER
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    with OnMeta():
        adam = FusedAdam([weight])
        adam.step()
        adam.step()
    inner = types.SimpleNamespace(
        optimizer=adam,
        grad_scaler=None,
        config=types.SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False),
        model_param_group_index_map={weight: (0, 0)},
    )
    state = sorted(adam.state[weight])
    with fixes.placeholder_steps(inner):
        saved = DistributedOptimizer.state_dict(inner)
    loaded = {"param": torch.full((3,), 4.0), "exp_avg": torch.full((3,), 5.0), "exp_avg_sq": torch.full((3,), 6.0)}
    with torch.no_grad():
        DistributedOptimizer._set_main_param_and_optimizer_states(inner, weight, loaded)
    found = {name: values.tolist() for name, values in {"param": weight, **adam.state[weight]}.items()}
    return {"state": state, "saved_step": saved["optimizer"]["param_groups"][0]["step"], "loaded": found}


def main(folder: Path, families: list[str]) -> None:
    """Print the description of each family, which orders of FP8 weights are kept, the kernels, and Adam's state."""
    warnings.simplefilter("ignore")
    import_transformer_engine(folder)
    found: dict[str, Any] = {family: describe(family) for family in families}
    print(json.dumps(found | {"kept": kept_orders(), "kernels": found_kernels(), "adam": saved_and_loaded_adam()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
