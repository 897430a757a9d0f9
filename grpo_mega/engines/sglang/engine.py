"""SGLang beside the training processes: one engine in its own processes for the ranks [r * tp, (r + 1) * tp).

The first of these ranks starts the engine process (sglang/engine_process.py) and communicates with it. It broadcasts
every result, or an empty heartbeat, to the others, so no rank waits long for another. Rank t writes the weights of
SGLang's rank t. All requests of a call enter SGLang in one message, after the seed of its generators, so the same seed
and prompts give the same tokens. The prefix cache is empty at the start of each call.
Written for SGLang 0.5.23. Without CUDA asserted by tests/engine/test_engine_contract.py. The code for CUDA has not been
run (tests/gpu/test_sglang_on_gpu.py).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from grpo_mega.engines.engine_rules import check_replica_gpus
from grpo_mega.engines.output_checks import OutputLimits
from grpo_mega.engines.replica_broadcast import ReplicaBroadcast
from grpo_mega.engines.request_checks import check_lengths, in_groups, require_ready
from grpo_mega.engines.sglang.arguments import (
    GpuMemory,
    SglangSettings,
    check_one_machine,
    check_sglang,
    engine_arguments,
    engine_workspace,
    visible_gpu,
)
from grpo_mega.engines.sglang.engine_client import SglangProcess
from grpo_mega.engines.sglang.requests import RequestTranslator
from grpo_mega.engines.sglang.scheduler_hooks import SharedModel
from grpo_mega.engines.sglang.sink import SglangSink
from grpo_mega.engines.sglang.staging import Staging
from grpo_mega.engines.sglang.weight_client import WeightClient
from grpo_mega.engines.weights.loader_recording import LoaderRecord
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.interfaces import WeightSink
from grpo_mega.models.parameter_tables import hf_shapes, keeps_float32
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.parallel.devices import num_usable_gpus
from grpo_mega.parallel.ports import free_port
from grpo_mega.types import Completion, Prompt, SamplingRequest, UserError

logger = logging.getLogger(__name__)

Resident = Literal["weights", "kv_cache"]


class SglangEngine:
    """`Engine` with the real SGLang. It starts awake with dummy weights, so a sync must come first.

    Args:
        settings: see there.
        log: file for the output of SGLang's processes; None: a temporary file.

    Raises:
        UserError: SGLang is not installed or does not fit on the GPU, the model has no EOS token, or `return_experts`
            is set for a model without experts.
        RuntimeError: SGLang did not start (with the end of its log), on all ranks of the replica.
    """

    def __init__(self, settings: SglangSettings, log: Path | None = None) -> None:
        self._on_cuda = torch.cuda.is_available()
        check_sglang(on_cuda=self._on_cuda)
        spec = checkpoint_spec(settings.config_dir)
        self._vocab_size = spec.vocab_size
        if settings.return_experts and spec.moe is None:
            raise UserError(
                f"algorithm.routing_replay=true: {settings.config_dir} has no experts", remedy="set it to false"
            )
        self._settings = settings
        self._requests = RequestTranslator(settings, spec)
        wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]
        tensors = {
            name: (shape, torch.float32 if keeps_float32(name) else wanted) for name, shape in hf_shapes(spec).items()
        }
        self._ranks = ReplicaBroadcast(settings.tp, settings.timeout_seconds)
        self._process: SglangProcess | None = None
        gpus, memory = self._own_devices(engine_workspace(settings, spec))
        arguments = engine_arguments(settings, memory, free_port())  # on every rank, so that all raise the same error
        # not that of config.json, if the files hold a head that differs from the embedding (formats/stored_head.py)
        arguments["json_model_override_args"] = json.dumps({"tie_word_embeddings": spec.tie_embeddings})
        if self._ranks.is_first:
            self._process = SglangProcess(
                arguments, tp=settings.tp, gpus=gpus, log=log, timeout_seconds=settings.timeout_seconds
            )
        self._client: WeightClient | None = None
        try:
            shared: list[SharedModel] = self._ranks.broadcast_last(self._start(tensors))
            target = self._connect(shared)
        except RuntimeError:
            self.close()
            raise
        self._sink = SglangSink(self._process, target, tensors)
        self._asleep: set[Resident] = set()
        self._gauges = EngineGauges()
        self.steps = 0
        """Number of completions so far."""

    @property
    def policy_version(self) -> int:
        """Updates behind the weights; -1 before the first sync."""
        return self._sink.policy_version

    @property
    def sink(self) -> WeightSink:
        return self._sink

    def sync_peers(self, *_args: object, **_settings: object) -> None:
        """Return None: the weights of this engine are on the ranks of the job (`Engine.sync_peers`)."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Return G completions per prompt; see `Engine.generate`.

        Raises:
            RuntimeError: the engine is asleep, an update is in progress, no sync has run, or SGLang failed.
            InvalidCompletionError: a completion cannot be right.
            ValueError: a prompt and its completion do not fit `max_model_len`, or the request needs `stop_texts` or
                `return_experts` and the engine was built without it.
        """
        self._check_ready(prompts, sampling)
        limits = OutputLimits("SGLang", self._vocab_size, self.policy_version)
        return in_groups(self._rollouts(prompts, sampling), prompts, sampling, limits, on_completion)

    def take_gauges(self) -> EngineGauges:
        """Return the gauges since the last call; empty on all ranks of the replica but the first."""
        taken, self._gauges = self._gauges, EngineGauges()
        return taken

    def fault(self) -> str:
        """Return why SGLang's processes cannot be used any more, or an empty string."""
        lost = "" if self._client is None else self._client.fault()
        return lost or ("" if self._process is None else self._process.fault())

    def sleep(self) -> None:
        """Release the KV cache, then the weights, which the next sync brings back.

        Without CUDA both stay in the memory of SGLang's processes, because its memory saver is a library for CUDA;
        sampling before the next sync is an error all the same. Processes that have exited hold no memory: `fault`
        reports them.
        """
        if self._asleep:
            return
        self._call_if_running("release", ["kv_cache", "weights"])
        self._asleep = {"weights", "kv_cache"}
        self._sink.forget()

    def wake(self, what: Resident) -> None:
        """Allocate again what `sleep` released. SGLang needs the weights, which a sync then fills, before the cache.

        Nothing happens in processes that have exited: the next sync or call fails, on all ranks.
        """
        if what not in self._asleep:
            return
        self._call_if_running("resume", [what])
        self._asleep.remove(what)

    def close(self) -> None:
        """End SGLang's processes. A second call does nothing."""
        if self._client is not None:
            self._client.close()
        if self._process is not None:
            self._process.close()
            self._process = None

    def _call_if_running(self, command: str, tags: list[Resident]) -> None:
        """Run a command in SGLang's process on the first rank. If the process has exited, log that."""
        if self._process is None:
            return
        try:
            self._process.call(command, tags)
        except RuntimeError as error:
            if not self._process.has_exited:
                raise
            logger.warning("%s", error)

    def _start(self, tensors: dict[str, Any]) -> Iterator[Any]:
        """On the first rank: yield heartbeats until SGLang has started, then the models of its schedulers."""
        if self._process is not None:
            yield from self._process.started(self._ranks.beat_seconds)
            yield self._process.call("share", tensors)

    def _own_devices(self, workspace: float) -> tuple[list[str] | None, GpuMemory | None]:
        """Return the GPUs of the engine's ranks and the memory of the fullest; None without CUDA. Collective.

        Args:
            workspace: bytes that the engine needs beside weights and KV cache.
        """
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        gpu, usable, memory = None, None, None
        if self._on_cuda:
            gpu, usable = visible_gpu(os.environ, torch.cuda.current_device()), num_usable_gpus()
            memory = GpuMemory(*torch.cuda.mem_get_info(), workspace)
        gathered = self._ranks.gather((machine, gpu, usable, memory))
        check_one_machine([each for each, _, _, _ in gathered], len(gathered))
        if not self._on_cuda:
            return None, None
        names = [name for _, name, _, _ in gathered]
        check_replica_gpus(len(names), gathered[0][2])
        check_replica_gpus(len(names), len(set(names)))  # ranks that see one GPU each may give it the same name
        return names, min((each for _, _, _, each in gathered), key=lambda each: each.free)

    def _connect(self, shared: list[SharedModel]) -> tuple[WeightClient, LoaderRecord] | str:
        """Connect to this rank's weight server; return the reason if a loader could not be recorded."""
        reasons = [each.record for each in shared if isinstance(each.record, str)]
        if reasons:
            return reasons[0]
        address, record = shared[self._ranks.number].address, shared[self._ranks.number].record
        assert address is not None, "a scheduler with a record has a weight server"
        assert not isinstance(record, str), "returned above"
        device = torch.device("cuda", torch.cuda.current_device()) if self._on_cuda else torch.device("cpu")
        last_words = self._process.last_words if self._process is not None else str
        self._client = WeightClient(
            address,
            Staging(self._settings.staging_bytes, device),
            dist.get_rank(),
            self._settings.timeout_seconds,
            last_words,
        )
        return self._client, record

    def _check_ready(self, prompts: Sequence[Prompt], sampling: SamplingRequest) -> None:
        require_ready(self._asleep, updating=self._sink.updating, policy_version=self.policy_version)
        if sampling.expert_choices and not self._settings.return_experts:
            raise ValueError("expert_choices=True: the engine was built without return_experts")
        if sampling.stop and not self._settings.stop_texts:
            raise ValueError(f"stop={sampling.stop}: the engine was built without stop_texts")
        check_lengths(prompts, sampling, self._settings.max_model_len)

    def _rollouts(
        self, prompts: Sequence[Prompt], sampling: SamplingRequest
    ) -> Generator[tuple[int, int, Completion], None, None]:
        """Yield (prompt position, member, completion) as rollouts complete, on every rank of the replica."""
        for sampled in self._ranks.broadcast_stream(self._sample(prompts, sampling)):
            position, member = divmod(sampled.position, sampling.group_size)
            self.steps += 1
            yield position, member, self._requests.completion(sampled, prompts[position], self.policy_version)

    def _sample(self, prompts: Sequence[Prompt], sampling: SamplingRequest) -> Iterator[Any]:
        """On the first rank: yield results and heartbeats of SGLang."""
        if self._process is not None:
            batch = self._requests.batch(prompts, sampling)
            for value in self._process.stream("sample", batch, beat_seconds=self._ranks.beat_seconds):
                if isinstance(value, EngineGauges):
                    self._gauges.add(value)
                else:
                    yield value
