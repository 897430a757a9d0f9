"""Starting and ending vLLM inside a training process: everything here exists because vLLM expects to own its process.

What is changed around its construction is put back: generators, RANK and LOCAL_RANK, `torch.set_num_threads`. The
default process group is never touched: vLLM's own shutdown destroys it, so `stop` does the rest of it by hand.
Written against vLLM 0.32; tests/engine/test_vllm_engine.py asserts each effect.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import uuid
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from grpo_mega.convert.families import hf_shapes, keeps_float32
from grpo_mega.convert.spec import ModelSpec
from grpo_mega.engines.record import LoaderRecord
from grpo_mega.engines.vllm.cpu import correct_vllm
from grpo_mega.engines.vllm.fp8 import OWN_LOADER, Fp8Weights, fp8_arguments, fp8_checkpoint_tensors
from grpo_mega.engines.vllm.record import RECORDING, recording_load_format
from grpo_mega.engines.vllm.routing import Steps, bind_routers
from grpo_mega.engines.vllm.splits import check_tp, local_kv_heads
from grpo_mega.types import UserError

BLOCK_TOKENS = 32  # the CPU kernels want multiples of 32; larger blocks waste cache on short rollouts
_EXPERT_MULTIPLE = 32  # rows and columns, in cpu_moe.py
_CPU_LATENT = (512, 64)  # kv_lora_rank and qk_rope_head_dim, in csrc/cpu/mla_decode.cpp
_MAX_BATCHED_TOKENS = 8192  # prompt tokens of one engine step
_CUDA_MEMORY_SHARE = 0.6  # of the device, when engine.kv_cache_tokens does not say; the policy has left it by then


@dataclass(frozen=True)
class VllmSettings:
    """How one replica is built. Sizes in tokens and sequences; `kv_cache_tokens` None: what `max_num_seqs` rollouts of
    `max_model_len` tokens need (on CUDA: a share of the device)."""

    config_dir: Path
    dtype: Literal["fp32", "bf16"]
    tp: int
    max_model_len: int
    max_num_seqs: int
    kv_cache_tokens: int | None
    seed: int
    dp: int = 1
    """Copies of the attention: the replica has tp * dp ranks, and the sizes are of each copy."""
    experts_spread: bool = False
    """Experts are whole on one rank each, not cut over all."""
    tell_experts: bool = False
    """Take down which experts each token is sent to."""
    fp8: Fp8Weights | None = None
    """Hold matrices as FP8 codes and scales: those that a sync brings, or of the loader's making."""


@dataclass(frozen=True)
class StartedEngine:
    """vLLM's LLMEngine, the record of its loader or why there is none, and, where asked for, what routers choose."""

    llm: Any
    record: LoaderRecord | str
    steps: Steps | None


