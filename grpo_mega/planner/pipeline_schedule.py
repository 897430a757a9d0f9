"""Number of microbatches that a pipeline rank holds at once, from walking through Megatron's schedules.

1F1B (arXiv:2104.04473, section "Default Schedule"): rank r of pp runs pp - r - 1 forward passes ahead. Interleaved
(section "Schedule with Interleaved Stages"): 2 (pp - r - 1) + (vpp - 1) pp passes (schedules.py of Megatron-Core 0.16,
get_pp_rank_microbatches).
Pure arithmetic. Asserted by tests/unit/planner/test_phase_memory.py.
"""

from __future__ import annotations

from collections.abc import Sequence


def peak_of_schedule(
    chunk_bytes: Sequence[float], pp: int, pp_rank: int, num_microbatches: int
) -> tuple[float, list[int]]:
    """Return the most bytes of activations on this rank, and the microbatches of each chunk that are held then.

    Args:
        chunk_bytes: bytes of one microbatch, for each of the rank's vpp chunks.
        pp: number of pipeline ranks.
        pp_rank: this pipeline rank.
        num_microbatches: microbatches of one update; with vpp > 1 a multiple of pp.

    Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
        arXiv:2104.04473; the interleaved order is that of Megatron-Core's schedules.py.
    """
    vpp = len(chunk_bytes)
    if vpp == 1:
        most_held = min(pp - pp_rank, num_microbatches)
        return most_held * chunk_bytes[0], [most_held]
    num_microbatches = min(num_microbatches, 4 * pp)  # by then every chunk has reached its peak
    total = num_microbatches * vpp
    ahead = min(2 * (pp - pp_rank - 1) + (vpp - 1) * pp, total)
    held = [0] * vpp
    peak, held_at_peak = 0.0, list(held)

    def forward(step: int) -> None:
        nonlocal peak, held_at_peak
        held[(step // pp) % vpp] += 1
        held_bytes = sum(n * size for n, size in zip(held, chunk_bytes, strict=True))
        if held_bytes > peak:
            peak, held_at_peak = held_bytes, list(held)

    for step in range(ahead):
        forward(step)
    for step in range(total):
        if step + ahead < total:
            forward(step + ahead)
        held[vpp - 1 - (step // pp) % vpp] -= 1
    return peak, held_at_peak
