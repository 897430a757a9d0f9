"""Startup and shutdown of vLLM inside a training process, although vLLM expects to own its process.

State that is changed while vLLM is constructed is restored: random generators, RANK and LOCAL_RANK,
`torch.set_num_threads`. The default process group is never touched. vLLM's own shutdown destroys it, so `stop` performs
the other steps of that shutdown itself.
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
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from grpo_mega.engines.vllm.arguments import (
    VllmSettings,
    check_cpu_experts,
    check_cpu_head,
    checkpoint_tensors,
    engine_arguments,
)
from grpo_mega.engines.vllm.cpu import patch_vllm
from grpo_mega.engines.vllm.recording_loader import recording_load_format, tied_as_configured
from grpo_mega.engines.vllm.routing import Steps, bind_routers
from grpo_mega.engines.vllm.tp_rules import check_tp
from grpo_mega.engines.weights.loader_recording import LoaderRecord
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.shared_memory import SHARED_MEMORY
from grpo_mega.types import UserError


@dataclass(frozen=True)
class StartedEngine:
    """A vLLM engine that was started on this rank."""

    llm: Any
    """vLLM's LLMEngine."""
    record: LoaderRecord | str
    """The recorded loader, or the reason why it cannot be recorded."""
    steps: Steps | None
    """The choices of the routers; None unless `return_experts` is set."""


def start(settings: VllmSettings, spec: ModelSpec) -> StartedEngine:
    """Start vLLM on this rank with dummy weights. Every rank of the world calls it.

    Raises:
        UserError: the model or the layout is not supported.
        ImportError: vLLM is not installed.
    """
    world = dist.get_world_size()
    if world % (settings.tp * settings.dp):
        keys = f"engine.tp={settings.tp}" + (f" x engine.dp={settings.dp}" if settings.dp > 1 else "")
        raise UserError(
            f"{keys} does not divide the {world} ranks of the job", remedy="use a divisor of the number of ranks"
        )
    check_tp(spec, settings.tp)
    prepare_environment()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # every rank would warn that a CPU has no Triton
    try:
        import vllm
    except ImportError as error:
        raise ImportError("engine.kind=vllm needs vLLM: pip install 'grpo_mega[vllm]'") from error
    if not torch.cuda.is_available():
        if settings.fp8:
            raise UserError("engine.fp8 needs CUDA devices, and none was found", remedy="remove engine.fp8")
        check_cpu_head(spec)
        check_cpu_experts(settings, spec)
        patch_vllm()
    with ExitStack() as stack:
        stack.enter_context(keep_generators())
        stack.enter_context(environment_of_ranks(settings))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # vLLM uses deprecated names of torch.distributed
        if not torch.cuda.is_available():
            stack.enter_context(_cpu_construction())
        register_model(settings.config_dir)
        stack.enter_context(tied_as_configured())
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]
        steps: list[Steps] = []
        records = recording_load_format(
            checkpoint_tensors(spec, dtype, fp8=settings.fp8),
            (lambda model, config: steps.append(bind_routers(model, config))) if settings.return_experts else None,
        )
        arguments = vllm.EngineArgs(**engine_arguments(settings, spec))
        engine = vllm.LLMEngine.from_engine_args(arguments)
    # The client's finalizer runs the full shutdown, default process group included, when it is collected.
    engine.engine_core._finalizer.detach()
    return StartedEngine(engine, records[-1], steps[-1] if steps else None)


def stop(engine: Any) -> None:
    """Shut vLLM down without destroying the default process group."""
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
    """Restore the global random generators (torch, CUDA, Python, NumPy) at exit."""
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
    """Set the environment variables that vLLM reads at import. They stay set: vLLM reads some of them again later."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs in this process
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # V2 samples from per-request seeds, not from the global generators
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB, and overrides kv_cache_memory_bytes
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # binding would pin all ranks to the same cores
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextmanager
def environment_of_ranks(settings: VllmSettings) -> Iterator[None]:
    """Set RANK and LOCAL_RANK for vLLM's external launcher, as vLLM reads them.

    config/parallel.py computes the data-parallel rank as RANK // tp, as if all ranks were one replica. With several
    replicas RANK is therefore the rank within the replica. (Process groups use torch.distributed's own ranks, which is
    right for any number of replicas.)
    v1/worker/gpu_worker.py:492 takes LOCAL_RANK as the index of the device. That is not the rank's place on its machine
    where Slurm shows each task only its own GPU (`--gpus-per-task=1`).
    """
    previous = {key: os.environ.get(key) for key in ("RANK", "LOCAL_RANK")}
    if previous["RANK"] is None or settings.dp > 1:
        ranks = settings.tp * settings.dp
        os.environ["RANK"] = str(dist.get_rank() % ranks if settings.dp > 1 else dist.get_rank())
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # a forked process does not have it
    try:
        yield
    finally:
        for key, value in previous.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _cpu_construction() -> Iterator[None]:
    """Change three things while vLLM builds its CPU worker, and restore them at exit.

    - Linear layers keep their plain weight: model_executor/layers/linear.py would pack it for oneDNN and drop it.
    - The shared memory of a group gets a name that is unique to the job. cpu_communicator.py derives the name from
      `env://` and the ranks alone, so two jobs on one machine would share it. The files are unlinked at exit, because
      they would outlive a killed job. The mappings stay: vLLM's barrier ensures that every rank has mapped them.
    - cpu_worker.py replaces `torch.set_num_threads`, which the policy still calls.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.model_executor.layers.linear import LinearBase

    job = [uuid.uuid4().hex[:12]]
    dist.broadcast_object_list(job, src=0)
    group_name, set_num_threads = _CPUSHMDistributed.make_group_name, torch.set_num_threads

    names: set[str] = set()

    def unique_name(communicator: Any) -> str:
        name = f"{job[0]}{group_name(communicator)}".replace("/", "")  # names of shared memory contain no slash
        names.add(name)
        return name

    _CPUSHMDistributed.make_group_name = staticmethod(unique_name)
    LinearBase._cpu_skip_gemm_dispatch = True
    try:
        yield
    finally:
        del LinearBase._cpu_skip_gemm_dispatch
        _CPUSHMDistributed.make_group_name = staticmethod(group_name)
        torch.set_num_threads = set_num_threads
        for file in SHARED_MEMORY.iterdir():
            if file.name.rpartition("_")[0] in names:  # vLLM appends _<rank of the group>
                file.unlink(missing_ok=True)  # the group's other ranks do the same


def register_model(config_dir: Path) -> None:
    """Register the model's class with vLLM, which would otherwise start a second Python to inspect the class."""
    from vllm.model_executor.models.registry import ModelRegistry, _LazyRegisteredModel

    config = json.loads((config_dir / "config.json").read_text(encoding="utf-8"))
    for architecture in config.get("architectures") or ():
        known = ModelRegistry.models.get(architecture)
        if isinstance(known, _LazyRegisteredModel):
            ModelRegistry.register_model(architecture, known.load_model_cls())
