"""Bytes on each pipeline rank in each phase, item by item (the phases: grpo_mega/trainer/phases.py).

Pure arithmetic. Asserted by tests/unit/planner/test_phase_memory.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from grpo_mega.config.schema import Config
from grpo_mega.interfaces import ModuleSizes
from grpo_mega.models.kv_cache import KvCacheSize, kv_bytes_per_token
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.activations import Activations
from grpo_mega.planner.hardware import Cluster
from grpo_mega.planner.pipeline_schedule import peak_of_schedule
from grpo_mega.planner.static_memory import ITEMSIZE, ModelChunk, StaticBytes, model_chunks, static_bytes
from grpo_mega.quantization.fp8_checkpoint import is_coded, scales_shape

PHASES = ("rollout", "log_probs", "train", "sync")  # and "value" where there is a critic
SCALE_BYTES = 4  # of a block of FP8 codes

_ROUTERS_AND_LATENTS = (
    ".mlp.gate.weight",
    ".block_sparse_moe.gate.weight",
    ".router.weight",
    "_a_proj.weight",
    "_a_proj_with_mqa.weight",
)


@dataclass(frozen=True)
class Workload:
    """Of one step and one update, in rollouts of full length and of the assumed mean length."""

    rollouts: int
    updates: int
    longest: int
    """Tokens of the longest rollout of a training batch."""
    mean: float
    row_tokens: int
    num_microbatches: int
    """Of one update on one data-parallel rank, at worst."""


@dataclass(frozen=True)
class RankMemory:
    """Every rank of one pipeline rank: phase -> item -> bytes."""

    pp_rank: int
    static: StaticBytes
    activations: float
    phases: dict[str, dict[str, float]]

    def peak(self, phase: str) -> float:
        """Bytes of all items."""
        return sum(self.phases[phase].values())


@dataclass(frozen=True)
class MemoryPlan:
    """Of the whole job."""

    ranks: list[RankMemory]
    engine_weights: float
    kv_cache: float
    kv_bytes_per_token: float
    host: dict[str, float]
    """Of one node, item by item."""
    checkpoint: float

    @property
    def phases(self) -> list[str]:
        """Their names."""
        return list(self.ranks[0].phases)

    def fullest(self, phase: str) -> RankMemory:
        """The pipeline rank with the most bytes."""
        return max(self.ranks, key=lambda rank: rank.peak(phase))


def workload_of(config: Config, topology: Topology, mean_length: float) -> Workload:
    """Rows are as long as they may be, microbatches as many as full-length rollouts need."""
    parallel, train = config.parallel, config.train
    rollouts = config.data.prompts_per_step * config.sampling.group_size
    longest = config.longest_training_rollout
    per_row = max(1, train.max_tokens_per_microbatch // longest)
    per_update = math.ceil(rollouts / train.minibatches_per_epoch / topology.dp)
    microbatches = math.ceil(per_update / per_row)
    if parallel.vpp > 1:
        microbatches = math.ceil(microbatches / parallel.pp) * parallel.pp
    return Workload(
        rollouts=rollouts,
        updates=train.epochs_per_rollout * train.minibatches_per_epoch,
        longest=longest,
        mean=mean_length * longest,
        row_tokens=train.max_tokens_per_microbatch,
        num_microbatches=microbatches,
    )


def plan_memory(
    config: Config,
    spec: ModelSpec,
    sizes: ModuleSizes,
    topology: Topology,
    cluster: Cluster,
    *,
    total_parameters: int,
    where: str,
) -> MemoryPlan:
    """The bytes of every phase.

    Raises:
        UserError: the layers cannot be split so.
    """
    work = workload_of(config, topology, cluster.assumptions.mean_length)
    acts = Activations(
        spec,
        config,
        cluster.gpu.kernels,
        row_tokens=work.row_tokens,
        longest=work.longest,
        imbalance=cluster.assumptions.routing_imbalance,
    )
    itemsize = ITEMSIZE[config.precision.dtype]
    spread, coded = config.engine.ep > 1, config.engine.fp8 is not None
    engine = engine_weight_bytes(spec, topology, itemsize, spread=spread, fp8=coded)
    per_token = kv_bytes_per_token(spec, config.engine.tp, itemsize)
    cache = _kv_cache(config, spec, cluster, engine)
    ranks = []
    for pp_rank, chunks in enumerate(model_chunks(spec, config, where)):
        static = static_bytes(chunks, sizes, spec, config, topology)
        kept = activation_bytes(acts, chunks, config.parallel.pp, pp_rank, work.num_microbatches)
        phases = _phases(config, spec, topology, cluster, acts, chunks, static, kept, engine, cache)
        ranks.append(RankMemory(pp_rank, static, kept, phases))
    state = itemsize + 8 + (4 if itemsize < 4 else 0)
    reference = itemsize if config.algorithm.ref_update_every else 0
    return MemoryPlan(
        ranks=ranks,
        engine_weights=engine,
        kv_cache=cache,
        kv_bytes_per_token=per_token,
        host=_host(config, ranks, topology, cluster),
        checkpoint=float(total_parameters * (state * (2 if config.algorithm.needs_critic else 1) + reference)),
    )


def activation_bytes(
    acts: Activations, chunks: list[ModelChunk], pp: int, pp_rank: int, num_microbatches: int
) -> float:
    """What autograd keeps at most on one rank: of every microbatch in flight, and what is computed again beside it."""
    kept, beside = zip(*(acts.chunk(chunk) for chunk in chunks), strict=True)
    peak, _ = peak_of_schedule(kept, pp, pp_rank, num_microbatches)
    return peak + float(max(beside))


def engine_weight_bytes(
    spec: ModelSpec, topology: Topology, itemsize: int, *, spread: bool, fp8: bool = False
) -> float:
    """Of one rank of an engine: experts are divided over all its ranks, other matrices cut over tp, norms, routers and
    latent projections are not, and key heads fewer than ranks are repeated. `spread`: experts are whole. `fp8`: a byte
    for each element of its matrices, and their scales."""
    sizes, tp = _engine_sizes(spec, itemsize, fp8), topology.engine_tp
    shared: float = sizes.shared
    # where experts are spread and copies of several ranks share them, a rank has its own part of the tokens, and models
    # with latent attention send it through the whole of the shared experts (models/deepseek_v2.py of vLLM)
    if spec.mla is None or topology.engine_dp == 1 or not spread:
        shared /= tp
    dense = sizes.cut / tp + sizes.repeated + sizes.keys / min(tp, spec.num_kv_heads)
    return dense + shared + sizes.experts / topology.engine_size


@dataclass
class _EngineSizes:
    """Bytes of experts, of the shared ones, cut over tp, on every rank, and cut over key heads."""

    experts: int = 0
    shared: int = 0
    cut: int = 0
    repeated: int = 0
    keys: int = 0


@functools.lru_cache(maxsize=16)
def _engine_sizes(spec: ModelSpec, itemsize: int, fp8: bool) -> _EngineSizes:
    found = _EngineSizes()
    for name, shape in hf_shapes(spec).items():
        plain = size = itemsize * math.prod(shape)
        if fp8 and is_coded(name, shape):
            size = math.prod(shape) + SCALE_BYTES * math.prod(scales_shape(shape))
        if ".experts." in name:
            found.experts += size
        elif ".shared_expert" in name:
            found.shared += size
        elif len(shape) == 1 or name.endswith(_ROUTERS_AND_LATENTS):
            found.repeated += size
        elif spec.mla is None and name.endswith((".k_proj.weight", ".v_proj.weight")):
            found.keys += size
        else:  # the last projection of latent attention is kept beside its absorbed form
            found.cut += size + (plain if name.endswith(".kv_b_proj.weight") else 0)
    return found


def _kv_cache(config: Config, spec: ModelSpec, cluster: Cluster, engine: float) -> float:
    """Return the bytes of the KV cache on one rank of an engine.

    Raises:
        UserError: `engine.kv_cache_tokens` does not hold one rollout of full length.
    """
    if config.engine.kv_cache_tokens is not None or cluster.gpu.kernels == "local":
        itemsize = ITEMSIZE[config.precision.dtype]
        return KvCacheSize.from_config(config).num_bytes(spec, config.engine.tp, itemsize)
    assumed = cluster.assumptions
    return max(0.0, assumed.engine_share * cluster.gpu.memory - engine - assumed.engine_workspace)


def _phases(
    config: Config,
    spec: ModelSpec,
    topology: Topology,
    cluster: Cluster,
    acts: Activations,
    chunks: list[ModelChunk],
    static: StaticBytes,
    kept: float,
    engine: float,
    cache: float,
) -> dict[str, dict[str, float]]:
    assumed = cluster.assumptions
    has_head = any(chunk.has_head for chunk in chunks)
    logits = acts.logits() if has_head else 0.0
    messages = 2 * acts.message * topology.pp if topology.pp > 1 else 0.0
    passing = max(acts.passing(chunk) for chunk in chunks) + messages
    state = {"weights": static.weights, "gradients": static.gradients, "optimizer": static.optimizer}
    left = {"policy offloaded": assumed.policy_residue}
    if static.fp8_copies:
        state["FP8 copies"] = static.fp8_copies
        if config.precision.fp8 is not None and config.precision.fp8.params:  # parts of the weights' own tensors
            left["FP8 copies"] = static.fp8_copies
    widest = max((acts.layer(*layer).kept for chunk in chunks for layer in set(chunk.layers)), default=0.0)
    on_engine = {"engine workspace": assumed.engine_workspace + _engine_logits(config, spec)}
    engine_residue = {"engine asleep": assumed.engine_residue}
    buckets = {"sync buckets": 2.0 * config.weight_sync.bucket_bytes}
    served = topology.engine_servers > 0
    if served:
        engine_residue = {}
    copies = topology.dp * topology.cp
    # a rank's part of the reference, on the device before it is gathered; a whole one is copied into its place
    reference = static.weights / copies if config.algorithm.needs_reference and copies > 1 else 0.0
    phases: dict[str, dict[str, float]] = {
        "rollout": {
            "engine weights": engine,
            "KV cache": cache,
            **on_engine,
            **left,
        },
        "log_probs": {**state, "activations": widest, "logits": logits, "communication": passing + reference}
        | engine_residue,
        "train": {**state, "activations": kept, "logits": logits, "communication": passing} | engine_residue,
        "sync": {
            "weights": static.weights,
            "engine weights": engine,
            **buckets,
        },
    }
    if served:  # the policy stays where it is; `server` is a device of an engine server, where nothing ever sleeps
        phases["server"] = {"engine weights": engine, "KV cache": cache, **on_engine, **buckets}
        phases["rollout"] = dict(state)
        phases["sync"] = {**state, **buckets}
    if config.algorithm.needs_critic:  # the policy's modules with a head of one row, which is counted as the policy's
        phases["value"] = {name: size for name, size in phases["train"].items() if name != "logits"}
        phases["value"] |= left
        if cluster.gpu.kernels == "local":  # one memory: neither leaves it
            for items in phases.values():
                items["critic"] = sum(state.values())
    nccl = assumed.context_bytes + assumed.nccl_bytes_per_group * num_groups(topology)
    for items in phases.values():
        used = sum(items.values())
        items["CUDA and NCCL"] = nccl
        items["allocator"] = assumed.allocator_share * used
    return phases


def num_groups(topology: Topology) -> int:
    """Communicators of more than one rank in which a rank takes part: the axes, their products, the engine's, all."""
    axes = (topology.tp, topology.cp, topology.dp, topology.pp, topology.ep, topology.etp, topology.edp)
    products = (topology.tp * topology.pp, topology.dp * topology.cp, topology.world_size)
    engine = (topology.engine_tp, topology.engine_dp, topology.engine_ranks if topology.engine_dp > 1 else 1)
    if topology.engine_servers:
        engine = (1, 1, 1)
    return sum(size > 1 for size in (*axes, *products, *engine))


