"""What a model is, in numbers: the sizes that every family has, and the parts that only some have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FP8_BLOCK = 128  # rows and columns of a block of an FP8 weight that share a scale

RopeKind = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the positions of pre-training.

    `linear` divides all of them by `factor`; `llama3` and `yarn` only the slow ones, in between they interpolate.
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
    """yarn with latent attention: the logits are multiplied with mscale(factor, this)^2; 0: they are not."""
    attention_factor: float = 1.0
    """yarn: cosine and sine are multiplied with it."""
    truncate: bool = True
    """yarn: the bounds of the interpolated range are rounded to whole dimensions."""


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1 for a factor above 1, else 1. Source: arXiv:2309.00071, equation 22."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class ClampedGate:
    """gate = min(gate, limit), up = clamp(up, -limit, limit), out = (up + 1) gate sigmoid(alpha gate), instead of
    silu(gate) up. Source: gpt-oss, the released code."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class MoeSpec:
    """Routed experts. A router scores all experts, takes the best `top_k`, and adds up their outputs with weights.

    `normalize`: the weights of the chosen add up to 1 (before `scaling`). With `num_groups`, experts are cut into so
    many groups; only those of the `top_groups` best groups may be chosen, a group counting as the sum of its
    `group_best` best scores.
    """

    layers: tuple[bool, ...]
    """Which layers have experts; the others have a dense feed-forward."""
    num_experts: int
    top_k: int
    expert_ffn_size: int
    score: Literal["softmax", "sigmoid"]
    normalize: bool
    scaling: float = 1.0
    shared_ffn_size: int = 0
    """Of the expert that every token visits; 0: there is none."""
    num_groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    correction_bias: bool = False
    """A bias per expert is added to the scores for the choice only. It is not trained by gradient."""
    gate: ClampedGate | None = None
    """Of experts whose tensors the checkpoint stacks, input by output, gate and up alternating in the columns; they and
    the router have biases."""


@dataclass(frozen=True)
class MlaSpec:
    """Multi-head latent attention: keys and values are made of a latent vector of `kv_rank`, and one rotary key of
    `rope_dim` that all heads share. `q_rank`: queries are made of a latent vector too; None: of the hidden state.

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
    """Sizes in elements. `rope_theta` is the base of the rotary frequencies, `norm_eps` is added to the mean square.

    `head_dim` is that of keys and queries; with latent attention (`mla`) it is that of the values.
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
    """Share of each head's dimensions that is rotated."""
    rope: RopeScaling | None = None
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None
    output_bias: bool = False
    """The projection of the attention's output has a bias."""
    attention_sinks: bool = False
    """Each head has a number that takes part in the softmax over its logits and then gives no value."""
    sliding_window: int = 0
    """Tokens that a query of a `windowed` layer sees, itself included."""
    windowed: tuple[bool, ...] = ()
    """Which layers see no more than the window; () : none."""
    num_mtp_layers: int = 0
    """Multi-token-prediction layers behind the last one in the checkpoint: kept aside, neither used nor trained."""

    def is_moe_layer(self, layer: int) -> bool:
        """Has this layer routed experts?"""
        return self.moe is not None and self.moe.layers[layer]
