"""Inputs of a plan: the run's config, its model, its layout and its cluster, and the workload of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.config.schema import Config
from grpo_mega.models.engine_memory import ITEMSIZE
from grpo_mega.models.kv_cache_memory import KvCacheSize
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.overlap import with_overlap
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.hardware import Assumptions, Cluster, Gpu


@dataclass(frozen=True)
class PlanInputs:
    """Everything that a plan is computed from, except the sizes of the model's modules."""

    config: Config
    spec: ModelSpec
    topology: Topology
    cluster: Cluster

    @classmethod
    def from_config(cls, config: Config, spec: ModelSpec, cluster: Cluster) -> PlanInputs:
        """Return the inputs with the layout of the config on the ranks of the cluster.

        Raises:
            UserError: the layout does not divide the ranks.
        """
        return cls(config, spec, Topology.of(config, cluster.num_ranks), cluster)

    @property
    def gpu(self) -> Gpu:
        """The device of every rank."""
        return self.cluster.gpu

    @property
    def assumptions(self) -> Assumptions:
        """The planner's assumptions for this device."""
        return self.cluster.assumptions

    @property
    def itemsize(self) -> int:
        """Bytes of one element in the compute precision."""
        return ITEMSIZE[self.config.precision.dtype]

    @property
    def is_cpu_job(self) -> bool:
        """True without CUDA: the device's memory is a part of the host's."""
        return self.gpu.kernels == "local"

    @property
    def uses_servers(self) -> bool:
        """True if the engines run on devices of their own."""
        return self.topology.engine_servers > 0

    @property
    def policy_is_offloaded(self) -> bool:
        """True if the policy leaves its devices between the phases that use it."""
        shares_devices = self.config.has_engine and not self.uses_servers
        return shares_devices or self.config.algorithm.needs_critic

    @property
    def parallel(self) -> ParallelConfig:
        """The section `parallel` with the defaults that depend on the device and the layout."""
        copies = self.topology.dp * self.topology.cp
        return with_overlap(self.config.parallel, copies=copies, on_cuda=not self.is_cpu_job)

    @property
    def kv_cache(self) -> KvCacheSize:
        """The size of the KV cache that the engine requests."""
        return KvCacheSize.from_config(self.config)

    @property
    def workload(self) -> Workload:
        """The rollouts (examples in supervised fine-tuning) and microbatches of one step.

        Rows are as long as the config allows. The microbatches are those of rollouts that all have full length.
        """
        config, parallel, train = self.config, self.config.parallel, self.config.train
        rollouts = config.data.prompts_per_step * (1 if config.is_sft else config.sampling.group_size)
        longest = config.longest_training_rollout
        rollouts_per_row = max(1, train.max_tokens_per_microbatch // longest)
        rollouts_per_update = math.ceil(rollouts / train.minibatches_per_epoch / self.topology.dp)
        microbatches = math.ceil(rollouts_per_update / rollouts_per_row)
        if parallel.vpp > 1:
            microbatches = math.ceil(microbatches / parallel.pp) * parallel.pp
        return Workload(
            rollouts=rollouts,
            updates=train.epochs_per_rollout * train.minibatches_per_epoch,
            longest=longest,
            mean=self.assumptions.mean_length * longest,
            row_tokens=train.max_tokens_per_microbatch,
            num_microbatches=microbatches,
        )


@dataclass(frozen=True)
class Workload:
    """The work of one step, in rollouts and in tokens."""

    rollouts: int
    updates: int
    longest: int
    """Tokens of the longest rollout of a training batch."""
    mean: float
    """Assumed mean number of tokens of a rollout, with its prompt."""
    row_tokens: int
    """Tokens of one packed row, which is one microbatch."""
    num_microbatches: int
    """Largest number of microbatches of one update on one data-parallel rank."""
