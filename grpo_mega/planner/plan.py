"""The plan of a run: memory, time and the verdict, as one object that is printed, drawn and searched over."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grpo_mega.config.fp8_rules import check_engine_generation, check_generation
from grpo_mega.config.schema import Config
from grpo_mega.interfaces import ModuleCounter, ModuleSizes
from grpo_mega.models.kv_cache import KvCacheSize
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.hardware import Cluster
from grpo_mega.planner.phase_memory import MemoryPlan, Workload, plan_memory, workload_of
from grpo_mega.planner.static_memory import chunk_parts, model_chunks
from grpo_mega.planner.step_time import StepTime, plan_time
from grpo_mega.types import UserError

HOST_SHARE = 0.9  # of a node's memory: the rest is the system's and its file cache's
_SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class ResourcePlan:
    """What a config needs on a cluster."""

    config: Config
    topology: Topology
    cluster: Cluster
    parameters: int
    work: Workload
    memory: MemoryPlan
    time: StepTime

    @cached_property
    def problems(self) -> list[str]:
        """Why it does not fit, one line each; empty: it fits."""
        found = []
        gib = 2**30
        for phase in self.memory.phases:
            rank = self.memory.fullest(phase)
            if rank.peak(phase) > self.cluster.gpu.memory:
                where = "a server" if phase == "server" else f"pipeline rank {rank.pp_rank}"
                found.append(
                    f"{phase}: {rank.peak(phase) / gib:.1f} GiB on {where}, the device has "
                    f"{self.cluster.gpu.memory / gib:.1f}"
                )
        needed = KvCacheSize.from_config(self.config).tokens_per_rollout * self.memory.kv_bytes_per_token
        if self.memory.kv_cache < needed:
            found.append(
                f"rollout: the KV cache of {self.memory.kv_cache / gib:.1f} GiB does not hold one rollout of "
                f"{self.config.longest_rollout} tokens ({needed / gib:.1f} GiB)"
            )
        host = sum(self.memory.host.values())
        if host > HOST_SHARE * self.cluster.gpu.host_memory:
            found.append(
                f"host: {host / gib:.0f} GiB a node, {HOST_SHARE:.0%} of its {self.cluster.gpu.host_memory / gib:.0f} "
                "may be used"
            )
        return found

    @property
    def fits(self) -> bool:
        """On every rank, in every phase, and on every node."""
        return not self.problems

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens, prompts and completions, of the whole job."""
        return self.time.tokens / self.time.seconds

    @property
    def mfu(self) -> float:
        """Operations of the model in the update over the peak of all devices in the whole step."""
        devices = self.topology.world_size + self.topology.num_server_ranks
        peak = devices * self.cluster.gpu.bf16_flops
        return self.time.model_flops / self.time.seconds / peak

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.time.seconds * self.config.train.steps / _SECONDS_PER_DAY

    @property
    def sync_bytes(self) -> int:
        """That enter the engines in one sync."""
        ranks = self.topology.num_server_ranks or self.topology.world_size
        return round(self.memory.engine_weights * ranks)

    def as_json(self, remedy: list[str] | None = None) -> dict[str, Any]:
        """What `tools/plan.py --json` prints."""
        return {
            "fits": self.fits,
            "remedy": remedy,
            "problems": self.problems,
            "ranks": self.topology.world_size,
            "server_ranks": self.topology.num_server_ranks,
            "gpu": self.cluster.gpu.name,
            "peak_bytes": {phase: round(self.memory.fullest(phase).peak(phase)) for phase in self.memory.phases},
            "device_bytes": round(self.cluster.gpu.memory),
            "parameters": self.parameters,
            "step_seconds": self.time.seconds,
            "phase_seconds": self.time.phases,
            "sync_bytes": self.sync_bytes,
            "host_bytes_per_node": round(sum(self.memory.host.values())),
            "host_items": {name: round(size) for name, size in self.memory.host.items()},
            "checkpoint_bytes": round(self.memory.checkpoint),
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "days": self.days,
            "pipeline_ranks": [
                {
                    "pp_rank": rank.pp_rank,
                    "parameters": rank.static.parameters,
                    "phases": {p: {k: round(v) for k, v in items.items()} for p, items in rank.phases.items()},
                }
                for rank in self.memory.ranks
            ],
            "assumptions": self.cluster.assumptions.described(),
        }


def plan_resources(config: Config, spec: ModelSpec, count: ModuleCounter, cluster: Cluster, where: str) -> ResourcePlan:
    """`count` gives the sizes of the real modules.

    Raises:
        UserError: the layout does not divide the ranks, or the layers; the device has no such FP8.
    """
    if (fp8 := config.precision.fp8) is not None and (why := check_generation(fp8.recipe, cluster.gpu.capability)):
        raise UserError(f"--gpu={cluster.gpu.name}: {why}")
    if config.engine.fp8 is not None and (why := check_engine_generation(cluster.gpu.capability)):
        raise UserError(f"--gpu={cluster.gpu.name}: {why}")
    topology = Topology.of(config, cluster.num_ranks)
    sizes = count(tp=topology.tp, ep=topology.ep, etp=topology.etp)
    total = total_parameters(config, spec, count(tp=1, ep=1, etp=1), where)
    memory = plan_memory(config, spec, sizes, topology, cluster, total_parameters=total, where=where)
    work = workload_of(config, topology, cluster.assumptions.mean_length)
    time = plan_time(config, spec, topology, cluster, memory, work, total)
    return ResourcePlan(config, topology, cluster, total, work, memory, time)


def total_parameters(config: Config, spec: ModelSpec, whole: ModuleSizes, where: str) -> int:
    """Of the model, each once; `whole` are the sizes on a single rank."""
    numel = 0
    for chunks in model_chunks(spec, config, where):
        for chunk in chunks:
            numel += sum(whole.sums[part].numel for part in chunk_parts(chunk, spec.tie_embeddings))
    if spec.tie_embeddings and config.parallel.pp > 1:  # the last stage's copy
        numel -= whole.sums["embedding"].numel
    return numel
