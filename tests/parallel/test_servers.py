"""Ranks of a job with engine servers: the weights that arrive, the job that is served, and the report of every fault.

Every fault raises an error that names the server, on every rank, before anything is sampled. The servers' weights are
plain memory.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch.distributed as dist

from grpo_mega.engines.server import engine as server_engine
from grpo_mega.engines.server.claim import inspect_server
from grpo_mega.engines.server.engine import ServerEngine
from grpo_mega.engines.server.messages import sample_command
from grpo_mega.engines.server.protocol import TOKEN_VARIABLE, named_servers
from grpo_mega.parallel.peer_group import find_store
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import Prompt, SamplingRequest, UserError
from grpo_mega.weight_sync import sync as sync_module
from grpo_mega.weight_sync.sync import SyncReport, SyncSettings, WeightSync
from tests.helpers.memory_ends import MemorySource
from tests.helpers.ranks import RankPool
from tests.helpers.stub_server import FACTS, TOKEN, StubServer, stub_server
from tests.helpers.weight_layouts import TENSORS, policy

BUCKET_BYTES = 128 * 1024
MODEL_BYTES = sum(math.prod(tensor.shape) * tensor.itemsize for tensor in TENSORS.values())
Answers = list[tuple[list[int], str, int]]
PROMPTS = [Prompt(7, "", (1, 2, 3), ""), Prompt(8, "", (4,), "")]
NO_SERVER = "127.0.0.1:9"
LIMIT = 3.0  # seconds; the timeout of tests in which a server does not answer


@pytest.fixture(scope="module")
def servers(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[StubServer]]:
    """Start two servers of one rank, which no test may break."""
    folder = tmp_path_factory.mktemp("servers")
    rank_pool.call(1, do_nothing)  # imports everything that the servers need
    with stub_server(folder / "first") as first, stub_server(folder / "second") as second:
        yield [first, second]


def do_nothing(rank: int) -> None: ...


def open_engine(
    urls: list[str],
    tp: int = 1,
    seconds: float = 20.0,
    token: bytes = TOKEN,
    spare_urls: Sequence[str] = (),
    **facts: object,
) -> ServerEngine:
    with mock.patch.dict("os.environ", {TOKEN_VARIABLE: token.decode()}):
        return ServerEngine(
            urls,
            spare_urls=spare_urls,
            tp=tp,
            facts=msgspec.structs.replace(FACTS, tp=tp, **facts),
            max_model_len=64,
            vocab_size=1000,
            tell_experts=False,
            timeout_seconds=seconds,
        )


def connect_sync(
    rank: int, engine: ServerEngine, transport: str = "auto", seconds: float = 20.0
) -> tuple[MemorySource, WeightSync]:
    size = dist.get_world_size()
    source = MemorySource(policy(Topology(size, tp=size)), rank)
    peers = engine.sync_peers(source.hf_shapes(), f"place {rank}", bucket_bytes=BUCKET_BYTES, transport=transport)
    everyone = dist.group.WORLD
    assert everyone is not None
    sync = WeightSync(
        source,
        lambda bucket_bytes: iter(()),
        engine.sink,
        source_group=everyone,
        replicas=peers.replicas,
        replica_group=everyone,
        settings=SyncSettings(BUCKET_BYTES, seconds, transport),  # type: ignore[arg-type]
        where=f"place {rank}",
        world=peers.group,
        announce=peers.announce,
    )
    return source, sync


def sample_rollouts(engine: ServerEngine, seed: int) -> Answers:
    request = SamplingRequest(2, 1.0, 4, seed=seed)
    return [
        (c.token_ids.tolist(), c.text, c.policy_version) for group in engine.generate(PROMPTS, request) for c in group
    ]


def run_syncs(rank: int, urls: list[str], tp: int, transport: str) -> tuple[list[Answers], list[SyncReport], list[int]]:
    engine = open_engine(urls, tp)
    source, sync = connect_sync(rank, engine, transport)
    answers: list[Answers] = []
    reports = []
    for version in (1, 2):
        source.set_version(version)
        reports.append(sync.push(version, verify=True))
        answers.append(sample_rollouts(engine, rank))
    engine.close()
    return answers, reports, sync.plan.traffic.received_bytes().tolist()


@pytest.mark.parametrize("transport", ["gloo", pytest.param("shared_memory", marks=pytest.mark.long)])
def test_two_servers_hold_the_policy_of_two_ranks_at_each_version(
    rank_pool: RankPool, servers: list[StubServer], transport: str
) -> None:
    found = rank_pool.call(2, run_syncs, [server.url for server in servers], 1, transport)
    for rank, (answers, reports, received) in enumerate(found):
        # each rank's own server answers, and its memory holds no slice of another version
        wanted = {version: [[*p.token_ids, rank] for p in PROMPTS for _ in range(2)] for version in (1, 2)}
        text = answers[0][0][1]
        assert text.startswith("0 of ")
        assert answers == [[(ids, text, version) for ids in wanted[version]] for version in (1, 2)]
        assert received[:2] == [0, 0]
        assert received[2:] == [MODEL_BYTES] * 2
        assert [report.received_bytes for report in reports] == [0, 0]
    assert sum(report.written_bytes for _, reports, _ in found for report in reports[:1]) == sum(found[0][2])
    assert len({report.policy_digest for _, reports, _ in found for report in reports}) == 2


def test_a_server_of_two_ranks_holds_each_slice_once(rank_pool: RankPool, tmp_path: Path) -> None:
    with stub_server(tmp_path / "wide", tp=2) as server:
        found = rank_pool.call(2, run_syncs, [server.url], 2, "gloo")
    for answers, _, received in found:
        assert [text for version in answers for _, text, _ in version] == [answers[0][0][1]] * 8
        assert answers[0][0][1].startswith("0 of ")
        assert answers == found[0][0]  # both ranks receive the same
        assert received[:2] == [0, 0]
        assert MODEL_BYTES < sum(received) < 1.1 * MODEL_BYTES  # both hold the norms and the routers
        assert received[2] == pytest.approx(received[3], rel=0.05)


def error_of_open(
    rank: int, urls: list[str], seconds: float, token: bytes, facts: dict[str, object], spare_urls: Sequence[str] = ()
) -> str:
    with pytest.raises(UserError) as caught:
        open_engine(urls, 1, seconds, token, spare_urls, **facts)
    return str(caught.value)


def test_a_server_with_another_model_or_setting_is_rejected_by_name(
    rank_pool: RankPool, servers: list[StubServer]
) -> None:
    urls = [server.url for server in servers]
    different: dict[str, object] = {"model_digest": "fedcba9876543210", "dtype": "fp32"}
    first, second = rank_pool.call(2, error_of_open, urls, 5.0, TOKEN, different)
    assert first == second
    assert first.splitlines()[1] == (
        f"engine.urls[1]={urls[1]}: that engine server has config.json of the model=0123456789abcdef, here "
        "fedcba9876543210; precision.dtype=bf16, here fp32; start it with this job's config"
    )


def test_another_secret_is_rejected(rank_pool: RankPool, servers: list[StubServer]) -> None:
    (message,) = rank_pool.call(1, error_of_open, [servers[0].url], 5.0, b"another secret of a test", {})
    assert message.startswith(f"engine.urls[0]={servers[0].url}: the program that listens there ")
    assert message.endswith("; start launch/serve.sh there, with the same secret")


def test_a_server_that_does_not_start_is_named_after_the_timeout(rank_pool: RankPool) -> None:
    messages = rank_pool.call(2, error_of_open, [NO_SERVER], 2.0, TOKEN, {})
    assert messages[0] == messages[1]
    assert messages[0].startswith("engine.urls[0]=127.0.0.1:9: no engine server was available to this job within ")
    assert "does not answer" in messages[0]


def sample_with_spares(
    rank: int, urls: list[str], spare_urls: list[str], seconds: float
) -> tuple[Answers, dict[str, object], list[str]]:
    """Sync and sample. Return the answers, the server of this rank if it has one, and what was logged."""
    logged: list[str] = []
    log = logging.getLogger("grpo_mega.engines")
    with mock.patch.object(log, "warning", lambda text, *values: logged.append(text % values)):
        engine = open_engine(urls, seconds=seconds, spare_urls=spare_urls)
        if rank == 0:
            engine._spare_check.join(30.0)
    source, sync = connect_sync(rank, engine, "gloo")
    source.set_version(1)
    sync.push(1, verify=True)
    answers = sample_rollouts(engine, rank)
    client, names = engine._client, [server.name for server in engine._servers]
    engine.close()
    return answers, {"own": None if client is None else client.claimed.server.name, "all": names}, logged


def test_a_spare_server_takes_the_place_of_one_that_does_not_answer(
    rank_pool: RankPool, servers: list[StubServer]
) -> None:
    first, second = (server.url for server in servers)
    found = rank_pool.call(2, sample_with_spares, [first, NO_SERVER], [second], 8.0)
    own, spare = f"engine.urls[0]={first}", f"engine.spare_urls[0]={second}"
    assert [names for _, names, _ in found] == [{"own": name, "all": [own, spare]} for name in (own, spare)]
    for rank, (answers, _, _) in enumerate(found):
        assert {text.startswith("0 of ") for _, text, _ in answers} == {True}
        assert [ids for ids, _, _ in answers] == [[*p.token_ids, rank] for p in PROMPTS for _ in range(2)]
    (warning,), nothing = (logged for _, _, logged in found)
    assert warning.startswith(f"{spare} takes the place of engine.urls[1]={NO_SERVER}: it does not answer (")
    assert nothing == []


def test_a_spare_server_is_not_used_but_named_if_it_could_not_help(
    rank_pool: RankPool, servers: list[StubServer]
) -> None:
    own = servers[0].url
    ((_, names, logged),) = rank_pool.call(1, sample_with_spares, [own], [NO_SERVER, servers[1].url], 20.0)
    assert names["own"] == f"engine.urls[0]={own}"
    (warning,) = logged
    assert warning.startswith(f"no spare server: engine.spare_urls[0]={NO_SERVER} does not answer")


def test_more_lost_servers_than_spares_are_an_error_with_every_reason(
    rank_pool: RankPool, servers: list[StubServer]
) -> None:
    """One of the two groups gets the only spare server."""
    arguments = ([NO_SERVER, "127.0.0.1:10"], 4.0, TOKEN, {}, [servers[0].url])
    messages = rank_pool.call(2, error_of_open, *arguments)
    assert messages[0] == messages[1]
    assert re.fullmatch(
        r"engine\.urls\[[01]\]=127\.0\.0\.1:\d+: no engine server was available to this job within \d+ s: it does not "
        rf"answer \(.*\); engine\.spare_urls\[0\]={servers[0].url}: it serves another job \(process .*\); start .*",
        messages[0],
    )


def test_a_spare_server_with_other_settings_is_named_and_another_one_is_taken(
    rank_pool: RankPool, servers: list[StubServer], tmp_path: Path
) -> None:
    with stub_server(tmp_path / "wide", tp=2) as wide:
        (message,) = rank_pool.call(1, error_of_open, [NO_SERVER], 2.0, TOKEN, {}, [wide.url])
        assert (
            f"; engine.spare_urls[0]={wide.url}: that engine server has engine.tp=2, here 1; start launch/serve.sh"
            in message
        )
        spares = [wide.url, servers[1].url]
        ((_, names, logged),) = rank_pool.call(1, sample_with_spares, [NO_SERVER], spares, 8.0)
    assert names["own"] == f"engine.spare_urls[1]={servers[1].url}"
    assert logged[1:] == [
        f"no spare server: engine.spare_urls[0]={wide.url} has engine.tp=2, here 1; start it with this job's config"
    ]


def lose_server_before_the_sync(rank: int, url: str, folder: Path, where: str) -> tuple[str, float]:
    """The server is killed after it was claimed. Return this rank's error and the seconds until it was raised.

    `where` is the moment of the kill: "joining" of the peer group, with rank 1 later than rank 0, or "comparing plans".
    """
    engine = open_engine([url], seconds=30.0)
    dist.barrier()

    def kill(*_: object) -> None:
        if rank == 0:
            (folder / "kill").touch()
        while not (folder / "killed").exists():
            time.sleep(0.02)

    begin = time.monotonic()
    try:
        if where == "joining":
            kill()
            late = mock.patch.object(server_engine, "find_store", side_effect=find_store_late)
            with late if rank == 1 else nullcontext():
                connect_sync(rank, engine, "gloo", seconds=30.0)
        else:
            with mock.patch.object(sync_module, "plan_reshard", side_effect=kill_then(kill, sync_module.plan_reshard)):
                connect_sync(rank, engine, "gloo", seconds=30.0)
    except RuntimeError as error:
        message = str(error)
    return message, time.monotonic() - begin


def find_store_late(*arguments: Any) -> Any:
    time.sleep(1.0)
    return find_store(*arguments)


def kill_then(kill: Callable[[], None], plan: Callable[..., Any]) -> Callable[..., Any]:
    def planned(*arguments: Any) -> Any:
        kill()
        return plan(*arguments)

    return planned


@pytest.mark.parametrize("where", ["joining", "comparing plans"])
def test_a_server_that_is_lost_before_the_first_sync_is_an_error_of_all_ranks_at_once(
    rank_pool: RankPool, tmp_path: Path, where: str
) -> None:
    with stub_server(tmp_path / "server") as server:

        def kill() -> None:
            while not (tmp_path / "kill").exists():
                time.sleep(0.02)
            server.kill()
            (tmp_path / "killed").touch()

        killer = threading.Thread(target=kill)
        killer.start()
        found = rank_pool.call(2, lose_server_before_the_sync, server.url, tmp_path, where)
        killer.join()
    for message, seconds in found:
        assert server.url in message or where in message or "closed" in message, message
        assert seconds < 15


def run_two_jobs(rank: int, url: str) -> str | None:
    """Run each rank as a job of one rank; the first job is served. Return the error of the second."""
    mine = dist.new_group([0]), dist.new_group([1])
    with (
        mock.patch.object(dist, "get_world_size", return_value=1),
        mock.patch.object(dist, "get_rank", return_value=0),
        mock.patch.object(dist, "all_gather_object", lambda into, value: into.__setitem__(0, value)),
    ):
        engine = open_engine([url]) if rank == 0 else None
        dist.barrier()
        message = error_of_open(0, [url], 1.0, TOKEN, {}) if rank == 1 else None
        dist.barrier()
        if engine is not None:
            engine.close()
    del mine
    return message


def test_a_server_serves_one_job_at_a_time(rank_pool: RankPool, servers: list[StubServer]) -> None:
    (named,) = named_servers("engine.urls", [servers[0].url])
    assert inspect_server(named, TOKEN).job is None
    _, message = rank_pool.call(2, run_two_jobs, servers[0].url)
    assert f"engine.urls[0]={servers[0].url}: no engine server was available to this job within " in message
    assert "it serves another job (process " in message
    end = time.monotonic() + 5
    while inspect_server(named, TOKEN).job is not None:  # the server is free after the job exits
        assert time.monotonic() < end


def run_with_fault(rank: int, urls: list[str], folder: Path, fault: str) -> tuple[str, float]:
    """Run one successful sync, then inject the fault. Return this rank's error and the seconds until it was raised."""
    engine = open_engine(urls, seconds=LIMIT)
    source, sync = connect_sync(rank, engine, "gloo", seconds=LIMIT)
    source.set_version(1)
    sync.push(1, verify=True)
    sample_rollouts(engine, 0)
    dist.barrier()
    (folder / "fault").write_text(fault)
    start = time.monotonic()
    try:
        source.set_version(2)
        sync.push(2, verify=True)
        sample_rollouts(engine, 0)
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    raise AssertionError(f"{fault}: rank {rank} raised no error")


