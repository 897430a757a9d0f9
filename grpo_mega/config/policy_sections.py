"""Config sections `policy`, `parallel`, `optimizer` and `precision`: the Megatron side of the policy."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from grpo_mega.config.section import Section

RecomputeModule = Literal["core_attn", "mlp", "layernorm", "mla_up_proj", "moe"]
LearningRateShape = Literal["constant", "linear", "cosine"]


class PolicyConfig(Section):
    """Implementation of the policy."""

    modules: Literal["auto", "transformer_engine", "local"] = "auto"
    """Modules that compute the policy. `transformer_engine`: those of Transformer Engine, which need CUDA. `local`:
    Megatron's own and those of grpo_mega/policy/modules, on every device. `auto`: `transformer_engine` on CUDA where it
    is installed, otherwise `local`."""


class ParallelConfig(Section):
    """Parallel layout of the policy.

    Dense layers have dp = world_size / (tp * cp * pp) replicas, experts have edp = world_size / (etp * ep * pp).
    """

    tp: int = Field(1, ge=1)
    """Tensor-parallel ranks: each holds a shard of every matrix."""
    pp: int = Field(1, ge=1)
    """Pipeline-parallel ranks: each holds some of the layers."""
    vpp: int = Field(1, ge=1)
    """Virtual pipeline size: model chunks per pipeline rank (interleaved 1F1B schedule)."""
    cp: int = Field(1, ge=1)
    """Context-parallel ranks: each holds a part of the tokens of every row."""
    ep: int = Field(1, ge=1)
    """Expert-parallel ranks: each holds some of the experts of every layer."""
    etp: int = Field(1, ge=1)
    """Expert tensor-parallel ranks: each holds a shard of every matrix of an expert."""
    sequence_parallel: bool = False
    """Shard the activations between tensor-parallel layers over the `tp` ranks."""
    num_layers_first_stage: int | None = Field(None, ge=1)
    """Layers on the first pipeline rank. null: the same number as on the others."""
    num_layers_last_stage: int | None = Field(None, ge=1)
    """Layers on the last pipeline rank. null: the same number as on the others."""
    pipeline_layout: str | None = None
    """Content of each pipeline stage, first to last, in the syntax of Megatron's pipeline_model_parallel_layout: `E`
    embedding, `t` layer, `L` loss, as in `Et*3|(t*4|)*2t*3L`. null: even stages."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes: none, those of `recompute_modules`, or those of whole layers."""
    recompute_modules: tuple[RecomputeModule, ...] | None = Field(None, strict=False)
    """Modules whose activations `recompute: selective` recomputes. null: `[core_attn]` on CPU. On CUDA the attention
    kernel recomputes its scores itself: `[mla_up_proj]` for latent attention, nothing for other models."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients over the data-parallel ranks while the backward pass is still running. null: on with CUDA and
    several data-parallel ranks."""
    overlap_param_gather: bool | None = None
    """Gather updated parameters while the next forward pass is already running. Needs `overlap_grad_reduce`. null: on
    with CUDA and several data-parallel ranks."""
    megatron: dict[str, Any] = Field({})
    """Fields of Megatron-Core's TransformerConfig, DistributedDataParallelConfig and OptimizerConfig, by name. Names
    that several of them declare need the prefix `transformer.`, `ddp.` or `optimizer.`. Fields that other keys set, or
    that are not supported, are errors."""


