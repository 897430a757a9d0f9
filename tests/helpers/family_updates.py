"""Tiny models of every model family, their layouts, and the measurements of a training run on each rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.helpers.family_configs import raw_family_config
from tests.helpers.random_families import random_case
from tests.helpers.ranks import RankPool
from tests.helpers.recorded_rollouts import (
    NUM_UPDATES,
    ONE,
    OPTIMIZER,
    OVERLAP,
    Layout,
    Recorded,
    RecordingLoss,
    as_array,
    make_rows,
    open_policy,
    sample_groups,
    with_recorded,
)
from tests.helpers.tiny_models import make_family_model
from tests.helpers.update_oracle import Expected, compute_expected, perturbed_log_probs

if TYPE_CHECKING:  # pytest's own process stays free of Megatron
    from grpo_mega.policy.policy import MegatronPolicy
    from grpo_mega.trainer.batch import TrainBatch


# original_max_position_embeddings is small, so that rows of a dozen tokens use the scaled frequencies
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 1000.0}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0,
        "rope_theta": 1000.0}  # fmt: skip

# name -> config.json
FAMILY_MODELS: dict[str, dict[str, Any]] = {
    "llama3-rope": raw_family_config("llama", rope_parameters=LLAMA3),
    "llama-linear-rope": raw_family_config("llama", rope_parameters=LINEAR),
    "qwen2-yarn": raw_family_config("qwen2", rope_parameters=YARN),
    "qwen3-moe": raw_family_config("qwen3_moe"),
    "qwen3-moe-sparse": raw_family_config(
        "qwen3_moe", norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[], num_experts_per_tok=3
    ),
    "mixtral": raw_family_config("mixtral"),
    "deepseek-v2": raw_family_config("deepseek_v2", rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}),
    "deepseek-v2-lite": raw_family_config(
        "deepseek_v2", q_lora_rank=None, topk_method="greedy", n_group=None, topk_group=None
    ),
    "deepseek-v3": raw_family_config(
        "deepseek_v3", rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, num_experts_per_tok=4
    ),
    "glm4-moe": raw_family_config("glm4_moe"),
    "gpt-oss": raw_family_config("gpt_oss"),
    "qwen2-tied": raw_family_config("qwen2", tie_word_embeddings=True),
    # dense: runs with tp and without sequence parallelism, which experts require
    "deepseek-dense": raw_family_config("deepseek_v2", first_k_dense_replace=2),
    "qwen3-tied": raw_family_config("qwen3", tie_word_embeddings=True),
}
# With the usual seed of these models no token chooses one of the experts, which then has no gradient.
SEEDS = {"qwen3-moe-sparse": 200, "deepseek-v2": 200}
DENSE = ("llama3-rope", "llama-linear-rope", "qwen2-yarn", "qwen2-tied", "qwen3-tied", "deepseek-dense")

SP = True
# two layers over four model chunks
SPREAD = ("pipeline_layout", "E|t|t|L")
# DEEP_*: every family. WIDE_MOE: three families that together have every part. Together they use every axis but vpp,
# and experts that Megatron would treat as dense layers (megatron_patches/fixes.py, separate_experts).
DEEP_DENSE, DEEP_MOE = Layout(4, tp=2, pp=2), Layout(4, tp=2, pp=2, sequence_parallel=SP, ep=2)
WIDE_MOE = Layout(4, cp=2, etp=2)
QUICK_WIDE = ("mixtral", "deepseek-v3", "gpt-oss")
LONG_DENSE = (
    ONE,
    Layout(2, tp=2),
    Layout(2, tp=2, sequence_parallel=SP),
    Layout(2, cp=2),
    Layout(4, pp=2, vpp=2, more=(SPREAD, *OVERLAP)),
    Layout(4, tp=2, cp=2, sequence_parallel=SP, more=(("recompute", "full"),)),
    Layout(8, tp=2, pp=2),
    Layout(8, tp=2, pp=2, cp=2),
)
LONG_MOE = (
    ONE,
    Layout(2, ep=2),
    Layout(2, tp=2, sequence_parallel=SP),
    Layout(4, ep=4, more=(("recompute", "selective"), ("recompute_modules", ("core_attn", "moe", "layernorm")))),
    Layout(4, tp=2, sequence_parallel=SP, ep=2, etp=2),
    Layout(4, pp=2, vpp=2, ep=2, more=(SPREAD, *OVERLAP)),
    Layout(4, tp=2, cp=2, sequence_parallel=SP, ep=4, more=(("recompute", "full"),)),
    Layout(8, tp=2, pp=2, cp=2, sequence_parallel=SP, ep=2),
)
# variants of a family that runs in all layouts; a variant runs in few, all of them in the long tier
VARIANTS = ("llama-linear-rope", "qwen2-tied", "qwen3-moe-sparse", "deepseek-dense")
FEW_DENSE, FEW_MOE = LONG_DENSE[-3:], LONG_MOE[-3:]


def layouts_of(name: str, *, quick: bool) -> tuple[Layout, ...]:
    """Return the layouts of a model in the quick suite, or all its other layouts."""
    few = name in VARIANTS
    if few:
        return () if quick else (DEEP_DENSE, *FEW_DENSE) if name in DENSE else (DEEP_MOE, *FEW_MOE)
    if name in DENSE:
        return (DEEP_DENSE,) if quick else LONG_DENSE
    wide = (WIDE_MOE,) if quick == (name in QUICK_WIDE) else ()
    found = (DEEP_MOE, *wide) if quick else (*wide, *LONG_MOE)
    # the experts of gpt-oss cannot be split by expert tensor parallelism
    return found if name != "gpt-oss" else tuple(replace(layout, etp=1) for layout in found)


@dataclass
class FamilyRecord:
    """The measurements of one rank for a family; rank 0 has the gathered gradients and tensors."""

    is_last_stage: bool = False
    logits: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)
    log_probs: dict[int, list[float]] = field(default_factory=dict)
    stats: list[Any] = field(default_factory=list)
    gradients: list[dict[str, np.ndarray[Any, Any]]] = field(default_factory=list)
    tensors: list[dict[str, np.ndarray[Any, Any]]] = field(default_factory=list)


class FamilyLaboratory:
    """Models of the families, their oracles and their runs; each is made once, on first use."""

    def __init__(self, pool: RankPool, folder: Path) -> None:
        self.pool = pool
        self._folder = folder
        self._recorded: dict[str, Recorded] = {}
        self._expected: dict[str, Expected] = {}
        self._runs: dict[tuple[str, Layout], list[FamilyRecord]] = {}

    def recorded(self, name: str) -> Recorded:
        """Return the model `name` of FAMILY_MODELS and rollouts for it."""
        if name not in self._recorded:
            seed = SEEDS.get(name, 100 + list(FAMILY_MODELS).index(name))
            self._recorded[name] = record_family(self._folder / name, FAMILY_MODELS[name], seed)
        return self._recorded[name]

    def expected(self, name: str) -> Expected:
        """Return the results of the oracle."""
        if name not in self._expected:
            self._expected[name] = compute_expected(self.recorded(name))
        return self._expected[name]

    def run(self, name: str, layout: Layout) -> list[FamilyRecord]:
        """Return the measurements of each rank."""
        if (name, layout) not in self._runs:
            self._runs[name, layout] = self.pool.call(
                layout.world, measure_family, self.recorded(name), layout, timeout_seconds=900.0
            )
        return self._runs[name, layout]


def record_family(folder: Path, config: dict[str, Any], seed: int) -> Recorded:
    """Write a random model to `folder`; return it with rollouts for it."""
    model = make_family_model(folder, config, seed)
    groups, rewards = sample_groups(4, 4, seed, vocab=config["vocab_size"])
    old = perturbed_log_probs(groups, model, 1.0, 0.01, seed + 10)
    ref = perturbed_log_probs(groups, model, 1.0, 0.02, seed + 20)
    return Recorded(model, groups, rewards, old, ref)


def measure_random(pool: RankPool, folder: Path, seed: int) -> tuple[Differences, Differences]:
    """Return the differences of a random model in a random layout, and the rounding error of float32.

    Both are differences to transformers in float64; the rounding error is the difference of transformers in float32. In
    some models it alone changes a gradient by more than 1e-5.
    """
    config, world, parallel = random_case(seed)
    axes = {name: getattr(parallel, name) for name in ("tp", "pp", "sequence_parallel", "cp", "vpp", "ep", "etp")}
    other_keys = {name: value for name, value in parallel.model_dump(exclude_defaults=True).items() if name not in axes}
    recorded = record_family(folder / f"seed_{seed}", config, seed)
    layout = Layout(world, more=tuple(other_keys.items()), **axes)
    records = pool.call(world, measure_family, recorded, layout, timeout_seconds=900.0)
    expected, float32_expected = compute_expected(recorded), compute_expected(recorded, torch.float32)
    float32_record = FamilyRecord(
        is_last_stage=True,
        logits={i: logits.numpy() for i, logits in enumerate(float32_expected.logits)},
        log_probs=dict(enumerate(float32_expected.log_probs[1.0])),
        gradients=[{name: g.numpy() for name, g in each.items()} for each in float32_expected.gradients],
        tensors=[{name: t.numpy() for name, t in each.items()} for each in float32_expected.tensors],
    )
    return (
        differences(records, expected, every_tensor_is_used=False),
        differences([float32_record], expected, every_tensor_is_used=False),
    )


def is_within(found: Differences, rounding: Differences | None = None) -> bool:
    """Return True if all differences are within tolerance; gradients may differ by three times the rounding error."""
    gradient = max(1e-5, 3 * rounding.gradient if rounding is not None else 0.0)
    return max(found.logits, found.log_probs) <= 2e-5 and found.gradient <= gradient and found.weights <= 1e-6


def measure_family(rank: int, recorded: Recorded, layout: Layout) -> FamilyRecord:
    """Measure, on a rank, log-probs and logits, then gradients and weights of three updates."""
    policy = open_policy(rank, recorded, layout)
    rows = make_rows(rank, recorded, layout)
    batch = with_recorded(rows, recorded)
    record = FamilyRecord(is_last_stage=policy.ranks.is_last_stage)
    values = policy.log_probs(rows.microbatches)
    record.log_probs = {} if values is None else rows.completion_values(values).by_rollout()
    record.logits = whole_logits(policy, rows)
    loss = RecordingLoss()
    for update in range(NUM_UPDATES + 1):
        tensors = {name: as_array(t) for name, t in policy.full_tensors(4096)}
        record.tensors.append(tensors if rank == 0 else {})
        if update < NUM_UPDATES:
            gradients = record_gradients(policy)
            stats, _ = policy.update(batch.microbatches, loss, OPTIMIZER.lr)
            record.stats.append(stats)
            record.gradients.append(gradients if rank == 0 else {})
    return record


def whole_logits(policy: MegatronPolicy, rows: TrainBatch) -> dict[int, np.ndarray[Any, Any]]:
    """Return the logits [T, V] of each rollout of this rank; only ranks of the last pipeline stage have them."""
    found: dict[int, np.ndarray[Any, Any]] = {}
    for microbatch, values in zip(rows.microbatches, policy.logits(rows.microbatches) or [], strict=False):
        bounds = microbatch.cu_seqlens.tolist()
        for i, begin, end in zip(microbatch.rollout_ids, bounds, bounds[1:], strict=False):
            found[i] = as_array(values[begin:end])  # with the padding at the end of the sequence
    return found


@dataclass(frozen=True)
class Differences:
    """The largest differences to the oracle: absolute, except gradients: |g - g'| / |g'|, over tensors and updates."""

    logits: float
    log_probs: float
    gradient: float
    gradient_of: str
    weights: float


def differences(records: list[FamilyRecord], expected: Expected, *, every_tensor_is_used: bool = True) -> Differences:
    """Return the largest differences over rollouts, tensors and updates; asserts that none is missing.

    A tensor may be unused (an expert that no token chose) unless `every_tensor_is_used`. The norm of its gradient is
    then taken to be at least 1e-4 of the norm of the whole gradient.
    """
    count = len(expected.logits)
    last = [record for record in records if record.is_last_stage]
    for by_rollout in ([r.logits for r in last], [r.log_probs for r in last]):
        assert {i for values in by_rollout for i in values} == set(range(count))
    logits = max(float(np.abs(v[: len(w)] - w).max()) for r in last for i, v in r.logits.items()
                 for w in [expected.logits[i].numpy()])  # fmt: skip
    wanted = expected.log_probs[1.0]
    log_probs = max(float(np.abs(np.array(v) - wanted[i]).max()) for r in last for i, v in r.log_probs.items())
    gradient, gradient_name = 0.0, ""
    for update, tensors in enumerate(expected.gradients):
        found = records[0].gradients[update]
        assert tensors.keys() == {name for name in found if not name.endswith("e_score_correction_bias")}
        for name, tensor in tensors.items():
            size = float(tensor.norm())
            if every_tensor_is_used:
                assert size > 1e-5, f"{name} has a gradient of zero, which cannot be compared"
            else:
                size = max(size, 1e-4 * expected.grad_norms[update])
            relative = float(np.linalg.norm(found[name] - tensor.numpy())) / size
            gradient, gradient_name = max((gradient, gradient_name), (relative, f"{name}, update {update + 1}"))
    weights = 0.0
    for update, tensors in enumerate(expected.tensors):
        assert tensors.keys() == records[0].tensors[update].keys()
        for name, tensor in tensors.items():
            weights = max(weights, float(np.abs(records[0].tensors[update][name] - tensor.numpy()).max()))
    return Differences(logits, log_probs, gradient, gradient_name, weights)


def record_gradients(policy: MegatronPolicy) -> dict[str, np.ndarray[Any, Any]]:
    """Return a dict that the next update fills before its step: checkpoint name -> gathered gradient of the tensor."""
    gradients: dict[str, np.ndarray[Any, Any]] = {}
    optimizer = policy.parts.optimizer

    def prepare() -> Any:
        result = type(optimizer).prepare_grads(optimizer)
        gradients.update((name, as_array(t)) for name, t in policy.full_gradients(1 << 20))
        del optimizer.prepare_grads
        return result

    optimizer.prepare_grads = prepare
    return gradients
