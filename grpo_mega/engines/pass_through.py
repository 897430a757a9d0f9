"""Checks of `engine.args`: arguments that pass through to vLLM's `EngineArgs` or SGLang's `ServerArgs`.

Names and types come from the source of the installed package. The package is not imported: vLLM must come after
Megatron in a process, and SGLang runs in processes of its own. Arguments that this program sets itself are
rejected, and so are arguments that change the memory which the planner counts or the weights that a sync writes.
Asserted by tests/unit/engines/test_pass_through.py.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import logging
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_mega.config.pass_through import check_arguments
from grpo_mega.config.schema import Config
from grpo_mega.parallel.devices import has_cuda_driver

logger = logging.getLogger(__name__)

_LENGTHS = "data.max_prompt_tokens and sampling.max_tokens"
# Config key -> the fields that the program sets from it; "": fields that it sets without a config key.
_VLLM = {
    "model.path": "model tokenizer hf_config_path hf_overrides",
    "precision.dtype": "dtype",
    "run.seed": "seed",
    "engine.tp": "tensor_parallel_size pipeline_parallel_size",
    "engine.dp": "data_parallel_size data_parallel_rank data_parallel_start_rank data_parallel_size_local "
    "data_parallel_address data_parallel_rpc_port data_parallel_backend data_parallel_hybrid_lb "
    "data_parallel_external_lb",
    "engine.ep": "enable_expert_parallel",
    "engine.fp8": "quantization quantization_config linear_backend moe_backend",
    "engine.max_num_seqs": "max_num_seqs",
    "engine.kv_cache_tokens": "kv_cache_memory_bytes num_gpu_blocks_override gpu_memory_utilization",
    "algorithm.routing_replay": "enable_return_routed_experts",
    _LENGTHS: "max_model_len",
    "": "load_format model_loader_extra_config skip_tokenizer_init generation_config override_generation_config "
    "logprobs_mode logits_processors distributed_executor_backend nnodes node_rank master_addr master_port worker_cls "
    "prefill_context_parallel_size decode_context_parallel_size max_num_batched_tokens block_size kv_cache_dtype "
    "enable_prefix_caching disable_log_stats enable_sleep_mode sleep_preserve_parameter_names cpu_offload_gb "
    "cpu_offload_params offload_params offload_backend offload_group_size offload_num_in_group offload_prefetch_step "
    "kv_offloading_size kv_offloading_backend enable_cumem_allocator speculative_config spec_method spec_model "
    "spec_tokens enable_lora async_scheduling disable_hybrid_kv_cache_manager enable_eplb eplb_config "
    "weight_transfer_config",
}
_VLLM_ON_CPU = {"": "enforce_eager attention_backend"}
_SGLANG = {
    "model.path": "model_path tokenizer_path json_model_override_args",
    "precision.dtype": "dtype",
    "run.seed": "random_seed",
    "engine.tp": "tp_size pp_size dp_size",
    "engine.ep": "ep_size",
    "engine.max_num_seqs": "max_running_requests",
    "engine.kv_cache_tokens": "max_total_tokens mem_fraction_static",
    "algorithm.routing_replay": "enable_return_routed_experts",
    _LENGTHS: "context_length",
    "": "load_format custom_weight_loader skip_tokenizer_init nccl_port nnodes node_rank dist_init_addr base_gpu_id "
    "gpu_id_step device sampling_backend grammar_backend sampling_defaults disable_overlap_schedule "
    "chunked_prefill_size max_prefill_tokens page_size kv_cache_dtype quantization sleep_on_idle stream_interval "
    "log_level enable_memory_saver enable_weights_cpu_backup moe_runner_backend cpu_offload_gb "
    "offload_mode offload_group_size offload_num_in_group offload_prefetch_step enable_unified_memory "
    "enable_hierarchical_cache speculative_algorithm speculative_draft_model_path enable_lora lora_paths "
    "enable_dp_attention enable_eplb swa_full_tokens_ratio",
}
_SGLANG_ON_CPU = {"": "attention_backend disable_cuda_graph"}


def check_engine_args(config: Config, *, on_cuda: bool | None = None) -> None:
    """Check `engine.args` by name and type against the installed class of arguments of `engine.kind`.

    Where the package is not installed, only the fields that the program sets are checked, and a warning says so.

    Args:
        config: the run.
        on_cuda: True if the run uses CUDA; None: if this machine has a driver.

    Raises:
        UserError: an argument is unknown, has the wrong type, or is set by this program.
    """
    given, kind = config.engine.args, config.engine.kind
    if not given:
        return
    target = {"vllm": "vLLM's EngineArgs", "sglang": "SGLang's ServerArgs"}[kind]
    fields = installed_fields(kind)
    if fields is None:
        logger.warning("engine.args was not checked against %s: the package is not installed here", target)
        fields = dict.fromkeys(given, Any)
    on_cuda = has_cuda_driver() if on_cuda is None else on_cuda
    check_arguments("engine.args", given, fields, owned_fields(kind, on_cuda=on_cuda), target)


def owned_fields(kind: str, *, on_cuda: bool) -> dict[str, str]:
    """Return field -> config key of all fields that the program sets; an empty text where no key sets the field."""
    tables = {"vllm": [_VLLM, _VLLM_ON_CPU], "sglang": [_SGLANG, _SGLANG_ON_CPU]}[kind]
    used = tables[:1] if on_cuda else tables
    return {field: key for table in used for key, fields in table.items() for field in fields.split()}


def installed_fields(kind: str) -> dict[str, Any] | None:
    """Return field -> type of the engine's class of arguments, `Any` for types that are not plain; None: not installed.

    The types are those of Python and of `typing`, and names that vLLM defines for `Literal` types.
    """
    spec = importlib.util.find_spec(kind)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    return _vllm_fields(root) if kind == "vllm" else _sglang_fields(root)


def _vllm_fields(root: Path) -> dict[str, Any]:
    """Read the dataclass `EngineArgs`; its annotations use names that vllm/config defines."""
    tree = _parsed(root / "engine" / "arg_utils.py")
    names = _typing_names()
    for module in [*map(_parsed, sorted((root / "config").glob("*.py"))), tree]:
        for node in module.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if len(targets) == 1 and isinstance(targets[0], ast.Name) and _is_literal(node):
                names[targets[0].id] = _type_of(node.value, names)  # type: ignore[attr-defined]
    (declared,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"]
    return {name: _type_of(annotation, names) for name, annotation in _annotated(declared)}


def _sglang_fields(root: Path) -> dict[str, Any]:
    """Read the namespaces of which `ServerArgs` is composed: classes whose fields are annotated as `A[type, help]`."""
    names, found = _typing_names(), {}
    for file in sorted((root / "srt" / "arg_groups" / "fields").glob("*.py")):
        for declared in [node for node in _parsed(file).body if isinstance(node, ast.ClassDef)]:
            for name, annotation in _annotated(declared):
                if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A":
                    assert isinstance(annotation.slice, ast.Tuple), f"A[{name}] has a type and a help text"
                    found[name] = _type_of(annotation.slice.elts[0], names)
    return found


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _annotated(declared: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """Yield name and annotation of the public fields of a class."""
    for node in declared.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
            yield node.target.id, node.annotation


def _is_literal(node: ast.stmt) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, ast.Subscript) and ast.unparse(value.value) == "Literal"


def _typing_names() -> dict[str, Any]:
    return {**vars(builtins), **vars(typing)}


def _type_of(annotation: ast.expr, names: Mapping[str, Any]) -> Any:
    """Return the type that an annotation denotes; `Any` if it uses a name that is not known here."""
    try:
        found = eval(ast.unparse(annotation), dict(names))
    except (NameError, TypeError, AttributeError):
        return Any
    return Any if isinstance(found, str) else found
