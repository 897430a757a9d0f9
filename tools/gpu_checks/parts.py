"""The parts of tools/gpu_proof.py: what each runs, how long it may take, and which packages it needs.

Imports nothing but the standard library: it is read before the packages of the check are installed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckPart:
    """One part of the check, which runs in a process of its own.

    Args:
        name: name of the part and of its result file.
        module: module whose `main(report)` runs it.
        shows: one line for `--help` and the documentation.
        expected_seconds: seconds that it takes on an H200, start of the process included. A part starts only if the
            deadline leaves it that much. The numbers are estimates until the first run on a GPU.
        limit_seconds: seconds after which it is stopped.
        needs: module without which the result is `not installed`; empty: every package is in the kit.
        default: True if the part runs when no part is named. An environment has one engine, so SGLang's must be named.
        rehearsable: False for engines, whose tests without a GPU are in tests/engine.
    """

    name: str
    module: str
    shows: str
    expected_seconds: float
    limit_seconds: float
    needs: str = ""
    default: bool = True
    rehearsable: bool = True


_PARTS = (
    CheckPart("machine", "machine", "device, versions, imports, speed of a matrix product and of a copy", 40, 120),
    CheckPart("cuda_ipc", "peer_transport", "two processes exchange buffers on one device through CUDA IPC", 40, 120),
    CheckPart("log_probs", "packed_rows",
              "log-probs and gradients of packed rows against transformers: dense, MoE, MLA; fp32 and bf16", 110, 240),
    CheckPart("offload", "memory_phases", "a step, then offload and reload, with digests of all state", 45, 120),
    CheckPart("checkpoint", "saved_state", "save while everything is offloaded, load, compare", 50, 150),
    CheckPart("reference", "reference_swap", "log-probs of the reference, and the policy's weights after it", 40, 120),
    CheckPart("digests", "digest_speed", "speed of weight digests, and their equality with the CPU's", 25, 90),
    CheckPart("bf16", "policy", "step seconds, MFU, peak memory next to the planner's, memory after offload", 120, 300),
    CheckPart("fp8", "policy", "the same for every FP8 recipe of this GPU, and log-probs next to bf16", 150, 600,
              needs="transformer_engine"),
    CheckPart("engine", "engine", "vLLM: memory after sleep and wake, GB/s of a sync, log-probs next to the policy's",
              300, 1800, needs="vllm", rehearsable=False),
    CheckPart("engine_fp8", "engine", "the same with the engine's weights in FP8", 300, 1800, needs="vllm",
              rehearsable=False),
    CheckPart("engine_sglang", "engine", "the same with SGLang, in an environment of its own", 300, 1800,
              needs="sglang", default=False, rehearsable=False),
)  # fmt: skip
PARTS = {part.name: part for part in _PARTS}
