"""How SGLang is started: the arguments of its Engine and the environment of its processes, without CUDA and with it.

What differs on CUDA, of SGLang 0.5.23 (paths inside sglang/srt; read, not run: nothing here has been run on a GPU):
- `enable_memory_saver`: weights and KV cache lie in memory of torch_memory_saver, which `release` gives back and
  `resume` takes again at the same addresses (managers/scheduler_components/weight_updater.py:337-420), so CUDA graphs
  stay valid. What was released comes back undefined: buffers are put back by SGLang (there, :478), parameters by the
  next sync.
- The MoE runner is `triton`, the one that reads experts as they are loaded: flashinfer_trtllm packs them into blocks
  (layers/quantization/unquant.py:976, the default of some models on Blackwell: arg_groups/overrides.py:823), and
  SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED (unquant.py:936) would mix the rows of gate and up. Linears, embeddings and heads
  in bf16 have no step after loading on CUDA (unquant.py:568); should one rewrite a parameter after all, the digests
  of the first sync differ, and one that is put elsewhere is named.
- Attention is SGLang's choice for the GPU; it has no weights of its own.
- The KV cache is `kv_cache_tokens`, else what the share of the device that vLLM gets leaves beside the weights.

Same seed, same tokens: tokens are drawn from the generators that each call seeds (sampling_backend pytorch), and all
requests of a call arrive together, so that the same requests share the same steps. SGLang promises equal results only
for equal steps: not across releases, GPUs, engine.tp, or other batches of the same prompts (that is its
enable_deterministic_inference, which fixes the order of its kernels' sums at the price of speed; it is off).
Asserted by tests/unit/engines/sglang/test_engine.py.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpo_mega
from grpo_mega.engines.sglang.cpu import ENVIRONMENT, threads_of
from grpo_mega.engines.sglang.scheduler_hooks import ANSWERS, LOADER
from grpo_mega.models.kv_cache import BATCHED_TOKENS, CACHE_FORMATS, CUDA_MEMORY_SHARE, KvCacheSize
from grpo_mega.types import UserError

_LONGEST_TMPDIR = 70  # of 107 characters that the path of a socket may have
_NEEDED_ON_CUDA = ("sgl_kernel", "torch_memory_saver", "triton")
# Where this rank is, which an engine of its own must not take for where it is itself.
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM_", "TORCH_NCCL_")
_OF_CPU = ("SGLANG_USE_CPU_ENGINE", "SGLANG_CPU_OMP_THREADS_BIND", "TORCHDYNAMO_DISABLE")
_ON_CUDA = {
    "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED": "0",  # see above
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",  # stages of the policy leave different amounts of their GPUs free
}


@dataclass(frozen=True)
class SglangSettings:
    """How one engine is built; as `SglangEngine`. `port`: for its own processes to meet."""

    config_dir: Path
    dtype: Literal["fp32", "bf16"]
    tp: int
    ep: int
    max_model_len: int
    max_num_seqs: int
    kv_cache_tokens: int | None
    seed: int
    stops_at_texts: bool
    tell_experts: bool
    port: int


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of a device: those that nobody has now, and all."""

    free: int
    total: int


def engine_arguments(settings: SglangSettings, memory: GpuMemory | None) -> dict[str, Any]:
    """Of SGLang's Engine.

    Args:
        settings: see there.
        memory: of the engine's fullest GPU; None without CUDA.

    Raises:
        UserError: the KV cache does not hold a rollout, a GPU has no room for the engine, or it cannot compute like
            that on this machine.
    """
    arguments: dict[str, Any] = {
        "model_path": str(settings.config_dir),
        "load_format": "dummy",  # the first sync brings the weights
        "custom_weight_loader": [LOADER],
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[settings.dtype],
        "skip_tokenizer_init": not settings.stops_at_texts,
        "tp_size": settings.tp,
        "ep_size": settings.ep,
        "nccl_port": settings.port,
        "context_length": settings.max_model_len + CACHE_FORMATS["sglang"].spare_tokens,
        "max_running_requests": settings.max_num_seqs,
        "random_seed": settings.seed,
        "enable_return_routed_experts": settings.tell_experts,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "sampling_defaults": "openai",  # ignore the model's own
        "disable_overlap_schedule": True,  # the next step would start before the last one's tokens are known
        "chunked_prefill_size": BATCHED_TOKENS,
        "sleep_on_idle": True,  # an idle scheduler would take the interpreter away from its door
        "stream_interval": 1 << 30,  # an answer is sent when it is complete
        "log_level": "error",
    }
    return arguments | (_on_cpu(settings) if memory is None else _on_cuda(settings, memory))


