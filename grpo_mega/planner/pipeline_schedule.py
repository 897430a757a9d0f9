"""How many microbatches a pipeline rank holds at once, by walking through Megatron's schedules. Pure.

1F1B (arXiv:2104.04473, figure 3): rank r of pp runs pp - r - 1 forward passes ahead; interleaved (figure 4):
2 (pp - r - 1) + (vpp - 1) pp (schedules.py of Megatron-Core 0.16, get_pp_rank_microbatches).
Asserted by tests/unit/planner/test_phase_memory.py.
"""

from __future__ import annotations

from collections.abc import Sequence


def peak_of_schedule(
    chunk_bytes: Sequence[float], pp: int, pp_rank: int, num_microbatches: int
) -> tuple[float, list[int]]:
    """Most bytes that the chunks' activations take at once on this rank, and how many microbatches of each chunk are
    alive then.

    Args:
        chunk_bytes: of one microbatch, for each of the rank's vpp chunks.
        pp: pipeline ranks.
        pp_rank: this one.
        num_microbatches: of one update; under vpp a multiple of pp.
    """
    vpp = len(chunk_bytes)
    if vpp == 1:
        alive_at_most = min(pp - pp_rank, num_microbatches)
        return alive_at_most * chunk_bytes[0], [alive_at_most]
    num_microbatches = min(num_microbatches, 4 * pp)  # by then every chunk has been at its most
    total = num_microbatches * vpp
    ahead = min(2 * (pp - pp_rank - 1) + (vpp - 1) * pp, total)
    alive = [0] * vpp
    peak, at_peak = 0.0, list(alive)

    def forward(step: int) -> None:
        nonlocal peak, at_peak
        alive[(step // pp) % vpp] += 1
        held = sum(n * size for n, size in zip(alive, chunk_bytes, strict=True))
        if held > peak:
            peak, at_peak = held, list(alive)

    for step in range(ahead):
        forward(step)
    for step in range(total):
        if step + ahead < total:
            forward(step + ahead)
        alive[vpp - 1 - (step // pp) % vpp] -= 1
    return peak, at_peak