def kv_cache_bytes(settings: VllmSettings, spec: ModelSpec) -> int:
    """Bytes of the KV cache on one rank: blocks * layers * elements per token * itemsize * BLOCK_TOKENS.

    Raises:
        UserError: `engine.kv_cache_tokens` does not hold one rollout of full length.
    """
    per_rollout = -(-settings.max_model_len // BLOCK_TOKENS)
    blocks = settings.max_num_seqs * per_rollout
    if settings.kv_cache_tokens is not None:
        blocks = settings.kv_cache_tokens // BLOCK_TOKENS
        if blocks < per_rollout:
            raise UserError(
                f"engine.kv_cache_tokens={settings.kv_cache_tokens} does not hold one rollout of "
                f"{settings.max_model_len} tokens; use at least {per_rollout * BLOCK_TOKENS}"
            )
    per_token = spec.num_layers * cached_elements(spec, settings.tp)
    itemsize = 4 if settings.dtype == "fp32" else 2
    return (blocks + 1) * BLOCK_TOKENS * per_token * itemsize  # vLLM keeps one block as a null block


def cached_elements(spec: ModelSpec, tp: int) -> int:
    """Of one token in one layer on one rank: keys and values of its heads, or the latent that all heads share."""
    if spec.mla is not None:
        return spec.mla.kv_rank + spec.mla.rope_dim
    return 2 * local_kv_heads(spec, tp) * spec.head_dim


def start(settings: VllmSettings, spec: ModelSpec) -> StartedEngine:
    """The engine on this rank, with dummy weights. Every rank of the world calls it.

    Raises:
        UserError: the model or the layout does not fit.
        ImportError: vLLM is not installed.
    """
    world = dist.get_world_size()
    if world % (settings.tp * settings.dp):
        keys = f"engine.tp={settings.tp}" + (f" x engine.dp={settings.dp}" if settings.dp > 1 else "")
        raise UserError(f"{keys} does not divide the {world} ranks of the job; use a divisor")
    check_tp(spec, settings.tp)
    prepare_environment()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # warns per rank that a CPU has no Triton
    try:
        import vllm
    except ImportError as error:
        raise ImportError("engine.kind=vllm needs vLLM: pip install 'grpo_mega[vllm]'") from error
    if not torch.cuda.is_available():
        if settings.fp8:
            raise UserError("engine.fp8 needs CUDA devices, and this machine has none; leave engine.fp8 out")
        _check_cpu_head(spec)
        _check_cpu_experts(settings, spec)
        correct_vllm()
    with ExitStack() as stack:
        stack.enter_context(keep_generators())
        stack.enter_context(_environment_of_ranks(settings))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # vLLM walks over torch.distributed's deprecated names
        if not torch.cuda.is_available():
            stack.enter_context(_cpu_construction())
        register_model(settings.config_dir)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]
        steps: list[Steps] = []
        records = recording_load_format(
            checkpoint_tensors(spec, dtype, fp8=settings.fp8 == "codes"),
            (lambda model, config: steps.append(bind_routers(model, config))) if settings.tell_experts else None,
            OWN_LOADER if settings.fp8 == "own_loader" else None,
        )
        arguments = vllm.EngineArgs(**_engine_arguments(settings, spec))
        engine = vllm.LLMEngine.from_engine_args(arguments)
    # The client's finalizer runs the full shutdown, default process group included, when it is collected.
    engine.engine_core._finalizer.detach()
    return StartedEngine(engine, records[-1], steps[-1] if steps else None)


def stop(engine: Any) -> None:
    """The shutdown of vLLM, without destroying the default process group."""
    from vllm.distributed import parallel_state

    core = engine.engine_core.engine_core
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = None
    parallel_state._NODE_COUNT = None
    gc.collect()


@contextmanager
def keep_generators() -> Iterator[None]:
    """Put the global generators (torch, CUDA, Python, NumPy) back at the end."""
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)


