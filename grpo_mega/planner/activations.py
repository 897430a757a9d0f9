"""Activation memory of one microbatch on one rank, layer by layer.

Two sets of formulas. `local` is for the modules of a machine without CUDA; they are measured tensor by tensor, and
tests/parallel/test_planner.py checks them within 10%. `te` is for the fused modules of Transformer Engine; they come
from reading its code.

Letters in the formulas, on one rank:
    t: tokens of the row              s: tokens of the row where sequence parallelism divides it
    h: hidden size                    f: feed-forward size
    n: query heads                    m: KV heads                   d: head size
    b: bytes of an element            i: bytes of an element that a matrix product reads (1 in FP8)
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.models.placement_rules import padded_vocab
from grpo_mega.models.recompute import recomputed_modules
from grpo_mega.planner.attention_activations import AttentionActivations
from grpo_mega.planner.feed_forward_activations import FeedForwardActivations
from grpo_mega.planner.fp8 import INPUT_BYTES
from grpo_mega.planner.inputs import PlanInputs
from grpo_mega.planner.row_shape import PackedRowShape
from grpo_mega.planner.static_memory import ModelChunk

LOGITS_SLICE_BYTES = 128 * 2**20
"""Largest slice of logits that is computed at once (parallel/vocab_parallel.py)."""


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer for one microbatch."""

    kept: float
    """From the layer's forward pass until its backward pass."""
    recomputed: float
    """Recomputed in the backward pass, and held while it lasts."""
    transient: float
    """Buffers that exist only while the layer is computed."""


class Activations:
    """Activation memory of one microbatch for the layers, the final norm, the loss and the logits."""

    def __init__(self, inputs: PlanInputs) -> None:
        self._spec, self._parallel = inputs.spec, inputs.config.parallel
        self._row = PackedRowShape.from_inputs(inputs)
        self._attention = AttentionActivations(self._row, self._spec, self._parallel)
        imbalance = inputs.assumptions.routing_imbalance
        self._feed_forward = FeedForwardActivations(
            self._row, self._spec, self._parallel, imbalance, aux_loss=inputs.config.algorithm.aux_loss_coef > 0
        )
        self._layers: dict[tuple[bool, bool], LayerActivations] = {}

    @property
    def message(self) -> float:
        """Bytes of the hidden states that one layer, or one pipeline stage, sends to the next: s h b."""
        return self._row.hidden_states

    def chunk(self, chunk: ModelChunk) -> tuple[float, float]:
        """Return (bytes that all of a chunk keeps of one microbatch, most bytes held beside them by recomputation)."""
        layers = [self.layer(is_moe, in_fp8) for is_moe, in_fp8 in chunk.layers]
        kept = sum(layer.kept for layer in layers)
        recomputed = max((layer.recomputed for layer in layers), default=0.0)
        if chunk.has_head:  # what follows the last layer is freed before a layer is recomputed
            after_layers = self.after_layers()
            kept, recomputed = kept + after_layers, max(0.0, recomputed - after_layers)
        return kept, recomputed

    def transient(self, chunk: ModelChunk) -> float:
        """Return the bytes of the buffers of the chunk's largest layer."""
        return max((self.layer(is_moe, in_fp8).transient for is_moe, in_fp8 in chunk.layers), default=0.0)

    def layer(self, is_moe: bool, in_fp8: bool) -> LayerActivations:
        """Return the bytes of one layer under `parallel.recompute`."""
        key = is_moe, in_fp8
        if key not in self._layers:
            self._layers[key] = self._compute_layer(is_moe, INPUT_BYTES if in_fp8 else self._row.itemsize)
        return self._layers[key]

    def _compute_layer(self, is_moe: bool, i: int) -> LayerActivations:
        row, attention = self._row, self._attention
        norms, inner, core = row.norms(i), attention.before_core(i), attention.core()
        if i != row.itemsize:
            core += attention.output(i)  # the core keeps its output in bf16, the output projection keeps it in FP8
        feed_forward = self._feed_forward.experts(i) if is_moe else self._feed_forward.dense(i)
        whole = norms + inner + core + feed_forward
        moe, h = self._spec.moe, self._spec.hidden_size
        routed = self._feed_forward.routed_tokens(moe) * h * row.itemsize if is_moe and moe is not None else 0.0
        gathered = row.tokens * h * row.itemsize if self._parallel.sequence_parallel else 0.0
        transient = 2 * gathered + 3 * routed + 2 * self.message
        if self._parallel.recompute == "full":
            # the norm keeps a float32 copy of its input, or else the layer's input itself
            keeps_copy = row.local and row.itemsize < 4
            return LayerActivations(self.message, whole - (0.0 if keeps_copy else self.message), transient)
        if self._parallel.recompute == "none":
            return LayerActivations(whole, 0.0, transient)
        dropped = self._dropped(is_moe, norms, inner, core, feed_forward, i)
        return LayerActivations(whole - sum(dropped), max(dropped, default=0.0), transient)

    def _dropped(
        self, is_moe: bool, norms: float, inner: float, core: float, feed_forward: float, i: int
    ) -> list[float]:
        """Return the bytes that each recomputed module does not keep."""
        modules = recomputed_modules(self._spec, self._parallel, fused_attention=not self._row.local or self._row.flash)
        attention = self._attention
        output = self._row.sequence_tokens * self._spec.hidden_size * i
        dropped = []
        if "core_attn" in modules:
            output_copy = attention.output(i) if i != self._row.itemsize else 0.0
            dropped.append(core - attention.core_inputs_and_output() - output_copy)
        if "mlp" in modules and not is_moe:
            dropped.append(feed_forward)
        if "moe" in modules and is_moe:
            dropped.append(feed_forward)
        if "layernorm" in modules:
            dropped.append(norms - 2 * output)
        if "mla_up_proj" in modules:
            dropped.append(inner - attention.latents(i))
        return [max(0.0, size) for size in dropped]

    def after_layers(self) -> float:
        """Return the bytes kept behind the last layer: final norm, input of the head, log-probs and loss."""
        row, h = self._row, self._spec.hidden_size
        norm = 8 * row.sequence_tokens * h if row.local else row.itemsize * row.sequence_tokens * h
        return norm + row.tokens * h * row.itemsize + 60 * row.row_tokens

    def logits(self) -> float:
        """Return the transient bytes of the head: slices of logits, and the head's gradient before it is added."""
        row, h = self._row, self._spec.hidden_size
        vocab_rows = padded_vocab(self._spec.vocab_size, self._parallel.tp) / self._parallel.tp
        slices = min(LOGITS_SLICE_BYTES, 8.0 * row.tokens * vocab_rows)
        product = 0.0 if row.itemsize == 4 else slices / 2
        head_gradient = vocab_rows * h * (4 + (0 if row.itemsize == 4 else row.itemsize))
        return slices + product + head_gradient + row.tokens * h * 4
