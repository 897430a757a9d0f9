"""Prompts and rank functions for tests of any engine, and log-probabilities of transformers as reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_mega.types import Completion, Prompt, SamplingOptions, SamplingRequest
from tests.helpers.engine_ranks import RankSession
from tests.helpers.tiny_models import EOS, make_tiny_model

SETTINGS: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 48, "kv_cache_tokens": None}
SAMPLING = SamplingRequest(group_size=8, temperature=1.0, max_tokens=8, seed=5)
# The last prompt fills two whole blocks of vLLM's KV cache, which the members of its group share.
PROMPTS = [Prompt(i, "", tuple(2 + (3 * i + j * j) % 18 for j in range(n)), "") for i, n in enumerate([6, 1, 9, 6, 70])]

SLASH = 15
ENDS = (EOS, SLASH)
"""Tokens that end an answer: the tokenizer's EOS, and the only one that generation_config.json names."""
_TEXTS = (*"0123456789+-*/= ?", "7.")
"""Texts of the tokens from 2. The last one contains a stop text and another character."""

# With CUDA the environment contains only one engine, and SGLang computes in 16 bits.
sglang_here = pytest.mark.skipif(
    torch.cuda.is_available(), reason="compares SGLang in fp32; tests/gpu/test_sglang_on_gpu.py is for CUDA"
)

# The fixture `opened` of tests/engine/conftest.py, for tests that not every engine can pass.
_SGLANG = [pytest.param("sglang", marks=sglang_here)]
COLOCATED = pytest.mark.parametrize("opened", ["vllm", *_SGLANG], indirect=True)
ONLY_SGLANG = pytest.mark.parametrize("opened", _SGLANG, indirect=True)


def make_contract_models(root: Path) -> dict[str, Path]:
    """Make two models that differ in their weights; `qwen3` has two EOS tokens and a token of two characters."""
    found = {"qwen3": make_tiny_model(root / "qwen3"), "other": make_tiny_model(root / "other", seed=1)}
    tokenizer = root / "qwen3" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('".": 19', '"7.": 19'))
    (root / "qwen3" / "generation_config.json").write_text(json.dumps({"eos_token_id": [SLASH]}))
    return found


def text_of(token_ids: Sequence[int]) -> str:
    """Return the text of tokens of `qwen3`."""
    return "".join(_TEXTS[i - 2] for i in token_ids if i > EOS)


# Functions that run on the ranks.


def push(session: RankSession, folder: Path, version: int, end: bool = True) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    if "served" in session.kept:
        session.kept["served"].push(tensors, version)
        return
    sink = session.engine.sink
    sink.begin_update()
    for region in sink.layout():
        hf = region.placement.hf
        sink.write(hf, tensors[hf.name][hf.index])
    if end:
        sink.end_update(version)


def generate(session: RankSession, prompts: list[Prompt], sampling: SamplingRequest) -> list[list[Completion]]:
    groups: list[list[Completion]] = session.engine.generate(prompts, sampling)
    return groups


# Expected values.


def largest_log_prob_error(
    folder: Path, prompts: list[Prompt], groups: list[list[Completion]], temperature: float
) -> float:
    """Return the largest difference to log_softmax(logits / temperature) of transformers in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    worst = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1]
            log_probs = torch.log_softmax(logits / temperature, -1)
            expected = log_probs.gather(1, torch.from_numpy(completion.token_ids).long()[:, None])[:, 0]
            worst = max(worst, float((expected - torch.from_numpy(completion.sampler_log_probs)).abs().max()))
    return worst


def kept_by(
    options: SamplingOptions, folder: Path, prompts: list[Prompt], groups: list[list[Completion]]
) -> list[bool]:
    """Return, for every sampled token, whether the options keep it, by the probabilities of transformers in fp32."""
    model, found = _reference_model(folder), []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            logits = _logits(model, (*prompt.token_ids, *completion.token_ids[:-1].tolist()))[
                len(prompt.token_ids) - 1 :
            ]
            for row, token in zip(torch.softmax(logits, -1), completion.token_ids, strict=True):
                above = row[row > row[token]]
                found.append(
                    len(above) < (options.top_k or len(row))
                    and float(above.sum()) < options.top_p
                    and float(row[token]) >= options.min_p * float(row.max())
                )
    return found


def greedy_answer(
    options: SamplingOptions, folder: Path, prompt: Prompt, ends: Sequence[int], max_tokens: int
) -> tuple[int, ...]:
    """Return the greedy answer, by the logits of transformers in fp32 and the definitions of the options."""
    model, answer = _reference_model(folder), list[int]()
    while len(answer) < max_tokens and (not answer or answer[-1] not in ends):
        logits = _logits(model, (*prompt.token_ids, *answer))[-1].tolist()
        for token, bias in options.logit_bias:
            logits[token] += bias
        for token in {*prompt.token_ids, *answer}:
            factor = options.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in set(answer):
            logits[token] -= options.presence_penalty + options.frequency_penalty * answer.count(token)
        answer.append(max(range(len(logits)), key=logits.__getitem__))
    return tuple(answer)


def _reference_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([list(token_ids)])).logits[0]
    return found


def tokens(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[tuple(completion.token_ids.tolist()) for completion in group] for group in groups]
