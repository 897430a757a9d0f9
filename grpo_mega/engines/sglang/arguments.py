"""Arguments of SGLang's Engine and the environment of its processes, with and without CUDA.

Differences on CUDA, in SGLang 0.5.23 (paths are inside sglang/srt). They come from reading the source; nothing here has
been run on a GPU.
- `enable_memory_saver`: weights and KV cache are allocated by torch_memory_saver. `release` frees the memory and
  `resume` allocates it again at the same addresses (managers/scheduler_components/weight_updater.py:337-420), so CUDA
  graphs stay valid. Released memory comes back undefined. SGLang restores buffers (there, :478); parameters are written
  by the next sync.
- The MoE runner is `triton`, which reads experts as they are loaded. flashinfer_trtllm packs them into blocks
  (layers/quantization/unquant.py:976; the default of some models on Blackwell: arg_groups/overrides.py:823), and
  SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED (unquant.py:936) would interleave the rows of gate and up. Linear layers,
  embeddings and heads in bf16 have no step after loading on CUDA (unquant.py:568). If one rewrites a parameter anyway,
  the digests of the first sync differ; a parameter that moves is reported by name.
- SGLang chooses the attention backend for the GPU; attention has no weights of its own.
- The KV cache holds `kv_cache_tokens`, or else what is left of the engine's memory share (the same as for vLLM) beside
  the weights.

Same seed, same tokens: each call seeds the generators that tokens are drawn from (sampling_backend pytorch). All
requests of a call arrive together, so the same requests share the same steps. SGLang guarantees equal results only for
equal steps: not across releases, GPUs, engine.tp, or other batches of the same prompts. Its
enable_deterministic_inference, which fixes the order of sums in the kernels at the price of speed, is off.
Asserted by tests/unit/engines/sglang/test_engine.py.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpo_mega
from grpo_mega.config.schema import Config
from grpo_mega.engines.replica_settings import ReplicaSettings
from grpo_mega.engines.sglang.cpu import ENVIRONMENT, threads_of
from grpo_mega.engines.sglang.scheduler_hooks import ANSWERS, LOADER
from grpo_mega.models.engine_memory import graph_bytes, workspace_bytes
from grpo_mega.models.kv_cache_memory import BATCHED_TOKENS, CACHE_FORMATS, KvCacheSize
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import UserError

STAGING_BYTES = 16 * 2**20  # in addition to the buckets of a sync; a larger buffer is not faster
_LONGEST_TMPDIR = 70  # the path of a Unix socket may have 107 characters
_NEEDED_ON_CUDA = ("sgl_kernel", "torch_memory_saver", "triton")
# Variables that describe the training rank; an engine process must not take them for its own.
_RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "SLURM_",
    "TORCH_NCCL_",
    "TORCH_FR_",
)
_CPU_VARIABLES = ("SGLANG_USE_CPU_ENGINE", "SGLANG_CPU_OMP_THREADS_BIND", "TORCHDYNAMO_DISABLE")
_CUDA_ENVIRONMENT = {
    "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED": "0",  # see the module docstring
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",  # stages of the policy leave different amounts free
}


@dataclass(frozen=True)
class SglangSettings(ReplicaSettings):
    """Settings of one SGLang replica of tp ranks. Without CUDA, a replica with `ep` above 1 cannot sample.

    It still receives and verifies weights.
    """

    stop_texts: bool = False
    """Support requests with `stop`, for which SGLang reads the tokenizer."""
    timeout_seconds: float = 600.0
    """Limit for every answer of SGLang's processes except sampling."""
    staging_bytes: int = STAGING_BYTES
    """Size of the buffer through which a rank writes into SGLang's memory."""

    @classmethod
    def from_config(cls, config: Config, model_folder: Path) -> SglangSettings:
        """Return the settings of the replica that the config asks for."""
        return cls.from_parts(
            config,
            model_folder,
            stop_texts=config.environment is not None,
            timeout_seconds=config.guard.timeout_seconds,
            staging_bytes=min(config.weight_sync.bucket_bytes, STAGING_BYTES),
        )


@dataclass(frozen=True)
class GpuMemory:
    """Memory of a device in bytes."""

    free: int
    total: int
    workspace: float
    """What the engine needs beside weights and KV cache (models/engine_memory.py)."""


def engine_arguments(settings: SglangSettings, memory: GpuMemory | None, port: int) -> dict[str, Any]:
    """Return the keyword arguments of SGLang's Engine.

    Args:
        settings: of the replica.
        memory: of the replica's fullest GPU; None without CUDA.
        port: a free port, where SGLang's own processes rendezvous.

    Raises:
        UserError: the KV cache does not hold one rollout, a GPU does not have enough free memory, or SGLang does not
            support the dtype on this machine.
    """
    arguments: dict[str, Any] = {
        "model_path": str(settings.config_dir),
        "load_format": "dummy",  # the first sync brings the weights
        "custom_weight_loader": [LOADER],
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[settings.dtype],
        "skip_tokenizer_init": not settings.stop_texts,
        "tp_size": settings.tp,
        "ep_size": settings.ep,
        "nccl_port": port,
        "context_length": settings.max_model_len + CACHE_FORMATS["sglang"].spare_tokens,
        "max_running_requests": settings.max_num_seqs,
        "random_seed": settings.seed,
        "enable_return_routed_experts": settings.return_experts,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "sampling_defaults": "openai",  # ignore the model's own sampling defaults
        "disable_overlap_schedule": True,  # with overlap a step starts before the tokens of the last one are known
        "chunked_prefill_size": BATCHED_TOKENS,
        "sleep_on_idle": True,  # a busy-waiting scheduler would block the thread of its weight server
        "stream_interval": 1 << 30,  # send each result once, when it is complete
        "log_level": "error",
    }
    machine = _cpu_arguments(settings) if memory is None else _cuda_arguments(settings, memory)
    return arguments | machine | settings.args


