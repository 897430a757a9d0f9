"""Expert records of requests from the choices of each step, without vLLM: order, cached blocks, other requests."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.data.expert_records import widen_record
from grpo_mega.engines.vllm.routing import RoutingRecorder, Span

BLOCK = 4


class Steps:
    """Token t of a step chose experts (t + first, t + first + 1) in one layer."""

    def __init__(self) -> None:
        self.first = 0

    def snapshot_routing_data(self, num_tokens: int) -> Tensor:
        numbers = self.first + torch.arange(num_tokens)
        return torch.stack([numbers, numbers + 1], 1)[:, None].to(torch.uint8)


def recorder() -> tuple[RoutingRecorder, Steps]:
    steps = Steps()
    return RoutingRecorder(steps, num_experts=100, block_tokens=BLOCK), steps


def firsts(record: Tensor) -> list[int]:
    assert record.shape[1:] == (1, 2)
    assert torch.equal(
        widen_record(record)[..., 1],
        torch.where(widen_record(record)[..., 0] < 0, -1, widen_record(record)[..., 0] + 1),
    )
    return [int(value) for value in widen_record(record)[:, 0, 0]]


def test_each_request_gets_the_rows_of_its_own_tokens_of_every_step() -> None:
    found, steps = recorder()
    found.open("a", (1, 2, 3), 4)
    found.open("b", (4, 5), 4)
    found.step([Span("a", 0, 3), Span("other", 7, 2), Span("b", 0, 2)])
    steps.first = 50
    found.step([Span("b", 2, 1), Span("a", 3, 1)])
    assert firsts(found.take("a", (1, 2, 3, 9, 9))) == [0, 1, 2, 51]
    assert firsts(found.take("b", (4, 5, 9, 9))) == [5, 6, 50]


def test_cached_blocks_have_the_record_of_the_request_that_computed_them_even_while_it_runs() -> None:
    found, steps = recorder()
    prompt = tuple(range(10))
    found.open("a", prompt, 4)
    found.step([Span("a", 0, 10)])
    steps.first = 50
    for name in ("b", "c"):
        found.open(name, (*prompt[:8], 70, 71) if name == "b" else (99, *prompt[1:]), 4)
        found.step([Span(name, 8, 2)])
    assert firsts(found.take("b", (*prompt[:8], 70, 71, 1))) == [*range(8), 50, 51]
    # another first token means other keys and values, so its blocks have no record
    assert firsts(found.take("c", (99, *prompt[1:], 1))) == [-1] * 8 + [50, 51]
    # blocks of the completion are available to a prompt that continues it
    found.step([Span("a", 10, 3)])
    assert firsts(found.take("a", (*prompt, 5, 6, 7, 8))) == [*range(10), 50, 51, 52]
    found.open("d", (*prompt, 5, 6, 7), 4)
    steps.first = 80
    found.step([Span("d", 12, 1)])
    assert firsts(found.take("d", (*prompt, 5, 6, 7, 8))) == [*range(10), 50, 51, 80]


def test_an_empty_cache_has_no_records() -> None:
    found, _ = recorder()
    prompt = tuple(range(8))
    found.open("a", prompt, 2)
    found.step([Span("a", 0, 8)])
    found.take("a", (*prompt, 1))
    found.drop()
    found.open("b", prompt, 2)
    found.step([Span("b", 4, 4)])
    assert firsts(found.take("b", (*prompt, 1))) == [-1] * 4 + [0, 1, 2, 3]


def test_choices_leave_the_device_before_the_request_ends() -> None:
    found, steps = recorder()
    found.open("a", (1,), 200)
    for t in range(90):
        steps.first = t
        found.step([Span("a", t, 1)])
        assert len(found._pending) < 64
    assert firsts(found.take("a", (1,) * 91)) == list(range(90))
