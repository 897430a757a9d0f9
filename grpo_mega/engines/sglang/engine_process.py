"""The process that owns SGLang's Engine for one replica; sglang/engine_client.py starts it and sends it commands.

    python -m grpo_mega.engines.sglang.engine_process DESCRIPTOR

No training rank may own the Engine: it spawns schedulers and a detokenizer, installs signal handlers, waits for a store
of torchrun that does not exist, and kills the whole process tree on any error of a child. DESCRIPTOR is one end of a
socket pair. Requests are (command, arguments). Answers are ("part", value) any number of times, then ("done", value) or
("failed", text). The process exits when the other end is closed.
Commands that need idle schedulers wait for them. Asserted by tests/unit/engines/sglang/test_engine_process.py and
tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_mega.engines.sglang.cpu import ENVIRONMENT, install_stubs, other_models
from grpo_mega.engines.sglang.messages import HostSettings, Sampled, SamplingBatch, pickled_tensors
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.parallel.heartbeat import write_stacks_on_signal

if TYPE_CHECKING:
    from torch import Tensor

# In this process and in those that SGLang spawns from it, before their imports.
if __name__ in ("__main__", "__mp_main__") and ENVIRONMENT.items() <= os.environ.items():
    install_stubs()
if __name__ in ("__main__", "__mp_main__"):
    write_stacks_on_signal()

_PR_SET_PDEATHSIG = 1
_READING_SECONDS = 0.02  # between two looks at the load that the scheduler publishes in shared memory


class Host:
    """SGLang's Engine and the commands that the rank may send. Commands raise RuntimeError with SGLang's message."""

    def __init__(self, settings: HostSettings, answer: Callable[[Any], None]) -> None:
        os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = other_models(Path(settings.arguments["model_path"]))
        import sglang

        self._settings, self._answer = settings, answer
        self._engine: Any = sglang.Engine(**settings.arguments)

    def share(self, tensors: dict[str, Any]) -> list[Any]:
        """Return the `SharedModel` of each scheduler process."""
        path = self._settings.answers / "tensors.pickle"
        path.write_bytes(pickle.dumps(tensors))
        return self._run_in_schedulers("share", {"tensors": str(path)})

    def load(self, tensors: bytes) -> None:
        """Give whole tensors, a pickled list of (name, tensor), to SGLang's own loader."""
        self._run_in_schedulers("load", {}, pickle.loads(tensors))  # noqa: S301 - from our own process

    def finish_update(self, version: int) -> None:
        """Set the version of the complete weights, and clear caches that were computed with earlier ones."""
        self._run_in_schedulers("finish_update", {}, version=version)
        self._flush("finish_update")

    def sample(self, batch: SamplingBatch) -> EngineGauges:
        """Sample a batch, send a `Sampled` for each request as soon as it is complete, and return the gauges."""
        gauges = EngineGauges()
        if not batch.keep_prefixes:
            self._flush("sample")
        self._run_in_schedulers("seed", {"seed": batch.seed})
        if not batch.prompts:
            return gauges
        parts = self._engine.generate(
            input_ids=[list(ids) for ids in batch.prompts],
            sampling_params=list(batch.parameters),
            return_logprob=True,
            return_routed_experts=batch.expert_choices,
            stream=True,
        )
        seen = self._read_load(gauges, time.time())
        next_reading = 0.0
        for part in parts:
            if time.monotonic() >= next_reading:
                seen, next_reading = self._read_load(gauges, seen), time.monotonic() + _READING_SECONDS
            meta = part["meta_info"]
            if meta["finish_reason"] is not None:
                log_probs = tuple(entry[0] for entry in meta["output_token_logprobs"])
                experts = base64.b64decode(meta["routed_experts"]) if batch.expert_choices else None
                token_ids, finish = tuple(part["output_ids"]), meta["finish_reason"]
                gauges.add_request(
                    prompt_tokens=meta["prompt_tokens"],
                    cached_tokens=meta["cached_tokens"],
                    completion_tokens=len(token_ids),
                    preemptions=meta["num_retractions"],
                )
                self._answer(Sampled(part["index"], token_ids, log_probs, finish, experts))
        return gauges

    def release(self, tags: list[str]) -> None:
        """Release SGLang's memory of these kinds, once the schedulers are idle."""
        self._flush("release")
        self._engine.release_memory_occupation(tags)

    def resume(self, tags: list[str]) -> None:
        """Allocate SGLang's memory of these kinds again."""
        self._engine.resume_memory_occupation(tags)

    def end(self) -> None:
        """End SGLang's own processes."""
        self._engine.shutdown()

    def _read_load(self, gauges: EngineGauges, seen: float) -> float:
        """Add the load that the scheduler published last, if that was after `seen`; return when it was published.

        The scheduler writes it into shared memory (managers/load_snapshot.py) in any case; reading asks nothing of it.
        """
        for load in self._engine.tokenizer_manager.load_snapshot_reader.read_all():
            if load.timestamp > seen:
                gauges.add_reading(load.num_running_reqs, load.num_waiting_reqs, load.token_usage)
                seen = load.timestamp
        return seen

    def _flush(self, command: str) -> None:
        """Wait until the schedulers are idle and empty their prefix caches.

        A completion arrives here before the scheduler has removed it from its running batch. Until then the scheduler
        rejects a flush, and `release_memory_occupation` ends all processes of SGLang
        (managers/scheduler_components/weight_updater.py:339). SGLang itself repeats a flush that has a timeout
        (managers/scheduler_components/flush_wrapper.py).
        """
        engine, seconds = self._engine, self._settings.idle_seconds
        flushed = engine.loop.run_until_complete(engine.tokenizer_manager.flush_cache(timeout_s=seconds))
        if not flushed.success:
            raise RuntimeError(
                f"{command}: SGLang's schedulers still have requests after {seconds:g} s ({flushed.message})"
            )

    def _run_in_schedulers(
        self,
        command: str,
        arguments: dict[str, Any],
        tensors: Sequence[tuple[str, Tensor]] = (),
        *,
        version: int | None = None,
    ) -> list[Any]:
        """Run a command of sglang/scheduler_hooks.py in every scheduler process and return their answers."""
        import torch
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        from grpo_mega.engines.sglang.scheduler_hooks import LOADER, answer_path

        paths = [answer_path(self._settings.answers, rank) for rank in range(self._settings.tp)]
        for path in paths:
            path.unlink(missing_ok=True)
        first = (json.dumps({"command": command, **arguments}), torch.zeros(()))
        payload = pickled_tensors([first, *tensors])  # by value: SGLang's own serializer supports one reader only
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[payload] * self._settings.tp,
            load_format=LOADER,
            flush_cache=False,  # it fails if the scheduler is not idle yet; see _flush
            weight_version=None if version is None else str(version),
        )
        engine = self._engine
        self._require(command, engine.begin_weight_update())
        updated = engine.loop.run_until_complete(engine.tokenizer_manager.update_weights_from_tensor(request, None))
        self._require(command, engine.end_weight_update())
        self._require(command, updated)
        answers = [pickle.loads(path.read_bytes()) for path in paths]  # noqa: S301 - in a private folder
        for rank, answer in enumerate(answers):
            if isinstance(answer, Exception):
                raise RuntimeError(f"SGLang's rank {rank}, {command}: {answer}")
        return answers

    def _require(self, command: str, result: tuple[bool, str]) -> None:
        if not result[0]:
            raise RuntimeError(f"SGLang rejected {command}: {result[1]}")


def main(descriptor: int) -> None:
    """Serve commands until `end` arrives or the other end is closed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed rank does not close its socket in order
    connection = Connection(descriptor)
    settings: HostSettings = connection.recv()
    host = Host(settings, lambda value: connection.send(("part", value)))
    connection.send(("done", None))
    command = ""
    while command != "end":
        try:
            command, arguments = connection.recv()
        except EOFError:
            command, arguments = "end", ()
        try:
            answer = "done", getattr(host, command)(*arguments)
        except (RuntimeError, ValueError, AssertionError) as error:
            answer = "failed", f"{type(error).__name__}: {error}"
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            command = "end"
    os._exit(0)  # skip SGLang's exit handlers, which have nothing left to do


if __name__ == "__main__":
    main(int(sys.argv[1]))
