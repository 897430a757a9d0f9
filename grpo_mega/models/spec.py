"""The sizes of a model: those that every family has, and the parts that only some families have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FP8_BLOCK = 128
"""Rows and columns of a block of an FP8 weight; one block has one scale."""

RopeKind = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies beyond the positions of pre-training.

    `linear` divides all frequencies by `factor`. `llama3` and `yarn` divide only the low ones and interpolate between.
    Source: Llama 3.1 (arXiv:2407.21783, the released code); YaRN, arXiv:2309.00071, section 3.2 and 3.4.
    """

    kind: RopeKind
    factor: float
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale_all_dim: float = 0.0
    """For yarn with latent attention: the logits are multiplied by mscale(factor, this)^2; 0 means they are not."""
    attention_factor: float = 1.0
    """For yarn: factor of cosine and sine."""
    truncate: bool = True
    """For yarn: round the bounds of the interpolated range to whole dimensions."""


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return 0.1 mscale ln(factor) + 1 for a factor above 1, else 1. Source: arXiv:2309.00071, equation 22."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class ClampedGate:
    """The gated unit of gpt-oss, in place of silu(gate) up.

    gate = min(gate, limit), up = clamp(up, -limit, limit), out = (up + 1) gate sigmoid(alpha gate).
    Source: gpt-oss, the released code.
    """

    alpha: float
    limit: float


@dataclass(frozen=True)
class MoeSpec:
    """Routed experts: a router scores all experts, chooses the best `top_k`, and adds their outputs with weights.

    With `normalize` the weights of the chosen experts add up to 1, before `scaling`. With `num_groups` > 1 the experts
    form groups, and only experts of the `top_groups` best groups can be chosen. The score of a group is the sum of its
    `group_best` best scores.
    """

    layers: tuple[bool, ...]
    """For each layer, True if it has experts; the other layers have a dense feed-forward."""
    num_experts: int
    top_k: int
    expert_ffn_size: int
    score: Literal["softmax", "sigmoid"]
    normalize: bool
    scaling: float = 1.0
    shared_ffn_size: int = 0
    """Feed-forward size of the shared expert, which computes every token; 0 means none."""
    num_groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    correction_bias: bool = False
    """A bias per expert is added to the scores for the choice of experts only; no gradient trains it."""
    gate: ClampedGate | None = None
    """The gate of experts that the checkpoint stacks in one tensor: [experts, input, output], with gate and up
    alternating in the columns. These experts and their router have biases."""


@dataclass(frozen=True)
class MlaSpec:
    """Multi-head latent attention: keys and values are projections of one latent vector of size `kv_rank`.

    All heads share one rotary key of size `rope_dim`. Queries are projections of a latent vector of size `q_rank`, or
    of the hidden state if `q_rank` is None.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    latent_norm_eps: float


@dataclass(frozen=True)
class ModelSpec:
    """A model in numbers; sizes are in elements.

    `rope_theta` is the base of the rotary frequencies. `norm_eps` is added to the mean square in norms. `head_dim` is
    the size of keys and queries; with latent attention (`mla`) it is the size of values.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rotary_fraction: float = 1.0
    """Fraction of the dimensions of each head that is rotated."""
    rope: RopeScaling | None = None
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None
    output_bias: bool = False
    """True if the output projection of the attention has a bias."""
    attention_sinks: bool = False
    """True if each head has a sink: a logit that takes part in the softmax and has no value."""
    sliding_window: int = 0
    """Tokens that a query of a `windowed` layer attends to, itself included."""
    windowed: tuple[bool, ...] = ()
    """For each layer, True if it has a sliding window; empty means none."""
    num_mtp_layers: int = 0
    """Multi-token-prediction layers after the last layer of the checkpoint; they are kept, but not used or trained."""

    def is_moe_layer(self, layer: int) -> bool:
        """Return True if this layer has routed experts."""
        return self.moe is not None and self.moe.layers[layer]
