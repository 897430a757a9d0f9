"""Rollouts with several turns of a scripted engine and environment: tokens, masks, token limits, order, seeds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from grpo_mega.environments.base import Turn
from grpo_mega.environments.pool import Reply
from grpo_mega.interfaces import Engine
from grpo_mega.rollout.multi_turn import MultiTurnGenerator
from grpo_mega.rollout.sampler import derived_seed
from grpo_mega.types import Completion, Prompt, SamplingRequest

EOS = 1
REQUEST = SamplingRequest(group_size=2, temperature=0.5, max_tokens=12, seed=77)


class ScriptedEngine:
    """Engine that returns `answers[turn]` with one token per character, and completes the last rollout first."""

    def __init__(self, *answers: str) -> None:
        self._answers = answers
        self.calls: list[tuple[list[tuple[int, ...]], SamplingRequest]] = []

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingRequest, received: Callable[[int, int, Completion], None]
    ) -> None:
        text = self._answers[len(self.calls)]
        self.calls.append(([p.token_ids for p in prompts], sampling))
        places = [(i, member) for i in range(len(prompts)) for member in range(sampling.group_size)]
        for position, member in reversed(places):
            limit = sampling.max_tokens_of(position)
            tokens = tuple(ord(c) for c in text)
            reason: Any = "stop" if "!" in text else "eos"
            if len(tokens) > limit:
                tokens, reason = tokens[:limit], "length"
            log_probs = tuple(-float(len(self.calls)) for _ in tokens)
            received(position, member, Completion(tokens, log_probs, reason, 4, Letters().decode(tokens)))


class Letters:
    """Codec with one token per character and two per capital, so that a second tokenization changes the result."""

    def encode(self, result: str) -> tuple[int, ...]:
        if "?" in result:
            raise ValueError("no token for ?")
        return tuple(t for c in result for t in ([ord("^"), ord(c.lower())] if c.isupper() else [ord(c)]))

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def cut_at_stop(self, token_ids: Sequence[int], stop: Sequence[str]) -> tuple[str, str] | None:
        return self.decode(token_ids).partition(stop[0])[0] + stop[0], stop[0]


class ScriptedEnvironment:
    """Environment whose reply is a function of (prompt, turns); returns replies in reverse order."""

    def __init__(self, reply: Callable[[str, list[Turn]], Reply]) -> None:
        self._reply = reply
        self.asked: list[tuple[int, str, list[Turn], str]] = []
        self._open: list[int] = []

    def submit(self, key: int, prompt: str, turns: Sequence[Turn], reference: str) -> None:
        self._open.append(len(self.asked))
        self.asked.append((key, prompt, list(turns), reference))

    def collect(self) -> dict[int, Reply]:
        replies = {self.asked[i][0]: self._reply(self.asked[i][1], self.asked[i][2]) for i in reversed(self._open)}
        self._open = []
        return replies


PROMPTS = [Prompt(10, "first", (5, 6), "ref1"), Prompt(11, "second", (7,), "ref2")]


def generate_rollouts(
    engine: ScriptedEngine,
    environment: ScriptedEnvironment,
    max_turns: int = 3,
    request: SamplingRequest = REQUEST,
    broadcast: Callable[[Any], Any] = lambda value: value,
) -> tuple[list[list[Completion]], list[tuple[int, int]]]:
    received: list[tuple[int, int]] = []
    turns = MultiTurnGenerator(
        cast("Engine", engine), environment, Letters(), stop=("!",), max_turns=max_turns, broadcast=broadcast
    )
    found = turns.generate(PROMPTS, request, lambda position, member, _: received.append((position, member)))
    return found, received


def test_a_rollout_is_the_sequence_of_answers_and_replies() -> None:
    engine = ScriptedEngine("ab!", "cd")
    found, _ = generate_rollouts(engine, ScriptedEnvironment(lambda _, turns: Reply("Xy" if len(turns) == 1 else None)))
    completion = found[1][0]
    assert completion.text == "ab!^xycd"
    assert completion.token_ids.tolist() == list(map(ord, "ab!^xycd"))
    assert completion.loss_mask is not None
    assert completion.loss_mask.tolist() == [True, True, True, False, False, False, True, True]
    assert completion.sampler_log_probs.tolist() == [-1.0, -1.0, -1.0, 0.0, 0.0, 0.0, -2.0, -2.0]
    assert completion.loss_log_probs.tolist() == [-1.0, -1.0, -1.0, -2.0, -2.0]
    assert (completion.num_turns, completion.num_loss_tokens, completion.stop_reason) == (2, 5, "eos")
    # the second prompt is the first one and the tokens so far, each rollout with what is left of its budget
    prompts, request = engine.calls[1]
    assert prompts == [(*p.token_ids, *map(ord, "ab!^xy")) for p in PROMPTS for _ in range(2)]
    assert (request.group_size, request.max_tokens_each, request.continues) == (1, (6,) * 4, True)
    assert request.seed == derived_seed(77, 1)
    first = engine.calls[0][1]
    assert (first.group_size, first.seed, first.stop, first.continues) == (2, 77, ("!",), False)


def test_the_environment_sees_each_answer_with_prompt_reference_and_history() -> None:
    environment = ScriptedEnvironment(lambda _, turns: Reply("r" if len(turns) == 1 else None))
    generate_rollouts(ScriptedEngine("a!", "b"), environment)
    assert environment.asked[3] == (0, "first", [Turn("a!", stop_text="!")], "ref1")
    assert environment.asked[4] == (3, "second", [Turn("a!", "r", "!"), Turn("b")], "ref2")


def test_characters_after_the_stop_text_are_sampled_but_not_in_the_turn() -> None:
    environment = ScriptedEnvironment(lambda _, turns: Reply("r" if len(turns) == 1 else None))
    found, _ = generate_rollouts(ScriptedEngine("a!.", "b"), environment)
    assert environment.asked[0][2] == [Turn("a!", stop_text="!")]
    assert environment.asked[-1][2] == [Turn("a!", "r", "!"), Turn("b")]
    assert found[0][0].text == "a!.rb"
    assert found[0][0].loss_mask is not None
    assert found[0][0].loss_mask.tolist() == [True, True, True, False, True]


def test_completed_rollouts_do_not_change_the_order_of_the_others() -> None:
    engine = ScriptedEngine("a!", "b!", "c!")
    found, received = generate_rollouts(
        engine, ScriptedEnvironment(lambda prompt, _: Reply("r" if prompt == "second" else None))
    )
    assert [len(prompts) for prompts, _ in engine.calls] == [2, 2, 2]  # two groups of two, then one of them
    assert [[c.num_turns for c in group] for group in found] == [[1, 1], [3, 3]]
    assert [[c.text for c in group] for group in found] == [["a!"] * 2, ["a!rb!rc!"] * 2]
    assert sorted(received) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found[0][0].loss_mask is None
    assert {c.stop_reason for group in found for c in group} == {"stop"}


def test_one_answer_without_a_reply_is_the_engines_own_completion() -> None:
    found, _ = generate_rollouts(ScriptedEngine("ab"), ScriptedEnvironment(lambda *_: Reply()))
    expected = Completion(tuple(map(ord, "ab")), (-1.0, -1.0), "eos", 4, "ab")
    assert found == [[expected] * 2] * 2


def test_answers_and_replies_broadcast_the_limit_of_tokens() -> None:
    # 12 tokens: "abcd!" and "rrr" leave 4
    found, _ = generate_rollouts(ScriptedEngine("abcd!", "efghi"), ScriptedEnvironment(lambda *_: Reply("rrr")))
    assert (found[0][0].text, found[0][0].stop_reason) == ("abcd!rrrefgh", "length")
    # a reply that leaves no token for an answer is left out
    full, _ = generate_rollouts(ScriptedEngine("abcd!"), ScriptedEnvironment(lambda *_: Reply("r" * 7)))
    assert (full[0][0].text, full[0][0].stop_reason, full[0][0].loss_mask) == ("abcd!", "length", None)
    just, _ = generate_rollouts(
        ScriptedEngine("abcd!", "e"), ScriptedEnvironment(lambda _, t: Reply("r" * 6 if len(t) < 2 else None))
    )
    assert just[0][0].text == "abcd!rrrrrre"


def test_a_truncated_answer_is_not_sent_to_the_environment() -> None:
    environment = ScriptedEnvironment(lambda *_: Reply("r"))
    found, _ = generate_rollouts(ScriptedEngine("a" * 20), environment)
    assert environment.asked == []
    assert {c.stop_reason for group in found for c in group} == {"length"}


@pytest.mark.parametrize("reply", [Reply(failure="timed out"), Reply("what?")])
def test_a_failure_ends_its_rollout_and_is_reported(reply: Reply) -> None:
    def replies(prompt: str, turns: list[Turn]) -> Reply:
        if prompt == "first":
            return reply
        return Reply("r" if len(turns) == 1 else None)

    found, _ = generate_rollouts(ScriptedEngine("a!", "b"), ScriptedEnvironment(replies))
    assert [c.failure for c in found[0]] == [reply.failure or "no token for ?"] * 2
    assert [c.text for c in found[0]] == ["a!"] * 2
    assert [c.failure for c in found[1]] == [None] * 2


def test_ranks_of_a_replica_make_the_same_calls_despite_a_slow_environment() -> None:
    engines = [ScriptedEngine("a!", "b!", "c") for _ in range(2)]
    results: list[Any] = [None, None]
    barrier, box = threading.Barrier(2, timeout=20), [None]

    def broadcast(rank: int) -> Callable[[Any], Any]:
        def broadcast(value: Any) -> Any:
            if rank == 0:
                box[0] = value
            barrier.wait()
            received = box[0]
            barrier.wait()
            return received

        return broadcast

    replies = ScriptedEnvironment(lambda _, turns: Reply("r" if len(turns) < 3 else None))

    def run(rank: int) -> None:
        environments = replies if rank == 0 else None
        turns = MultiTurnGenerator(
            cast("Engine", engines[rank]), environments, Letters(), stop=("!",), max_turns=4, broadcast=broadcast(rank)
        )
        results[rank] = turns.generate(PROMPTS, REQUEST)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert engines[0].calls == engines[1].calls
    assert [len(calls) for calls, _ in engines[0].calls] == [2, 4, 4]


def test_an_exception_on_the_first_rank_is_raised_on_all_ranks() -> None:
    broadcastd: list[Any] = []

    class Broken(ScriptedEnvironment):
        def collect(self) -> dict[int, Reply]:
            raise RuntimeError("no workers")

    def broadcast(value: Any) -> Any:
        broadcastd.append(value)
        return value

    with pytest.raises(RuntimeError, match="no workers"):
        generate_rollouts(ScriptedEngine("a!"), Broken(lambda *_: Reply()), broadcast=broadcast)
    assert isinstance(broadcastd[0], RuntimeError)  # it was broadcast first


def test_a_rank_without_unfinished_rollouts_calls_its_engine_as_often_as_its_replica() -> None:
    """The first prompt shard has one turn, the second has no prompts, the third takes three turns."""
    engines = [ScriptedEngine("a", "b", "c"), ScriptedEngine("a", "b", "c"), ScriptedEngine("a!", "b!", "c")]
    results: list[Any] = [None] * 3
    barrier, unfinished = threading.Barrier(3, timeout=20), [False] * 3

    def any_unfinished(rank: int) -> Callable[[bool], bool]:
        def agree(here: bool) -> bool:
            unfinished[rank] = here
            barrier.wait()
            there = any(unfinished)
            barrier.wait()
            return there

        return agree

    def run(rank: int) -> None:
        turns = MultiTurnGenerator(
            cast("Engine", engines[rank]),
            ScriptedEnvironment(lambda _, turns: Reply("r" if turns[-1].answer.endswith("!") else None)),
            Letters(),
            stop=("!",),
            max_turns=5,
            broadcast=lambda value: value,
            any_unfinished=any_unfinished(rank),
        )
        results[rank] = turns.generate(PROMPTS if rank != 1 else [], REQUEST)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[len(prompts) for prompts, _ in engine.calls] for engine in engines] == [[2, 0, 0], [0, 0, 0], [2, 4, 4]]
    assert [[c.num_turns for c in group] for group in results[0]] == [[1, 1], [1, 1]]
    assert results[1] == []
    assert [[c.text for c in group] for group in results[2]] == [["a!rb!rc"] * 2] * 2
