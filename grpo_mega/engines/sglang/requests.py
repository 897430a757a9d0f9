"""Translation between this program's prompts and completions and SGLang's requests and results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_mega.data.answer_ends import eos_ids
from grpo_mega.data.answer_text import answer_text
from grpo_mega.data.expert_records import narrow_record
from grpo_mega.engines.sglang.arguments import SglangSettings
from grpo_mega.engines.sglang.messages import Sampled, SamplingBatch
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import Completion, Prompt, SamplingRequest, StopReason

_NOT_A_TOKEN = "NaN happened"


class RequestTranslator:
    """Builds the batch of a call of `generate` and reads its results.

    Raises:
        UserError: the model has no EOS token.
    """

    def __init__(self, settings: SglangSettings, spec: ModelSpec) -> None:
        from transformers import AutoTokenizer

        self._spec = spec
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(settings.config_dir))
        self._eos_ids = eos_ids(settings.config_dir, self._tokenizer.eos_token_id)

    def batch(self, prompts: Sequence[Prompt], sampling: SamplingRequest) -> SamplingBatch:
        """Return one request per rollout; rollout `member` of prompt `i` is at position i * group_size + member."""
        requests = [(p, position) for position, p in enumerate(prompts) for _ in range(sampling.group_size)]
        return SamplingBatch(
            [prompt.token_ids for prompt, _ in requests],
            [self._parameters(sampling, sampling.max_tokens_of(position)) for _, position in requests],
            sampling.seed,
            sampling.continues,
            sampling.expert_choices,
        )

    def completion(self, sampled: Sampled, prompt: Prompt, policy_version: int) -> Completion:
        """Return the completion of one finished request.

        Raises:
            RuntimeError: SGLang aborted the request, or returned expert choices of another shape than [N, L, K].
        """
        token_ids = np.array(sampled.token_ids, dtype=np.int32)
        assert len(token_ids) == len(sampled.log_probs), f"{len(token_ids)} tokens, {len(sampled.log_probs)} log-probs"
        return Completion(
            token_ids=token_ids,
            sampler_log_probs=np.array(sampled.log_probs, dtype=np.float32),
            stop_reason=stop_reason(sampled.finish),
            policy_version=policy_version,
            text=answer_text(self._tokenizer, sampled.token_ids),
            expert_choices=self._experts(sampled, len(prompt.token_ids)),
        )

    def _parameters(self, sampling: SamplingRequest, max_tokens: int) -> dict[str, Any]:
        """Return SGLang's sampling parameters, including every one that the model's folder could set otherwise."""
        options = sampling.options
        assert not options.bad_words, "config/rules.py rejects evaluation.bad_words with SGLang"
        return {
            "temperature": sampling.temperature,
            "max_new_tokens": max_tokens,
            "stop_token_ids": list(self._eos_ids),
            "stop": list(sampling.stop) or None,
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "top_p": options.top_p,
            "top_k": -1 if options.top_k is None else options.top_k,
            "min_p": options.min_p,
            "repetition_penalty": options.repetition_penalty,
            "presence_penalty": options.presence_penalty,
            "frequency_penalty": options.frequency_penalty,
            "logit_bias": {str(token): bias for token, bias in options.logit_bias} or None,
        }

    def _experts(self, sampled: Sampled, prompt_tokens: int) -> Tensor | None:
        """Return the experts [N, L, K] of all tokens except the last, which the engine never reads as input."""
        if sampled.expert_choices is None:
            return None
        assert self._spec.moe is not None, "checked when the engine was built"
        shape = (prompt_tokens + len(sampled.token_ids) - 1, self._spec.num_layers, self._spec.moe.top_k)
        received = np.frombuffer(sampled.expert_choices, dtype=np.int32)
        if received.size != math.prod(shape):
            raise RuntimeError(
                f"SGLang returned {received.size} expert ids for a rollout; expected {' x '.join(map(str, shape))}"
            )
        return narrow_record(torch.from_numpy(received.reshape(shape).astype(np.int16)), self._spec.moe.num_experts)


def stop_reason(finish: dict[str, Any]) -> StopReason:
    """Return the stop reason for SGLang's `finish_reason`.

    Raises:
        RuntimeError: SGLang aborted the request, or sampled a token outside of the vocabulary, as it does from logits
            that are not numbers; it then replaces the token by EOS and reports a stop text (schedule_batch.py:1989).
    """
    if finish.get("matched") == _NOT_A_TOKEN:
        raise RuntimeError("SGLang sampled a token outside of the vocabulary: its logits are not finite numbers")
    if finish["type"] == "length":
        return "length"
    if finish["type"] == "stop":
        return "stop" if isinstance(finish["matched"], str) else "eos"
    raise RuntimeError(f"SGLang ended a rollout early: {finish}")
