"""An engine whose answers end at random, for tests of partial rollouts, and a codec with one token per character."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from grpo_mega.data.dataset import DataSet, PromptDataset
from grpo_mega.rewards.inputs import ScoringRow
from grpo_mega.types import Completion, Prompt, Reward, SamplingRequest

EOS = 0


def random_lengths(num_prompts: int = 400, mean_of: Callable[[int], int] = lambda i: 2 + 9 * (i % 3)) -> PromptDataset:
    """Return prompts whose answers by RandomEngine have the mean length `mean_of(index)`."""
    return PromptDataset((DataSet("d", tuple(Prompt(i, f"q{i}", (mean_of(i),), "") for i in range(num_prompts))),))


class RecordingScorer:
    """Scorer whose reward is `reward_of(prompt, member of the key)`; counts what it scores."""

    def __init__(
        self, group_size: int, reward_of: Callable[[int, int], float] = lambda _, member: float(member)
    ) -> None:
        self.scored: Counter[int] = Counter()
        self._group_size, self._reward_of, self._open = group_size, reward_of, dict[int, Reward]()

    def submit_row(self, key: int, row: ScoringRow) -> None:
        assert row.index is not None
        self.scored[key] += 1
        self._open[key] = Reward(self._reward_of(row.index, key % self._group_size), {"exact": 1.0})

    def collect(self) -> dict[int, Reward]:
        found, self._open = self._open, {}
        return found


class RandomEngine:
    """Engine that ends an answer at every token with probability 1 / (mean length of the prompt).

    The mean length of a prompt is its first token. All other tokens are 7. Random numbers come from the seed of the
    call only. `calls` has (token ids of the prompts, request) of every call.
    """

    def __init__(self, policy_version: int = 0) -> None:
        self.policy_version = policy_version
        self.calls: list[tuple[list[tuple[int, ...]], SamplingRequest]] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        self.calls.append(([p.token_ids for p in prompts], sampling))
        rng = random.Random(sampling.seed)
        groups = []
        for position, prompt in enumerate(prompts):
            tokens: list[int] = []
            while len(tokens) < sampling.max_tokens_of(position) and (not tokens or tokens[-1] != EOS):
                tokens.append(EOS if rng.random() < 1 / prompt.token_ids[0] else 7)
            reason: Any = "eos" if tokens[-1] == EOS else "length"
            log_probs = [-rng.random() for _ in tokens]
            groups.append([Completion(tokens, log_probs, reason, self.policy_version, "slice")])
        if on_completion is not None:
            for position in reversed(range(len(groups))):
                on_completion(position, 0, groups[position][0])
        return groups


class ScriptedAnswers:
    """Engine that continues `answers[prompt.index]` where the tokens so far end; one token per character.

    It finds stop texts in the tokens of one call only, as real engines do.
    """

    def __init__(self, *answers: str, policy_version: int = 3) -> None:
        self.answers, self.policy_version = answers, policy_version
        self.requests: list[SamplingRequest] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None],
    ) -> None:
        self.requests.append(sampling)
        for position, prompt in enumerate(prompts):
            done = "".join(map(chr, prompt.token_ids[1:]))  # a prompt has one token
            whole = self.answers[prompt.index]
            assert whole.startswith(done), f"{done!r} is not the beginning of {whole!r}"
            rest, reason = whole[len(done) :], "eos"
            limit = sampling.max_tokens_of(position)
            ends = [rest.index(stop) + len(stop) for stop in sampling.stop if stop in rest]
            if ends and min(ends) <= limit:
                rest, reason = rest[: min(ends)], "stop"
            elif len(rest) > limit:
                rest, reason = rest[:limit], "length"
            tokens = [ord(c) for c in rest]
            on_completion(position, 0, Completion(tokens, [-1.0] * len(tokens), reason, self.policy_version, rest))


class Characters:
    """Codec with one token per character."""

    def encode(self, result: str) -> tuple[int, ...]:
        return tuple(map(ord, result))

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def cut_at_stop(self, token_ids: Sequence[int], stop: Sequence[str]) -> tuple[str, str] | None:
        text = self.decode(token_ids)
        found = [each for each in stop if text.endswith(each)]
        return (text, found[0]) if found else None
