"""Computes the work metrics of a step: operations of the updates, MFU, and the bubble of the pipeline. Pure.

Asserted by tests/unit/trainer/test_work_metrics.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo_mega.models.flops import TRAINED_PASSES, forward_flops
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Topology


@dataclass(frozen=True)
class WorkMetrics:
    """The work of the policy's updates, on a model and a layout.

    Attributes:
        spec: the model.
        topology: ranks of the policy and of servers.
        epochs: passes over the rollouts of a step.
        peak_flops: dense bf16 FLOP/s of one device; None where it is not known: there is no MFU.
    """

    spec: ModelSpec
    topology: Topology
    epochs: int
    peak_flops: float | None

    def of_step(
        self, lengths: Sequence[int], microbatches: Sequence[int], times: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the metrics of a step.

        MFU is operations / (seconds x peak x devices): of the phase `train` on the policy's devices, and of the whole
        step on all devices, with those of engine servers. The bubble is (pp - 1) / (m vpp + pp - 1), the idle part of
        a pipeline of m microbatches.

        Args:
            lengths: tokens, prompt and completion, of each sequence that is trained on.
            microbatches: microbatches of each update on this rank; empty: they are not known.
            times: metrics `time/*`, in seconds.
        """
        flops = self.epochs * TRAINED_PASSES * forward_flops(self.spec, lengths)
        found = {"throughput/update_flops": flops}
        if (train := times.get("time/train_seconds", 0.0)) > 0:
            found["throughput/train_flops_per_second"] = flops / train / self.topology.world_size
            if self.peak_flops is not None:
                found["throughput/train_mfu"] = flops / (train * self.peak_flops * self.topology.world_size)
        if self.peak_flops is not None:
            devices = self.topology.world_size + self.topology.num_server_ranks
            found["throughput/mfu"] = flops / (times["time/step_seconds"] * self.peak_flops * devices)
        if self.topology.pp > 1 and microbatches:
            idle, useful = self.topology.pp - 1, self.topology.vpp * sum(microbatches) / len(microbatches)
            found["train/bubble_fraction"] = idle / (useful + idle)
        return found
