"""Part `reference` of tools/gpu_proof.py: log-probs of the reference, and the policy's weights after the swap."""

from __future__ import annotations

from tools.gpu_checks.part_job import PartJob
from tools.gpu_checks.trained_policy import check_changed, check_equal, equal_bits, policy_setup, state_digests


def main(job: PartJob) -> None:
    """Update the policy, compare the reference's log-probs with those at the start, and measure the swap."""
    with policy_setup(job) as setup:
        policy = setup.build(with_reference=True)
        start, at_start = setup.log_probs(policy), state_digests(policy)
        setup.update(policy)
        trained, log_probs = state_digests(policy), setup.log_probs(policy)
        check_changed(job, "weights after an update", trained["weights"], at_start["weights"])
        with policy.reference():
            inside = state_digests(policy)["weights"]
            reference = setup.log_probs(policy)
        check_equal(job, "weights inside the swap", inside, at_start["weights"], "the snapshot is a copy")
        check_equal(
            job, "reference log-probs have the bits of the start", equal_bits(reference, start), True,
            "the same kernels on the same weights",
        )  # fmt: skip
        check_equal(job, "state after the swap", state_digests(policy), trained, "the policy is restored bit for bit")
        same = equal_bits(setup.log_probs(policy), log_probs)
        check_equal(job, "log-probs after the swap have the same bits", same, True, "same kernels, same weights")

        def swap() -> None:
            with policy.reference():
                pass

        seconds, size = job.seconds_of(swap), policy.state_bytes()["params"]
        job.result.add(swap_seconds=seconds, parameter_bytes=size)
        job.result.put(main=f"exact; {size / 1e9:.3g} GB swapped in and out in {seconds:.3f} s")
