"""Every reward returns a number in its range for any completion, and takes no long time."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import BUILTIN_REWARDS, build_rewards
from grpo_mega.rewards.pool import RewardPool
from grpo_mega.types import UserError
from tests.helpers.all_rewards import ARGS, REFERENCES, stub_lean, tiny_reward_model
from tests.helpers.reward_server import Request, judged, serving

PIECES = (
    *("####", "#### ", "\\boxed{", "\\frac{1}{", "\\frac12", "\\text{", "\\left(", "\\begin{array}", "\\\\", "\\"),
    *("{", "}", "}}}", "[", ")", "$", "$$", "\\$", "**", "_", "<<", ">>", "=", "\\sqrt[", "\\int_", "\\infty", "\\%"),
    *("7", "1,234", "1/0", "3/4", ".5", "5.", "1e9", "1e99", "9^9^9", "9**9**9", "99!", "-", "\u2212", "\u2009"),
    *("\u00bd", "^{2", " or ", "\n", "\r\n", "\0", "\x1b[0m", "\u202e", "\ud800", "\U0001f600", "\u0663", "\u216b"),
    *("\uff17", "answer is ", "million", " x ", ":", "<think>", "</think>", "<answer>", "</answer>"),
    *("```python\n", "```\n", "```json\n", "```lean\n", "print(", "while True: pass\n", "def f(", "import os\n"),
    *('{"answer": ', "null", "NaN", "Score: 11", "rfl", "sorry", "\u6211\u4eec", "\u043e\u0442\u0432\u0435\u0442"),
)
CHEAP = ("exact", "gsm8k", "format", "countdown", "length", "language_consistency", "json_schema")
KINDS = (
    *({"kind": kind} for kind in ("boxed", "think_answer", "think")),
    {"kind": "tags", "tags": ["think", "answer"]},
    {"pattern": "(?s)<think>.*</think>"},
)


def strange_completion(generator: random.Random) -> str:
    kind = generator.random()
    if kind < 0.002:
        return generator.choice(PIECES) * (1_000_000 // 8)
    if kind < 0.02:
        return generator.choice(PIECES) * (100_000 // 8)
    if kind < 0.04:
        return "".join(generator.choice("0123456789,. ") for _ in range(20_000)) + generator.choice(PIECES)
    if kind < 0.3:
        return "".join(chr(generator.randrange(0x110000)) for _ in range(generator.randrange(200)))
    return "".join(generator.choice(PIECES) for _ in range(generator.randrange(60)))


def strange_completions(number: int) -> list[str]:
    generator = random.Random(0)
    return [strange_completion(generator) for _ in range(number)]


def test_a_thousand_strange_completions_get_a_float_in_range_within_seconds() -> None:
    terms = [RewardTerm(name=name, args=ARGS.get(name, {})) for name in CHEAP]
    terms += [RewardTerm(name="format", args=args) for args in KINDS]
    terms += [RewardTerm(name="gsm8k", args={"strict": True})]
    slowest = {}
    completions = strange_completions(1000)
    for term, component in zip(terms, build_rewards(terms), strict=True):
        reference = REFERENCES.get(term.name, "steps\n#### 7")
        for completion in completions:
            started = time.process_time()
            value = component("a question", completion, reference)
            slowest[component.name] = max(slowest.get(component.name, 0.0), time.process_time() - started)
            assert type(value) is float
            assert component.low <= value <= component.high
    assert max(slowest.values()) < 2.0, slowest  # linear patterns: a quadratic one would take minutes


@pytest.fixture(scope="module")
def expensive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """Arguments of the rewards that need more than the completion: a model, a server, Lean."""

    def answer(request: Request) -> tuple[int, Any]:
        if "rows" in request.body:
            return 200, {"rewards": [len(row["completion"]) % 7 / 7 for row in request.body["rows"]]}
        return 200, judged("Score: 5")

    model = tmp_path_factory.mktemp("model")
    tiny_reward_model(model)
    lean = stub_lean(tmp_path_factory.mktemp("lean"))
    with serving(answer) as server:
        yield {
            "code": {"seconds": 5.0},
            "judge": {"url": server.url, "model": "m"},
            "math": {"cpu_seconds": 1.0},
            "proof": {"lean": lean, "seconds": 5.0},
            "remote": {"url": server.url},
            "reward_model": {"path": str(model), "max_tokens": 32},
        }


def assert_a_number_each(name: str, args: dict[str, Any], number: int, workers: int = 1) -> None:
    reference = REFERENCES.get(name, "7")
    term = RewardTerm(name=name, args=args)
    (component,) = build_rewards([term])
    with RewardPool([term], workers=workers, timeout_seconds=600.0) as pool:
        for key, completion in enumerate(strange_completions(number)):
            pool.submit(key, "a question", completion, reference)
        rewards = pool.collect()
        failures = dict(pool.failure_counts)
    assert sorted(rewards) == list(range(number))
    assert all(component.low <= reward.value <= component.high for reward in rewards.values())
    assert failures == {}


@pytest.mark.parametrize("name", ["math", "code", "proof", "judge", "remote", "reward_model"])
def test_strange_completions_get_a_number_from_rewards_with_programs_models_or_servers(
    expensive: dict[str, dict[str, Any]], name: str
) -> None:
    try:
        assert_a_number_each(name, expensive[name], 25)
    except UserError as error:
        if "sandbox" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", BUILTIN_REWARDS)
def test_ten_thousand_strange_completions_get_a_number_from_every_reward(
    expensive: dict[str, dict[str, Any]], name: str
) -> None:
    assert_a_number_each(name, expensive.get(name, ARGS.get(name, {})), 10_000, workers=2)