def prepare_environment() -> None:
    """What vLLM reads while it is imported. It stays: vLLM reads some of it again later."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs in this process
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # V2 samples from per-request seeds, not from the global generators
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB, and overrides kv_cache_memory_bytes
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # binding would pin all ranks to the same cores
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextmanager
def _environment_of_ranks(settings: VllmSettings) -> Iterator[None]:
    """The external launcher reads its rank from the environment, which a process that was forked does not have.

    config/parallel.py takes RANK // tp for the data-parallel rank, as if all ranks were one replica: with several, it
    is told the rank within the replica. (Groups are made from torch.distributed's ranks, right for any number.)
    """
    told = {key: os.environ.get(key) for key in ("RANK", "LOCAL_RANK")}
    if told["RANK"] is None or settings.dp > 1:
        ranks = settings.tp * settings.dp
        os.environ["RANK"] = str(dist.get_rank() % ranks if settings.dp > 1 else dist.get_rank())
    if told["LOCAL_RANK"] is None:
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    try:
        yield
    finally:
        for key, value in told.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextmanager
def _cpu_construction() -> Iterator[None]:
    """What must be different while vLLM builds its CPU worker.

    - Linears keep their plain weight: model_executor/layers/linear.py would pack it for oneDNN and drop it.
    - The shared memory of a group gets a name of this job: cpu_communicator.py derives it from `env://` and the ranks
      alone, so that two jobs on one machine would share it. Its files are unlinked at the end, or they would outlive a
      job that is killed; the mappings stay, and a barrier of vLLM's has seen every rank of the group map them.
    - cpu_worker.py replaces `torch.set_num_threads`; the policy may still call it.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.model_executor.layers.linear import LinearBase

    job = [uuid.uuid4().hex[:12]]
    dist.broadcast_object_list(job, src=0)
    group_name, set_num_threads = _CPUSHMDistributed.make_group_name, torch.set_num_threads

    names: set[str] = set()

    def name_of_job(communicator: Any) -> str:
        name = f"{job[0]}{group_name(communicator)}".replace("/", "")  # a name in shared memory has no slash inside
        names.add(name)
        return name

    _CPUSHMDistributed.make_group_name = staticmethod(name_of_job)
    LinearBase._cpu_skip_gemm_dispatch = True
    try:
        yield
    finally:
        del LinearBase._cpu_skip_gemm_dispatch
        _CPUSHMDistributed.make_group_name = staticmethod(group_name)
        torch.set_num_threads = set_num_threads
        for file in Path("/dev/shm").iterdir():
            if file.name.rpartition("_")[0] in names:  # vLLM appends _<rank of the group>
                file.unlink(missing_ok=True)  # the group's other ranks do the same


def _check_cpu_head(spec: ModelSpec) -> None:
    """Refuse what would fail only at the first token, deep inside the kernels."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if spec.mla is not None:
        if (spec.mla.kv_rank, spec.mla.rope_dim) != _CPU_LATENT:
            raise UserError(
                f"model.path: kv_lora_rank={spec.mla.kv_rank}, qk_rope_head_dim={spec.mla.rope_dim} of config.json: "
                f"vLLM's latent attention on CPU takes {_CPU_LATENT[0]} and {_CPU_LATENT[1]}; use these"
            )
        return
    head_dim = spec.head_dim
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in sizes:
        raise UserError(
            f"model.path: head_dim={head_dim} of config.json: vLLM's attention on CPU takes heads of "
            f"{', '.join(map(str, sizes))}; use one of them"
        )


def _check_cpu_experts(settings: VllmSettings, spec: ModelSpec) -> None:
    """Refuse what the kernel would pad: then the weights are not where the loader put them."""
    ways = 1 if settings.experts_spread else settings.tp * settings.dp
    if spec.moe is None:
        return
    if spec.moe.expert_ffn_size % (ways * _EXPERT_MULTIPLE) or spec.hidden_size % _EXPERT_MULTIPLE:
        ranks = settings.tp * settings.dp
        raise UserError(
            f"engine.tp={settings.tp}, engine.dp={settings.dp}, engine.ep={ranks // ways}: vLLM's kernel on CPU takes "
            f"experts whose rows on a rank are a multiple of {_EXPERT_MULTIPLE}, here {spec.moe.expert_ffn_size} / "
            f"{ways}; use engine.ep={ranks} or fewer ranks"
        )


def checkpoint_tensors(
    spec: ModelSpec, dtype: torch.dtype, *, fp8: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and dtype of every tensor that a sync brings. `fp8`: matrices as codes and scales."""
    plain = {name: (shape, torch.float32 if keeps_float32(name) else dtype) for name, shape in hf_shapes(spec).items()}
    return fp8_checkpoint_tensors(plain) if fp8 else plain


def register_model(config_dir: Path) -> None:
    """Give vLLM the model's class: else it starts a second Python that imports all of vLLM to look at it."""
    from vllm.model_executor.models.registry import ModelRegistry, _LazyRegisteredModel

    config = json.loads((config_dir / "config.json").read_text(encoding="utf-8"))
    for architecture in config.get("architectures") or ():
        known = ModelRegistry.models.get(architecture)
        if isinstance(known, _LazyRegisteredModel):
            ModelRegistry.register_model(architecture, known.load_model_cls())


def _engine_arguments(settings: VllmSettings, spec: ModelSpec) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": str(settings.config_dir),
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[settings.dtype],
        "load_format": RECORDING,  # the first sync brings the weights
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # ignore the model's own sampling defaults
        "logprobs_mode": "processed_logprobs",
        "distributed_executor_backend": "external_launcher",
        "tensor_parallel_size": settings.tp,
        "data_parallel_size": settings.dp,
        "enable_expert_parallel": settings.experts_spread,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": max(_MAX_BATCHED_TOKENS, settings.max_model_len, settings.max_num_seqs),
        "block_size": BLOCK_TOKENS,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": settings.seed,
    }
    if settings.fp8 is not None:
        arguments |= fp8_arguments(settings.fp8, spec)
    on_cuda = torch.cuda.is_available()
    if settings.kv_cache_tokens is not None or not on_cuda:
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes(settings, spec)
    if on_cuda:
        arguments |= {"gpu_memory_utilization": _CUDA_MEMORY_SHARE, "enable_sleep_mode": True}
    else:
        arguments["enforce_eager"] = True
        if spec.mla is not None:  # with AMX vLLM would take a kernel that reads packed copies of its own
            arguments["attention_backend"] = "CPU_MLA"
    return arguments
