"""Weight server and client in other threads and processes, without SGLang: data, rejected calls, and errors."""

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

from grpo_mega.engines.sglang import weight_client
from grpo_mega.engines.sglang.sink import SglangSink
from grpo_mega.engines.sglang.staging import Staging, StagingPlace, parts_that_fit
from grpo_mega.engines.sglang.weight_client import SchedulerGoneError, WeightClient
from grpo_mega.engines.sglang.weight_server import WeightServer, WeightServerAddress
from grpo_mega.engines.weights.loader_recording import LoaderRecord, record_loader
from grpo_mega.models.digest import slice_digest
from grpo_mega.types import TensorSlice
from tests.helpers.signals import stop_process

SHAPES = {"query": ((4, 6), torch.float32), "key": ((2, 6), torch.float32), "table": ((5, 4), torch.bfloat16)}
PADDED = 7  # rows of the table, of which a checkpoint has five


class Toy(nn.Module):
    """A model with a fused parameter and a parameter with padding."""

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


def record(model: Toy) -> LoaderRecord:
    return record_loader(model, SHAPES, {"table"})


def start_server(
    model: Toy, loader: LoaderRecord, folder: Path, require_unmoved: Callable[[], None]
) -> WeightServerAddress:
    return WeightServer(loader, dict(model.named_parameters()), require_unmoved).start(folder, 1, os.getpid())


@dataclass
class Ends:
    model: Toy
    client: WeightClient
    sink: SglangSink
    address: WeightServerAddress
    tensors: dict[str, Tensor]
    require_unmoved: mock.Mock

    def push(self, version: int, end: bool = True) -> None:
        self.sink.begin_update()
        for region in self.sink.layout():
            self.sink.write(region.placement.hf, self.tensors[region.placement.hf.name])
        if end:
            self.sink.end_update(version)

    def wrong(self) -> list[str]:
        """Return the names of slices whose digest differs from the tensors that were sent."""
        slices = [region.placement.hf for region in self.sink.layout()]
        held = zip(slices, self.sink.digests(slices), strict=True)
        return [hf.name for hf, digest in held if digest != slice_digest(self.tensors[hf.name], hf)]


Make = Callable[..., Ends]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:

        def start(num_bytes: int = 4096, timeout_seconds: float = 20.0) -> Ends:
            model, require_unmoved = Toy(), mock.Mock()
            loader = record(model)
            address = start_server(model, loader, tmp_path, require_unmoved)
            client = WeightClient(address, Staging(num_bytes, torch.device("cpu")), 3, timeout_seconds)
            stack.callback(client.close)
            generator = torch.Generator().manual_seed(1)
            tensors = {
                name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in SHAPES.items()
            }
            return Ends(model, client, SglangSink(None, (client, loader), SHAPES), address, tensors, require_unmoved)

        yield start


# The tensors have 96, 48 and 40 bytes. The buffer is smaller than a row, smaller than a slice, or as large as all.
@pytest.mark.parametrize(
    ("num_bytes", "messages"), [(4, 46), (16, 15), (64, 4), (96, 2), (96 + 48 + 40, 1), (1 << 20, 1)]
)
def test_values_are_written_where_the_loader_puts_them_for_every_buffer_size(
    make: Make, num_bytes: int, messages: int
) -> None:
    ends = make(num_bytes)
    with mock.patch.object(ends.client, "call", wraps=ends.client.call) as call:
        ends.push(5)
    assert sum(each.args[0] == "write" for each in call.call_args_list) == messages
    assert torch.equal(ends.model.fused[:4], ends.tensors["query"])
    assert torch.equal(ends.model.fused[4:], ends.tensors["key"])
    assert torch.equal(ends.model.table[:5], ends.tensors["table"])
    assert ends.model.table[5:].count_nonzero() == 0
    assert ends.wrong() == []
    assert ends.sink.probe() == {}
    assert ends.sink.policy_version == 5


