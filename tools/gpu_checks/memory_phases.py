"""Part `offload` of tools/gpu_proof.py: a step, then offload and reload, with digests of all state."""

from __future__ import annotations

from tools.gpu_checks.part_job import PartJob
from tools.gpu_checks.trained_policy import (
    ALL,
    check_changed,
    check_equal,
    equal_bits,
    policy_setup,
    state_digests,
)

RESIDUE_SHARE = 0.05
_EXACT = "storages are copied bit for bit"


def main(job: PartJob) -> None:
    """Train, offload, reload, and compare; then train again."""
    with policy_setup(job) as setup:
        policy = setup.build()
        start = state_digests(policy)
        rows = setup.rows(setup.log_probs(policy))
        job.result.add(step_seconds=job.seconds_of(lambda: policy.update(rows, setup.loss, 1e-4)))
        trained, log_probs = state_digests(policy), setup.log_probs(policy)
        check_changed(job, "weights after an update", trained["weights"], start["weights"])
        sizes = policy.state_bytes()
        held = job.memory()["allocated"]

        policy.offload(*ALL)
        job.release_cached()
        offloaded = job.memory()
        job.result.add(
            state_bytes=sizes, allocated_bytes=held, offloaded_bytes=offloaded["allocated"],
            used_offloaded_bytes=offloaded["used"],
        )  # fmt: skip
        job.check_memory(
            "allocated bytes while offloaded", offloaded["allocated"], RESIDUE_SHARE * max(held, 1),
            reason="what stays is rotary tables and the batch; the smallest part that could be forgotten is 12%",
        )  # fmt: skip
        policy.reload(*ALL)
        check_equal(job, "state after reload", state_digests(policy), trained, _EXACT)
        same = equal_bits(setup.log_probs(policy), log_probs)
        check_equal(job, "log-probs after reload have the same bits", same, True, "the same kernels on the same values")

        def round_trip() -> None:
            policy.offload(*ALL)
            policy.reload(*ALL)

        seconds = job.seconds_of(round_trip)
        moved = 2 * sizes["params"] + 2 * sizes["optimizer"]  # gradients are freed, not moved
        job.result.add(there_and_back_seconds=seconds, gb_per_second=moved / seconds / 1e9)
        setup.update(policy)
        check_changed(job, "weights after an update that follows the reload", state_digests(policy)["weights"],
                      trained["weights"])  # fmt: skip
        job.result.put(main=f"all state equal after reload, {moved / seconds / 1e9:.3g} GB/s")
