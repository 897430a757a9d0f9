"""Faults of Megatron-Core 0.16 that are repaired from outside, each with its line. Applied on every machine.

Asserted by tests/parallel/test_checkpoint.py (optimizer state), tests/parallel/test_update.py (reductions,
pipeline messages).
"""

from __future__ import annotations

import functools
import queue
from typing import Any

import torch
from torch import Tensor

from grpo_mega.policy import cpu

cpu.prepare_import()

from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402 - only after prepare_import
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.tensor_parallel import mappings  # noqa: E402

# Of a pipeline's messages, for TransformerConfig. p2p_communication.py:28-47 posts send-previous, receive-previous,
# send-next, receive-next on one group. With two stages previous and next are the same rank, where messages match in
# order: an interleaved schedule takes a gradient for an activation.
PIPELINE_MESSAGES = {"batch_p2p_comm": False}


def install() -> None:
    """Idempotent."""
    setter = DistributedOptimizer._set_main_param_and_optimizer_states
    if not getattr(setter, "keeps_own_step", False):
        DistributedOptimizer._set_main_param_and_optimizer_states = _with_own_step(setter)
    sharded = DistributedOptimizer.sharded_param_state_fully_reshardable
    if not getattr(sharded, "counts_padding", False):
        DistributedOptimizer.sharded_param_state_fully_reshardable = _counting_padding(sharded)
    # filesystem_async.py:54 spawns a server process for a queue that a synchronous save puts into and gets from in this
    # process: seconds at the first save, 270 MB, and it outlives a rank that is killed
    filesystem_async._get_write_results_queue = _results_of_this_process
    if not getattr(mappings._reduce, "returns_the_sum", False):
        mappings._reduce = _reducing_contiguous(mappings._reduce)


def fill_optimizer_state(optimizer: Any) -> None:
    """Give torch's AdamW the state that a load writes into; before its first step it has none, and
    distrib_optimizer.py:642 asserts that it has."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = inner.optimizer
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _with_own_step(setter: Any) -> Any:
    """distrib_optimizer.py:939 expects the key `step` among the loaded tensors, which the checkpoint keeps elsewhere;
    and :825 gives all parameters one shared step tensor, which AdamW then advances once per parameter."""

    @functools.wraps(setter)
    def set_states(self: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state and torch.is_tensor(state["step"]):
            state["step"] = state["step"].clone()
            tensors = {"step": state["step"], **tensors}
        setter(self, model_param, tensors)

    set_states.keeps_own_step = True  # type: ignore[attr-defined]
    return set_states


@functools.cache
def _results_of_this_process() -> queue.Queue[Any]:
    return queue.Queue()


def _counting_padding(sharded: Any) -> Any:
    """distrib_optimizer.py:1113 joins buckets without the padding at their ends, :1501 cuts parameters out of the
    result at offsets that count it: behind a padded bucket every parameter gets another's master weights and moments.
    (A tied head under pipeline parallelism has a bucket of its own.) Inside, buckets say that none of them is padded.
    """

    @functools.wraps(sharded)
    def state(self: Any, *args: Any, **kwargs: Any) -> Any:
        sized = [(b, b.grad_data.numel()) for buffer in self.buffers for b in (buffer, *buffer.buckets)]
        unpadded = [b.numel_unpadded for b, _ in sized]
        for b, numel in sized:
            b.numel_unpadded = numel
        try:
            return sharded(self, *args, **kwargs)
        finally:
            for (b, _), numel in zip(sized, unpadded, strict=True):
                b.numel_unpadded = numel

    state.counts_padding = True  # type: ignore[attr-defined]
    return state


def _reducing_contiguous(reduce: Any) -> Any:
    """mappings.py:31-33 all-reduces `input_.contiguous()` and returns `input_`: the sum of a strided tensor is lost."""

    @functools.wraps(reduce)
    def reduced(input_: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return reduce(input_.contiguous(), *args, **kwargs)  # type: ignore[no-any-return]

    reduced.returns_the_sum = True  # type: ignore[attr-defined]
    return reduced
