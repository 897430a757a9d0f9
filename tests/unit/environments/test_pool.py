"""The contract of environments, their processes, and the calculator."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest

from grpo_mega.config.rollout_sections import EnvironmentConfig
from grpo_mega.environments.base import Turn, build_environment
from grpo_mega.environments.calculator import MAX_BITS, calculator, evaluate, format_value
from grpo_mega.environments.pool import EnvironmentPool, Reply, ReplyErrors
from grpo_mega.types import UserError

BAD = "tests.helpers.bad_environments"


def spec(name: str = f"{BAD}:obeys", **settings: Any) -> EnvironmentConfig:
    return EnvironmentConfig(name=name, **settings)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("calculaotr", {}, r"environment\.name='calculaotr' is not a known environment, did you mean 'calculator'\?"),
        ("nowhere.module:f", {}, r"cannot import 'nowhere\.module' \(ModuleNotFoundError"),
        (f"{BAD}:obey", {}, r"has no function 'obey', did you mean 'obeys'\?; its environments: obeys"),
        ("tests.helpers.plain_rewards:digits", {}, r"has the decorator of another kind: reward; name"),
        (
            f"{BAD}:obeys",
            {"loud": True},
            r"environment\.args=.* does not fit .*; it takes: shout",
        ),
        ("calculator", {"digits": -1}, r"environment\.args: digits=-1 must be a whole number from 0 to 20"),
    ],
)
def test_the_error_for_a_wrong_environment_names_it(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_environment(spec(name, args=args))


def test_an_environment_needs_no_decorator() -> None:
    built = build_environment(spec(f"{BAD}.undeclared"))
    assert built.stop == ()


def test_an_environment_gets_all_turns_and_its_args() -> None:
    built = build_environment(spec(args={"shout": True}))
    assert built.stop == ("!",)
    assert built("q", [Turn("a!", "1"), Turn("b!")], "ref") == "Q|REF|A!>1;B!>NONE"


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvironmentPool]:
    with EnvironmentPool(spec(), workers=2, timeout_seconds=3.0) as made:
        yield made


def test_every_key_is_returned_with_its_own_reply(pool: EnvironmentPool) -> None:
    for key in range(40):
        pool.submit(key, f"q{key}", [Turn("slow" if key == 0 else f"a{key}")], "r")
    replies = pool.collect()
    assert sorted(replies) == list(range(40))
    assert all(replies[key] == Reply(f"q{key}|r|a{key}>None") for key in range(1, 40))
    assert pool.collect() == {}
    pool.submit(3, "q", [Turn("over")], "r")
    with pytest.raises(ValueError, match="key=3 was submitted twice"):
        pool.submit(3, "q", [Turn("over")], "r")
    assert pool.collect() == {3: Reply()}


def test_the_environment_is_told_the_stop_text(pool: EnvironmentPool) -> None:
    pool.submit(0, "q", [Turn("told!", stop_text="!")], "r")
    pool.submit(1, "q", [Turn("told")], "r")
    assert pool.collect() == {0: Reply("!"), 1: Reply()}


@pytest.mark.parametrize("written", ["garbage", "5", '{"result": 3}', '{"result": "a", "failure": "b"}'])
def test_an_environment_that_writes_to_the_connection_of_its_worker_fails_that_turn_only(written: str) -> None:
    with EnvironmentPool(spec(), workers=1, timeout_seconds=60.0) as made:
        made.submit(0, "q", [Turn(f"write {written}")], "r")
        made.submit(1, "q", [Turn("a")], "r")
        replies = made.collect()
    assert replies[1] == Reply("q|r|a>None")
    assert replies[0].result is None
    assert str(replies[0].failure).startswith("crashed, its connection")


@pytest.mark.parametrize("args", [{"shout": dt.date(2026, 1, 2)}, {"shout": {1: "a"}}], ids=str)
def test_an_argument_that_json_cannot_hold_is_rejected_with_its_key(args: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^environment\.args\.shout.*put quotes"):
        build_environment(spec(args=args))


def test_results_that_report_an_error_are_counted_once() -> None:
    with EnvironmentPool(spec("calculator"), workers=1, timeout_seconds=60.0) as made:
        for key, answer in enumerate(["<<1/0>>", "<<x>>", "<<1+1>>", "7"]):
            made.submit(key, "q", [Turn(answer)], "r")
        assert {key: reply.result for key, reply in made.collect().items()} == {0: "error", 1: "error", 2: "2", 3: None}
        assert made.take_errors() == ReplyErrors(tool_errors=2)
        assert made.take_errors() == ReplyErrors()


def test_failures_affect_no_other_turn(pool: EnvironmentPool, caplog: pytest.LogCaptureFixture) -> None:
    answers = ["hang", "crash", "raise", "number", "fine", "fine", "over"]
    for key, answer in enumerate(answers):
        pool.submit(key, "q", [Turn(answer)], "r")
    replies = pool.collect()
    assert [replies[key].failure for key in range(4)] == [
        "timed out",
        "crashed, exit status 7",
        "raised LookupError: as asked",
        "raised ValueError: returned int, neither text nor None",
    ]
    assert [replies[key] for key in (4, 5, 6)] == [Reply("q|r|fine>None")] * 2 + [Reply()]
    assert pool.take_errors() == ReplyErrors(failures=4)
    assert "failed in 4 of 7 turns, whose rollouts score the floor" in caplog.text
    pool.submit(0, "q", [Turn("fine")], "r")  # answered by the replacement processes
    assert pool.collect() == {0: Reply("q|r|fine>None")}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", "24"),
        ("48/2=25", "24"),
        ("48+24*2", "96"),
        (" (1 + 2) * -3 ", "-9"),
        ("1,200*0.5", "600"),
        ("10/3", "3.3333"),
        ("2/3", "0.6667"),
        ("-2/3", "-0.6667"),
        ("0.1+0.2", "0.3"),
        ("7//2", "3"),
        ("7%4", "3"),
        ("2**10", "1024"),
        ("2^3", "8"),
        ("3×4÷2−1", "5"),
        ("$15*3", "45"),
        ("-1/100000", "0"),
    ],
)
def test_the_calculator_computes_exactly_and_rounds_at_the_end(expression: str, value: str) -> None:
    assert calculator("", [Turn(f"so <<1>> and <<{expression}>>")], "") == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", "1/0", "1+", "a+b", "__import__('os')", "9**9**9", "2**-2000", "'a'*9", "True+1", "1 if 1 else 2", "[1]"),
        *("(" * 300, "1" * 201, "1\0", "0**-1", "1.5**0.5", "f'{1}'", "1e999", "50%", "2**1025"),
    ],
)
def test_a_text_that_is_not_arithmetic_is_an_error_and_takes_no_time(expression: str) -> None:
    begin = time.process_time()
    assert calculator("", [Turn(f"<<{expression}>>")], "") == "error"
    assert time.process_time() - begin < 5


def test_large_numbers_are_rejected() -> None:
    assert evaluate("2**1000 / 2**999") == 2
    with pytest.raises(ValueError, match=f"more than {MAX_BITS} bits"):
        evaluate("2**1000 * 2**100")


@pytest.mark.parametrize("answer", ["no call", "<<1+1>> is asked no more", "1+1>>", ""])
def test_only_an_answer_that_ends_with_a_call_gets_a_reply(answer: str) -> None:
    assert calculator("", [Turn("<<1>>", "1"), Turn(answer)], "") is None


def test_a_value_is_formatted_with_the_requested_digits() -> None:
    assert [format_value(Fraction(1, 3), digits) for digits in (0, 2)] == ["0", "0.33"]
    assert [format_value(Fraction(n, 2), 0) for n in (1, 3, -1)] == ["1", "2", "-1"]
