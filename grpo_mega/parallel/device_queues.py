"""CUDA_DEVICE_MAX_CONNECTIONS, the number of hardware queues through which a process launches kernels.

Before Blackwell, Megatron's tensor and context parallelism need exactly one queue: a collective overlaps with the
matrix product after it only if both start in the order of their launches (core/tensor_parallel/layers.py:621;
training/arguments.py:1412 asserts the value). Since Blackwell no layout needs it, and one queue would only serialize
other streams. CUDA reads the variable when it initializes, so each rank sets it before anything imports torch.
Asserted by tests/unit/parallel/test_device_queues.py and tests/unit/test_train.py.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from grpo_mega.parallel.topology import Topology

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
_BLACKWELL = 10  # major compute capability


def required_queues(topology: Topology, capability: tuple[int, int] | None) -> str | None:
    """Return the value of the variable that a layout needs; None if any value is right.

    Args:
        topology: the layout.
        capability: compute capability of the GPUs; None if it is unknown, which is treated like Hopper.
    """
    overlaps = topology.tp > 1 or topology.cp > 1
    return "1" if overlaps and (capability is None or capability[0] < _BLACKWELL) else None


def queue_conflict(topology: Topology, env: Mapping[str, str], capability: tuple[int, int] | None) -> str | None:
    """Return why the value in `env` is wrong for a layout; None if it is right or not set."""
    required, found = required_queues(topology, capability), env.get(VARIABLE)
    if required is None or found in (None, required):
        return None
    return (
        f"{VARIABLE}={found}: with parallel.tp={topology.tp}, parallel.cp={topology.cp} Megatron overlaps collectives "
        f"with matrix products only if it is {required}"
    )


def set_device_queues(
    topology: Topology, env: MutableMapping[str, str], capability: tuple[int, int] | None
) -> str | None:
    """Set the variable in `env` if the layout needs a value and none is set. A value that is set is kept.

    Returns:
        The conflict, if the value that was kept is wrong for the layout.
    """
    required = required_queues(topology, capability)
    if required is not None:
        env.setdefault(VARIABLE, required)
    return queue_conflict(topology, env, capability)