def _cpu_arguments(settings: SglangSettings) -> dict[str, Any]:
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
        "mem_fraction_static": 0.1,  # of host memory, without effect: max_total_tokens decides
        "max_total_tokens": cached_tokens(settings.kv_cache_tokens, settings.max_num_seqs, settings.max_model_len),
    }


def _cuda_arguments(settings: SglangSettings, memory: GpuMemory) -> dict[str, Any]:
    if settings.dtype == "fp32":
        raise UserError(
            "precision.dtype=fp32 with engine.kind=sglang: SGLang's attention kernels for CUDA compute in 16 bits",
            remedy="use precision.dtype=bf16, or engine.kind=vllm",
        )
    arguments = {
        "device": "cuda",
        "enable_memory_saver": True,
        "moe_runner_backend": "triton",
        "mem_fraction_static": static_fraction(memory, settings.memory_share),
    }
    if settings.kv_cache_tokens is not None:
        arguments["max_total_tokens"] = cached_tokens(
            settings.kv_cache_tokens, settings.max_num_seqs, settings.max_model_len
        )
    return arguments


def static_fraction(memory: GpuMemory, share: float) -> float:
    """Return `mem_fraction_static` for `engine.memory_share`.

    SGLang applies the fraction to the memory that is free at its start (mem_cache/kv_cache_configurator.py:3007), and
    to weights and KV cache only. `engine.memory_share` is a share of the whole device and includes the workspace, as
    for vLLM and the planner.

    Raises:
        UserError: less memory is free than the engine's share.
    """
    wanted = share * memory.total
    if wanted >= memory.free:
        raise UserError(
            f"engine.memory_share={share:g}: the engine needs this fraction of the {memory.total / 2**30:.1f} GiB of "
            f"a GPU, and {memory.free / 2**30:.1f} GiB are free when it starts",
            remedy=f"end other processes on the GPU, or use at most engine.memory_share="
            f"{math.floor(100 * memory.free / memory.total) / 100:g}",
        )
    return round((wanted - memory.workspace) / memory.free, 4)


def engine_workspace(settings: SglangSettings, spec: ModelSpec) -> float:
    """Return the bytes that the engine needs on one GPU beside weights and KV cache."""
    size = KvCacheSize("sglang", settings.max_model_len, settings.max_num_seqs, settings.kv_cache_tokens)
    return workspace_bytes(size, spec, graph_bytes("sglang", settings.args))


def cached_tokens(kv_cache_tokens: int | None, max_num_seqs: int, max_model_len: int) -> int:
    """Return the tokens of SGLang's KV cache (models/kv_cache_memory.py).

    Raises:
        UserError: `engine.kv_cache_tokens` does not hold one rollout of full length.
    """
    return KvCacheSize("sglang", max_model_len, max_num_seqs, kv_cache_tokens).num_tokens


def process_environment(
    present: Mapping[str, str], answers: Path, tp: int, gpus: Sequence[str] | None
) -> dict[str, str]:
    """Return the environment of SGLang's processes.

    Args:
        present: the environment of the rank that starts them.
        answers: the folder through which the schedulers answer.
        tp: number of ranks of the replica.
        gpus: the GPUs of the ranks, in order, as CUDA_VISIBLE_DEVICES names them; None without CUDA.
    """
    removed = _RANK_VARIABLES if gpus is None else (*_RANK_VARIABLES, *_CPU_VARIABLES)
    kept = {key: value for key, value in present.items() if not key.startswith(removed)}
    root = str(Path(grpo_mega.__file__).parents[1])
    machine = (
        {**ENVIRONMENT, "SGLANG_CPU_OMP_THREADS_BIND": threads_of(tp)}
        if gpus is None
        else {**_CUDA_ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    )
    return {
        **kept,
        **machine,
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # by the spare positions, which stay unused
        "OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": kept.get("HF_HUB_OFFLINE", "1"),
        "PYTHONPATH": root + (f":{kept['PYTHONPATH']}" if kept.get("PYTHONPATH") else ""),
        ANSWERS: str(answers),
    }


def visible_gpu(present: Mapping[str, str], index: int) -> str:
    """Return the name of device `index` for CUDA_VISIBLE_DEVICES, given the environment of this process."""
    names = [name.strip() for name in present.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return names[index] if names else str(index)


def check_sglang(*, on_cuda: bool) -> None:
    """Check that SGLang can be started on this machine.

    Raises:
        UserError: SGLang, or a package that it needs on CUDA, is not installed, or the path of the temporary folder is
            too long for Unix sockets.
    """
    needed = ("sglang", *_NEEDED_ON_CUDA) if on_cuda else ("sglang",)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"engine.kind=sglang needs the package {missing[0]}, which is not installed",
            remedy="run launch/setup.sh --with sglang",
        )
    if len(tempfile.gettempdir()) > _LONGEST_TMPDIR:
        raise UserError(
            f"TMPDIR={tempfile.gettempdir()}: the path is too long for the Unix sockets of SGLang's processes",
            remedy=f"set it to a folder whose path has at most {_LONGEST_TMPDIR} characters",
        )


def check_one_machine(machines: Sequence[str], tp: int) -> None:
    """Check that the ranks of a replica, which run on `machines`, are on one machine.

    Raises:
        UserError: they are on several.
    """
    if len(set(machines)) > 1:
        raise UserError(
            f"engine.tp={tp}: the ranks of a replica are on {len(set(machines))} machines, and engine.kind=sglang "
            "supports only one",
            remedy="use an engine.tp that divides the number of ranks per machine",
        )
