"""Recorded rollouts of one step, and the measurements of a layout that trains on them: log-probs, updates, weights.

The old and the reference policy are the same model with perturbed weights, so that ratios are clipped and the KL is not
zero. `measure_layout` runs on a rank; everything else is plain data that is sent to and from the ranks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from grpo_mega.algorithm.loss import PolicyLoss
from grpo_mega.algorithm.surrogates.clipped_ratio import clipped_ratio
from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.config.data_sections import DataConfig
from grpo_mega.config.model_sections import ModelConfig
from grpo_mega.config.policy_sections import OptimizerConfig, ParallelConfig, PrecisionConfig
from grpo_mega.config.rollout_sections import RewardConfig, SamplingConfig
from grpo_mega.config.schema import Config, TrainConfig
from grpo_mega.data.row_plan import RowShape
from grpo_mega.models.config_readers import read_spec
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.batch import TrainBatch, build_batch
from grpo_mega.trainer.objective import Objective
from grpo_mega.types import Completion, Microbatch, Prompt, Reward, Rollout
from tests.helpers.thread_ranks import replicated

if TYPE_CHECKING:  # pytest's own process stays free of Megatron
    from grpo_mega.policy.policy import MegatronPolicy

# only tp=3 and tp=7 divide 21, so that the output layer is padded with tp=2
VOCAB, EOS = 21, 1
CLIP_LOW, CLIP_HIGH, KL_COEF = 0.2, 0.25, 0.1
LOSS = PolicyLoss(partial(clipped_ratio, clip_low=CLIP_LOW, clip_high=CLIP_HIGH), kl_coef=KL_COEF)
# Adam's first step is g / (|g| + eps), a sign when eps is small: where a gradient is as small as its rounding error, a
# weight would change by +lr in one layout and by -lr in another. With eps = 1e-3 an error d of g changes it by at most
# lr d / eps. clip_grad is below every gradient norm, so that all gradients are clipped.
OPTIMIZER = OptimizerConfig(lr=2e-3, beta1=0.9, beta2=0.95, eps=1e-3, weight_decay=0.1, clip_grad=0.5)
NUM_UPDATES = 3
TEMPERATURES = (1.0, 0.7)


@dataclass(frozen=True)
class Layout:
    """The layout of a run: world = tp * cp * pp * dp. `more`: names and values of other keys of `parallel`."""

    world: int = 1
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tp=self.tp,
            pp=self.pp,
            cp=self.cp,
            vpp=self.vpp,
            ep=self.ep,
            etp=self.etp,
            sequence_parallel=self.sequence_parallel,
            **dict(self.more),
        )

    @property
    def topology(self) -> Topology:
        return Topology(self.world, self.tp, self.pp, cp=self.cp, ep=self.ep, etp=self.etp, vpp=self.vpp)

    def __str__(self) -> str:
        axes = [f"tp{self.tp}pp{self.pp}dp{self.topology.dp}"]
        more = (("cp", self.cp), ("vpp", self.vpp), ("ep", self.ep), ("etp", self.etp))
        axes += [f"{name}{size}" for name, size in more if size > 1]
        axes += ["sp"] if self.sequence_parallel else []
        return "-".join([*axes, *(f"{key}={value}" for key, value in self.more)])


ONE = Layout()
LAYOUTS = (
    ONE,
    Layout(2, tp=2),
    Layout(2, tp=2, sequence_parallel=True),
    Layout(2, pp=2),
    Layout(2),
    Layout(8, tp=2, pp=2),
)
OVERLAP = (("overlap_grad_reduce", True), ("overlap_param_gather", True))
# for the model of four layers
DEEP_LAYOUTS = (
    ONE,
    Layout(2, pp=2, more=(("num_layers_first_stage", 1), ("recompute", "selective"))),
    Layout(4, pp=4, more=(("pipeline_layout", "E|tt|t*2|L"),)),
    Layout(2, pp=2, vpp=2),
    Layout(
        4, tp=2, pp=2, vpp=2, sequence_parallel=True, more=(("pipeline_layout", "Et|tt||tL"), ("recompute", "full"))
    ),
    Layout(2, cp=2),
    Layout(4, tp=2, cp=2, sequence_parallel=True),
    Layout(4, pp=2, cp=2, more=OVERLAP),
    Layout(4, pp=2, vpp=2, more=OVERLAP),
)
MODULES = (("recompute", "selective"), ("recompute_modules", ("core_attn", "mlp", "layernorm")))
LONG_LAYOUTS = (
    Layout(8, tp=2, pp=2, cp=2),
    Layout(4, cp=4),
    Layout(6, cp=3, more=(("recompute", "full"),)),
    Layout(8, tp=2, cp=2, more=(*OVERLAP, *MODULES)),
    Layout(8, pp=2, vpp=2, cp=2, more=(*OVERLAP, *MODULES)),
    Layout(8, tp=2, pp=2, vpp=2, cp=2, sequence_parallel=True, more=MODULES),
    Layout(4, pp=4, more=(("num_layers_first_stage", 1), ("num_layers_last_stage", 1))),
    Layout(8, pp=4, more=(("pipeline_layout", "E|tt|tt|L"), *OVERLAP)),
)


@dataclass(frozen=True)
class RolloutGroups:
    """Rollouts of a step, group by group, and the groups that the package makes of them."""

    rollouts: list[Rollout]
    group_size: int

    def sampled(self) -> SampledGroups:
        return SampledGroups.of(self.rollouts, self.group_size)


@dataclass(frozen=True)
class Recorded:
    """The input of every layout. `old` and `ref`: log-probs of the completion tokens of each rollout."""

    model: Path
    groups: RolloutGroups
    rewards: list[float]
    old: list[list[float]]
    ref: list[list[float]]
    temperature: float = 1.0
    dtype: str = "fp32"
    max_tokens: int = 40
    optimizer: OptimizerConfig = OPTIMIZER


def sample_groups(
    num_prompts: int, group_size: int, seed: int, vocab: int = VOCAB, *, with_results: bool = False
) -> tuple[RolloutGroups, list[float]]:
    """Return rollouts of different lengths with rewards, which are all equal in the last group.

    `with_results`: an environment wrote tokens in the middle of the rollouts of at least four tokens.
    """
    rng = random.Random(seed)
    rollouts, rewards = [], []
    for index in range(num_prompts):
        prompt = Prompt(index, "", tuple(rng.randrange(2, vocab) for _ in range(rng.randint(2, 7))), "")
        for _ in range(group_size):
            tokens = (*(rng.randrange(2, vocab) for _ in range(rng.randint(0, 13))), EOS)
            mask = _random_loss_mask(len(tokens), random.Random(len(rollouts))) if with_results else None
            completion = Completion(tokens, (-1.0,) * len(tokens), "eos", 0, "", loss_mask=mask)
            rewards.append(1.0 if index == num_prompts - 1 else rng.random())
            rollouts.append(Rollout(prompt, completion, Reward(rewards[-1]), 0))
    return RolloutGroups(rollouts, group_size), rewards


def _random_loss_mask(num_tokens: int, rng: random.Random) -> tuple[bool, ...] | None:
    """Return a loss mask: True at both ends, random in between."""
    if num_tokens < 4:
        return None
    own = [True, *(rng.random() < 0.5 for _ in range(num_tokens - 2)), True]
    return tuple(own)


def make_config(recorded: Recorded, layout: Layout) -> Config:
    """Return the config of a run with this layout."""
    return Config(
        model=ModelConfig(path=str(recorded.model)),
        data=DataConfig(train="arithmetic:train"),
        reward=RewardConfig(terms=()),
        parallel=layout.parallel,
        optimizer=recorded.optimizer,
        sampling=SamplingConfig(temperature=recorded.temperature),
        train=TrainConfig(steps=1, max_tokens_per_microbatch=recorded.max_tokens),
        precision=PrecisionConfig(dtype=recorded.dtype),  # type: ignore[arg-type]
    )


def ranks_of(rank: int, layout: Layout) -> Ranks:
    return Ranks(layout.topology, layout.topology.coordinates(rank), torch.device("cpu"))


def open_policy(
    rank: int, recorded: Recorded, layout: Layout, *, with_reference: bool = False, ref_update_every: int = 0
) -> MegatronPolicy:
    """Build the real policy on a rank."""
    from grpo_mega.policy.policy import MegatronPolicy

    algorithm = AlgorithmConfig(ref_update_every=ref_update_every)
    config, ranks = make_config(recorded, layout).model_copy(update={"algorithm": algorithm}), ranks_of(rank, layout)
    return MegatronPolicy(config, read_spec(recorded.model), recorded.model, ranks, with_reference=with_reference)


def make_rows(rank: int, recorded: Recorded, layout: Layout) -> TrainBatch:
    """Return this rank's microbatches, without old and reference log-probs."""
    return build_batch(
        recorded.groups.sampled(),
        np.array(recorded.rewards),
        TrainConfig(steps=1, max_tokens_per_microbatch=recorded.max_tokens),
        Objective(AlgorithmConfig(), max_tokens=recorded.max_tokens),
        transfer=replicated(ranks_of(rank, layout)),
        shape=RowShape.of(layout.parallel),
    )


