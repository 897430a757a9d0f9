"""Checks of what an engine returned, before anything reads it; shared by all engines.

A kernel with a fault, or a server with other weights, can return tokens and log-probs that look like any other; those
that cannot be right are an error with the name of the fault. An engine that computes another function is found later
(trainer/mismatch_guard.py).
Asserted by tests/unit/engines/test_output_checks.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grpo_mega.types import Completion, Prompt

_MOST_LOG_PROB = 1e-3
"""A log-prob of 0 may be rounded to a positive number, nats."""


class InvalidCompletionError(RuntimeError):
    """An engine returned a completion that cannot be right. Names engine, prompt and fault."""


@dataclass(frozen=True)
class OutputLimits:
    """Limits of the completions of one request.

    Attributes:
        engine: name of the engine, for messages.
        vocab_size: token ids are below it.
        policy_version: of the weights that must have sampled.
    """

    engine: str
    vocab_size: int
    policy_version: int

    def check(self, completion: Completion, prompt: Prompt, member: int, max_tokens: int) -> None:
        """Check one completion.

        Args:
            completion: as the engine returned it.
            prompt: its prompt, for messages.
            member: its position in the group, for messages.
            max_tokens: most tokens that were asked for.

        Raises:
            InvalidCompletionError: the number of tokens, a token id, a log-prob or the version of the weights cannot be
                right.
        """
        fault = self._fault(completion, max_tokens)
        if fault is not None:
            raise InvalidCompletionError(
                f"{self.engine} returned an invalid completion (member {member} of the group of prompt {prompt.index}):"
                f" {fault}. If this happens again, remove engine.args, or try the other engine.kind"
            )

    def _fault(self, completion: Completion, max_tokens: int) -> str | None:
        tokens, log_probs = completion.token_ids, completion.sampler_log_probs
        if not 0 < len(tokens) <= max_tokens:
            return f"it has {len(tokens)} tokens, and 1 to {max_tokens} were asked for"
        wrong = np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))
        if len(wrong):
            return f"token {wrong[0]} is {tokens[wrong[0]]}, which is not below the vocabulary size {self.vocab_size}"
        wrong = np.flatnonzero(~np.isfinite(log_probs) | (log_probs > _MOST_LOG_PROB))
        if len(wrong):
            return f"the log-prob of token {wrong[0]} is {log_probs[wrong[0]]:g}, which is no log-probability"
        if completion.policy_version != self.policy_version:
            return (
                f"weights of version {completion.policy_version} sampled it, and the last sync brought version "
                f"{self.policy_version}"
            )
        return None
