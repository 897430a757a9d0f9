"""The plan of a run: memory, time and the verdict, as one object that is printed, drawn and searched over."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grpo_mega.config.fp8_rules import check_engine_generation, check_generation
from grpo_mega.config.schema import Config
from grpo_mega.models.module_sizes import ModuleCounter, ModuleSizes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.planner.disk import DiskPlan, plan_disk
from grpo_mega.planner.hardware import GIB, Cluster
from grpo_mega.planner.inputs import PlanInputs
from grpo_mega.planner.phase_memory import MemoryPlan, plan_memory
from grpo_mega.planner.static_memory import chunk_parts, model_chunks
from grpo_mega.planner.step_time import StepTime, plan_time
from grpo_mega.types import UserError

HOST_SHARE = 0.9
"""Fraction of a node's memory that a run may use; the rest is for the operating system and its file cache."""
_SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class ResourcePlan:
    """The memory and time that a run needs on a cluster."""

    inputs: PlanInputs
    parameters: int
    memory: MemoryPlan
    time: StepTime

    @cached_property
    def problems(self) -> list[str]:
        """The reasons why the run does not fit, one line each; empty if it fits."""
        return [*self._device_problems(), *self._host_problems()]

    def _device_problems(self) -> list[str]:
        capacity, problems = self.inputs.gpu.memory, []
        for phase in self.memory.phases:
            rank = self.memory.fullest(phase)
            if rank.peak(phase) > capacity:
                where = "a server" if phase == "server" else f"pipeline rank {rank.pp_rank}"
                problems.append(
                    f"{phase}: {rank.peak(phase) / GIB:.1f} GiB on {where}, the device has {capacity / GIB:.1f}"
                )
        return problems

    def _host_problems(self) -> list[str]:
        used, capacity = sum(self.memory.host.values()), self.inputs.gpu.host_memory
        if used <= HOST_SHARE * capacity:
            return []
        return [
            f"host: {used / GIB:.0f} GiB per node, at most {HOST_SHARE:.0%} of {capacity / GIB:.0f} GiB can be used"
        ]

    @property
    def fits(self) -> bool:
        """True if every rank in every phase, and every node, has enough memory."""
        return not self.problems

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens of the whole job per second, prompts and completions."""
        return self.time.tokens / self.time.seconds

    @property
    def mfu(self) -> float:
        """Model FLOP/s utilization: operations of the update over the peak of all devices during the whole step."""
        topology = self.inputs.topology
        peak = (topology.world_size + topology.num_server_ranks) * self.inputs.gpu.bf16_flops
        return self.time.model_flops / self.time.seconds / peak

    @property
    def days(self) -> float:
        """Days of the whole run."""
        return self.time.seconds * self.inputs.config.train.steps / _SECONDS_PER_DAY

    @property
    def disk(self) -> DiskPlan:
        """Bytes that the run writes to its folder."""
        return plan_disk(self.inputs, checkpoint=self.memory.checkpoint, total_parameters=self.parameters)

    @property
    def sync_bytes(self) -> int:
        """Bytes that the engines receive in one sync."""
        if not self.inputs.config.has_engine:
            return 0
        ranks = self.inputs.topology.num_server_ranks or self.inputs.topology.world_size
        return round(self.memory.engine.weights * ranks)

    def as_json(self, remedy: list[str] | None = None) -> dict[str, Any]:
        """Return what `tools/plan.py --json` prints."""
        topology, memory = self.inputs.topology, self.memory
        return {
            "fits": self.fits,
            "remedy": remedy,
            "problems": self.problems,
            "ranks": topology.world_size,
            "server_ranks": topology.num_server_ranks,
            "gpu": self.inputs.gpu.name,
            "peak_bytes": {phase: round(memory.fullest(phase).peak(phase)) for phase in memory.phases},
            "device_bytes": round(self.inputs.gpu.memory),
            "parameters": self.parameters,
            "step_seconds": self.time.seconds,
            "phase_seconds": self.time.phases,
            "sync_bytes": self.sync_bytes,
            "host_bytes_per_node": round(sum(memory.host.values())),
            "host_items": {name: round(size) for name, size in memory.host.items()},
            "checkpoint_bytes": round(memory.checkpoint),
            "disk_bytes": self.disk.as_json(),
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "days": self.days,
            "pipeline_ranks": [
                {
                    "pp_rank": rank.pp_rank,
                    "parameters": rank.static.parameters,
                    "phases": {p: {k: round(v) for k, v in items.items()} for p, items in rank.phases.items()},
                }
                for rank in memory.ranks
            ],
            "assumptions": self.inputs.assumptions.described(),
        }


def plan_resources(config: Config, spec: ModelSpec, count: ModuleCounter, cluster: Cluster, where: str) -> ResourcePlan:
    """Return the plan of a run.

    Args:
        config: the run.
        spec: its model.
        count: gives the sizes of the policy's real modules in a layout.
        cluster: the devices.
        where: what error messages call the source of the model.

    Raises:
        UserError: the layout does not divide the ranks or the layers, the device does not support the requested FP8,
            or `engine.kv_cache_tokens` or `engine.memory_share` does not hold one rollout.
    """
    _check_fp8_support(config, cluster)
    inputs = PlanInputs.from_config(config, spec, cluster)
    topology = inputs.topology
    sizes = count(tp=topology.tp, ep=topology.ep, etp=topology.etp)
    total = total_parameters(config, spec, count(tp=1, ep=1, etp=1), where)
    memory = plan_memory(inputs, sizes, total_parameters=total, where=where)
    return ResourcePlan(inputs, total, memory, plan_time(inputs, memory))


def _check_fp8_support(config: Config, cluster: Cluster) -> None:
    """Raise UserError if the device does not support the FP8 of the policy or of the engine."""
    problems = []
    if config.precision.fp8 is not None:
        problems.append(check_generation(config.precision.fp8.recipe, cluster.gpu.capability))
    if config.engine.fp8 is not None:
        problems.append(check_engine_generation(cluster.gpu.capability))
    for problem in filter(None, problems):
        raise UserError(f"--gpu={cluster.gpu.name}: {problem.message}", remedy=problem.remedy)


def total_parameters(config: Config, spec: ModelSpec, whole: ModuleSizes, where: str) -> int:
    """Return the number of parameters of the model, each counted once.

    Args:
        config: gives the pipeline layout.
        spec: the model.
        whole: sizes of the modules on a single rank.
        where: what error messages call the source of the model.

    Raises:
        UserError: the layers do not divide into the pipeline stages.
    """
    numel = 0
    for chunks in model_chunks(spec, config, where):
        for chunk in chunks:
            numel += sum(whole.sums[part].numel for part in chunk_parts(chunk, spec.tie_embeddings))
    if spec.tie_embeddings and config.parallel.pp > 1:  # the last stage holds a copy
        numel -= whole.sums["embedding"].numel
    return numel
