"""`judge` and `remote` with a server that works, fails, stalls, sends slowly, or sends malformed answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.rewards.batched import BatchScorer, ScoringRow
from grpo_mega.rewards.pool import RewardPool
from grpo_mega.types import Reward, UserError
from tests.helpers.reward_server import Request, RewardServer, judged, serving

QUICK = {"request_seconds": 60.0, "retries": 2, "backoff_seconds": 0.01}


@pytest.fixture(scope="module")
def one_server() -> Iterator[RewardServer]:
    with serving(lambda request: (200, {})) as server:
        yield server


@pytest.fixture
def server(one_server: RewardServer) -> RewardServer:
    one_server.requests.clear()
    one_server.max_concurrent = 0
    return one_server


def opened(name: str, **args: Any) -> BatchScorer:
    (component,) = build_rewards([RewardTerm(name=name, args=args)])
    return component.open()


def values(scorer: BatchScorer, *completions: str) -> list[float | Exception]:
    for key, completion in enumerate(completions):
        scorer.submit(key, ScoringRow("the question", completion, "the reference"))
    done = scorer.collect()
    scorer.close()
    return [done[key] for key in range(len(completions))]


def judge(server: RewardServer, *completions: str, **args: Any) -> list[float | Exception]:
    return values(opened("judge", url=f"{server.url}/v1", model="m", **(QUICK | args)), *completions)


def remote(server: RewardServer, *completions: str, **args: Any) -> list[float | Exception]:
    return values(opened("remote", url=f"{server.url}/score", **(QUICK | args)), *completions)


def test_the_mark_of_the_judge_is_scaled_to_zero_to_one(server: RewardServer) -> None:
    server.answer = lambda request: (200, judged("Good.\nScore: 3, no: **Score: 7**\n" if request else ""))
    assert judge(server, "an answer") == [6 / 9]
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert (request.body["model"], request.body["temperature"], request.body["max_tokens"]) == ("m", 0.0, 512)
    text = request.body["messages"][0]["content"]
    assert all(part in text for part in ("the question", "an answer", "the reference"))


def test_the_judge_gets_the_users_template_and_scale(server: RewardServer) -> None:
    server.answer = lambda request: (200, judged("<mark>-1</mark>"))
    found = judge(
        server, "{prompt} \ud800", template="{completion}|{prompt}", pattern="<mark>(.*?)</mark>", scale=[-2, 2]
    )
    assert found == [0.25]
    assert server.requests[0].body["messages"][0]["content"] == "{prompt} ?|the question"  # filled in once


def test_the_api_key_is_read_from_the_environment(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "abc")
    server.answer = lambda request: (200, judged("Score: 10"))
    assert judge(server, "a", api_key_env="JUDGE_KEY") == [1.0]
    assert server.requests[0].headers["Authorization"] == "Bearer abc"


def test_remote_scores_many_completions_with_one_request_and_few_at_a_time(server: RewardServer) -> None:
    all_submitted = threading.Event()

    def answer(request: Request) -> tuple[int, Any]:
        all_submitted.wait(60.0)
        return 200, {"rewards": [len(row["completion"]) / 100 for row in request.body["rows"]]}

    server.answer = answer
    scorer = opened("remote", url=f"{server.url}/score", batch_size=8, concurrency=2, **QUICK)
    for key in range(40):
        scorer.submit(key, ScoringRow("the question", "x" * key, "the reference"))
    limit = time.monotonic() + 60.0
    while server.max_concurrent < 2:
        assert time.monotonic() < limit
        time.sleep(0.01)
    all_submitted.set()
    assert scorer.collect() == {key: key / 100 for key in range(40)}
    scorer.close()
    assert 5 <= len(server.requests) <= 7  # two with what was queued first, then full batches
    assert max(len(request.body["rows"]) for request in server.requests) == 8
    assert server.max_concurrent == 2
    row = {
        "prompt": "the question",
        "completion": "",
        "reference": "the reference",
        "messages": [{"role": "user", "content": "the question"}],
        "completion_with_special_tokens": "",
        "fields": {},
        "dataset": "",
    }
    assert row in [row for request in server.requests for row in request.body["rows"]]


CHAT = ScoringRow(
    "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n",
    "It is 4",
    "4",
    messages=({"role": "user", "content": "2+2"},),
    completion_with_special_tokens="It is 4<|im_end|>",
    fields={"level": 3, "rubric": "be short \ud800", "nan": float("nan")},
    dataset="sums",
)


def scored(scorer: BatchScorer, row: ScoringRow) -> float | Exception:
    scorer.submit(0, row)
    (value,) = scorer.collect().values()
    scorer.close()
    return value


def test_remote_sends_everything_that_a_reward_gets_or_what_its_inputs_name(server: RewardServer) -> None:
    server.answer = lambda request: (200, {"rewards": [1.0] * len(request.body["rows"])})
    assert scored(opened("remote", url=server.url, **QUICK), CHAT) == 1.0
    (row,) = server.requests[0].body["rows"]
    assert row == {
        "prompt": CHAT.prompt,
        "completion": "It is 4",
        "reference": "4",
        "messages": [{"role": "user", "content": "2+2"}],
        "completion_with_special_tokens": "It is 4<|im_end|>",
        "fields": {"level": 3, "rubric": "be short ?", "nan": None},
        "dataset": "sums",
    }
    assert scored(opened("remote", url=server.url, inputs=["completion", "dataset"], **QUICK), CHAT) == 1.0
    assert server.requests[1].body["rows"] == [{"completion": "It is 4", "dataset": "sums"}]


def test_the_judge_reads_messages_and_columns_without_the_markup_of_the_policy(server: RewardServer) -> None:
    server.answer = lambda request: (200, judged("Score: 10"))
    template = "{prompt}|{completion}|{reference}|{dataset}|{fields.rubric}|{fields.level}"
    asked = [
        CHAT,
        replace(CHAT, messages=({"role": "system", "content": "Sums."}, *CHAT.messages)),
        replace(CHAT, messages=(*CHAT.messages, {"role": "assistant", "content": "Well. "})),
    ]
    for row in asked:
        assert scored(opened("judge", url=f"{server.url}/v1", model="m", template=template, **QUICK), row) == 1.0
    assert [request.body["messages"][0]["content"] for request in server.requests] == [
        "2+2|It is 4|4|sums|be short ?|3",
        "System: Sums.\n\nUser: 2+2|It is 4|4|sums|be short ?|3",
        "2+2|Well. It is 4|4|sums|be short ?|3",
    ]


def test_a_column_of_the_judges_template_that_the_row_lacks_is_named(server: RewardServer) -> None:
    template = "{completion}{fields.rubrik}"
    found = scored(opened("judge", url=f"{server.url}/v1", model="m", template=template, **QUICK), CHAT)
    assert isinstance(found, ValueError)
    assert "{fields.rubrik}; the columns of the row are ['level', 'nan', 'rubric']" in str(found)
    assert server.requests == []


def test_remote_reads_an_engines_classification(server: RewardServer) -> None:
    data = [{"index": 1, "probs": [0.7, 0.3]}, {"index": 0, "probs": [0.2]}]
    server.answer = lambda request: (200, {"data": data[: len(request.body["input"])][::-1] if request else []})
    server.answer = lambda request: (200, {"data": data if len(request.body["input"]) == 2 else data[1:]})
    scorer = opened("remote", url=f"{server.url}/classify", protocol="classify", model="rm", concurrency=1, **QUICK)
    assert values(scorer, "a")[0] == 0.2
    assert server.requests[0].body == {"model": "rm", "input": ["the questiona"]}


@pytest.mark.parametrize("failure", [(500, {}), (429, {}), (200, b"no json"), (200, b""), (200, {"choices": []})])
def test_a_transient_error_is_retried(server: RewardServer, failure: tuple[int, Any]) -> None:
    server.answer = lambda request: failure if len(server.requests) < 3 else (200, judged("Score: 10"))
    assert judge(server, "a") == [1.0]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("answer", "attempts", "reason"),
    [
        ((503, {"error": "busy"}), 3, "3 attempts failed; the last: ServerError: "),
        ((400, {"error": "bad"}), 1, 'status 400: {"error": "bad"}'),
        ((200, judged("I would rather not.")), 3, "no mark in 'I would rather not.'"),
        ((200, judged("Score: 11")), 3, "mark 11 is not on the scale 1 to 10"),
        ((200, [1, 2]), 3, "the answer has the wrong form (TypeError"),
        ((200, b"[" * 100_000), 3, "RecursionError"),
    ],
)
def test_a_server_without_a_usable_answer_fails_within_its_attempts(
    server: RewardServer, answer: tuple[int, Any], attempts: int, reason: str
) -> None:
    server.answer = lambda request: answer
    (found,) = judge(server, "a")
    assert isinstance(found, Exception)
    assert reason in str(found)
    assert len(server.requests) == attempts


@pytest.mark.parametrize(("answer", "reason"), [(None, "no answer within 0.5 s"), ("drip", "within 0.5 s")])
def test_a_server_that_does_not_finish_its_answer_fails_within_its_limits(
    server: RewardServer, answer: str | None, reason: str
) -> None:
    server.answer = lambda request: (200, answer)
    (found,) = judge(server, "a", request_seconds=0.5)  # the server would wait for 60 s, or answer forever
    assert isinstance(found, Exception)
    assert "3 attempts failed" in str(found)
    assert reason in str(found)


def test_the_wait_doubles_with_each_attempt(server: RewardServer) -> None:
    times: list[float] = []

    def answer(request: Request) -> tuple[int, Any]:
        times.append(time.monotonic())
        return 500, {}

    server.answer = answer
    judge(server, "a", backoff_seconds=0.1)
    first, second = times[1] - times[0], times[2] - times[1]
    assert first >= 0.1
    assert second >= 0.2


def test_the_completions_of_a_server_that_exited_are_left_out_without_an_error() -> None:
    with serving(lambda request: (200, {"rewards": [1.0] * len(request.body["rows"])})) as short_lived:
        terms = [
            RewardTerm(name="remote", args={"url": short_lived.url, "low": -3.0, **QUICK}),
            RewardTerm(name="exact"),
        ]
        pool = RewardPool(terms, workers=1, timeout_seconds=60.0)
        pool.submit(0, "", "7", "7")
        assert pool.collect()[0].value == 2.0
    pool.submit(1, "", "7", "7")
    lost = pool.collect()[1]
    pool.close()
    assert lost == Reward(value=None, components={"exact": 1.0}, failures=("remote",))


@pytest.mark.parametrize(
    "answer",
    [{"rewards": [0.5]}, {"rewards": None}, {}, [], {"rewards": [0.5, 0.5, 0.5]}],
)
def test_a_batch_of_the_wrong_length_fails_for_all_its_completions(server: RewardServer, answer: Any) -> None:
    server.answer = lambda request: (200, answer)
    scorer = opened("remote", url=server.url, **(QUICK | {"retries": 0}))
    held = [ScoringRow("", "a", ""), ScoringRow("", "b", "")]
    for key, row in enumerate(held):
        scorer.submit(key, row)
    done = scorer.collect()
    scorer.close()
    assert len(done) == 2
    assert all(isinstance(value, Exception) or answer == {"rewards": [0.5]} for value in done.values())


def test_a_value_that_is_not_a_number_fails_alone(server: RewardServer) -> None:
    given = {"a": 0.5, "b": None, "c": "high", "d": True}
    server.answer = lambda request: (200, {"rewards": [given[row["completion"]] for row in request.body["rows"]]})
    found = remote(server, "a", "b", "c", "d")
    assert found[0] == 0.5
    assert all(isinstance(value, ValueError) for value in found[1:])


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("judge", {"model": ""}, "model='' must be the name"),
        ("judge", {"template": "Grade it."}, "template must contain {completion}"),
        ("judge", {"pattern": "("}, "pattern='(' is not a regular expression"),
        ("judge", {"pattern": "Score"}, "pattern='Score' must have a group"),
        ("judge", {"scale": [10, 1]}, "scale=[10, 1] must be [lowest, highest]"),
        ("judge", {"url": "localhost:8000"}, "url='localhost:8000' is not a URL"),
        ("judge", {"url": "http://127.0.0.1:1/v1"}, "no connection to port 1 of 127.0.0.1"),
        ("judge", {"concurrency": 0}, "concurrency=0 must be a whole number from 1"),
        ("judge", {"retries": -1}, "retries=-1 must be a whole number from 0"),
        ("judge", {"request_seconds": 0}, "request_seconds=0 must be a number of seconds"),
        ("remote", {"wait_seconds": -1}, "wait_seconds=-1 must be a number of seconds"),
        ("judge", {"api_key_env": "NOT_SET_ANYWHERE"}, "is not set"),
        ("remote", {"low": 1.0}, "low=1.0 high=1.0 must be"),
        ("remote", {"protocol": "grpc"}, "protocol='grpc' is unknown"),
        ("remote", {"protocol": "classify"}, "set model for protocol classify"),
        ("remote", {"inputs": ["promt"]}, "inputs=['promt'] must list names of inputs"),
        ("remote", {"inputs": "prompt"}, "inputs='prompt' must list"),
        ("remote", {"batch_size": 0}, "batch_size=0 must be a whole number"),
    ],
)
def test_a_bad_argument_is_rejected_before_the_run(
    server: RewardServer, name: str, args: dict[str, Any], message: str
) -> None:
    needed = {"url": server.url} | ({"model": "m"} if name == "judge" else {})
    with pytest.raises(UserError) as caught:
        build_rewards([RewardTerm(name=name, args=needed | args)])
    assert message in str(caught.value)
    assert str(caught.value).startswith("reward.terms[0].args: ")
