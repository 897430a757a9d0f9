"""The vLLM engine inside the training process: sampling, sleep and wake, shutdown.

All ranks of the world construct it together, after torch.distributed is initialized. Ranks [r * tp * dp,
(r + 1) * tp * dp) are replica r. Each group of tp consecutive ranks holds one copy of the attention, and its ranks make
the same calls in the same order. With dp > 1 the copies share the experts. They then call `generate` together, each
with its own prompts or none, and step together: a copy that has finished runs dummy batches until all have. vLLM's
`has_unfinished_requests` agrees on this at every step.
Sampling reads only the global random generators. They are seeded from the request and restored afterwards, so the same
seed and prompts give the same tokens. The prefix cache is empty at the start of each call.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

from grpo_mega.data.answer_ends import eos_ids
from grpo_mega.data.answer_text import answer_text
from grpo_mega.engines.output_checks import OutputLimits
from grpo_mega.engines.request_checks import check_lengths, in_groups, require_ready
from grpo_mega.engines.vllm.arguments import BLOCK_TOKENS, VllmSettings
from grpo_mega.engines.vllm.host_storages import ReleasedStorages
from grpo_mega.engines.vllm.lifecycle import keep_generators, start, stop
from grpo_mega.engines.vllm.routing import RoutingRecorder, record_steps
from grpo_mega.engines.vllm.sink import VllmSink
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.interfaces import WeightSink
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.types import Completion, Prompt, SamplingRequest, StopReason

Resident = Literal["weights", "kv_cache"]
_STOP_REASONS: dict[str, StopReason] = {"stop": "eos", "length": "length"}


class VllmEngine:
    """`Engine` with the real vLLM in this process. It starts awake with dummy weights, so a sync must come first.

    Raises:
        UserError: the model has no layout table or no EOS token, `tp` does not fit it, or the choices of its
            routers cannot be recorded.
        ImportError: vLLM is not installed.
    """

    def __init__(self, settings: VllmSettings) -> None:
        from transformers import AutoTokenizer

        spec = checkpoint_spec(settings.config_dir)
        self._vocab_size = spec.vocab_size
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(settings.config_dir))
        self._eos_ids = eos_ids(settings.config_dir, self._tokenizer.eos_token_id)
        self._max_model_len = settings.max_model_len
        self._on_cuda = torch.cuda.is_available()
        started = start(settings, spec)
        self._llm: Any = started.llm
        runner = self._llm.model_executor.driver_worker.worker.model_runner
        self._routing: RoutingRecorder | None = None
        if started.steps is not None:
            assert spec.moe is not None, "bind_routers rejects a model without experts"
            self._routing = RoutingRecorder(started.steps, num_experts=spec.moe.num_experts, block_tokens=BLOCK_TOKENS)
            record_steps(runner, self._routing)
        self._sink = VllmSink(runner.model, started.record, self._drop_prefixes)
        self._kv_cache = ReleasedStorages(runner.kv_caches)
        self._weights = ReleasedStorages(runner.model.parameters(), kept=runner.model.buffers())
        self._asleep: set[Resident] = set()
        self._gauges = EngineGauges()
        self.steps = 0
        """Number of engine steps so far; an engine server reports it in its heartbeats."""

    @property
    def policy_version(self) -> int:
        """Updates behind the weights; -1 before the first sync."""
        return self._sink.policy_version

    @property
    def sink(self) -> WeightSink:
        return self._sink

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes that the KV cache occupies on this rank now."""
        return self._kv_cache.num_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes that the model's parameters occupy on this rank now; valid without CUDA."""
        return self._weights.num_bytes

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
            RuntimeError: the engine is asleep, an update is in progress, or no sync has run.
            InvalidCompletionError: a completion cannot be right.
            ValueError: a prompt and its completion do not fit `max_model_len`, or the request asks for expert choices
                and the engine was built without `return_experts`.
        """
        self._check_ready(prompts, sampling)
        if not sampling.continues:
            self._drop_prefixes()
        limits = OutputLimits("vLLM", self._vocab_size, self.policy_version)
        with _seeded(sampling.seed), _without_compilation(self._on_cuda):
            return in_groups(self._rollouts(prompts, sampling), prompts, sampling, limits, on_completion)

    def take_gauges(self) -> EngineGauges:
        """Return the gauges since the last call; every rank of a replica has the same ones."""
        taken, self._gauges = self._gauges, EngineGauges()
        return taken

    def fault(self) -> str:
        """Return an empty string: the engine is in the process of its rank."""
        return ""

    def sleep(self) -> None:
        """Release the KV cache and the weights, which the next sync brings back.

        Without CUDA the parameters are released; buffers and copies that are derived from parameters stay.
        """
        if self._asleep:
            return
        if self._on_cuda:
            self._llm.sleep(level=2)
        else:
            self._drop_prefixes()
            self._kv_cache.release()
            self._weights.release()
        self._sink.forget()
        self._asleep = {"weights", "kv_cache"}

    def wake(self, what: Resident) -> None:
        """Take back the memory of the weights or of the KV cache; does nothing if it was not released."""
        if what not in self._asleep:
            return
        if self._on_cuda:
            self._llm.wake_up(tags=[what])
        else:
            (self._kv_cache if what == "kv_cache" else self._weights).restore()
        self._asleep.remove(what)

    def close(self) -> None:
        """Shut the engine down with its process groups, except the default one. A second call does nothing."""
        if self._llm is not None:
            self._kv_cache.release()
            stop(self._llm)
            self._llm = None

    def _check_ready(self, prompts: Sequence[Prompt], sampling: SamplingRequest) -> None:
        require_ready(self._asleep, updating=self._sink.updating, policy_version=self.policy_version)
        if sampling.expert_choices and self._routing is None:
            raise ValueError("expert_choices=True: the engine was built without return_experts")
        check_lengths(prompts, sampling, self._max_model_len)

    def _rollouts(
        self, prompts: Sequence[Prompt], sampling: SamplingRequest
    ) -> Generator[tuple[int, int, Completion], None, None]:
        """Yield (prompt position, member, completion) as rollouts complete."""
        from vllm.inputs import tokens_input

        scheduler = self._llm.engine_core.engine_core.scheduler
        places: dict[str, tuple[int, int]] = {}
        requests: dict[str, Any] = {}  # vLLM's own, which count their preemptions
        for position, prompt in enumerate(prompts):
            parameters = self._parameters(sampling, sampling.max_tokens_of(position))
            for member in range(sampling.group_size):
                # One request per rollout: a request with n=G reports only when the last of the G is complete.
                request_id = f"{position}/{member}"
                places[request_id] = (position, member)
                if self._routing is not None and sampling.expert_choices:
                    self._routing.open(request_id, prompt.token_ids, sampling.max_tokens_of(position))
                own_id = self._llm.add_request(request_id, tokens_input(list(prompt.token_ids)), parameters)
                requests[request_id] = scheduler.requests[own_id]
        try:
            while self._llm.has_unfinished_requests():
                outputs = self._llm.step()
                self.steps += 1
                running, waiting = scheduler.get_request_counts()
                self._gauges.add_reading(running, waiting, scheduler.get_kv_cache_usage())
                for output in outputs:
                    position, member = places.pop(output.request_id)
                    completion = self._completion(output.outputs[0])
                    self._gauges.add_request(
                        prompt_tokens=len(prompts[position].token_ids),
                        cached_tokens=output.num_cached_tokens or 0,
                        completion_tokens=len(completion.token_ids),
                        preemptions=requests.pop(output.request_id).num_preemptions,
                    )
                    if self._routing is not None and sampling.expert_choices:
                        tokens = (*prompts[position].token_ids, *completion.token_ids.tolist())
                        completion = replace(completion, expert_choices=self._routing.take(output.request_id, tokens))
                    yield position, member, completion
        finally:
            if places:  # after an error: the next call must not find requests of this one
                self._llm.abort_request(list(places))

    def _parameters(self, sampling: SamplingRequest, max_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if sampling.stop:  # stop texts need a tokenizer in the output processor, and vLLM was started without one
            self._llm.output_processor.tokenizer = self._tokenizer
        options = sampling.options
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=options.top_p,
            top_k=options.top_k or 0,  # 0: all tokens
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            logit_bias=dict(options.logit_bias) or None,
            bad_words=list(options.bad_words),
            max_tokens=max_tokens,
            stop_token_ids=list(self._eos_ids),
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            logprobs=0,  # the sampled token's only
            flat_logprobs=True,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        if options.bad_words:  # vLLM, which has no tokenizer here, would ignore them
            encoder = SimpleNamespace(encode=self._tokenizer.encode, max_token_id=len(self._tokenizer) - 1)
            parameters.update_from_tokenizer(encoder)
        return parameters

    def _completion(self, output: Any) -> Completion:
        token_ids, log_probs = list(output.token_ids), list(output.logprobs.logprobs)
        return Completion(
            token_ids=np.array(token_ids, dtype=np.int32),
            sampler_log_probs=np.array(log_probs, dtype=np.float32),
            # vLLM gives a stop text as str and a stop token as int
            stop_reason="stop" if isinstance(output.stop_reason, str) else _STOP_REASONS[output.finish_reason],
            policy_version=self.policy_version,
            text=answer_text(self._tokenizer, token_ids),
        )

    def _drop_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests of an earlier call are still running")
        if self._routing is not None:
            self._routing.drop()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators and restore them at exit. (Per-request seeds fail on CPU in vLLM 0.32.)"""
    with keep_generators():
        torch.manual_seed(seed)  # CUDA's as well
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def _without_compilation(on_cuda: bool) -> Any:
    """Turn compilation off on CPU, where vLLM would compile a kernel for an unused output (15 s per process)."""
    return nullcontext() if on_cuda else torch.compiler.set_stance("force_eager")
