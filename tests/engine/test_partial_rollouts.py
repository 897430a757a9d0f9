"""Slices of rollouts with the real vLLM and the real SGLang on CPU, before and after a weight sync."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grpo_mega.rollout.open_rollout import OpenRollout
from grpo_mega.rollout.slices import SliceSampler
from grpo_mega.types import Prompt, SamplingRequest
from tests.helpers.engine_contract import COLOCATED, ENDS, PROMPTS, generate, push, text_of
from tests.helpers.engine_ranks import EngineRanks, RankSession

Parts = list[list[tuple[list[int], list[float], int]]]
REQUEST = SamplingRequest(group_size=1, temperature=1.0, max_tokens=20, seed=5)
GREEDY = replace(REQUEST, temperature=0.0)
MANY = [Prompt(i, "", p.token_ids[:9], "") for i, p in enumerate(PROMPTS * 4)]
SLICE = 6


def begin(session: RankSession, prompts: list[Prompt]) -> None:
    session.kept["rollouts"] = [OpenRollout(prompt) for prompt in prompts]


def sample(session: RankSession, request: SamplingRequest, num_slices: int) -> Parts:
    """Sample slices with the present weights; return (tokens, log-probs, version) of the parts of each rollout."""
    slices = SliceSampler(session.engine, SLICE, 64, text_of)
    rollouts = session.kept["rollouts"]
    for i in range(num_slices):
        still_open = [rollout for rollout in rollouts if not rollout.is_done]
        slices.sample(still_open, replace(request, seed=request.seed + i, continues=i > 0))
    return [
        [(part.token_ids.tolist(), part.log_probs.tolist(), part.policy_version) for part in rollout.parts]
        for rollout in rollouts
    ]


def log_probs(folder: Path, prompt: Prompt, tokens: list[int]) -> torch.Tensor:
    """Return the log-probs of the tokens behind the prompt by transformers in fp32."""
    from transformers import AutoModelForCausalLM

    model = _MODELS.setdefault(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    ids = torch.tensor([[*prompt.token_ids, *tokens]])
    with torch.no_grad():
        rows = torch.log_softmax(model(ids).logits[0, len(prompt.token_ids) - 1 : -1], -1)
    return rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]


_MODELS: dict[Path, Any] = {}


@COLOCATED
def test_slices_of_greedy_answers_are_the_whole_answers(engine: EngineRanks) -> None:
    wanted = [group[0].token_ids.tolist() for group in engine.call(generate, PROMPTS, GREEDY)[0]]
    engine.call(begin, PROMPTS)
    found = engine.call(sample, GREEDY, 4)[0]
    assert [[token for tokens, _, _ in parts for token in tokens] for parts in found] == wanted
    assert max(len(parts) for parts in found) > 1, "an answer has several slices"


@COLOCATED
def test_after_a_sync_the_new_weights_continue_the_answers(engine: EngineRanks, models: dict[str, Path]) -> None:
    """Log-probs are those of the weights of each part, given all tokens before: no cache of the old weights is read."""
    runs = []
    for _ in range(2):
        engine.call(push, models["qwen3"], 3)
        engine.call(begin, MANY)
        engine.call(sample, REQUEST, 1)
        engine.call(push, models["other"], 4)
        runs.append(engine.call(sample, replace(REQUEST, seed=77), 3)[0])
    assert runs[0] == runs[1], "the same weights and seeds give the same tokens"
    worst, num_continued = 0.0, 0
    for prompt, parts in zip(MANY, runs[0], strict=True):
        tokens = [token for part, _, _ in parts for token in part]
        expected = {3: log_probs(models["qwen3"], prompt, tokens), 4: log_probs(models["other"], prompt, tokens)}
        place = 0
        for part, sampled, version in parts:
            assert len(part) <= SLICE
            difference = expected[version][place : place + len(part)] - torch.tensor(sampled)
            worst, place = max(worst, float(difference.abs().max())), place + len(part)
        versions = [version for _, _, version in parts]
        assert versions == sorted(versions)
        num_continued += set(versions) == {3, 4}
        assert tokens[-1] in ENDS or len(tokens) == REQUEST.max_tokens
        assert not set(ENDS) & set(tokens[:-1])
    assert num_continued >= 4
    assert worst <= 2e-5
