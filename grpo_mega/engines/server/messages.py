"""Messages between a job and an engine server, except for the weights. Encoded as MessagePack.

The first rank of a job's engine sends `Hello`; the server answers with its own `Hello` and its `ServerStatus`. After
`ClaimServer` and `ClaimAccepted` the job sends commands. The server answers each command with replies, then with
`CommandDone` or `CommandFailed`. Decoding checks every field's type and constructs nothing but these classes.
Asserted by tests/unit/engines/server/test_messages.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
import numpy as np
import torch
from torch import Tensor

import grpo_mega
from grpo_mega.config.schema import Config
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.types import Completion, Prompt, SamplingRequest, StopReason

PROTOCOL = 4
"""Version of these messages and of their framing; must be raised with every change. Both sides must have the same."""

Transport: TypeAlias = Literal["auto", "gloo", "nccl", "shared_memory", "cuda_ipc"]
"""Values of `weight_sync.transport`."""

# The files of a model's folder that an engine reads, apart from the weights.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
_MODEL_FILES = ("config.json", "generation_config.json")


class ServingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that must be equal in a server and its job: they determine the rollouts.

    The encoded names are those that messages to the user show.
    """

    program_version: str = msgspec.field(name="version of grpo_mega")
    model_digest: str = msgspec.field(name="config.json of the model")
    tokenizer_digest: str = msgspec.field(name="tokenizer of the model")
    dtype: str = msgspec.field(name="precision.dtype")
    engine_kind: str = msgspec.field(name="engine.kind")
    tp: int = msgspec.field(name="engine.tp")
    ep: int = msgspec.field(name="engine.ep")
    fp8: str | None = msgspec.field(name="engine.fp8")
    max_num_seqs: int | None = msgspec.field(name="engine.max_num_seqs")
    engine_args: str = msgspec.field(name="engine.args")
    """As JSON with sorted keys."""
    kv_cache_tokens: int | None = msgspec.field(name="engine.kv_cache_tokens")
    max_model_len: int = msgspec.field(name="data.max_prompt_tokens + the largest max_tokens")
    routing_replay: bool = msgspec.field(name="algorithm.routing_replay")


class EngineMessage(msgspec.Struct, frozen=True, tag=True):
    """Base class of all messages; the class name identifies the message in its encoding."""


class Hello(EngineMessage, frozen=True):
    """First message of both sides. Its fields are the same in every version of the protocol."""

    protocol: int


class ClaimServer(EngineMessage, frozen=True):
    """Asks the server to serve this job. `job` names the job in messages to other jobs."""

    job: str


class MeetCommand(EngineMessage, frozen=True):
    """Asks all ranks of the server to join the peer group and to build their end of the weight sync.

    Args:
        address, port: of the store that rank 0 of the job opened.
        names: coordinates of every rank of the peer group, for messages.
        first_rank: rank of the server's first rank in the peer group.
        replicas: ranks of each server in the peer group.
        shapes: of every tensor of the policy, by its Hugging Face name.
        bucket_bytes, transport, timeout_seconds: as in `SyncSettings`.
    """

    address: str
    port: int
    names: tuple[str, ...]
    first_rank: int
    replicas: tuple[tuple[int, ...], ...]
    shapes: dict[str, tuple[int, ...]]
    bucket_bytes: int
    transport: Transport
    timeout_seconds: float


class PushCommand(EngineMessage, frozen=True):
    """Asks all ranks of the server to take part in a weight sync."""

    policy_version: int
    verify: bool


class PromptTokens(msgspec.Struct, frozen=True, array_like=True):
    """The fields of a `Prompt` that an engine reads."""

    index: int
    token_ids: tuple[int, ...]


class SampleCommand(EngineMessage, frozen=True):
    """Asks for completions that were sampled with the weights of `policy_version`."""

    policy_version: int
    prompts: tuple[PromptTokens, ...]
    sampling: SamplingRequest


class EndJob(EngineMessage, frozen=True):
    """Releases the server."""


class ServerStatus(EngineMessage, frozen=True):
    """The server's settings, and the name of the job that it serves; None: the server is free."""

    facts: ServingFacts
    job: str | None


class ClaimAccepted(EngineMessage, frozen=True):
    """The server serves this job from now on."""


class ServerBusy(EngineMessage, frozen=True):
    """The server serves `job`. `is_ending`: that job is gone, and the server still executes its last command."""

    job: str
    is_ending: bool


class ExpertChoices(msgspec.Struct, frozen=True):
    """The tensor `Completion.expert_choices`: [N, L, K] small integers, as bytes in the machine's order."""

    shape: tuple[int, ...]
    dtype: Literal["uint8", "int16", "int32"]
    values: bytes


class RolloutReply(EngineMessage, frozen=True):
    """One completion: number `member` of the prompt at `position` in the command."""

    position: int
    member: int
    token_ids: bytes  # int32, little-endian
    log_probs: bytes  # float32, little-endian
    stop_reason: StopReason
    policy_version: int
    text: str
    experts: ExpertChoices | None


