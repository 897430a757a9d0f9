"""Defaults of `parallel.overlap_grad_reduce` and `overlap_param_gather`, by device and layout.

Asserted by tests/unit/parallel/test_overlap.py.
"""

from __future__ import annotations

from grpo_mega.config.policy_sections import ParallelConfig


def with_overlap(parallel: ParallelConfig, *, copies: int, on_cuda: bool) -> ParallelConfig:
    """Return the section with true or false instead of null in `overlap_grad_reduce` and `overlap_param_gather`.

    Null means on with CUDA and several data-parallel copies. One copy exchanges nothing. Without CUDA, gloo's threads
    take the processors that compute.

    Args:
        parallel: config section.
        copies: data-parallel copies of the dense layers, dp * cp.
        on_cuda: True if the policy computes on GPUs.
    """
    usual = on_cuda and copies > 1
    reduce = usual if parallel.overlap_grad_reduce is None else parallel.overlap_grad_reduce
    gather = reduce and usual if parallel.overlap_param_gather is None else parallel.overlap_param_gather
    return parallel.model_copy(update={"overlap_grad_reduce": reduce, "overlap_param_gather": gather})
