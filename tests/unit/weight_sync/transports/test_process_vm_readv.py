"""Tensors as evenly spaced runs of bytes, read from the memory of another process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from grpo_mega.weight_sync.transports import process_vm_readv
from grpo_mega.weight_sync.transports.process_vm_readv import (
    MIN_RUN_BYTES,
    RANGE_BYTES,
    StridedRange,
    allow_reading,
    compatible,
    read_range_table,
    read_ranges,
    write_range_table,
)

WIDTH = MIN_RUN_BYTES // 4  # elements of float32 in the shortest run


def numbers(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def runs(values: Tensor) -> StridedRange:
    found = StridedRange.of(values)
    assert found is not None
    return found


@pytest.fixture
def fork() -> Iterator[Callable[[], int]]:
    """Start an idle process with the same memory at the same addresses as this one."""
    children: list[int] = []

    def start() -> int:
        process = os.fork()
        if process == 0:
            allow_reading()
            signal.pause()
            os._exit(0)
        children.append(process)
        return process

    yield start
    for process in children:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


VIEWS = {
    "whole": lambda x: x,
    "rows": lambda x: x[1:3],
    "columns": lambda x: x[..., WIDTH : 2 * WIDTH],
    "every other row": lambda x: x[..., ::2, :],
    "one row": lambda x: x[..., 2, :],
    "one element": lambda x: x[1, 2, 5:6],
    "columns of every plane": lambda x: x[:2, :, WIDTH:],
}


@pytest.mark.parametrize("theirs", VIEWS)
@pytest.mark.parametrize("ours", ["without gaps", "as theirs"])
def test_a_view_of_another_process_arrives(fork: Callable[[], int], theirs: str, ours: str) -> None:
    view = VIEWS[theirs]
    held = numbers(4, 6, 3 * WIDTH)
    process = fork()
    expected = view(held).clone()
    held.zero_()  # in this process only
    whole = torch.zeros_like(held)
    target = torch.zeros_like(expected) if ours == "without gaps" else view(whole)
    address = StridedRange.of(view(held))
    assert address is not None
    read_ranges(process, [(address, runs(target))])
    assert torch.equal(target, expected)
    if ours == "as theirs":
        assert whole.count_nonzero() == expected.count_nonzero(), "nothing else was touched"


def test_more_runs_than_one_call_takes_arrive_in_order(fork: Callable[[], int]) -> None:
    held = numbers(2500, 2 * WIDTH)
    process = fork()
    expected, target = held[:, :WIDTH].clone(), torch.zeros(2500, WIDTH)
    held.zero_()
    read_ranges(process, [(runs(held[:, :WIDTH]), runs(target))])
    assert torch.equal(target, expected)


@pytest.mark.parametrize("most", [1 << 30, 5 * MIN_RUN_BYTES, 1])
def test_many_pairs_arrive_in_as_many_calls_as_their_bytes_need(
    fork: Callable[[], int], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(process_vm_readv, "_MAX_BYTES", most)
    held = numbers(12, 2 * WIDTH)
    process = fork()
    expected = [held[:4].clone(), held[5:9, :WIDTH].clone(), held[11:, 3:5].clone()]
    ranges = [runs(held[:4]), runs(held[5:9, :WIDTH]), runs(held[11:, 3:5])]
    held.zero_()
    targets = [torch.zeros_like(each) for each in expected]
    read_ranges(process, [(address, runs(target)) for address, target in zip(ranges, targets, strict=True)])
    for target, each in zip(targets, expected, strict=True):
        assert torch.equal(target, each)


@pytest.mark.parametrize(
    "values",
    [
        numbers(8, WIDTH)[:, : WIDTH - 1],
        numbers(4, 4, 2 * WIDTH)[:, :3, :WIDTH],
        numbers(8, WIDTH).t(),
        torch.zeros(0, 4),
    ],
    ids=["short runs", "not evenly spaced", "transposed", "empty"],
)
def test_short_or_unevenly_spaced_runs_have_no_range(values: Tensor) -> None:
    assert StridedRange.of(values) is None


def test_runs_that_do_not_divide_each_other_are_not_compatible() -> None:
    two, three = (runs(numbers(6, 7 * WIDTH)[:, : n * WIDTH]) for n in (2, 3))
    assert compatible(two, two)
    assert compatible(runs(numbers(12 * WIDTH)), two)
    assert not compatible(two, three)


def test_a_range_table_is_read_as_it_was_written() -> None:
    ranges = [runs(numbers(3, 2 * WIDTH)[:, :WIDTH]), StridedRange(2**47 - 8, 1, 3, 3)]
    table = torch.zeros(2 * RANGE_BYTES + 8, dtype=torch.uint8)
    write_range_table(table, ranges)
    assert read_range_table(table, 2) == ranges


def test_an_exited_process_and_an_invalid_address_are_errors() -> None:
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    values = numbers(16)
    with pytest.raises(OSError, match=f"could not read process {process}: No such process"):
        read_ranges(process, [(runs(values), runs(torch.zeros(16)))])
    with pytest.raises(OSError, match="Bad address"):
        read_ranges(os.getpid(), [(StridedRange(4096, 1, 64, 64), runs(torch.zeros(16)))])
