"""What an engine server and the jobs that it serves say to each other, besides the weights.

The first rank of a job's engine sends commands; the server answers each with parts, then `done` or `failed`. Beats in
between carry the number of engine steps so far: a server that lives and makes no step is noticed too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import grpo_mega
from grpo_mega.config.schema import Config
from grpo_mega.engines.server.protocol import ServerMessage
from grpo_mega.types import Completion, Prompt, SamplingRequest

# What an engine reads of a model's folder; its weights are none of it.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
_MODEL_FILES = ("config.json", "generation_config.json")


def serving_facts(config: Config, model_folder: Path) -> dict[str, Any]:
    """What must be the same in a server and in its job, for its rollouts to be those of an engine beside the policy."""
    engine = config.engine
    return {
        "version of grpo_mega": grpo_mega.__version__,
        "config.json of the model": _digest(model_folder, _MODEL_FILES),
        "tokenizer of the model": _digest(model_folder, _TOKENIZER_FILES),
        "precision.dtype": config.precision.dtype,
        "engine.kind": engine.kind,
        "engine.tp": engine.tp,
        "engine.ep": engine.ep,
        "engine.fp8": engine.fp8,
        "engine.max_num_seqs": engine.max_num_seqs,
        "engine.kv_cache_tokens": engine.kv_cache_tokens,
        "data.max_prompt_tokens + the largest max_tokens": config.longest_rollout,
        "algorithm.routing_replay": config.algorithm.routing_replay,
    }


def differences(wanted: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """In words: what a server has otherwise than its job."""
    keys = list(dict.fromkeys([*wanted, *got]))
    return [f"{key}={got.get(key)}, here {wanted.get(key)}" for key in keys if wanted.get(key) != got.get(key)]


def _digest(folder: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def sample_command(prompts: Sequence[Prompt], sampling: SamplingRequest, policy_version: int) -> dict[str, Any]:
    """The fields of `sample`."""
    return {
        "policy_version": policy_version,
        "prompts": [[prompt.index, prompt.token_ids] for prompt in prompts],
        "sampling": asdict(sampling),
    }


def read_sample(fields: dict[str, Any]) -> tuple[list[Prompt], SamplingRequest]:
    """What `sample_command` was given; of prompts only what engines look at."""
    told = dict(fields["sampling"])
    each = told.pop("max_tokens_each")
    request = SamplingRequest(
        **{**told, "stop": tuple(told["stop"])}, max_tokens_each=None if each is None else tuple(each)
    )
    return [Prompt(index, "", tuple(token_ids), "") for index, token_ids in fields["prompts"]], request


def rollout_part(position: int, member: int, completion: Completion) -> tuple[dict[str, Any], list[bytes]]:
    """Fields and blobs of a `rollout`."""
    fields: dict[str, Any] = {
        "position": position,
        "member": member,
        "token_ids": completion.token_ids,
        "log_probs": completion.sampler_log_probs,
        "stop_reason": completion.stop_reason,
        "policy_version": completion.policy_version,
        "text": completion.text,
    }
    experts = completion.expert_choices
    if experts is None:
        return fields, []
    fields |= {"experts_shape": list(experts.shape), "experts_dtype": str(experts.dtype).removeprefix("torch.")}
    return fields, [experts.contiguous().view(torch.uint8).numpy().tobytes()]


def read_rollout(message: ServerMessage) -> tuple[int, int, Completion]:
    """(position of the prompt, member, completion)."""
    told = message.fields
    experts = None
    if message.blobs:
        dtype = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}[told["experts_dtype"]]
        experts = torch.frombuffer(bytearray(message.blobs[0]), dtype=dtype).view(told["experts_shape"])
    completion = Completion(
        token_ids=tuple(told["token_ids"]),
        sampler_log_probs=tuple(told["log_probs"]),
        stop_reason=told["stop_reason"],
        policy_version=told["policy_version"],
        text=told["text"],
        expert_choices=experts,
    )
    return told["position"], told["member"], completion
