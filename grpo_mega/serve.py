"""An engine server: a replica of `engine.kind=vllm` on devices of its own, for jobs with `engine.placement=server`.

    launch/serve.sh CONFIG [section.key=value ...] [--host ADDRESS] [--port PORT]

Started with a job's own config. Prints one line with its address when it is ready; serves one job after the other and
ends on SIGTERM. All ranks carry out what the first one hears: `meet` (make this end of the weight sync), `push` (take
part in one) and `sample`. What goes wrong in a sync leaves a server that refuses to sample until the next one.

Exit code 0: asked to end. 2: the input is wrong, one message. 1: a failure.
Asserted by tests/parallel/test_servers.py and tests/e2e/test_server.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_mega.config.load import load_config
from grpo_mega.config.schema import Config
from grpo_mega.parallel.ports import free_port
from grpo_mega.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from grpo_mega.engines.replica_broadcast import ReplicaBroadcast
    from grpo_mega.engines.server.listener import ServerListener
    from grpo_mega.engines.server.protocol import ServerMessage
    from grpo_mega.engines.vllm.engine import VllmEngine
    from grpo_mega.interfaces import HeldSlice
    from grpo_mega.weight_sync.sync import WeightSync

log = logging.getLogger("grpo_mega.serve")


def main() -> None:
    """Entry point of the server, and of each of its ranks."""
    parser = argparse.ArgumentParser(prog="grpo_mega.serve", description="An engine for jobs elsewhere.")
    parser.add_argument("config", type=Path, help="YAML of the job")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--host", default="127.0.0.1", help="listen at this address (127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="and this port; 0: a free one (0)")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(args.config, [*args.overrides, "engine.placement=server", _any_url(args.host)])
        from grpo_mega.engines.server.protocol import read_token, require_token

        require_token(args.host, read_token(), f"--host={args.host}")
        if "RANK" not in os.environ and config.engine.tp > 1:
            sys.exit(_start_ranks(config.engine.tp))
        serve(config, args.host, args.port)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {error}\n")
            sys.stderr.flush()
        os._exit(2)


def _any_url(host: str) -> str:
    """A config for servers names some; this one's own is not known before it listens."""
    return f"engine.urls=['{host}:1']"


def _start_ranks(num_ranks: int) -> int:
    from grpo_mega.launch.supervisor import run_ranks

    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    command = [sys.executable, "-m", "grpo_mega.serve", *sys.argv[1:]]
    return run_ranks(command, [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(num_ranks)])


def serve(config: Config, host: str, port: int) -> None:
    """On every rank of the server; does not return.

    Raises:
        UserError: the address is taken, or the engine does not fit the config.
    """
    end_on_signals()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    listener = _bound(host, port) if os.environ["RANK"] == "0" else None
    # from here on with torch, which takes seconds to load
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
    folder = model_folder_of(config)  # of a tiny base the engine reads all but the weights
    # longer than any wait of a job: the ranks of a server wait for each other while one of them waits for the job
    limit = 2 * config.guard.timeout_seconds + 60
    init_ranks(Topology(tp, engine_tp=tp), limit)
    ranks = ReplicaBroadcast(tp, config.guard.timeout_seconds)
    engine = make_vllm_engine(config, folder)
    quiet_libraries()
    door = None
    if listener is not None:
        door = ServerListener(listener, read_token(), serving_facts(config, folder), config.guard.timeout_seconds)
        door.open()
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
        sys.stdout.write(f"listening at {f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}\n")
        sys.stdout.flush()
    Server(engine, ranks, door).run()


