"""Assumptions of the planner about devices and programs: every number that is not counted from the model's modules.

Memory, FLOP/s and link speeds come from the vendors' data sheets. Efficiencies and residues are those of published
runs. docs/measurements/planner.md gives the source of each, and says which were measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Literal

from grpo_mega.models.engine_memory import ENGINE_GRAPHS, ENGINE_KERNELS
from grpo_mega.types import UserError

GIB = 2**30
Kernels = Literal["te", "local"]


@dataclass(frozen=True)
class Gpu:
    """One device and its share of a node, in bytes, bytes per second and FLOP/s. Link speeds are per direction."""

    name: str
    memory: float
    """Memory that a process can allocate, without the driver's own."""
    bf16_flops: float
    """Dense rate, without sparsity."""
    memory_bandwidth: float
    nvlink: float
    network: float
    """Speed of the device's own network adapter."""
    pcie: float
    per_node: int
    host_memory: float
    """Host memory of a node."""
    kernels: Kernels = "te"
    """Modules that compute: Transformer Engine's, or the local ones of a machine without CUDA."""
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability; (0, 0) means no CUDA."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-80g", 79.0 * GIB, 312e12, 2.0e12, 300e9, 25e9, 25e9, 8, 1.0e12, capability=(8, 0)),
        Gpu("h100-80g", 79.1 * GIB, 989e12, 3.35e12, 450e9, 50e9, 55e9, 8, 2.0e12, capability=(9, 0)),
        Gpu("h20-96g", 95.0 * GIB, 148e12, 4.0e12, 450e9, 50e9, 55e9, 8, 2.0e12, capability=(9, 0)),
        Gpu("h200-141g", 139.0 * GIB, 989e12, 4.8e12, 450e9, 50e9, 55e9, 8, 2.0e12, capability=(9, 0)),
        Gpu("b200-180g", 178.0 * GIB, 2250e12, 7.7e12, 900e9, 50e9, 55e9, 8, 2.0e12, capability=(10, 0)),
        # A rank of a CPU job: its bytes are those of the local modules, its time is not predicted.
        Gpu("cpu", 16.0 * GIB, 1e11, 1e10, 1e9, 1e9, 1e10, 8, 128 * GIB, "local"),
    )
}


def gpu_named(name: str) -> Gpu:
    """Return the device with this name.

    Raises:
        UserError: there is no such device; the remedy lists the names.
    """
    if name not in GPUS:
        raise UserError(f"--gpu={name} is not a known device", remedy=f"use one of {', '.join(GPUS)}")
    return GPUS[name]


def device_peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device by CUDA's name of it; None if `GPUS` does not have it."""
    words = device_name.upper().replace("-", " ").split()
    models = {name.partition("-")[0].upper(): gpu for name, gpu in GPUS.items() if gpu.kernels == "te"}
    return next((gpu.bf16_flops for model, gpu in models.items() if model in words), None)


