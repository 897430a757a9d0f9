"""Recording of vLLM's loader for any rank of any layout in one process, without other ranks, weights or devices.

The model is built for one rank of a fake process group, with its floating-point parameters on the meta device, and its
loader is recorded (vllm/recording_loader.py). The process cannot start an engine afterwards, so only planning tools use
this module, never a job.
Asserted by tests/engine/test_vllm_record.py.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from grpo_mega.engines.vllm.fp8 import built_for_fp8, model_overrides
from grpo_mega.engines.vllm.lifecycle import prepare_environment, register_model
from grpo_mega.engines.vllm.recording_loader import record_vllm
from grpo_mega.engines.weights.loader_recording import LoaderRecord, Shape
from grpo_mega.formats.stored_head import HEAD, checkpoint_spec
from grpo_mega.types import UserError


def record_ranks(
    config_dir: Path,
    tensors: Mapping[str, tuple[Shape, torch.dtype]],
    *,
    dtype: Literal["fp32", "bf16"],
    tp: int,
    ranks: Sequence[int],
    dp: int = 1,
    experts_spread: bool = False,
    fp8: bool = False,
) -> list[LoaderRecord]:
    """Record vLLM's loader on some ranks of a replica.

    Args:
        config_dir: folder with config.json.
        tensors: name -> (shape, dtype) of every tensor of the checkpoint.
        dtype: of the engine.
        tp: ranks that split one copy of the attention.
        ranks: the ranks to record, out of tp * dp.
        dp: copies of the attention.
        experts_spread: each expert is whole on one rank (expert parallelism), not split over all.
        fp8: the engine holds matrices as FP8 values and scales, which `tensors` lists; works on any machine.

    Raises:
        CannotRecordError: the loader does something other than copying slices.
        UserError: vLLM has no kernel for the model in this layout.
        ImportError: vLLM is not installed.
    """
    prepare_environment()
    register_model(config_dir)
    overrides: dict[str, Any] = {"tie_word_embeddings": HEAD not in tensors}
    if fp8:
        overrides |= model_overrides(checkpoint_spec(config_dir))
    with built_for_fp8() if fp8 else nullcontext():
        return [_record_rank(config_dir, tensors, dtype, tp, dp, rank, experts_spread, overrides) for rank in ranks]


def _record_rank(
    config_dir: Path,
    tensors: Mapping[str, tuple[Shape, torch.dtype]],
    dtype: Literal["fp32", "bf16"],
    tp: int,
    dp: int,
    rank: int,
    experts_spread: bool,
    hf_overrides: dict[str, Any],
) -> LoaderRecord:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_fake_ranks(tp * dp, rank))
        arguments: dict[str, Any] = {
            "model": str(config_dir),
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
            "tensor_parallel_size": tp,
            "data_parallel_size": dp,
            "distributed_executor_backend": "external_launcher",
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "enable_expert_parallel": experts_spread,
            "load_format": "dummy",
            "max_model_len": 64,
            "hf_overrides": hf_overrides,
        }
        config = EngineArgs(**arguments).create_engine_config()
        stack.enter_context(set_current_vllm_config(config))
        parallel_state.init_distributed_environment(
            world_size=tp * dp, rank=rank, local_rank=rank, distributed_init_method="env://", backend="fake"
        )
        parallel_state.initialize_model_parallel(tp)
        try:
            stack.enter_context(set_default_torch_dtype(config.model_config.dtype))
            try:
                with _FloatsOnMeta():
                    model = initialize_model(vllm_config=config)
            except NotImplementedError as error:
                raise UserError(
                    f"engine.tp={tp}: vLLM has no kernel on this machine for this layout of {config_dir} ({error})",
                    remedy="choose another engine.tp, or engine.ep=engine.tp for a model with experts",
                ) from None
            return record_vllm(model, tensors)
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None
            parallel_state._NODE_COUNT = None


@contextmanager
def _fake_ranks(world_size: int, rank: int) -> Iterator[None]:
    """Create a fake default process group, and patch what vLLM would ask of real ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators import cpu_communicator, shm_broadcast

    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        kwargs["backend"] = "fake"
        return new_group(*args, **kwargs)

    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group("fake", world_size=world_size, rank=rank, store=FakeStore())
    try:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, variables))
            stack.enter_context(mock.patch.object(dist, "new_group", fake_group))
            stack.enter_context(
                mock.patch.object(parallel_state, "in_the_same_node_as", return_value=[True] * world_size)
            )
            stack.enter_context(
                mock.patch.object(shm_broadcast.MessageQueue, "create_from_process_group", return_value=None)
            )
            stack.enter_context(
                mock.patch.object(
                    cpu_communicator.CpuCommunicator, "_all_group_ranks_share_shm_group_name", return_value=False
                )
            )
            yield
    finally:
        dist.destroy_process_group()


class _FloatsOnMeta(TorchFunctionMode):
    """Creates floating-point tensors on the meta device; integer tensors keep storage, for values of expert maps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones):
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            if dtype.is_floating_point:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)