@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        ("die in sampling", "{name} closed the connection \\(sample\\)"),
        ("die in a sync", "{name}"),
        pytest.param("die in verification", "{name}", marks=pytest.mark.long),
        ("stop in sampling", "{name} is not responding: no answer and no engine step for 3 s \\(sample\\)"),
        pytest.param(
            "make no step in sampling",
            "{name} is not responding: no answer and no engine step for 3 s \\(sample\\)",
            marks=pytest.mark.long,
        ),
        pytest.param("stop in a sync", "{name}", marks=pytest.mark.long),
        pytest.param(
            "fail in sampling", "{name} failed \\(sample\\): RuntimeError: no more memory", marks=pytest.mark.long
        ),
        ("fail in a sync", "the engine rejected it \\(no more memory\\)"),
    ],
)
def test_a_server_that_fails_ends_the_job_and_is_named(
    rank_pool: RankPool, tmp_path: Path, fault: str, pattern: str
) -> None:
    with stub_server(tmp_path / "server") as server:
        (found,) = rank_pool.call(1, run_with_fault, [server.url], server.folder, fault)
    name = f"engine server engine.urls\\[0\\]={server.url}"
    message, seconds = found
    assert re.search(pattern.format(name=name), message), message
    assert seconds < 3 * LIMIT


