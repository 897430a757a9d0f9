"""An engine server: a replica of `engine.kind=vllm` on devices of its own, for jobs with `engine.placement=server`.

    launch/serve.sh CONFIG [section.key=value ...] [--host ADDRESS] [--port PORT]

The config is the job's own. The server prints one line with its address when it is ready, serves one job after the
other, and exits on SIGTERM. All ranks execute the commands that the first rank receives: build this end of the weight
sync, take part in a sync, sample. After a failed sync the server rejects sampling until another sync has succeeded.

Exit code 0: SIGTERM. 1: failure. 2: wrong input, reported in one message. 130: SIGINT.
Asserted by tests/parallel/test_servers.py and tests/e2e/test_server.py.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_mega.config.load import known_keys, load_config
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.config.schema import Config
from grpo_mega.data.hub.fetch import with_hub_inputs
from grpo_mega.parallel.error_report import report_error
from grpo_mega.parallel.ports import free_port, is_loopback
from grpo_mega.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from grpo_mega.engines.replica_broadcast import ReplicaBroadcast
    from grpo_mega.engines.server.listener import ServerListener
    from grpo_mega.engines.server.messages import Command, MeetCommand, PushCommand, SampleCommand, ServerMessage
    from grpo_mega.engines.vllm.engine import VllmEngine
    from grpo_mega.interfaces import HeldSlice
    from grpo_mega.weight_sync.sync import WeightSync

log = logging.getLogger("grpo_mega.serve")


def make_parser() -> OptionParser:
    """Return the parser of the command line."""
    parser = OptionParser(
        prog="grpo_mega.serve", description="Serve one engine replica to jobs with engine.placement=server."
    )
    parser.config_keys = known_keys()
    parser.add_argument("config", type=Path, help="YAML file of the job")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="port to listen at; 0: any free port (default: 0)")
    return parser


def main() -> None:
    """Run the server, or one of its ranks when a launcher has set RANK."""
    args = make_parser().parse_intermixed_args()
    try:
        config = load_config(args.config, [*args.overrides, "engine.placement=server", _placeholder_url(args.host)])
        config = with_hub_inputs(config, with_data=False)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no library asks a hub from here on
        from grpo_mega.engines.server.protocol import read_token, require_token

        require_token(args.host, read_token(), f"--host={args.host}")
        if "RANK" not in os.environ:
            _check_machine(config)
            if config.engine.tp > 1:
                sys.exit(_start_ranks(config.engine.tp))
        serve(config, args.host, args.port)
    except UserError as error:
        report_error(error)
        os._exit(2)


def _placeholder_url(host: str) -> str:
    """Return an override that satisfies the config's check; the server's own port is not known yet."""
    return f"engine.urls=['{host}:1']"


def _check_machine(config: Config) -> None:
    """Check `engine.memory_share` on this machine, as planner, doctor and the start of a job do.

    Raises:
        UserError: the share does not hold the engine, or it is set on a machine without CUDA devices.
    """
    from grpo_mega.doctor.examine import examine_server
    from grpo_mega.doctor.finding import require
    from grpo_mega.engines.engine_rules import check_memory_share_device

    check_memory_share_device(config)
    require(examine_server(config))


def _start_ranks(num_ranks: int) -> int:
    from grpo_mega.launch.node import Node
    from grpo_mega.launch.supervisor import run_ranks

    command = [sys.executable, "-m", "grpo_mega.serve", *sys.argv[1:]]
    return run_ranks(command, Node.of_whole_job(num_ranks).environments(os.environ))


def serve(config: Config, host: str, port: int) -> None:
    """Run one rank of the server. Does not return.

    Raises:
        UserError: the address is in use, or the engine does not support the config.
    """
    exit_on_signals()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    listener = _bind(host, port) if os.environ["RANK"] == "0" else None
    # these modules import torch, which takes seconds: the address is checked before
    from grpo_mega.engines.factory import make_vllm_engine
    from grpo_mega.engines.replica_broadcast import ReplicaBroadcast
    from grpo_mega.engines.server.listener import ServerListener
    from grpo_mega.engines.server.messages import serving_facts
    from grpo_mega.engines.server.protocol import read_token
    from grpo_mega.observe.log import configure_logging, quiet_libraries
    from grpo_mega.parallel.ranks import init_ranks
    from grpo_mega.parallel.topology import Topology
    from grpo_mega.tiny_base.train import model_folder_of

    tp = config.engine.tp
    configure_logging(int(os.environ["RANK"]), "server")
    folder = model_folder_of(config)  # an engine with a tiny base reads only the other files, not the weights
    # longer than any wait of a job: the ranks of a server wait for each other while one of them waits for the job
    limit = 2 * config.guard.timeout_seconds + 60
    init_ranks(Topology(tp, engine_tp=tp), limit, peers_elsewhere=not is_loopback(host))
    ranks = ReplicaBroadcast(tp, config.guard.timeout_seconds)
    engine = make_vllm_engine(config, folder)
    quiet_libraries()
    server_listener = None
    if listener is not None:
        facts = serving_facts(config, folder)
        server_listener = ServerListener(listener, read_token(), facts, lambda: engine.steps)
        port = listener.getsockname()[1]
        server_listener.open()
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else host  # noqa: S104 - only compared
        sys.stdout.write(f"listening at {f'[{shown}]' if ':' in shown else shown}:{port}\n")
        sys.stdout.flush()
    Server(engine, ranks, server_listener).run()


class Server:
    """One rank of a server. `listener` is None except on the first rank."""

    def __init__(self, engine: VllmEngine, ranks: ReplicaBroadcast, listener: ServerListener | None) -> None:
        self._engine, self._ranks, self._listener = engine, ranks, listener
        self._sync: WeightSync | None = None
        self._is_synced = False  # the last sync succeeded

    def run(self) -> None:
        """Execute commands until the process ends."""
        from grpo_mega.engines.server.messages import CommandFailed, JobEnded

        commands = self._listener.commands(self._ranks.beat_seconds) if self._listener is not None else iter(())
        for command in self._ranks.broadcast_stream(commands):
            if isinstance(command, JobEnded):
                self._sync, self._is_synced = None, False
                continue
            try:
                self.execute(command)
            except Exception as error:  # the engine failed: its other ranks may wait for this one without a limit
                log.exception("this server failed")
                self._answer(CommandFailed(f"{type(error).__name__}: {error}"))
                if self._listener is not None:
                    self._listener.close()
                logging.shutdown()
                os._exit(1)

    def execute(self, command: Command) -> None:
        """Execute a command and report its result to the job."""
        from grpo_mega.engines.server.messages import (
            CommandDone,
            CommandFailed,
            MeetCommand,
            PushCommand,
            SampleCommand,
        )

        gauges = None
        try:
            match command:
                case MeetCommand():
                    self._meet(command)
                case PushCommand():
                    self._push(command)
                case SampleCommand():
                    self._sample(command)
                    gauges = self._engine.take_gauges()
        except (ValueError, KeyError, TypeError) as error:  # errors of the request, which every rank raises
            self._answer(CommandFailed(f"{type(error).__name__}: {error}"))
        else:
            self._answer(CommandDone(gauges))

    def _meet(self, command: MeetCommand) -> None:
        import torch.distributed as dist

        from grpo_mega.parallel.peer_group import find_store, join_peers
        from grpo_mega.weight_sync.sync import SyncSettings, WeightSync

        timeout, rank = command.timeout_seconds, command.first_rank + dist.get_rank()
        group = dist.group.WORLD
        assert group is not None, "init_ranks has made it"
        with self._invalidate_sync_on_error():
            store = find_store(command.address, command.port, timeout)
            check = self._listener.check_job if self._listener is not None else lambda: None
            peers = join_peers(store, rank, command.names, timeout, check)
            self._sync = WeightSync(
                NoWeights(command.shapes),
                no_tensors,
                self._engine.sink,
                source_group=group,
                replicas=[list(ranks) for ranks in command.replicas],
                replica_group=group,
                settings=SyncSettings(command.bucket_bytes, timeout, command.transport),
                where=command.names[rank],
                world=peers,
            )

    def _push(self, command: PushCommand) -> None:
        if self._sync is None:
            raise ValueError("weight sync requested before the peer group was formed")
        with self._invalidate_sync_on_error():
            self._sync.push(command.policy_version, verify=command.verify)
        self._is_synced = True

    def _sample(self, command: SampleCommand) -> None:
        from grpo_mega.engines.server.messages import read_prompts, rollout_reply
        from grpo_mega.types import Completion

        if not self._is_synced:
            raise ValueError("sample requested before the first successful weight sync")
        if command.policy_version != self._engine.policy_version:
            raise ValueError(
                f"sample requested with weights of version {command.policy_version}, but this server has version "
                f"{self._engine.policy_version}"
            )

        def send(position: int, member: int, completion: Completion) -> None:
            self._answer(rollout_reply(position, member, completion))

        self._engine.generate(read_prompts(command), command.sampling, send)

    def _answer(self, message: ServerMessage) -> None:
        if self._listener is not None:
            self._listener.answer(message)

    @contextmanager
    def _invalidate_sync_on_error(self) -> Iterator[None]:
        """Reject sampling after a failed sync: the engine's weights may be incomplete, or the job may be gone."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            log.warning("%s", error)
            self._sync, self._is_synced = None, False
            raise ValueError(str(error)) from error


class NoWeights:
    """`WeightSource` of a rank that holds no part of the policy. `shapes`: of every tensor of the policy."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def shards(self) -> Sequence[HeldSlice]:
        return ()

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes


def no_tensors(bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Raise AssertionError: a server never sends whole tensors."""
    raise AssertionError("a server takes part in a sync of slices only")


def exit_on_signals() -> None:
    """Exit at once on SIGTERM and SIGINT, whatever the process waits for. Call before other threads are started."""
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait_and_exit() -> None:
        number = signal.sigwait(signals)
        log.info("exiting on %s", signal.Signals(number).name)
        logging.shutdown()
        os._exit(0 if number == signal.SIGTERM else 130)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as error:  # the last two: a port or a name that cannot exist
        with suppress(OSError):
            listener.close()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"--host={host} --port={port}: cannot listen at this address ({reason})",
            remedy="choose another address",
        ) from error
    return listener


if __name__ == "__main__":
    main()