@dataclass(frozen=True)
class Assumptions:
    """Efficiencies, as fractions of the peak rate of a device or a link, and fixed costs in bytes and seconds."""

    dense_flops: float = 0.40
    """Fraction of bf16 FLOP/s in training and log-prob passes, without pipeline bubbles (Megatron-LM: 0.41 to 0.48)."""
    expert_flops: float = 0.20
    """The same fraction for models with experts (published: 0.16 to 0.26 with forced balance)."""
    fp8_speedup: float = 1.3
    """Speed of training and log-prob passes in FP8 over bf16, end to end (published: 1.2 to 1.5)."""
    decode_bandwidth: float = 0.85
    """Fraction of memory bandwidth while the engine decodes, and while the optimizer reads and writes its state."""
    engine_step: float = 5e-3
    """Seconds of an engine's processes between two forward passes of a decode step: scheduling, sampling, and the new
    tokens. With `decode_bandwidth` it gives the published seconds of a decode step (docs/measurements/planner.md)."""
    scheduling_ahead: float = 12e-6
    """Seconds per running rollout of `engine_step` that vLLM hides on CUDA: it schedules a step while the GPU computes
    the one before. vLLM pull request 23914 (external launcher, TP2, A100): 0.34, 0.78, 1.71 and 3.26 ms a step with 32,
    64, 128 and 256 running."""
    prefill_flops: float = 0.45
    """Fraction of bf16 FLOP/s while the engine computes prompts."""
    link: float = 0.70
    """Fraction of NVLink and network speed in collectives."""
    pcie: float = 0.80
    """Fraction of PCIe speed in copies between device and host."""
    collective_latency: float = 15e-6
    """Seconds of one small all-reduce in a decode step, inside a node."""
    network_latency: float = 80e-6
    """Seconds of one small all-reduce in a decode step, between nodes."""
    mean_length: float = 0.5
    """Mean completion, as a fraction of sampling.max_tokens; the longest completion reaches sampling.max_tokens."""
    text_bytes_per_token: float = 4.0
    """Bytes of text of a token in a rollout file."""
    routing_imbalance: float = 1.25
    """Tokens of the busiest expert-parallel rank, divided by the mean."""
    host_adam_bandwidth: float = 150e9
    """Bytes per second that Adam reads and writes on a node whose ranks use all its cores (policy/host_threads.py)."""
    checkpoint_bandwidth: float = 5e9
    """Bytes per second that a node writes to disk."""
    context_bytes: float = 0.6 * GIB
    """CUDA context and libraries of one process."""
    nccl_bytes_per_group: float = 0.35 * GIB
    """Buffers of one communicator of the policy of more than one rank."""
    engine_communicator: float = 0.5625 * GIB
    """Buffers of one communicator of an engine (published: 479 and 576 MiB with 8 ranks)."""
    allocator_share: float = 0.04
    """Fraction of a phase's allocations that is lost to fragmentation."""
    policy_residue: float = 1.0 * GIB
    """Device memory that an offloaded policy keeps."""
    process_host_bytes: float = 6.0 * GIB
    """Host memory of one rank's process before any tensor."""

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all assumptions."""
        return [field.name for field in fields(cls)]

    def described(self) -> dict[str, float]:
        """Return name -> value, with the assumptions that the engines share with the planner."""
        shared = {"engine_graphs": ENGINE_GRAPHS, "engine_kernels": ENGINE_KERNELS}
        return {f.name: getattr(self, f.name) for f in fields(self)} | shared


CPU_ASSUMPTIONS = Assumptions(
    routing_imbalance=1.0,
    context_bytes=0,
    nccl_bytes_per_group=0,
    allocator_share=0,
    engine_communicator=0,
    policy_residue=0,
)


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind of device."""

    gpu: Gpu
    num_ranks: int
    assumptions: Assumptions

    @property
    def num_nodes(self) -> int:
        """Nodes that hold the ranks of the job."""
        return -(-self.num_ranks // self.gpu.per_node)

    def link_speed(self, ranks: int) -> float:
        """Return the bytes per second and rank among consecutive ranks: NVLink inside a node, the network beyond it."""
        in_one_node = ranks <= self.gpu.per_node
        return (self.gpu.nvlink if in_one_node else self.gpu.network) * self.assumptions.link

    def collective_latency(self, ranks: int) -> float:
        """Return the seconds of one small all-reduce among consecutive ranks."""
        assumed = self.assumptions
        return assumed.collective_latency if ranks <= self.gpu.per_node else assumed.network_latency


def cluster_of(gpu: Gpu, num_ranks: int, assumed: Mapping[str, float] = MappingProxyType({})) -> Cluster:
    """Return a cluster with the assumptions for its kind of device; `assumed` replaces some of them."""
    defaults = CPU_ASSUMPTIONS if gpu.kernels == "local" else Assumptions()
    return Cluster(gpu, num_ranks, replace(defaults, **assumed))
