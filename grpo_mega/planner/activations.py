"""Bytes that autograd keeps of one microbatch on one rank, part by part, and what computing them takes in passing.

Two tables of what modules save: `local`, the modules of a machine without CUDA, measured tensor by tensor
(tests/parallel/test_planner.py holds it within 10%); `te`, Transformer Engine's fused modules, from reading them.
Letters: t tokens of the row on this rank, s of them where sequence parallelism cuts a row, h hidden size, b bytes of
an element and i of one that a product reads (one in FP8), n and m heads of queries and of keys on this rank, d their
size, f feed-forward size on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.config.schema import Config
from grpo_mega.models.placement_rules import padded_vocab
from grpo_mega.models.spec import MlaSpec, ModelSpec, MoeSpec
from grpo_mega.planner.fp8 import INPUT_BYTES
from grpo_mega.planner.hardware import Kernels
from grpo_mega.planner.static_memory import ITEMSIZE, ModelChunk

SLICE_BYTES = 128 * 2**20  # of logits (parallel/vocab_parallel.py)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer. `kept`: between forward and backward pass; `again`: of what is computed again, held while
    that lasts; `passing`: buffers of the computation itself."""

    kept: float
    again: float
    passing: float


class Activations:
    """Of rows of `row_tokens` tokens, whose sequences have `longest` tokens."""

    def __init__(
        self, spec: ModelSpec, config: Config, kernels: Kernels, *, row_tokens: int, longest: int, imbalance: float
    ) -> None:
        parallel = config.parallel
        self._spec, self._parallel, self._local = spec, parallel, kernels == "local"
        self._b = ITEMSIZE[config.precision.dtype]
        self._t = row_tokens / parallel.cp
        self._s = self._t / parallel.tp if parallel.sequence_parallel else self._t
        self._longest, self._imbalance = min(longest, row_tokens), imbalance
        self._row_tokens = row_tokens
        self._layers: dict[tuple[bool, bool], LayerActivations] = {}

    @property
    def message(self) -> float:
        """Of a hidden state between two layers or stages."""
        return self._s * self._spec.hidden_size * self._b

    def chunk(self, chunk: ModelChunk) -> tuple[float, float]:
        """Kept of one microbatch by all of a chunk, and held beside it at worst while it is computed."""
        layers = [self.layer(is_moe, in_fp8) for is_moe, in_fp8 in chunk.layers]
        kept, beside = sum(layer.kept for layer in layers), max((x.again for x in layers), default=0.0)
        if chunk.has_head:
            tail = self.tail()
            kept, beside = kept + tail, max(0.0, beside - tail)  # the tail is gone when layers are computed again
        return kept, beside

    def passing(self, chunk: ModelChunk) -> float:
        """Buffers of the widest layer."""
        return max((self.layer(is_moe, in_fp8).passing for is_moe, in_fp8 in chunk.layers), default=0.0)

    def layer(self, is_moe: bool, in_fp8: bool) -> LayerActivations:
        """One layer, under the config's recomputation."""
        key = is_moe, in_fp8
        if key not in self._layers:
            self._layers[key] = self._layer(is_moe, INPUT_BYTES if in_fp8 else self._b)
        return self._layers[key]

    def _layer(self, is_moe: bool, i: int) -> LayerActivations:
        norms, inner, core = self._norms(i), self._attention_inputs(i), self._core_attention()
        if i != self._b:
            core += self._projected(i)  # the core keeps its output in bf16, the projection behind it in FP8
        feed = self._experts(i) if is_moe else self._mlp(self._spec.ffn_size / self._parallel.tp, i)
        whole = norms + inner + core + feed
        moe = self._spec.moe
        routed = self._routed(moe) * self._spec.hidden_size * self._b if is_moe and moe is not None else 0.0
        gathered = self._t * self._spec.hidden_size * self._b if self._parallel.sequence_parallel else 0.0
        passing = 2 * gathered + 3 * routed + 2 * self.message
        if self._parallel.recompute == "full":
            copied = (
                self._local and self._b < 4
            )  # the norm's float32 copy; else the norm keeps the layer's input itself
            return LayerActivations(self.message, whole - (0.0 if copied else self.message), passing)
        if self._parallel.recompute == "none":
            return LayerActivations(whole, 0.0, passing)
        dropped = self._dropped(is_moe, norms, inner, core, feed, i)
        return LayerActivations(whole - sum(dropped), max(dropped, default=0.0), passing)

    def _dropped(self, is_moe: bool, norms: float, inner: float, core: float, feed: float, i: int) -> list[float]:
        """What each recomputed module does not keep."""
        modules = self._parallel.recompute_modules or ("core_attn",)
        output = self._s * self._spec.hidden_size * i
        found = []
        if "core_attn" in modules:
            found.append(core - self._core_inputs_and_output() - (self._projected(i) if i != self._b else 0.0))
        if "mlp" in modules and not is_moe:
            found.append(feed)
        if "moe" in modules and is_moe:
            found.append(feed)
        if "layernorm" in modules:
            found.append(norms - 2 * output)
        if "mla_up_proj" in modules:
            found.append(inner - self._latents(i))
        return [max(0.0, size) for size in found]

    def _norms(self, i: int) -> float:
        """Two norms of hidden states. Both: input and output; local: input and normalised input in float32."""
        per_element = 8 + self._b if self._local else self._b + i
        return 2 * self._s * self._spec.hidden_size * per_element + 8 * self._s

    def _heads(self) -> tuple[float, float]:
        return self._spec.num_heads / self._parallel.tp, self._spec.num_kv_heads / self._parallel.tp

    def _projected(self, i: int) -> float:
        """What the projection behind the core keeps of its input."""
        size = self._spec.head_dim if self._spec.mla is None else self._spec.mla.v_dim
        return self._t * self._heads()[0] * size * i

    def _attention_inputs(self, i: int) -> float:
        """From the normed hidden state to rotated queries, keys and values, without these."""
        if self._spec.mla is not None:
            return self._latents(i) + self._up_projections(self._spec.mla)
        (n, m), d, b, t = self._heads(), self._spec.head_dim, self._b, self._t
        if not self._local:
            return t * (n + 2 * m) * d * b
        rotary = 4 * t * d * self._spec.rotary_fraction * b
        if not self._spec.qk_norm:
            return rotary
        if b == 4:  # a query is copied out of the projection, which keys and values keep alive
            return rotary + t * d * (8 * n + 4 * m + 4 * (n + 2 * m)) + 4 * t * (n + m)
        return rotary + 8 * t * d * (n + m) + 4 * t * (n + m)

    def _latents(self, i: int) -> float:
        """Latent vectors and their norms."""
        mla = self._spec.mla
        if mla is None:
            return 0.0
        q, kv, rope, b = mla.q_rank or 0, mla.kv_rank, mla.rope_dim, self._b
        if self._local:
            return self._t * (q * (8 + b) + (kv + rope) * 4 + kv * (4 + b) + 4 * rope * b)
        return self._s * ((b + i) * (q + kv) + b * rope)

    def _up_projections(self, mla: MlaSpec) -> float:
        """Keys and values of a head lie side by side; values are used where they lie."""
        n = self._heads()[0]
        return 0.0 if self._local else self._t * n * mla.nope_dim * self._b

    def _core_attention(self) -> float:
        """Rotated queries, keys, values, the output, and what the kernel keeps."""
        (n, m), b, t = self._heads(), self._b, self._t
        if self._spec.mla is not None:
            qk, v = self._spec.mla.nope_dim + self._spec.mla.rope_dim, self._spec.mla.v_dim
            if self._local:  # torch's kernel for unequal sizes computes in float32 and keeps the probabilities
                return 4 * t * n * (2 * qk + v + self._longest) + 2 * t * n * v * b
            return t * n * b * (2 * qk + 2 * v) + 4 * t * n
        d = self._spec.head_dim
        if not self._local:
            return t * d * b * (2 * n + 2 * m) + 4 * t * n
        if self._parallel.cp > 1:
            projection = 0 if self._spec.qk_norm and b == 4 else n + 2 * m
            return t * d * b * (2 * n + m + projection)
        return t * d * b * (4 * n + 2 * m) + 4 * t * n

    def _core_inputs_and_output(self) -> float:
        """What is left of core attention that is computed again."""
        (n, m), b, t = self._heads(), self._b, self._t
        if self._spec.mla is not None:
            qk, v = self._spec.mla.nope_dim + self._spec.mla.rope_dim, self._spec.mla.v_dim
            return t * n * b * (2 * qk + 2 * v)
        d = self._spec.head_dim
        if self._local and not (self._spec.qk_norm and b == 4):
            return t * d * b * (2 * n + m + n + 2 * m)  # a value is a view of the whole projection
        return t * d * b * (2 * n + m + (0 if self._local else m))

    def _mlp(self, f: float, i: int) -> float:
        """[gate; up], silu(gate), up, product: Megatron's unfused gated unit."""
        return f * self._t * (4 * self._b + i)

    def _routed(self, moe: MoeSpec) -> float:
        """Tokens that this rank's experts see."""
        return self._s * moe.top_k * self._parallel.etp * self._imbalance

    def _experts(self, i: int) -> float:
        """Routed experts, the shared one and the router."""
        moe, b = self._spec.moe, self._b
        assert moe is not None, "a layer of experts without experts"
        routed = self._routed(moe)
        kept = self._spec.hidden_size * i + (5 * b + i) * moe.expert_ffn_size / self._parallel.etp
        router = self._s * (12 * moe.num_experts + 40 * moe.top_k)
        shared = self._mlp(moe.shared_ffn_size / self._parallel.tp, i)
        return routed * (kept + 8) + router + shared

    def tail(self) -> float:
        """Behind the last layer: final norm, the hidden states that the head reads, log-probs and loss."""
        h, b = self._spec.hidden_size, self._b
        norm = 8 * self._s * h if self._local else b * self._s * h
        return norm + self._t * h * b + 60 * self._row_tokens

    def logits(self) -> float:
        """In passing: slices of logits, forward or backward, and the gradient of the head before it is added."""
        rows = padded_vocab(self._spec.vocab_size, self._parallel.tp) / self._parallel.tp
        slices = min(SLICE_BYTES, 8.0 * self._t * rows)
        product = 0.0 if self._b == 4 else slices / 2
        head = rows * self._spec.hidden_size
        return slices + product + head * (4 + (0 if self._b == 4 else self._b)) + self._t * self._spec.hidden_size * 4
