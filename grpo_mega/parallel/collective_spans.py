"""Reports when this process is inside a collective or a point-to-point message, for the trace of a run.

The methods of torch's process groups are replaced while the context is open: every collective passes through them,
also those of Megatron-Core and vLLM, which hold references to functions of torch.distributed. With NCCL a call only
enqueues work on the device; the device's own times are in a torch profile (`observe.profile_steps`).
Asserted by tests/parallel/test_trace_of_ranks.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist

_METHODS = (
    *("allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "allgather_into_tensor_coalesced"),
    *("broadcast", "reduce", "gather", "scatter", "reduce_scatter", "_reduce_scatter_base", "alltoall"),
    *("reduce_scatter_tensor_coalesced", "alltoall_base", "send", "recv", "recv_anysource", "barrier"),
)
_MAX_OPEN = 1024  # collectives whose `wait` has not been called


class RecordSpan(Protocol):
    """Receiver of spans; called in any thread of the process."""

    def __call__(self, name: str, category: str, start_ns: int, end_ns: int, args: dict[str, Any]) -> None:
        """Take a span of `time.monotonic_ns`."""
        ...


@contextmanager
def recording_collectives(record: RecordSpan) -> Iterator[None]:
    """Report each call of a collective, and each wait for one, to `record` while the context is open."""
    started: dict[int, str] = {}
    groups: Any = dist.ProcessGroup
    works: Any = dist.Work
    # as the class holds them: what `getattr` returns would not bind to a group when it is put back
    originals = {name: vars(groups)[name] for name in _METHODS if name in vars(groups)}
    original_wait, wait = vars(works)["wait"], works.wait
    for name in originals:
        setattr(groups, name, _recorded_call(name.strip("_"), getattr(groups, name), record, started))

    def recorded_wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.monotonic_ns()
        try:
            return wait(work, *args, **kwargs)
        finally:
            name = started.pop(id(work), "collective")
            record(f"wait {name}", "collective", start, time.monotonic_ns(), {})

    works.wait = recorded_wait
    try:
        yield
    finally:
        works.wait = original_wait
        for name, method in originals.items():
            setattr(groups, name, method)


def _recorded_call(name: str, method: Any, record: RecordSpan, started: dict[int, str]) -> Callable[..., Any]:
    def call(group: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.monotonic_ns()
        work = method(group, *args, **kwargs)
        if len(started) < _MAX_OPEN:
            started[id(work)] = name
        details = {"ranks": group.size(), "bytes": sum(map(_num_bytes, args))}
        record(name, "collective", start, time.monotonic_ns(), details)
        return work

    return call


def _num_bytes(value: object) -> int:
    """Return the bytes of a tensor or of nested lists of tensors; 0 for anything else."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 0
