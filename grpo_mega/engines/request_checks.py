"""Checks of requests and grouping of completions; shared by all engines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing

from grpo_mega.engines.output_checks import OutputLimits
from grpo_mega.types import Completion, Prompt, SamplingRequest


def require_ready(asleep: Collection[str], *, updating: bool, policy_version: int) -> None:
    """Check that the engine can sample.

    Raises:
        RuntimeError: a part of the engine is asleep, or its weights are incomplete.
    """
    if asleep:
        raise RuntimeError(f"generate while {' and '.join(sorted(asleep))} sleep; wake them first")
    if updating or policy_version < 0:
        raise RuntimeError("generate before the weights are complete; begin_update .. end_update must have run")


def in_groups(
    rollouts: Generator[tuple[int, int, Completion], None, None],
    prompts: Sequence[Prompt],
    sampling: SamplingRequest,
    limits: OutputLimits,
    on_completion: Callable[[int, int, Completion], None] | None,
) -> list[list[Completion]]:
    """Collect (prompt position, member, completion) in any order into groups in the order of the prompts.

    The generator is closed when this function returns or raises.

    Args:
        rollouts: the completions, one by one.
        prompts: of the request.
        sampling: the request.
        limits: what a completion may be.
        on_completion: called with each completion, once it was checked.

    Raises:
        InvalidCompletionError: a completion cannot be right.
    """
    groups: list[list[Completion | None]] = [[None] * sampling.group_size for _ in prompts]
    with closing(rollouts):
        for position, member, completion in rollouts:
            limits.check(completion, prompts[position], member, sampling.max_tokens_of(position))
            groups[position][member] = completion
            if on_completion is not None:
                on_completion(position, member, completion)
    return [[member for member in group if member is not None] for group in groups]


def check_lengths(prompts: Sequence[Prompt], sampling: SamplingRequest, max_model_len: int) -> None:
    """Check that every prompt and its longest completion fit the engine.

    Raises:
        ValueError: one does not (names the prompt).
    """
    for position, prompt in enumerate(prompts):
        max_tokens = sampling.max_tokens_of(position)
        if len(prompt.token_ids) + max_tokens > max_model_len:
            raise ValueError(
                f"prompt {prompt.index}: {len(prompt.token_ids)} tokens plus max_tokens={max_tokens} "
                f"exceed the engine's max_model_len={max_model_len}"
            )
