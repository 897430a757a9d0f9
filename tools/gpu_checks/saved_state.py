"""Part `checkpoint` of tools/gpu_proof.py: save a policy that is offloaded, load it into a new one, compare."""

from __future__ import annotations

import time
from pathlib import Path

from grpo_mega.trainer.phases import Phases
from tools.gpu_checks.part_job import PartJob
from tools.gpu_checks.trained_policy import (
    ALL,
    check_changed,
    check_equal,
    equal_bits,
    policy_setup,
    state_digests,
)

_EXTRA = {"step": 7}


def main(job: PartJob) -> None:
    """Save, load and compare weights, optimizer state, log-probs, and the next update."""
    with policy_setup(job) as setup:
        policy = setup.build()
        start = state_digests(policy)
        setup.update(policy)
        trained, log_probs = state_digests(policy), setup.log_probs(policy)
        check_changed(job, "weights after an update", trained["weights"], start["weights"])

        folder = setup.folder.parent / "checkpoint"
        folder.mkdir()
        policy.offload(*ALL)  # as it is while the engine samples
        with Phases(policy).checkpointing(policy):
            begin = time.perf_counter()
            policy.save(folder, _EXTRA)
            saved = time.perf_counter() - begin
        policy.reload(*ALL)
        check_equal(job, "state after the save", state_digests(policy), trained, "a save changes nothing")
        setup.update(policy)
        next_log_probs = setup.log_probs(policy)
        del policy
        job.release_cached()

        loaded = setup.build()
        loaded.offload(*ALL)
        with Phases(loaded).checkpointing(loaded):
            begin = time.perf_counter()
            extra = loaded.load(folder)
            seconds = time.perf_counter() - begin
        loaded.reload(*ALL)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        job.result.add(save_seconds=saved, load_seconds=seconds, checkpoint_bytes=size)
        check_equal(job, "counters", extra, _EXTRA, "they are stored as they are")
        check_equal(job, "state after the load", state_digests(loaded), trained, "values are stored bit for bit")
        same = equal_bits(setup.log_probs(loaded), log_probs)
        check_equal(job, "log-probs after the load have the same bits", same, True, "same kernels, same values")
        setup.update(loaded)
        worst = max(
            float((a.float() - b.float()).abs().max().cpu())
            for a, b in zip(setup.log_probs(loaded), next_log_probs, strict=True)
        )
        job.result.check(
            "log-probs after the next update, largest difference", worst, 0.05, passed=worst <= 0.05,
            reason="nats; kernels of the backward pass may add in another order, and Adam divides small gradients by "
            "their own size; moments that were not restored change log-probs by more",
        )  # fmt: skip
        job.result.put(main=f"equal after load; {size / 1e9:.3g} GB in {saved:.1f} s, back in {seconds:.1f} s")
