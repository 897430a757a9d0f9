"""The program sets the number of CUDA's queues where the layout needs it, and keeps the user's value."""

from __future__ import annotations

import pytest

from grpo_mega.parallel.device_queues import required_queues, set_device_queues
from grpo_mega.parallel.topology import Topology

HOPPER, BLACKWELL = (9, 0), (10, 0)


@pytest.mark.parametrize(
    ("topology", "capability", "required"),
    [
        (Topology(2, tp=2), HOPPER, "1"),
        (Topology(2, cp=2), HOPPER, "1"),
        (Topology(2, tp=2), None, "1"),
        (Topology(2, tp=2), BLACKWELL, None),
        (Topology(2, tp=2), (12, 0), None),
        (Topology(2, pp=2), HOPPER, None),
    ],
)
def test_one_queue_is_needed_for_tensor_and_context_parallelism_before_blackwell(
    topology: Topology, capability: tuple[int, int] | None, required: str | None
) -> None:
    assert required_queues(topology, capability) == required
    env: dict[str, str] = {}
    assert set_device_queues(topology, env, capability) is None
    assert env == ({} if required is None else {"CUDA_DEVICE_MAX_CONNECTIONS": required})


def test_a_value_of_the_user_is_kept_and_reported_if_it_conflicts() -> None:
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    conflict = set_device_queues(Topology(2, tp=2), env, HOPPER)
    assert env == {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert conflict is not None
    assert conflict.startswith("CUDA_DEVICE_MAX_CONNECTIONS=8: with parallel.tp=2")
    assert set_device_queues(Topology(2, tp=2), env, BLACKWELL) is None
    assert set_device_queues(Topology(2, tp=2), {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, HOPPER) is None
