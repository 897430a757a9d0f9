"""The matrix products of an update, alone: the least time that any program needs with the same library.

They are those of models/flops.py: projections, feed-forward and head of a dense model, and the two products of
attention over the unmasked half, each once forward and twice backward. Sequences are not padded, and products with the
weights are made once per row. Asserted by tests/unit/tools/test_matrix_products.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grpo_mega.models.spec import ModelSpec

Shape = tuple[int, int, int, int]
"""B, m, k, n of B products [m, k] @ [k, n]."""


def forward_products(spec: ModelSpec, rows: Sequence[Sequence[int]]) -> dict[Shape, int]:
    """Return the number of products of each shape in the forward pass.

    Args:
        spec: a dense model.
        rows: tokens of each sequence of each packed row.
    """
    if spec.moe is not None or spec.mla is not None:
        raise ValueError("only dense models without latent attention are supported")
    found: dict[Shape, int] = {}
    heads, width, h, f = spec.num_heads, spec.head_dim, spec.hidden_size, spec.ffn_size
    for lengths in rows:
        tokens = sum(lengths)
        shapes: list[tuple[Shape, int]] = [
            ((1, tokens, h, (heads + 2 * spec.num_kv_heads) * width), spec.num_layers),
            ((1, tokens, heads * width, h), spec.num_layers),
            ((1, tokens, h, 2 * f), spec.num_layers),
            ((1, tokens, f, h), spec.num_layers),
            ((1, tokens, h, spec.vocab_size), 1),
        ]
        for length in lengths:
            seen = (length + 1) // 2  # keys that a query sees, mean
            shapes += [((heads, length, width, seen), spec.num_layers), ((heads, length, seen, width), spec.num_layers)]
        for shape, count in shapes:
            found[shape] = found.get(shape, 0) + count
    return found


def operations(products: dict[Shape, int]) -> int:
    """Return the floating-point operations of products."""
    return sum(2 * b * m * k * n * count for (b, m, k, n), count in products.items())


def cpu_seconds(products: dict[Shape, int], dtype: torch.dtype = torch.float32) -> float:
    """Make each product forward and backward, as often as counted; return the CPU seconds of this process.

    The operands of a shape are made before its time is taken.
    """
    taken = 0.0
    for shape, count in products.items():
        passes = list(_passes(shape, dtype))
        torch.bmm(*passes[0])  # the first call of a shape may choose a kernel
        start = time.process_time()
        for _ in range(count):
            for left, right in passes:
                torch.bmm(left, right)
        taken += time.process_time() - start
    return taken


def _passes(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the operands of x w, of the gradient of x, and of that of w."""
    b, m, k, n = shape
    x, w, gradient = (
        torch.ones(b, m, k, dtype=dtype),
        torch.ones(b, k, n, dtype=dtype),
        torch.ones(b, m, n, dtype=dtype),
    )
    yield x, w
    yield gradient, w.transpose(1, 2)
    yield x.transpose(1, 2), gradient