def _engine_logits(config: Config, spec: ModelSpec) -> float:
    """Float32 logits and probabilities of one decode step, and hidden states of one prefill step."""
    hidden = 6.0 * KvCacheSize.from_config(config).batched_tokens * spec.hidden_size * 2
    return 8.0 * config.engine.max_num_seqs * spec.vocab_size + hidden


def _host(config: Config, ranks: list[RankMemory], topology: Topology, cluster: Cluster) -> dict[str, float]:
    """Of the fullest node: pinned copies of what leaves the device, the host's optimizer with its gradients, the
    reference, and the processes. Without CUDA nothing leaves: there is one memory; nor where engines are elsewhere."""
    per_node = min(cluster.gpu.per_node, topology.world_size)
    fullest = max(ranks, key=lambda rank: rank.static.weights)
    static = fullest.static
    leaves = cluster.gpu.kernels != "local" and (not topology.engine_servers or config.algorithm.needs_critic)
    reference = static.weights / (topology.dp * topology.cp) if config.algorithm.needs_reference else 0.0
    learners = 2 if config.algorithm.needs_critic else 1
    # 12 bytes of state and 4 of gradient for each parameter that is updated here
    updated = static.optimizer_on_host * 4 / 3
    items = {
        "processes": cluster.assumptions.process_host_bytes,
        "offloaded weights": learners * static.weights if leaves else 0.0,
        "offloaded optimizer": learners * static.optimizer if leaves else 0.0,
        "optimizer on the host": learners * updated,
        "reference": 2 * reference,
    }
    return {name: per_node * size for name, size in items.items()}