class OptimizerConfig(Section):
    """Optimizer of the policy and its learning rates (docs/optimizers.md)."""

    name: Literal["adam", "muon"] = "adam"
    """`adam`: Adam with decoupled weight decay (AdamW). `muon`: Muon for the matrices of the layers, AdamW for
    embedding, output layer, norms and biases."""
    lr: float = Field(1e-6, gt=0, le=1000)
    """Learning rate after the warm-up."""
    schedule: LearningRateShape | None = None
    """Learning rate after the warm-up: `constant`, or a `linear` or `cosine` decay from `lr` to `min_lr`. null:
    `linear` if `decay_updates` is set, otherwise `constant`."""
    warmup_updates: int = Field(0, ge=0)
    """Updates over which the learning rate rises linearly to `lr`."""
    warmup_fraction: float | None = Field(None, gt=0, lt=1)
    """`warmup_updates` as a fraction of all updates of the run, rounded down. An update is a minibatch of an epoch of a
    step. null: `warmup_updates` holds."""
    decay_updates: int | None = Field(None, ge=1)
    """Update, counted from the first and warm-up included, at which the decay reaches `min_lr`; the rate stays there.
    null: the end of the run, if `schedule` is `linear` or `cosine`."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate after the decay, at most `lr`."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay rate of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Term added to the denominator of Adam."""
    muon_momentum: float | None = Field(None, ge=0, lt=1)
    """Decay rate of Muon's momentum. null: 0.95."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Number format in which Adam's moments are stored (Megatron's precision-aware optimizer). `bf16` saves 4 bytes per
    parameter; it needs CUDA, Transformer Engine and `precision.dtype=bf16`, and is not yet verified on a GPU."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay: an update also multiplies a weight by 1 - rate * weight_decay. It applies to matrices,
    embedding and output layer included, and to no norm and no bias."""
    clip_grad: float = Field(1.0, gt=0)
    """Largest L2 norm of the whole gradient, over all parameters and ranks. A larger gradient is scaled down to it;
    `train/grad_norm` is the norm before."""
    host_fraction: float = Field(0.0, ge=0, le=1)
    """Fraction of the master weights and moments that stay in host memory and are updated there (CUDA only). During the
    update each rank uses its share of the node's cores, whatever OMP_NUM_THREADS is."""

    @property
    def momentum_of_muon(self) -> float:
        """Decay rate of Muon's momentum."""
        return 0.95 if self.muon_momentum is None else self.muon_momentum

    @property
    def shape(self) -> LearningRateShape:
        """Shape of the learning rate after the warm-up: `schedule`, or the shape that follows from `decay_updates`."""
        return self.schedule or ("constant" if self.decay_updates is None else "linear")

    @property
    def depends_on_run_length(self) -> bool:
        """True if another `train.steps` changes the learning rates of the steps that both runs have."""
        decays_to_the_end = self.schedule in ("linear", "cosine") and self.decay_updates is None
        return decays_to_the_end or self.warmup_fraction is not None

    def warmup_of(self, num_updates: int) -> int:
        """Return the number of warm-up updates of a run of `num_updates` updates."""
        if self.warmup_fraction is None:
            return self.warmup_updates
        return math.floor(self.warmup_fraction * num_updates + 1e-9)  # 0.1 * 30 is 3, not 2

    def decay_end_of(self, num_updates: int) -> int:
        """Return the update at which the decay of a run of `num_updates` updates reaches `min_lr`."""
        return num_updates if self.decay_updates is None else self.decay_updates


class Fp8Config(Section):
    """FP8 matrix products of the policy, by Transformer Engine. Not yet verified on a GPU."""

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
    """Granularity and source of the scales (docs/fp8.md)."""
    format: Literal["e4m3", "hybrid"] | None = None
    """`e4m3`, or `hybrid` with gradients in e5m2. null: `hybrid` for one scale per tensor, `e4m3` for one per block."""
    params: bool = False
    """Store weights in FP8, and gather them in FP8 after an update."""
    first_layers_bf16: int = Field(0, ge=0)
    """Number of layers at the start of the model that compute in bf16."""
    last_layers_bf16: int = Field(0, ge=0)
    """Number of layers at the end of the model that compute in bf16."""
    amax_history: int | None = Field(None, ge=1)
    """Length of the amax history of the `delayed` recipe, in steps. null: 1024."""


class PrecisionConfig(Section):
    """Number formats of the policy and of the engine."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Parameters and compute of policy and engine. Master weights and main gradients are always fp32."""
    fp8: Fp8Config | None = None
    """FP8 matrix products in the policy. null: none."""