def disconnect_and_start_again(rank: int, url: str, folder: Path, of: str) -> tuple[str, float, Answers]:
    """Disconnect a job while its server works for it, then start another job.

    Return the second job's first error, its waiting time, and its answers after a sync.
    """
    first = open_engine([url], seconds=LIMIT)
    source, sync = connect_sync(rank, first, "gloo", seconds=LIMIT)
    client = first._client
    assert client is not None
    if of == "sampling":
        source.set_version(1)
        sync.push(1, verify=True)
        (folder / "fault").write_text("delay in sampling")
        client.start(sample_command(PROMPTS, SamplingRequest(2, 1.0, 4, seed=0), 1))
    else:
        first.announce(1, True)  # but sends no weights
    time.sleep(0.2)
    client._connection.close()
    start = time.monotonic()
    second = open_engine([url], seconds=20.0)
    waited = time.monotonic() - start
    (folder / "fault").write_text("")
    second._sink.policy_version = 1
    with pytest.raises(RuntimeError) as caught:
        sample_rollouts(second, 0)
    source, sync = connect_sync(rank, second, "gloo")
    source.set_version(5)
    sync.push(5, verify=True)
    answers = sample_rollouts(second, 0)
    second.close()
    return str(caught.value), waited, answers


@pytest.mark.long
@pytest.mark.parametrize("of", ["sampling", "a sync"])
def test_after_a_job_is_disconnected_the_server_samples_only_after_another_sync(
    rank_pool: RankPool, tmp_path: Path, of: str
) -> None:
    with stub_server(tmp_path / "server") as server:
        ((message, waited, answers),) = rank_pool.call(1, disconnect_and_start_again, server.url, server.folder, of)
    assert message.endswith("failed (sample): ValueError: sample requested before the first successful weight sync")
    assert waited > 1.0  # until the server has finished its last command
    assert [version for _, _, version in answers] == [5] * 4
    assert {text.startswith("0 of ") for _, text, _ in answers} == {True}
