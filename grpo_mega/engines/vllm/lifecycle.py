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
from grpo_mega.engines.vllm.cpu import correct_vllm
from grpo_mega.engines.vllm.fp8 import OWN_LOADER
from grpo_mega.engines.vllm.record import recording_load_format
from grpo_mega.engines.vllm.routing import Steps, bind_routers
from grpo_mega.engines.vllm.tp_rules import check_tp
from grpo_mega.engines.weights.loader_recording import LoaderRecord
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import UserError


@dataclass(frozen=True)
class StartedEngine:
    """vLLM's LLMEngine, the record of its loader or why there is none, and, where asked for, what routers choose."""

    llm: Any
    record: LoaderRecord | str
    steps: Steps | None


def start(settings: VllmSettings, spec: ModelSpec) -> StartedEngine:
    """The engine on this rank, with dummy weights. Every rank of the world calls it.

    Raises:
        UserError: the model or the layout does not fit.
        ImportError: vLLM is not installed.
    """
    world = dist.get_world_size()
    if world % (settings.tp * settings.dp):
        keys = f"engine.tp={settings.tp}" + (f" x engine.dp={settings.dp}" if settings.dp > 1 else "")
        raise UserError(f"{keys} does not divide the {world} ranks of the job", remedy="use a divisor")
    check_tp(spec, settings.tp)
    prepare_environment()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # warns per rank that a CPU has no Triton
    try:
        import vllm
    except ImportError as error:
        raise ImportError("engine.kind=vllm needs vLLM: pip install 'grpo_mega[vllm]'") from error
    if not torch.cuda.is_available():
        if settings.fp8:
            raise UserError("engine.fp8 needs CUDA devices, and this machine has none", remedy="leave engine.fp8 out")
        check_cpu_head(spec)
        check_cpu_experts(settings, spec)
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
        arguments = vllm.EngineArgs(**engine_arguments(settings, spec))
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


def register_model(config_dir: Path) -> None:
    """Give vLLM the model's class: else it starts a second Python that imports all of vLLM to look at it."""
    from vllm.model_executor.models.registry import ModelRegistry, _LazyRegisteredModel

    config = json.loads((config_dir / "config.json").read_text(encoding="utf-8"))
    for architecture in config.get("architectures") or ():
        known = ModelRegistry.models.get(architecture)
        if isinstance(known, _LazyRegisteredModel):
            ModelRegistry.register_model(architecture, known.load_model_cls())
