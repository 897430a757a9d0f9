"""Samples open rollouts by slices: at most a fixed number of tokens of each, in one call of the engine.

After a slice the rollouts that are not complete can be continued, by another slice with the same weights or after a
weight sync: the engine gets prompt and tokens so far as the prompt. Within a step it finds them in its prefix cache.
The result is a function of the weights, the seed and the rollouts, with every engine.
Asserted by tests/unit/rollout/test_slices.py and tests/engine/test_partial_rollouts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from grpo_mega.rollout.multi_turn import MultiTurnGenerator
from grpo_mega.rollout.open_rollout import OpenRollout, TextOf, cut_at_seam, turn_of
from grpo_mega.rollout.sampler import Generator
from grpo_mega.types import Completion, SamplingRequest


@dataclass(frozen=True)
class SliceSampler:
    """Sampler of slices on this rank's replica.

    Attributes:
        engine: of this rank.
        slice_tokens: most tokens that a slice adds to a rollout.
        max_running: most rollouts of a slice. The engine holds all of them at the same time, so it need not compute the
            tokens of an earlier slice again.
        text_of: returns the text of an answer.
        dialogue: environment of rollouts with several turns; None: rollouts have one answer.
    """

    engine: Generator
    slice_tokens: int
    max_running: int
    text_of: TextOf
    dialogue: MultiTurnGenerator | None = None

    def sample(self, rollouts: Sequence[OpenRollout], request: SamplingRequest) -> None:
        """Continue open rollouts by one slice, and apply the replies to answers that are complete. Collective.

        All ranks of a replica call it together. The rollouts are changed in place.

        Args:
            rollouts: the first `max_running` of these are continued.
            request: seed, temperature, limit of all tokens of a rollout, and `continues`.
        """
        running = rollouts[: self.max_running]
        limits = [min(self.slice_tokens, request.max_tokens - rollout.num_tokens) for rollout in running]
        requested: set[int] = set()

        def on_completion(position: int, _: int, completion: Completion) -> None:
            if self._is_reply_needed(running[position], completion, request.max_tokens):
                requested.add(position)
                self._submit(position, running[position])

        stop = () if self.dialogue is None else self.dialogue.stop
        with nullcontext() if self.dialogue is None else self.dialogue.discarding_replies():
            self.engine.generate(
                [rollout.next_prompt() for rollout in running],
                replace(request, group_size=1, max_tokens_each=tuple(limits), stop=stop),
                on_completion,
            )
        if self.dialogue is None or not requested:
            return
        replies = self.dialogue.replies()
        assert replies.keys() == requested, f"requested {sorted(requested)}, received {sorted(replies)}"
        for position in sorted(requested):
            running[position].apply_reply(replies[position], self.dialogue.codec, request.max_tokens)

    def _is_reply_needed(self, rollout: OpenRollout, completion: Completion, max_tokens: int) -> bool:
        """Append the tokens of a slice; return True if they complete an answer to which the environment replies."""
        dialogue = self.dialogue
        if dialogue is not None:
            completion = cut_at_seam(rollout.answer_ids, completion, dialogue.codec, dialogue.stop)
        rollout.add_sampled(completion)
        reason, is_full = completion.stop_reason, rollout.num_tokens >= max_tokens
        if reason == "length" and not is_full:
            return False
        if dialogue is None:
            rollout.is_done = True
            return False
        answer = rollout.answer_ids
        rollout.end_answer(turn_of(self.text_of(answer), answer, reason, dialogue.codec, dialogue.stop))
        rollout.is_done = reason == "length" or len(rollout.turns) >= dialogue.max_turns
        return not rollout.is_done

    def _submit(self, position: int, rollout: OpenRollout) -> None:
        if self.dialogue is not None and self.dialogue.environments is not None:
            prompt = rollout.prompt
            self.dialogue.environments.submit(position, prompt.text, rollout.turns, prompt.answer)
