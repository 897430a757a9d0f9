"""No completion, however strange, gets anything but a float in range out of a reward, and none takes long."""

from __future__ import annotations

import random
import time

from grpo_mega.config.schema import RewardTerm
from grpo_mega.rewards import build_rewards

NUM_COMPLETIONS = 2000
PIECES = (
    *(
        "####",
        "#### ",
        "\\boxed{",
        "\\frac{1}{",
        "\\frac12",
        "\\text{",
        "{",
        "}",
        "}}}",
        "$",
        "\\$",
        "**",
        "_",
        "<<",
        ">>",
        "=",
    ),
    *(
        "7",
        "1,234",
        "1/0",
        "3/4",
        ".5",
        "5.",
        "1e9",
        "1e99",
        "-",
        "\u2212",
        "\u2009",
        "\u00bd",
        "^{2",
        " or ",
        "\n",
        "\r\n",
    ),
    *(
        "\0",
        "\x1b[0m",
        "\u202e",
        "\ud800",
        "\U0001f600",
        "\u0663",
        "\u216b",
        "\uff17",
        "answer is ",
        "million",
        " x ",
        ":",
    ),
    *("<think>", "</think>", "<answer>", "</answer>"),
)


def strange_completion(generator: random.Random) -> str:
    kind = generator.random()
    if kind < 0.02:
        return generator.choice(PIECES) * (100_000 // 8)
    if kind < 0.04:
        return "".join(generator.choice("0123456789,. ") for _ in range(20_000)) + generator.choice(PIECES)
    if kind < 0.3:
        return "".join(chr(generator.randrange(0x110000)) for _ in range(generator.randrange(200)))
    return "".join(generator.choice(PIECES) for _ in range(generator.randrange(60)))


def test_two_thousand_strange_completions_get_a_float_in_range_within_seconds() -> None:
    generator = random.Random(0)
    completions = [strange_completion(generator) for _ in range(NUM_COMPLETIONS)]
    terms = [RewardTerm(name=name) for name in ("exact", "gsm8k", "format")]
    terms += [RewardTerm(name="format", args={"kind": kind}) for kind in ("boxed", "think_answer")]
    terms += [RewardTerm(name="gsm8k", args={"strict": True})]
    components = build_rewards(terms)
    slowest = 0.0
    for completion in completions:
        for component in components:
            started = time.process_time()
            value = component("a question", completion, "steps\n#### 7")
            slowest = max(slowest, time.process_time() - started)
            assert type(value) is float
            assert 0.0 <= value <= 1.0
    assert slowest < 1.0  # linear patterns: 100 kB take milliseconds; a quadratic one would take minutes