def with_recorded(batch: TrainBatch, recorded: Recorded) -> TrainBatch:
    """Return the batch with the recorded log-probs."""
    return batch.with_log_probs(
        old=[as_row(recorded.old, m) for m in batch.microbatches],
        ref=[as_row(recorded.ref, m) for m in batch.microbatches],
    )


def as_row(values: list[list[float]], microbatch: Microbatch) -> Tensor:
    """Return values per rollout as a row [T]; other positions are 1e3, which would change a loss that used them."""
    row = torch.full((len(microbatch.token_ids),), 1e3)
    row[microbatch.loss_mask] = torch.tensor([v for i in microbatch.rollout_ids for v in values[i]])
    return row


@dataclass
class RankRecord:
    """The measurements of one rank.

    Ranks of the last pipeline stage have the values per rollout. Rank 0 has the gathered tensors after 0, 1, 2 and 3
    updates, and the gradients of the first update.
    """

    is_last_stage: bool = False
    log_probs: dict[float, dict[int, list[float]]] = field(default_factory=dict)
    entropy: dict[int, list[float]] = field(default_factory=dict)
    num_microbatches: int = 0
    stats: list[Any] = field(default_factory=list)
    tensors: list[dict[str, np.ndarray[Any, Any]]] = field(default_factory=list)
    gradients: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    shard_digests: dict[str, int] = field(default_factory=dict)
    small_buckets_equal: bool = False
    param_bytes: int = 0
    main_grad_bytes: int = 0
    moment_bytes: int = 0