class Server:
    """One rank of a server. `door` is None but on the first."""

    def __init__(self, engine: VllmEngine, ranks: ReplicaBroadcast, door: ServerListener | None) -> None:
        self._engine, self._ranks, self._door = engine, ranks, door
        self._sync: WeightSync | None = None
        self._sound = False  # the last sync has succeeded

    def run(self) -> None:
        """Until the process ends."""
        from grpo_mega.engines.server.listener import FREED

        told = self._door.commands(self._ranks.beat_seconds) if self._door is not None else iter(())
        for message in self._ranks.broadcast_stream(told):
            if message.kind == FREED:
                self._sync, self._sound = None, False
                continue
            try:
                self.obey(message)
            except Exception as error:  # of the engine: whatever it is, the other ranks may wait in it for this one
                log.exception("this server failed")
                self._answer("failed", {"why": f"{type(error).__name__}: {error}"})
                logging.shutdown()
                os._exit(1)

    def obey(self, message: ServerMessage) -> None:
        """Carry a command out and say how it went."""
        commands = {"meet": self._meet, "push": self._push, "sample": self._sample}
        with self._door.beating(lambda: self._engine.steps) if self._door is not None else nullcontext():
            try:
                commands[message.kind](message.fields)
            except (ValueError, KeyError, TypeError) as error:  # of the request: the same on every rank
                self._answer("failed", {"why": f"{type(error).__name__}: {error}"})
            else:
                self._answer("done")

    def _meet(self, told: dict[str, Any]) -> None:
        import torch.distributed as dist

        from grpo_mega.parallel.peer_group import find_store, join_world
        from grpo_mega.weight_sync.sync import SyncSettings, WeightSync

        timeout, rank = told["timeout_seconds"], told["first_rank"] + dist.get_rank()
        group = dist.group.WORLD
        assert group is not None, "init_ranks has made it"
        with self._faults_told():
            store = find_store(told["address"], told["port"], timeout)
            check = self._door.check_job if self._door is not None else lambda: None
            world = join_world(store, rank, told["names"], timeout, check)
            self._sync = WeightSync(
                NoWeights({name: tuple(shape) for name, shape in told["shapes"].items()}),
                no_tensors,
                self._engine.sink,
                source_group=group,
                replicas=told["replicas"],
                replica_group=group,
                settings=SyncSettings(told["bucket_bytes"], timeout, told["transport"]),
                where=told["names"][rank],
                world=world,
            )

    def _push(self, told: dict[str, Any]) -> None:
        if self._sync is None:
            raise ValueError("push before meet")
        with self._faults_told():
            self._sync.push(told["policy_version"], verify=told["verify"])
        self._sound = True

    def _sample(self, told: dict[str, Any]) -> None:
        from grpo_mega.engines.server.messages import read_sample, rollout_part
        from grpo_mega.types import Completion

        prompts, request = read_sample(told)
        if not self._sound:
            raise ValueError("rollouts before a sync that succeeded")
        if told["policy_version"] != self._engine.policy_version:
            raise ValueError(
                f"rollouts of version {told['policy_version']} are wanted, and this server has version "
                f"{self._engine.policy_version}"
            )

        def send(position: int, member: int, completion: Completion) -> None:
            if self._door is not None:
                self._door.answer("rollout", *rollout_part(position, member, completion))

        self._engine.generate(prompts, request, send)

    def _answer(self, kind: str, fields: dict[str, Any] | None = None) -> None:
        if self._door is not None:
            self._door.answer(kind, fields)

    @contextmanager
    def _faults_told(self) -> Iterator[None]:
        """A job that is gone, or weights that are not the policy's: no rollout before another sync has succeeded."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            log.warning("%s", error)
            self._sync, self._sound = None, False
            raise ValueError(str(error)) from error


class NoWeights:
    """`WeightSource` of a rank without a policy."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """`shapes`: of every tensor of the policy."""
        self._shapes = shapes

    def shards(self) -> Sequence[HeldSlice]:
        return ()

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes


def no_tensors(bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors of a rank without a policy."""
    raise AssertionError("servers get slices")


def end_on_signals() -> None:
    """SIGTERM and SIGINT end the process at once, whatever it waits for; called before other threads exist."""
    wanted = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)

    def end() -> None:
        number = signal.sigwait(wanted)
        log.info("ended by %s", signal.Signals(number).name)
        logging.shutdown()
        os._exit(0 if number == signal.SIGTERM else 130)

    threading.Thread(target=end, daemon=True).start()


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        with suppress(OSError):
            listener.close()
        raise UserError(
            f"--host={host} --port={port}: cannot listen there ({error.strerror})", remedy="choose another"
        ) from (error)
    return listener


if __name__ == "__main__":
    main()
