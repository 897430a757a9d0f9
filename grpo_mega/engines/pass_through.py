"""Checks of `engine.args`: arguments that pass through to vLLM's `EngineArgs` or SGLang's `ServerArgs`.

Names, types and limits come from the source of the installed package. The package is not imported: vLLM must come after
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

from grpo_mega.config.pass_through import ValueLimit, check_arguments, size_limit
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
    "engine.fp8": "quantization quantization_config linear_backend",
    "engine.max_num_seqs": "max_num_seqs",
    "engine.kv_cache_tokens": "kv_cache_memory_bytes num_gpu_blocks_override",
    "engine.memory_share": "gpu_memory_utilization",
    "algorithm.routing_replay": "enable_return_routed_experts",
    _LENGTHS: "max_model_len",
    "": "load_format model_loader_extra_config skip_tokenizer_init generation_config override_generation_config "
    "logprobs_mode logits_processors distributed_executor_backend nnodes node_rank master_addr master_port worker_cls "
    "prefill_context_parallel_size decode_context_parallel_size max_num_batched_tokens block_size kv_cache_dtype "
    "enable_prefix_caching disable_log_stats enable_sleep_mode sleep_mode_offload_cudagraph "
    "enable_nccl_comm_suspend sleep_preserve_parameter_names cpu_offload_gb cpu_offload_params offload_params "
    "offload_backend offload_group_size offload_num_in_group offload_prefetch_step "
    "kv_offloading_size kv_offloading_backend enable_cumem_allocator speculative_config spec_method spec_model "
    "spec_tokens enable_lora async_scheduling disable_hybrid_kv_cache_manager enable_eplb eplb_config "
    "weight_transfer_config moe_backend kernel_config",
}
_VLLM_ON_CPU = {"": "enforce_eager attention_backend"}
_SGLANG = {
    "model.path": "model_path tokenizer_path json_model_override_args",
    "precision.dtype": "dtype",
    "run.seed": "random_seed",
    "engine.tp": "tp_size pp_size dp_size",
    "engine.ep": "ep_size",
    "engine.max_num_seqs": "max_running_requests",
    "engine.kv_cache_tokens": "max_total_tokens",
    "engine.memory_share": "mem_fraction_static",
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
    """Check `engine.args` by name, type and limits against the installed class of arguments of `engine.kind`.

    Where the package is not installed, only the fields that the program sets are checked, and a warning says so.

    Args:
        config: the run.
        on_cuda: True if the run uses CUDA; None: if this machine has a driver.

    Raises:
        UserError: an argument is unknown, has the wrong type, is outside of its limits, or is set by this program.
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
    owned, limits = owned_fields(kind, on_cuda=on_cuda), installed_limits(kind)
    check_arguments("engine.args", given, fields, owned, target, limits)


def owned_fields(kind: str, *, on_cuda: bool) -> dict[str, str]:
    """Return field -> config key of all fields that the program sets; an empty text where no key sets the field."""
    tables = {"vllm": [_VLLM, _VLLM_ON_CPU], "sglang": [_SGLANG, _SGLANG_ON_CPU]}[kind]
    used = tables[:1] if on_cuda else tables
    return {field: key for table in used for key, fields in table.items() for field in fields.split()}


def installed_fields(kind: str) -> dict[str, Any] | None:
    """Return field -> type of the engine's class of arguments, `Any` for types that are not plain; None: not installed.

    The types are those of Python and of `typing`, and names that vLLM defines for `Literal` types.
    """
    root = _package_folder(kind)
    if root is None:
        return None
    return _vllm_fields(root) if kind == "vllm" else _sglang_fields(root)


def installed_limits(kind: str) -> dict[str, ValueLimit]:
    """Return field -> limit of the engine's class of arguments; none where the package is not installed.

    vLLM declares bounds in its config classes, and SGLang declares choices. A field without either that is a size by
    its name must not be negative, unless a negative value has a meaning.
    """
    root = _package_folder(kind)
    if root is None:
        return {}
    found = _vllm_limits(root) if kind == "vllm" else _sglang_limits(root)
    return {name: limit for name, limit in found if limit is not None}


def _package_folder(kind: str) -> Path | None:
    spec = importlib.util.find_spec(kind)
    return Path(spec.submodule_search_locations[0]) if spec is not None and spec.submodule_search_locations else None


def _vllm_fields(root: Path) -> dict[str, Any]:
    """Read the dataclass `EngineArgs`; its annotations use names that vllm/config defines."""
    tree = _parsed(root / "engine" / "arg_utils.py")
    names = _typing_names()
    for module in [*map(_parsed, sorted((root / "config").glob("*.py"))), tree]:
        for node in module.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if len(targets) == 1 and isinstance(targets[0], ast.Name) and _is_literal(node):
                names[targets[0].id] = _type_of(node.value, names)  # type: ignore[attr-defined]
    declared = _class_named("EngineArgs", tree)
    return {name: _type_of(annotation, names) for name, annotation in _annotated(declared)}


