"""Messages between a job and an engine server: every field arrives, and nothing else is decoded."""

from __future__ import annotations

import pickle

import msgspec
import pytest
import torch

from grpo_mega.engines.server.messages import (
    ClaimServer,
    CommandFailed,
    EndJob,
    Heartbeat,
    Hello,
    JobMessage,
    MeetCommand,
    PushCommand,
    ServerBusy,
    ServerMessage,
    ServerStatus,
    decode_job_message,
    decode_server_message,
    differences,
    encode,
    read_completion,
    read_prompts,
    rollout_reply,
    sample_command,
)
from grpo_mega.types import Completion, Prompt, SamplingOptions, SamplingRequest
from tests.helpers.stub_server import FACTS

SAMPLING = SamplingRequest(
    2, 0.7, 4, seed=2**63 + 1, stop=("ä\n",), max_tokens_each=(3, 4), continues=True, expert_choices=True,
    options=SamplingOptions(0.9, 5, 0.1, 1.1, 0.5, -0.5, ((3, -1.5), (0, 2.0)), ("ä", "no")),
)  # fmt: skip
MEET = MeetCommand(
    address="node0",
    port=7,
    names=("rank 0", "server"),
    first_rank=1,
    replicas=((1,),),
    shapes={"a.weight": (2, 3), "b": ()},
    bucket_bytes=1 << 40,
    transport="shared_memory",
    timeout_seconds=0.1,
)


@pytest.mark.parametrize("message", [Hello(2), ClaimServer("a"), MEET, PushCommand(3, True), EndJob()])
def test_messages_of_a_job_arrive_unchanged(message: JobMessage) -> None:
    assert decode_job_message(encode(message)) == message
    assert pickle.loads(pickle.dumps(message)) == message  # the first rank broadcasts it to the other ranks


@pytest.mark.parametrize(
    "message", [Hello(2), ServerStatus(FACTS, None), ServerBusy("a", True), CommandFailed("b"), Heartbeat(5)]
)
def test_messages_of_a_server_arrive_unchanged(message: ServerMessage) -> None:
    assert decode_server_message(encode(message)) == message


def test_prompts_arrive_with_the_fields_that_engines_read() -> None:
    prompts = [Prompt(7, "text", (1, 2), "answer", "set"), Prompt(8, "", (), "")]
    command = sample_command(prompts, SAMPLING, 5)
    decoded = decode_job_message(encode(command))
    assert decoded == command
    assert read_prompts(command) == [Prompt(7, "", (1, 2), ""), Prompt(8, "", (), "")]
    assert command.sampling == SAMPLING


@pytest.mark.parametrize("dtype", [None, torch.uint8, torch.int16, torch.int32])
def test_a_completion_arrives_unchanged(dtype: torch.dtype | None) -> None:
    experts = None if dtype is None else torch.arange(24, dtype=dtype).view(4, 3, 2)
    completion = Completion((5, 2**31 - 1), (-0.1, float("-inf")), "stop", 3, "ä\n", expert_choices=experts)
    reply = decode_server_message(encode(rollout_reply(4, 1, completion)))
    assert reply == rollout_reply(4, 1, completion)
    found = read_completion(rollout_reply(4, 1, completion))
    assert found == completion
    assert experts is None or torch.equal(found.expert_choices, experts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data", [b"", b"GET / HTTP/1.1", msgspec.msgpack.encode({"type": "PushCommand", "policy_version": "3"})]
)
def test_other_data_is_not_decoded(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_job_message(data)


def test_the_hello_of_a_later_version_can_be_read() -> None:
    later = msgspec.msgpack.encode({"type": "Hello", "protocol": 9, "more": [1]})
    assert decode_job_message(later) == decode_server_message(later) == Hello(9)


def test_differences_are_named_as_the_config_names_them() -> None:
    other = msgspec.structs.replace(FACTS, dtype="fp32", tp=2)
    assert differences(FACTS, FACTS) == []
    assert differences(other, FACTS) == ["precision.dtype=bf16, here fp32", "engine.tp=1, here 2"]


def test_other_arguments_of_the_engine_are_a_difference() -> None:
    other = msgspec.structs.replace(FACTS, engine_args='{"scheduling_policy": "priority"}')
    assert differences(FACTS, FACTS) == []
    (found,) = differences(FACTS, other)
    assert found.startswith('engine.args={"scheduling_policy": "priority"}')