def _on_cpu(settings: SglangSettings) -> dict[str, Any]:
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
        "mem_fraction_static": 0.1,  # of host memory, for nothing: max_total_tokens says how much
        "max_total_tokens": cached_tokens(settings.kv_cache_tokens, settings.max_num_seqs, settings.max_model_len),
    }


def _on_cuda(settings: SglangSettings, memory: GpuMemory) -> dict[str, Any]:
    if settings.dtype == "fp32":
        raise UserError(
            "precision.dtype=fp32 with engine.kind=sglang: SGLang's attention on CUDA computes in 16 bits",
            remedy="use precision.dtype=bf16, or engine.kind=vllm",
        )
    arguments = {
        "device": "cuda",
        "enable_memory_saver": True,
        "moe_runner_backend": "triton",
        "mem_fraction_static": static_fraction(memory),
    }
    if settings.kv_cache_tokens is not None:
        arguments["max_total_tokens"] = cached_tokens(
            settings.kv_cache_tokens, settings.max_num_seqs, settings.max_model_len
        )
    return arguments


def static_fraction(memory: GpuMemory) -> float:
    """mem_fraction_static: SGLang takes it of what is free at its start (mem_cache/kv_cache_configurator.py:3007), here
    it is a share of the device, as the planner and vLLM understand it.

    Raises:
        UserError: so much is not free.
    """
    wanted = CUDA_MEMORY_SHARE * memory.total
    if wanted >= memory.free:
        raise UserError(
            f"engine.kind=sglang: {memory.free / 2**30:.1f} GiB of a GPU are free at the start of the engine, and it "
            f"takes {CUDA_MEMORY_SHARE:g} of its {memory.total / 2**30:.1f} GiB",
            remedy="cut the policy over more ranks (parallel.tp, parallel.pp), or end what else is on the GPU",
        )
    return round(wanted / memory.free, 4)


def cached_tokens(kv_cache_tokens: int | None, max_num_seqs: int, max_model_len: int) -> int:
    """Return the tokens of SGLang's KV cache (models/kv_cache.py).

    Raises:
        UserError: `engine.kv_cache_tokens` does not hold one rollout of full length.
    """
    return KvCacheSize("sglang", max_model_len, max_num_seqs, kv_cache_tokens).num_tokens


def process_environment(
    present: Mapping[str, str], answers: Path, tp: int, gpus: Sequence[str] | None
) -> dict[str, str]:
    """Of SGLang's processes.

    Args:
        present: of the rank that starts them.
        answers: the folder through which its schedulers answer.
        tp: of its ranks.
        gpus: of its ranks, in their order, as CUDA_VISIBLE_DEVICES names them; None without CUDA.
    """
    left_out = _OF_RANKS if gpus is None else (*_OF_RANKS, *_OF_CPU)
    kept = {key: value for key, value in present.items() if not key.startswith(left_out)}
    root = str(Path(grpo_mega.__file__).parents[1])
    machine = (
        {**ENVIRONMENT, "SGLANG_CPU_OMP_THREADS_BIND": threads_of(tp)}
        if gpus is None
        else {**_ON_CUDA, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    )
    return {
        **kept,
        **machine,
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # a few positions more than the model has, none of them used
        "OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": kept.get("HF_HUB_OFFLINE", "1"),
        "PYTHONPATH": root + (f":{kept['PYTHONPATH']}" if kept.get("PYTHONPATH") else ""),
        ANSWERS: str(answers),
    }


def visible_gpu(present: Mapping[str, str], index: int) -> str:
    """What CUDA_VISIBLE_DEVICES calls device `index` of a process with this environment."""
    names = [name.strip() for name in present.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return names[index] if names else str(index)


def check_sglang(*, on_cuda: bool) -> None:
    """Is there a SGLang that this adapter can drive?

    Raises:
        UserError: it, or what it needs on CUDA, is not installed; or the temporary folder is nowhere to meet.
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
            f"TMPDIR={tempfile.gettempdir()}: SGLang's processes have sockets there, whose paths cannot be that long",
            remedy=f"set it to a folder of at most {_LONGEST_TMPDIR} characters",
        )


def check_one_machine(machines: Sequence[str], tp: int) -> None:
    """Raises UserError: the ranks of an engine, whose machines these are, are not on one."""
    if len(set(machines)) > 1:
        raise UserError(
            f"engine.tp={tp}: the ranks of an engine are on {len(set(machines))} machines, and SGLang's processes are "
            "on one",
            remedy="use an engine.tp that divides the ranks of a machine",
        )