def test_a_part_of_a_slice_is_written_in_its_place(make: Make) -> None:
    ends = make()
    ends.push(0)
    ends.sink.begin_update()
    ends.sink.write(TensorSlice("query", (1, 2), (2, 3)), torch.full((2, 3), 7.0))
    ends.sink.end_update(1)
    ends.tensors["query"][1:3, 2:5] = 7.0
    assert ends.wrong() == []
    assert torch.equal(ends.model.fused[:4], ends.tensors["query"])


def test_a_byte_that_changes_in_the_buffer_is_found_by_the_digest_of_its_tensor(make: Make) -> None:
    ends = make()
    ends.push(0, end=False)
    ends.client._staging.memory[96 + 5] ^= 1
    ends.sink.end_update(0)
    assert ends.wrong() == ["key"]


def test_digests_are_of_the_present_values_and_padding_that_is_not_zero_is_found(make: Make) -> None:
    ends = make()
    ends.push(0)
    assert ends.wrong() == []
    ends.model.fused[1, 1] += 1
    ends.model.table[6, 2] = 1
    assert ends.wrong() == ["query"]
    assert ends.sink.probe() == {"table": "1 of 8 elements are not zero, although another rank adds them"}


def test_writes_outside_of_an_update_are_rejected_by_client_and_server(make: Make) -> None:
    ends = make()
    key = TensorSlice("key", (0, 0), (2, 6))
    with pytest.raises(RuntimeError, match=r"write of key\[0:2, 0:6\] outside of an update"):
        ends.sink.write(key, ends.tensors["key"])
    with pytest.raises(RuntimeError, match=r"SGLang's rank 1 \(.*\), write from rank 3: .*key\[0:2, 0:6\] outside"):
        ends.client.call("write", [(key, torch.float32, 0)])
    ends.push(1)
    assert ends.wrong() == []


def test_slices_left_in_the_buffer_by_an_unfinished_update_are_discarded(make: Make) -> None:
    ends = make()
    ends.push(0)
    ends.sink.begin_update()
    ends.sink.write(TensorSlice("key", (0, 0), (2, 6)), torch.ones(2, 6))
    ends.sink.begin_update()
    ends.sink.end_update(1)
    assert ends.wrong() == []


def test_a_server_with_another_version_of_the_weights_is_an_error(make: Make) -> None:
    ends = make()
    ends.push(2)
    ends.client.call("begin")
    ends.client.call("end", 9)
    for _ in range(2):
        with pytest.raises(
            SchedulerGoneError, match=r"SGLang's rank 1 \(.*\) holds version 9 .* rank 3 sent version 2"
        ):
            ends.wrong()


def test_digests_of_parameters_that_moved_are_rejected(make: Make) -> None:
    ends = make()
    ends.push(2)
    ends.require_unmoved.side_effect = RuntimeError("SGLang moved fused")
    with pytest.raises(RuntimeError, match=r"SGLang's rank 1 .*, digests from rank 3: .*SGLang moved fused"):
        ends.wrong()


def test_a_client_with_a_wrong_key_is_rejected_and_the_next_one_is_accepted(make: Make) -> None:
    ends = make()
    ends.client.close()
    staging = Staging(64, torch.device("cpu"))
    with pytest.raises(SchedulerGoneError, match=r"SGLang's rank 1 \(.*\) did not accept rank 3 \(AuthenticationError"):
        WeightClient(replace(ends.address, key=b"another"), staging, 3, 5.0)
    client = WeightClient(ends.address, staging, 3, 5.0)
    assert client.call("probe") == {}
    client.close()


def test_a_missing_server_is_an_error(make: Make) -> None:
    ends = make()
    gone = replace(ends.address, path=ends.address.path + "_gone")
    with pytest.raises(SchedulerGoneError, match=r"did not accept rank 3 \(FileNotFoundError"):
        WeightClient(gone, Staging(64, torch.device("cpu")), 3, 5.0)


def test_a_buffer_on_another_device_than_the_engine_is_rejected(make: Make) -> None:
    ends = make()
    ends.client.close()
    staging = Staging(64, torch.device("cpu"))
    staging._place, staging._descriptor = StagingPlace(64, "of-another-machine", ()), -1
    with pytest.raises(RuntimeError, match="writes on GPU of-another-machine, and this process runs on cpu"):
        WeightClient(ends.address, staging, 3, 5.0)