class CommandDone(EngineMessage, frozen=True):
    """The command succeeded; it was the last message of its answer. `gauges` are those of sampling."""

    gauges: EngineGauges | None = None


class CommandFailed(EngineMessage, frozen=True):
    """The command failed; it was the last message of its answer."""

    reason: str


class Heartbeat(EngineMessage, frozen=True):
    """Sent every second to the job that is served. `steps`: engine steps so far, which show progress."""

    steps: int


class JobEnded(EngineMessage, frozen=True):
    """Inside the server only: the job is gone and the server is free again."""

    reason: str


JobMessage: TypeAlias = Hello | ClaimServer | MeetCommand | PushCommand | SampleCommand | EndJob
ServerMessage: TypeAlias = (
    Hello | ServerStatus | ClaimAccepted | ServerBusy | RolloutReply | CommandDone | CommandFailed | Heartbeat
)
Command: TypeAlias = MeetCommand | PushCommand | SampleCommand

_encoder = msgspec.msgpack.Encoder()
_job_decoder = msgspec.msgpack.Decoder(JobMessage)
_server_decoder = msgspec.msgpack.Decoder(ServerMessage)


def encode(message: JobMessage | ServerMessage) -> bytes:
    """Encode a message of either side."""
    return _encoder.encode(message)


def decode_job_message(data: bytes) -> JobMessage:
    """Decode a message of a job. Raises msgspec.DecodeError if it is not one."""
    message: JobMessage = _job_decoder.decode(data)
    return message


def decode_server_message(data: bytes) -> ServerMessage:
    """Decode a message of a server. Raises msgspec.DecodeError if it is not one."""
    message: ServerMessage = _server_decoder.decode(data)
    return message


def serving_facts(config: Config, model_folder: Path) -> ServingFacts:
    """Return the settings of `config` and the digests of the model's files that a server and its job must share."""
    engine = config.engine
    return ServingFacts(
        program_version=grpo_mega.__version__,
        model_digest=_digest(model_folder, _MODEL_FILES),
        tokenizer_digest=_digest(model_folder, _TOKENIZER_FILES),
        dtype=config.precision.dtype,
        engine_kind=engine.kind,
        tp=engine.tp,
        ep=engine.ep,
        fp8=engine.fp8,
        max_num_seqs=engine.max_num_seqs,
        engine_args=json.dumps(engine.args, sort_keys=True, default=str),
        kv_cache_tokens=engine.kv_cache_tokens,
        max_model_len=config.longest_rollout,
        routing_replay=config.algorithm.routing_replay,
    )


def differences(job: ServingFacts, server: ServingFacts) -> list[str]:
    """Return one text for each setting in which a server differs from its job."""
    wanted, found = msgspec.to_builtins(job), msgspec.to_builtins(server)
    return [f"{key}={found[key]}, here {wanted[key]}" for key in wanted if wanted[key] != found[key]]


def _digest(folder: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def sample_command(prompts: Sequence[Prompt], sampling: SamplingRequest, policy_version: int) -> SampleCommand:
    """Build the command that asks for completions of `prompts`."""
    return SampleCommand(
        policy_version, tuple(PromptTokens(prompt.index, prompt.token_ids) for prompt in prompts), sampling
    )


def read_prompts(command: SampleCommand) -> list[Prompt]:
    """Return the prompts of the command, with only the fields that an engine reads."""
    return [Prompt(prompt.index, "", prompt.token_ids, "") for prompt in command.prompts]


def rollout_reply(position: int, member: int, completion: Completion) -> RolloutReply:
    """Build the message that carries one completion."""
    return RolloutReply(
        position=position,
        member=member,
        token_ids=completion.token_ids.astype("<i4", copy=False).tobytes(),
        log_probs=completion.sampler_log_probs.astype("<f4", copy=False).tobytes(),
        stop_reason=completion.stop_reason,
        policy_version=completion.policy_version,
        text=completion.text,
        experts=None if completion.expert_choices is None else _pack_experts(completion.expert_choices),
    )


def read_completion(reply: RolloutReply) -> Completion:
    """Return the completion that the message carries."""
    return Completion(
        token_ids=np.frombuffer(reply.token_ids, dtype="<i4"),
        sampler_log_probs=np.frombuffer(reply.log_probs, dtype="<f4"),
        stop_reason=reply.stop_reason,
        policy_version=reply.policy_version,
        text=reply.text,
        expert_choices=None if reply.experts is None else _unpack_experts(reply.experts),
    )


def _pack_experts(experts: Tensor) -> ExpertChoices:
    names: dict[torch.dtype, Literal["uint8", "int16", "int32"]] = {
        torch.uint8: "uint8",
        torch.int16: "int16",
        torch.int32: "int32",
    }
    values = experts.contiguous().view(torch.uint8).numpy().tobytes()
    return ExpertChoices(tuple(experts.shape), names[experts.dtype], values)


def _unpack_experts(experts: ExpertChoices) -> Tensor:
    dtype = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}[experts.dtype]
    return torch.frombuffer(bytearray(experts.values), dtype=dtype).view(experts.shape)
