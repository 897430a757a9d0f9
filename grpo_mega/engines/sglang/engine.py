"""SGLang beside the training processes: one engine for the ranks [r * tp, (r + 1) * tp), in processes of its own.

The first of these ranks starts the engine's process (sglang/process.py) and speaks to it; the others hear from it what
came back, in parts, so that no rank waits longer than a beat for another. Rank t of them writes the weights of SGLang's
rank t. All requests of a call enter SGLang in one message, behind the seed of its generators, so the same seed and
prompts give the same tokens; the prefix cache is empty at the start of each call.
Written for SGLang 0.5.23. Without CUDA asserted by tests/engine/test_engine_contract.py; with it written, never run
(tests/gpu/test_sglang_on_gpu.py).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.data.expert_records import narrowed
from grpo_mega.engines.replica_broadcast import ReplicaBroadcast
from grpo_mega.engines.request_checks import check_lengths, eos_ids, in_groups, require_ready
from grpo_mega.engines.sglang.arguments import (
    GpuMemory,
    SglangSettings,
    check_one_machine,
    check_sglang,
    engine_arguments,
    visible_gpu,
)
from grpo_mega.engines.sglang.engine_client import SglangProcess
from grpo_mega.engines.sglang.messages import Sampled, SamplingBatch
from grpo_mega.engines.sglang.scheduler_hooks import SharedModel
from grpo_mega.engines.sglang.sink import SglangSink
from grpo_mega.engines.sglang.staging import Staging
from grpo_mega.engines.sglang.weight_client import WeightClient
from grpo_mega.engines.weights.loader_recording import LoaderRecord
from grpo_mega.interfaces import WeightSink
from grpo_mega.models.config_readers import read_spec
from grpo_mega.models.parameter_tables import hf_shapes, keeps_float32
from grpo_mega.parallel.ports import free_port
from grpo_mega.types import Completion, Prompt, SamplingRequest, StopReason, UserError

logger = logging.getLogger(__name__)

Resident = Literal["weights", "kv_cache"]
STAGING_BYTES = 16 * 2**20  # beside the buckets of a sync; a larger one is not faster


class SglangEngine:
    """`Engine` with the real SGLang. Starts awake with dummy weights: sync before the first `generate`.

    Args:
        config_dir: Hugging Face folder with config.json and the tokenizer; its weights are not read.
        tp: ranks of one replica.
        ep: 1: experts are cut over the tp ranks; tp: each is whole on one of them, which without CUDA takes weights and
            proves them, and cannot sample.
        max_model_len: longest prompt plus completion, tokens.
        max_num_seqs: rollouts that a replica samples at the same time.
        kv_cache_tokens: capacity of a replica's KV cache; None: `max_num_seqs` rollouts of `max_model_len` (on CUDA: a
            share of the device).
        seed: of SGLang's own dummy weights.
        stops_at_texts: requests may have `stop`; SGLang reads the tokenizer then.
        tell_experts: be able to answer requests with `expert_choices`.
        timeout_seconds: of its answers to everything but sampling.
        staging_bytes: of the buffer through which a rank writes into SGLang's memory.
        log: where its processes write; None: a temporary file.

    Raises:
        UserError: SGLang is not installed, it does not fit on the GPU, or the model has no EOS token, or no experts to
            tell.
        RuntimeError: SGLang did not start (with the end of its log), on all ranks of the replica.
    """

    def __init__(
        self,
        config_dir: Path,
        *,
        dtype: Literal["fp32", "bf16"],
        tp: int,
        ep: int = 1,
        max_model_len: int,
        max_num_seqs: int,
        kv_cache_tokens: int | None,
        seed: int,
        stops_at_texts: bool = False,
        tell_experts: bool = False,
        timeout_seconds: float = 600.0,
        staging_bytes: int = STAGING_BYTES,
        log: Path | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        self._on_cuda = torch.cuda.is_available()
        check_sglang(on_cuda=self._on_cuda)
        spec = read_spec(config_dir)
        if tell_experts and spec.moe is None:
            raise UserError(
                f"algorithm.routing_replay=true: {config_dir} has no experts to tell", remedy="set it to false"
            )
        self._spec, self._tells_experts = spec, tell_experts
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(config_dir))
        self._eos_ids = eos_ids(config_dir, self._tokenizer.eos_token_id)
        self._max_model_len, self._stops_at_texts = max_model_len, stops_at_texts
        wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        tensors = {name: (shape, _dtype(name, wanted)) for name, shape in hf_shapes(spec).items()}
        self._ranks = ReplicaBroadcast(tp, timeout_seconds)
        self._process: SglangProcess | None = None
        gpus, memory = self._own_devices()
        settings = SglangSettings(
            config_dir, dtype, tp, ep, max_model_len, max_num_seqs, kv_cache_tokens, seed, stops_at_texts,
            tell_experts, free_port(),
        )  # fmt: skip
        arguments = engine_arguments(settings, memory)  # on every rank: what is refused is refused by all
        if self._ranks.is_first:
            self._process = SglangProcess(arguments, tp=tp, gpus=gpus, log=log, timeout_seconds=timeout_seconds)
        self._door: WeightClient | None = None
        try:
            shared: list[SharedModel] = self._ranks.broadcast_last(self._started(tensors))
            opened = self._opened(shared, staging_bytes, timeout_seconds)
        except RuntimeError:
            self.close()
            raise
        self._sink = SglangSink(self._process, opened, tensors)
        self._asleep: set[Resident] = set()
        self._told = False  # what sleeping means on this machine: said once

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
        """G completions per prompt; `Engine.generate`.

        Raises:
            RuntimeError: asleep, in the middle of an update, before the first sync, or SGLang failed.
            ValueError: a prompt and its completion do not fit `max_model_len`, or the engine was not built for `stop`,
                or not to tell experts and is asked for them.
        """
        self._check_ready(prompts, sampling)
        return in_groups(self._rollouts(prompts, sampling), len(prompts), sampling.group_size, on_completion)

    def sleep(self) -> None:
        """SGLang's order of release. On CUDA the weights are gone until a sync has brought all of them; without it both
        stay in host memory."""
        if self._asleep:
            return
        if not self._on_cuda and not self._told:
            logger.info("without CUDA SGLang releases nothing: KV cache and weights stay in host memory")
            self._told = True
        if self._process is not None:
            self._process.call("release", ["kv_cache", "weights"])
        self._asleep = {"weights", "kv_cache"}
        if self._on_cuda:
            self._sink.forget()

    def wake(self, what: Resident) -> None:
        """SGLang's order: weights, which a sync then brings, before the KV cache."""
        if what not in self._asleep:
            return
        if self._process is not None:
            self._process.call("resume", [what])
        self._asleep.remove(what)

    def close(self) -> None:
        """End SGLang's processes. A second call does nothing."""
        if self._door is not None:
            self._door.close()
        if self._process is not None:
            self._process.close()
            self._process = None

    def _started(self, tensors: dict[str, Any]) -> Iterator[Any]:
        if self._process is not None:
            yield from self._process.started(self._ranks.beat_seconds)
            yield self._process.call("share", tensors)

    def _own_devices(self) -> tuple[list[str] | None, GpuMemory | None]:
        """GPUs of this engine's ranks, and the memory of the fullest; None without CUDA. Collective over them."""
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        gpu, memory = None, None
        if self._on_cuda:
            gpu = visible_gpu(os.environ, torch.cuda.current_device())
            memory = GpuMemory(*torch.cuda.mem_get_info())
        told = self._ranks.gather((machine, gpu, memory))
        check_one_machine([each for each, _, _ in told], len(told))
        if not self._on_cuda:
            return None, None
        return [name for _, name, _ in told], min((each for _, _, each in told), key=lambda each: each.free)

    def _opened(
        self, shared: list[SharedModel], staging_bytes: int, timeout_seconds: float
    ) -> tuple[WeightClient, LoaderRecord] | str:
        """This rank's door; or why there is none."""
        because = [each.record for each in shared if isinstance(each.record, str)]
        if because:
            return because[0]
        door, record = shared[self._ranks.number].door, shared[self._ranks.number].record
        assert door is not None, "a record has a door"
        assert not isinstance(record, str), "looked at above"
        device = torch.device("cuda", torch.cuda.current_device()) if self._on_cuda else torch.device("cpu")
        words = self._process.last_words if self._process is not None else str
        self._door = WeightClient(door, Staging(staging_bytes, device), dist.get_rank(), timeout_seconds, words)
        return self._door, record

    def _check_ready(self, prompts: Sequence[Prompt], sampling: SamplingRequest) -> None:
        require_ready(self._asleep, updating=self._sink.updating, policy_version=self.policy_version)
        if sampling.expert_choices and not self._tells_experts:
            raise ValueError("expert_choices of an engine that was built without tell_experts")
        if sampling.stop and not self._stops_at_texts:
            raise ValueError("stop of an engine that was built without stops_at_texts")
        check_lengths(prompts, sampling, self._max_model_len)

    def _rollouts(
        self, prompts: Sequence[Prompt], sampling: SamplingRequest
    ) -> Generator[tuple[int, int, Completion], None, None]:
        for sampled in self._ranks.broadcast_stream(self._sampled(prompts, sampling)):
            position, member = divmod(sampled.position, sampling.group_size)
            yield position, member, self._completion(sampled, prompts[position])

    def _sampled(self, prompts: Sequence[Prompt], sampling: SamplingRequest) -> Iterator[Any]:
        if self._process is None:
            return
        requests = [(p, position) for position, p in enumerate(prompts) for _ in range(sampling.group_size)]
        batch = SamplingBatch(
            [prompt.token_ids for prompt, _ in requests],
            [self._parameters(sampling, sampling.max_tokens_of(position)) for _, position in requests],
            sampling.seed,
            sampling.continues,
            sampling.expert_choices,
        )
        yield from self._process.stream("sample", batch, beat_seconds=self._ranks.beat_seconds)

    def _parameters(self, sampling: SamplingRequest, max_tokens: int) -> dict[str, Any]:
        """All that the model's folder could set otherwise."""
        return {
            "temperature": sampling.temperature,
            "max_new_tokens": max_tokens,
            "stop_token_ids": list(self._eos_ids),
            "stop": list(sampling.stop) or None,
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
        }

    def _completion(self, sampled: Sampled, prompt: Prompt) -> Completion:
        token_ids = sampled.token_ids
        assert len(token_ids) == len(sampled.log_probs), f"{len(token_ids)} tokens, {len(sampled.log_probs)} log-probs"
        return Completion(
            token_ids=token_ids,
            sampler_log_probs=sampled.log_probs,
            stop_reason=stop_reason(sampled.finish),
            policy_version=self.policy_version,
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True),
            expert_choices=self._experts(sampled, len(prompt.token_ids)),
        )

    def _experts(self, sampled: Sampled, prompt_tokens: int) -> Tensor | None:
        """[N, L, K] of all tokens but the last, which the engine has not read."""
        if sampled.expert_choices is None:
            return None
        assert self._spec.moe is not None, "checked when the engine was built"
        shape = (prompt_tokens + len(sampled.token_ids) - 1, self._spec.num_layers, self._spec.moe.top_k)
        told = np.frombuffer(sampled.expert_choices, dtype=np.int32)
        if told.size != math.prod(shape):
            raise RuntimeError(f"SGLang told {told.size} experts of a rollout, not {' x '.join(map(str, shape))}")
        return narrowed(torch.from_numpy(told.reshape(shape).astype(np.int16)), self._spec.moe.num_experts)


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if keeps_float32(name) else dtype


def stop_reason(finish: dict[str, Any]) -> StopReason:
    """Of SGLang's finish_reason.

    Raises:
        RuntimeError: it gave up on the request.
    """
    if finish["type"] == "length":
        return "length"
    if finish["type"] == "stop":
        return "stop" if isinstance(finish["matched"], str) else "eos"
    raise RuntimeError(f"SGLang ended a rollout early: {finish}")
