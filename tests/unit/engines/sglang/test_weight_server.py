"""Weights through a door into another thread or process: what arrives, what is refused, and who is named. No SGLang."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from grpo_mega.engines.sglang.sink import SglangSink
from grpo_mega.engines.sglang.staging import Staging, StagingPlace, parts_that_fit
from grpo_mega.engines.sglang.weight_client import SchedulerGoneError, WeightClient
from grpo_mega.engines.sglang.weight_server import WeightServer, WeightServerAddress
from grpo_mega.engines.weights.loader_recording import LoaderRecord, record_loader
from grpo_mega.models.digest import slice_digest
from grpo_mega.types import TensorSlice

SHAPES = {"query": ((4, 6), torch.float32), "key": ((2, 6), torch.float32), "table": ((5, 4), torch.bfloat16)}
PADDED = 7  # rows of the table, of which a checkpoint has five


class Toy(nn.Module):
    """A fused parameter, one with padding, and one that its loader turns."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.zeros(6, 6), requires_grad=False)
        self.table = nn.Parameter(torch.full((PADDED, 4), 9.0, dtype=torch.bfloat16), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name == "table":
                self.table[:5].copy_(tensor)
                self.table[5:].zero_()
            else:
                self.fused[:4].copy_(tensor) if name == "query" else self.fused[4:].copy_(tensor)


def recorded(model: Toy) -> LoaderRecord:
    return record_loader(model, SHAPES, {"table"})


def opened(model: Toy, record: LoaderRecord, folder: Path, require_place: Callable[[], None]) -> WeightServerAddress:
    return WeightServer(record, dict(model.named_parameters()), require_place).open(folder, 1, os.getpid())


@dataclass
class Ends:
    model: Toy
    link: WeightClient
    sink: SglangSink
    address: WeightServerAddress
    tensors: dict[str, Tensor]
    stays: mock.Mock

    def push(self, version: int, end: bool = True) -> None:
        self.sink.begin_update()
        for region in self.sink.layout():
            self.sink.write(region.placement.hf, self.tensors[region.placement.hf.name])
        if end:
            self.sink.end_update(version)

    def wrong(self) -> list[str]:
        """Names of what the door's digests say is other than what was sent."""
        slices = [region.placement.hf for region in self.sink.layout()]
        held = zip(slices, self.sink.digests(slices), strict=True)
        return [hf.name for hf, digest in held if digest != slice_digest(self.tensors[hf.name], hf)]


Make = Callable[..., Ends]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:

        def made(num_bytes: int = 4096, timeout_seconds: float = 20.0) -> Ends:
            model, stays = Toy(), mock.Mock()
            record = recorded(model)
            address = opened(model, record, tmp_path, stays)
            link = WeightClient(address, Staging(num_bytes, torch.device("cpu")), 3, timeout_seconds)
            stack.callback(link.close)
            generator = torch.Generator().manual_seed(1)
            tensors = {
                name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in SHAPES.items()
            }
            return Ends(model, link, SglangSink(None, (link, record), SHAPES), address, tensors, stays)

        yield made


# The tensors have 96, 48 and 40 bytes: smaller than one slice, than one row; exactly one; exactly all; more.
@pytest.mark.parametrize(
    ("num_bytes", "messages"), [(4, 46), (16, 15), (64, 4), (96, 2), (96 + 48 + 40, 1), (1 << 20, 1)]
)
def test_what_is_written_is_where_the_loader_puts_it_whatever_fits_into_the_buffer(
    make: Make, num_bytes: int, messages: int
) -> None:
    ends = make(num_bytes)
    with mock.patch.object(ends.link, "call", wraps=ends.link.call) as call:
        ends.push(5)
    assert sum(each.args[0] == "write" for each in call.call_args_list) == messages
    assert torch.equal(ends.model.fused[:4], ends.tensors["query"])
    assert torch.equal(ends.model.fused[4:], ends.tensors["key"])
    assert torch.equal(ends.model.table[:5], ends.tensors["table"])
    assert ends.model.table[5:].count_nonzero() == 0
    assert ends.wrong() == []
    assert ends.sink.probe() == {}
    assert ends.sink.policy_version == 5


def test_parts_of_slices_that_travelled_in_pieces_are_put_together(make: Make) -> None:
    ends = make()
    ends.push(0)
    ends.sink.begin_update()
    ends.sink.write(TensorSlice("query", (1, 2), (2, 3)), torch.full((2, 3), 7.0))
    ends.sink.end_update(1)
    ends.tensors["query"][1:3, 2:5] = 7.0
    assert ends.wrong() == []
    assert torch.equal(ends.model.fused[:4], ends.tensors["query"])


def test_a_byte_that_changes_in_the_buffer_is_named_by_its_digest(make: Make) -> None:
    ends = make()
    ends.push(0, end=False)
    ends.link._staging.memory[96 + 5] ^= 1
    ends.sink.end_update(0)
    assert ends.wrong() == ["key"]


def test_digests_are_made_anew_each_time_and_padding_that_is_not_zero_is_found(make: Make) -> None:
    ends = make()
    ends.push(0)
    assert ends.wrong() == []
    ends.model.fused[1, 1] += 1
    ends.model.table[6, 2] = 1
    assert ends.wrong() == ["query"]
    assert ends.sink.probe() == {"table": "1 of 8 elements that this rank must not add are not zero"}


def test_writes_outside_of_an_update_are_refused_on_both_sides(make: Make) -> None:
    ends = make()
    key = TensorSlice("key", (0, 0), (2, 6))
    with pytest.raises(RuntimeError, match=r"write of key\[0:2, 0:6\] outside of an update"):
        ends.sink.write(key, ends.tensors["key"])
    with pytest.raises(RuntimeError, match=r"SGLang's rank 1 \(.*\), write of rank 3: .*key\[0:2, 0:6\] outside"):
        ends.link.call("write", [(key, torch.float32, 0)])
    ends.push(1)
    assert ends.wrong() == []


def test_what_an_update_left_in_the_buffer_is_not_part_of_the_next_one(make: Make) -> None:
    ends = make()
    ends.push(0)
    ends.sink.begin_update()
    ends.sink.write(TensorSlice("key", (0, 0), (2, 6)), torch.ones(2, 6))
    ends.sink.begin_update()
    ends.sink.end_update(1)
    assert ends.wrong() == []


def test_a_door_with_another_version_of_the_weights_is_an_error(make: Make) -> None:
    ends = make()
    ends.push(2)
    ends.link.call("begin")
    ends.link.call("end", 9)
    for _ in range(2):
        with pytest.raises(
            SchedulerGoneError, match=r"SGLang's rank 1 \(.*\) answers with version 9 .* rank 3 sent version 2"
        ):
            ends.wrong()


def test_digests_of_parameters_that_were_put_elsewhere_are_refused(make: Make) -> None:
    ends = make()
    ends.push(2)
    ends.stays.side_effect = RuntimeError("SGLang put fused elsewhere")
    with pytest.raises(RuntimeError, match=r"SGLang's rank 1 .*, digests of rank 3: .*SGLang put fused elsewhere"):
        ends.wrong()


def test_a_stranger_without_the_key_is_refused_and_the_rank_gets_in_afterwards(make: Make) -> None:
    ends = make()
    ends.link.close()
    staging = Staging(64, torch.device("cpu"))
    with pytest.raises(
        SchedulerGoneError, match=r"SGLang's rank 1 \(.*\) opens no door to rank 3 \(AuthenticationError"
    ):
        WeightClient(replace(ends.address, key=b"another"), staging, 3, 5.0)
    link = WeightClient(ends.address, staging, 3, 5.0)
    assert link.call("probe") == {}
    link.close()


def test_a_door_that_is_not_there_is_an_error(make: Make) -> None:
    ends = make()
    gone = replace(ends.address, path=ends.address.path + "_gone")
    with pytest.raises(SchedulerGoneError, match=r"opens no door to rank 3 \(FileNotFoundError"):
        WeightClient(gone, Staging(64, torch.device("cpu")), 3, 5.0)


def test_a_buffer_on_another_device_than_the_engines_is_refused(make: Make) -> None:
    ends = make()
    ends.link.close()
    staging = Staging(64, torch.device("cpu"))
    staging._place, staging._descriptor = StagingPlace(64, "of-another-machine", ()), -1
    with pytest.raises(RuntimeError, match="writes on GPU of-another-machine, and this process computes on cpu"):
        WeightClient(ends.address, staging, 3, 5.0)


def test_a_door_that_stalls_is_an_error_within_the_limit_and_its_late_answer_is_nobodys(make: Make) -> None:
    ends = make(timeout_seconds=1.0)
    ends.push(0)
    ends.stays.side_effect = lambda: time.sleep(2)
    start = time.monotonic()
    late = r"SGLang's rank 1 \(.*\) did not answer digests of rank 3 within 1 s"
    with pytest.raises(SchedulerGoneError, match=late):
        ends.wrong()
    assert time.monotonic() - start < 2
    time.sleep(2)
    with pytest.raises(SchedulerGoneError, match=late):
        ends.sink.probe()


def behind_the_door(folder: str, connection: Connection) -> None:
    model = Toy()
    record = recorded(model)
    connection.send((opened(model, record, Path(folder), lambda: os._exit(3)), record))
    connection.recv()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[tuple[Any, WeightServerAddress, LoaderRecord]]:
    """A door in a process of its own, which ends when it is asked for digests."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=behind_the_door, args=(str(tmp_path), theirs), daemon=True)
    process.start()
    theirs.close()
    yield process, *ours.recv()
    process.kill()
    process.join()


def test_a_scheduler_that_dies_during_an_update_is_an_error_that_names_both_and_has_its_last_words(
    elsewhere: tuple[Any, WeightServerAddress, LoaderRecord],
) -> None:
    process, address, record = elsewhere
    link = WeightClient(address, Staging(96, torch.device("cpu")), 3, 20.0, lambda: "; the end of its log")
    sink = SglangSink(None, (link, record), SHAPES)
    sink.begin_update()
    sink.write(TensorSlice("query", (0, 0), (4, 6)), torch.ones(4, 6))
    sink.write(TensorSlice("key", (0, 0), (2, 6)), torch.ones(2, 6))  # the first is handed over for it
    process.kill()
    process.join()
    for _ in range(2):
        with pytest.raises(
            SchedulerGoneError, match=r"SGLang's rank 1 \(process \d+\) has ended .*rank 3.*; the end of its log"
        ):
            sink.end_update(1)
    assert sink.updating
    assert sink.policy_version == -1
    link.close()


def test_a_scheduler_that_dies_before_its_answer_is_an_error_that_names_both(
    elsewhere: tuple[Any, WeightServerAddress, LoaderRecord],
) -> None:
    _, address, record = elsewhere
    link = WeightClient(address, Staging(96, torch.device("cpu")), 3, 20.0)
    sink = SglangSink(None, (link, record), SHAPES)
    with pytest.raises(SchedulerGoneError, match=r"process \d+\) has ended while rank 3 waited for digests"):
        sink.digests([TensorSlice("key", (0, 0), (2, 6))])
    link.close()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 4), (1, 1, 6), (3, 1, 4)])
@pytest.mark.parametrize("elements", [1, 3, 4, 8, 100])
def test_parts_tile_a_slice_and_are_as_large_as_they_may_be(shape: tuple[int, ...], elements: int) -> None:
    whole = TensorSlice("t", tuple(2 for _ in shape), shape)
    parts = list(parts_that_fit(whole, elements))
    seen = torch.zeros([2 + n for n in shape], dtype=torch.int64)
    for part in parts:
        assert math.prod(part.shape) <= elements
        seen[part.index] += 1
    assert torch.equal(seen[whole.index], torch.ones(shape, dtype=torch.int64))
    assert int(seen.sum()) == math.prod(shape)
    if elements >= math.prod(shape):
        assert parts == [whole]
