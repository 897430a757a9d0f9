"""The shape of one packed row on one rank; the letters are those of planner/activations.py."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.planner.inputs import PlanInputs


@dataclass(frozen=True)
class PackedRowShape:
    """Tokens of one packed row on one rank, and the bytes of an element."""

    row_tokens: int
    """Tokens of the whole row, over all context-parallel ranks."""
    tokens: float
    """Tokens on this rank: t."""
    sequence_tokens: float
    """Tokens on this rank where sequence parallelism divides them: s."""
    longest: int
    """Tokens of the longest sequence of the row."""
    hidden_size: int
    itemsize: int
    local: bool
    """True for local modules (`policy.modules`), False for Transformer Engine's."""
    flash: bool
    """True if local modules compute attention with the flash kernel, which reads queries, keys and values in place."""

    @classmethod
    def from_inputs(cls, inputs: PlanInputs) -> PackedRowShape:
        """Return the shape of a full row."""
        parallel, work = inputs.config.parallel, inputs.workload
        tokens = work.row_tokens / parallel.cp
        return cls(
            row_tokens=work.row_tokens,
            tokens=tokens,
            sequence_tokens=tokens / parallel.tp if parallel.sequence_parallel else tokens,
            longest=min(work.longest, work.row_tokens),
            hidden_size=inputs.spec.hidden_size,
            itemsize=inputs.itemsize,
            local=inputs.is_cpu_job or inputs.config.policy.modules == "local",
            flash=not inputs.is_cpu_job and inputs.itemsize == 2,
        )

    @property
    def hidden_states(self) -> float:
        """Bytes of the hidden states between two layers: s h b."""
        return self.sequence_tokens * self.hidden_size * self.itemsize

    def norms(self, i: int) -> float:
        """Return the bytes that the two norms of a layer keep.

        Both kinds keep input and output. The local norm also keeps input and normalized input in float32.
        """
        per_element = 8 + self.itemsize if self.local else self.itemsize + i
        return 2 * self.sequence_tokens * self.hidden_size * per_element + 8 * self.sequence_tokens