def _vllm_limits(root: Path) -> Iterator[tuple[str, ValueLimit | None]]:
    """Yield the limits of `EngineArgs`, whose defaults name a field of a config class: `CacheConfig.block_size`."""
    declared: dict[tuple[str, str], tuple[ast.expr | None, str]] = {}  # (class, field) -> (default, description)
    for module in map(_parsed, sorted((root / "config").glob("*.py"))):
        for each in [node for node in module.body if isinstance(node, ast.ClassDef)]:
            for node, after in zip(each.body, [*each.body[1:], None], strict=True):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    entry = (node.value, ast.unparse(after) if isinstance(after, ast.Expr) else "")
                    declared[each.name, node.target.id] = entry
                    if _bounds(node.value) is not None:  # for a default of EngineArgs that names no class
                        declared.setdefault(("", node.target.id), entry)
    arguments = _class_named("EngineArgs", _parsed(root / "engine" / "arg_utils.py"))
    for node in arguments.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_numeric(node.annotation):
            name = node.target.id
            default, description = declared.get(_config_field(node.value, name), (node.value, ""))
            yield name, _bounds(default) or size_limit(name, _default(default), description)


def _config_field(default: ast.expr | None, argument: str) -> tuple[str, str]:
    """Return (class, field) of `Class.field` or `get_field(Class, "field")`, else ("", argument)."""
    match default:
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            return owner, name
        case ast.Call(func=ast.Name(id="get_field"), args=[ast.Name(id=owner), ast.Constant(value=str(name))]):
            return owner, name
    return "", argument


def _bounds(default: ast.expr | None) -> ValueLimit | None:
    """Return the bounds of `Field(default=..., ge=1)`; None for any other default."""
    if not (isinstance(default, ast.Call) and ast.unparse(default.func) == "Field"):
        return None
    found = {each.arg: _literal(each.value) for each in default.keywords}
    limit = ValueLimit(ge=found.get("ge"), gt=found.get("gt"), le=found.get("le"), lt=found.get("lt"))
    return None if limit == ValueLimit() else limit


def _default(value: ast.expr | None) -> Any:
    """Return a literal default, also of `Field(default=...)` or `Field(...)`; None for one that is computed."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        named = [each.value for each in value.keywords if each.arg == "default"]
        value = next(iter([*named, *value.args]), None)
    return None if value is None else _literal(value)


def _literal(value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        return None


def _is_numeric(annotation: ast.expr) -> bool:
    return bool({"int", "float"} & {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)})


def _sglang_fields(root: Path) -> dict[str, Any]:
    """Return field -> type."""
    names = _typing_names()
    return {name: _type_of(kind, names) for name, kind, _, _ in _sglang_declarations(root)}


def _sglang_limits(root: Path) -> Iterator[tuple[str, ValueLimit | None]]:
    """Yield the choices that `Arg(choices=...)` lists, or the limit of a size."""
    lists = {
        node.targets[0].id: _literal(node.value)
        for node in _parsed(root / "srt" / "arg_groups" / "choices.py").body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for name, kind, help_text, default in _sglang_declarations(root):
        listed = [
            each.value
            for call in ast.walk(help_text)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "Arg"
            for each in call.keywords
            if each.arg == "choices"
        ]
        choices = [lists.get(each.id) if isinstance(each, ast.Name) else _literal(each) for each in listed]
        if choices and isinstance(choices[0], list | tuple):
            yield name, ValueLimit(choices=tuple(choices[0]))
        elif _is_numeric(kind):
            yield name, size_limit(name, _default(default), ast.unparse(help_text))


def _sglang_declarations(root: Path) -> Iterator[tuple[str, ast.expr, ast.expr, ast.expr | None]]:
    """Yield name, type, help and default of the namespaces of which `ServerArgs` is composed.

    They are classes whose fields are annotated as `A[type, help]`.
    """
    for file in sorted((root / "srt" / "arg_groups" / "fields").glob("*.py")):
        for declared in [node for node in _parsed(file).body if isinstance(node, ast.ClassDef)]:
            defaults = {ast.unparse(n.target): n.value for n in declared.body if isinstance(n, ast.AnnAssign)}
            for name, annotation in _annotated(declared):
                if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A":
                    assert isinstance(annotation.slice, ast.Tuple), f"A[{name}] has a type and a help text"
                    kind, *others = annotation.slice.elts
                    yield name, kind, ast.Tuple(others, ast.Load()), defaults[name]


def _class_named(name: str, module: ast.Module) -> ast.ClassDef:
    (found,) = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name]
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
        found = eval(ast.unparse(annotation), dict(names))  # noqa: S307 - source of the installed engine
    except (NameError, TypeError, AttributeError):
        return Any
    return Any if isinstance(found, str) else found