class RecordingLoss:
    """`LOSS`, which also records the entropies that it receives."""

    needs_reference = True

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, log_probs: Tensor, entropy: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(entropy.detach().clone())
        return LOSS(log_probs, entropy, microbatch)


def measure_layout(rank: int, recorded: Recorded, layout: Layout) -> RankRecord:
    """Measure, on a rank, everything that the tests of updates and weights compare."""
    policy = open_policy(rank, recorded, layout)
    rows = make_rows(rank, recorded, layout)
    batch = with_recorded(rows, recorded)
    record = RankRecord(is_last_stage=policy.ranks.is_last_stage, num_microbatches=len(batch.microbatches))
    for temperature in TEMPERATURES:
        policy.temperature = temperature
        values = policy.log_probs(rows.microbatches)
        record.log_probs[temperature] = {} if values is None else rows.completion_values(values).by_rollout()
    policy.temperature = recorded.temperature
    record.shard_digests = shard_digests(policy)
    whole = [(name, as_array(t)) for name, t in policy.full_tensors(1 << 28)]
    small = [(name, as_array(t)) for name, t in policy.full_tensors(1024)]
    record.small_buckets_equal = [(n, t.tobytes()) for n, t in small] == [(n, t.tobytes()) for n, t in whole]
    policy.backward(batch.microbatches, LOSS)
    gradients = {name: as_array(t) for name, t in policy.full_gradients(1 << 12)}
    record.gradients = gradients if rank == 0 else {}
    loss = RecordingLoss()
    for update in range(NUM_UPDATES + 1):
        tensors = {name: as_array(t) for name, t in policy.full_tensors(1 << 28)}
        record.tensors.append(tensors if rank == 0 else {})
        if update < NUM_UPDATES:
            stats, _ = policy.update(batch.microbatches, loss, OPTIMIZER.lr)
            record.stats.append(stats)
    if policy.ranks.is_last_stage:
        record.entropy = batch.completion_values(loss.seen[: len(batch.microbatches)]).by_rollout()
    record.param_bytes = sum(p.nbytes for p in policy.parts.parameters)
    record.main_grad_bytes = sum(b.grad_data.nbytes for b in policy.parts.buffers)
    record.moment_bytes = sum(m.nbytes for m in optimizer_moments(policy))
    return record


def as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a copy as an array; bfloat16, which numpy does not have, as int16 with the same bits."""
    tensor = tensor.detach().clone()
    return np.array((tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy())


def shard_digests(policy: MegatronPolicy) -> dict[str, int]:
    """Return the sum of the digests of this rank's slices of each tensor."""
    from grpo_mega.models.digest import slice_digest, wrap_int64

    sums: dict[str, int] = {}
    for shard in policy.source.shards():
        if not shard.counted:
            continue
        sums[shard.hf.name] = wrap_int64(sums.get(shard.hf.name, 0) + slice_digest(shard.view, shard.hf))
    return sums


def torch_optimizers(policy: MegatronPolicy) -> list[Any]:
    """Return the torch optimizers inside Megatron's optimizer."""
    chain = getattr(policy.parts.optimizer, "chained_optimizers", [policy.parts.optimizer])
    return [inner.optimizer for inner in chain]


def optimizer_moments(policy: MegatronPolicy) -> list[Tensor]:
    """Return exp_avg and, where there is one, exp_avg_sq of this rank's shards."""
    states = optimizer_states(policy)
    return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq") if name in state]


def optimizer_states(policy: MegatronPolicy) -> list[dict[str, Tensor]]:
    """Return the states of this rank's shards that have one, in the order of the parameters."""
    adams = torch_optimizers(policy)
    return [a.state[p] for a in adams for group in a.param_groups for p in group["params"] if p in a.state]