def test_a_server_that_does_not_respond_times_out_and_its_late_answer_is_ignored(
    make: Make,
) -> None:
    ends = make(timeout_seconds=1.0)
    ends.push(0)
    ends.require_unmoved.side_effect = lambda: time.sleep(2)
    start = time.monotonic()
    late = r"SGLang's rank 1 \(.*\) did not answer digests from rank 3 within 1 s"
    with pytest.raises(SchedulerGoneError, match=late):
        ends.wrong()
    assert time.monotonic() - start < 2
    time.sleep(2)
    with pytest.raises(SchedulerGoneError, match=late):
        ends.sink.probe()


def serve_until_digests(folder: str, connection: Connection) -> None:
    model = Toy()
    loader = record(model)
    connection.send((start_server(model, loader, Path(folder), lambda: os._exit(3)), loader))
    connection.recv()


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[tuple[Any, WeightServerAddress, LoaderRecord]]:
    """A server in a process of its own, which exits when it receives a request for digests."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_until_digests, args=(str(tmp_path), theirs), daemon=True)
    process.start()
    theirs.close()
    yield process, *ours.recv()
    process.kill()
    process.join()


def test_a_scheduler_that_dies_during_an_update_is_an_error_with_both_names_and_the_end_of_its_log(
    other_process: tuple[Any, WeightServerAddress, LoaderRecord],
) -> None:
    process, address, loader = other_process
    client = WeightClient(address, Staging(96, torch.device("cpu")), 3, 20.0, lambda: "; the end of its log")
    sink = SglangSink(None, (client, loader), SHAPES)
    sink.begin_update()
    sink.write(TensorSlice("query", (0, 0), (4, 6)), torch.ones(4, 6))
    sink.write(TensorSlice("key", (0, 0), (2, 6)), torch.ones(2, 6))  # needs the space of the first, which is sent
    process.kill()
    process.join()
    for _ in range(2):
        with pytest.raises(
            SchedulerGoneError, match=r"SGLang's rank 1 \(process \d+\) exited .*rank 3.*; the end of its log"
        ):
            sink.end_update(1)
    assert sink.updating
    assert sink.policy_version == -1
    assert client.fault().startswith("SGLang's rank 1 (process ")
    client.close()


def test_a_scheduler_that_stays_stopped_is_named_before_the_timeout(
    other_process: tuple[Any, WeightServerAddress, LoaderRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, address, loader = other_process
    client = WeightClient(replace(address, process=process.pid), Staging(96, torch.device("cpu")), 3, 60.0)
    sink = SglangSink(None, (client, loader), SHAPES)
    sink.begin_update()
    assert client.fault() == ""
    monkeypatch.setattr(weight_client, "_STOPPED_SECONDS", 0.5)
    monkeypatch.setattr(weight_client, "_CHECK_SECONDS", 0.1)
    stop_process(process.pid)
    with pytest.raises(SchedulerGoneError, match=r"has been stopped .* for 0.5 s while rank 3 waited for begin"):
        sink.begin_update()
    assert "has been stopped" in client.fault()
    client.close()


def test_a_scheduler_that_dies_before_its_answer_is_an_error_with_both_names(
    other_process: tuple[Any, WeightServerAddress, LoaderRecord],
) -> None:
    _, address, loader = other_process
    client = WeightClient(address, Staging(96, torch.device("cpu")), 3, 20.0)
    sink = SglangSink(None, (client, loader), SHAPES)
    with pytest.raises(SchedulerGoneError, match=r"process \d+\) exited while rank 3 waited for digests"):
        sink.digests([TensorSlice("key", (0, 0), (2, 6))])
    client.close()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 4), (1, 1, 6), (3, 1, 4)])
@pytest.mark.parametrize("elements", [1, 3, 4, 8, 100])
def test_parts_cover_a_slice_exactly_once_and_do_not_exceed_the_limit(shape: tuple[int, ...], elements: int) -> None:
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
