"""A position-dependent 64-bit digest of a tensor that adds up over disjoint slices.

digest(X) = sum over elements of bits(x[r, c]) * a[r] * b[c] mod 2^64, where r numbers the rows of X (all leading
dimensions flattened), c its last dimension, and a, b are fixed pseudo-random odd numbers. The digest of a slice uses
the positions it has in the whole tensor, so the digests of shards that tile X add up to digest(X): nothing is gathered.
A single flipped bit always changes it (odd factors are invertible); any other fixed corruption goes unnoticed with a
chance of about 2^-63. It protects against errors, not against an adversary.
Asserted by tests/unit/test_digest.py.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
from torch import Tensor

from grpo_mega.types import TensorSlice

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements converted to 64 bits at a time: on a CPU they stay in a core's cache, elsewhere a kernel has enough to do.
_ELEMENTS_AT_ONCE = {"cpu": 1 << 15}
_ELEMENTS_ELSEWHERE = 1 << 20
# A CPU multiplies matrices of float64 three times as fast as vectors of int64. With factors in limbs of 22 bits and
# elements of at most 16, a sum over 2^16 columns is below 2^53: exact, in whatever order.
_LIMB_BITS, _NUM_LIMBS, _EXACT_COLUMNS, _PRODUCT_ELEMENTS = 22, 3, 1 << 16, 1 << 17


def slice_digest(values: Tensor, hf: TensorSlice) -> int:
    """Digest of `values` as the slice `hf`, in [-2^63, 2^63); 0 for an empty one."""
    if not values.numel():
        return 0
    # not made contiguous: a slice of columns would be copied whole
    rows = values.detach().view(_BITS[values.element_size()]).reshape(-1, values.shape[-1])
    columns = _factors(1, hf.offsets[-1], hf.shape[-1]).to(values.device)
    weights = _row_factors(hf).to(values.device)
    if rows.device.type == "cpu" and rows.itemsize <= 2 and rows.shape[1] <= _EXACT_COLUMNS:
        sums = _sums_by_matrices(rows, columns)
    else:
        sums = _sums_by_vectors(rows, columns)
    return wrap(int((sums * weights).sum()))


def _sums_by_vectors(rows: Tensor, columns: Tensor) -> Tensor:
    """[R] int64: sum over c of rows[r, c] * columns[c] mod 2^64."""
    step = max(1, _ELEMENTS_AT_ONCE.get(rows.device.type, _ELEMENTS_ELSEWHERE) // rows.shape[1])
    products = columns.new_empty(min(step, rows.shape[0]), rows.shape[1])
    sums = columns.new_empty(rows.shape[0])
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        block = products[: part.shape[0]]
        torch.mul(part, columns, out=block)
        torch.sum(block, 1, out=sums[start : start + step])
    return sums


def _sums_by_matrices(rows: Tensor, columns: Tensor) -> Tensor:
    """The same for elements of at most 16 bits."""
    shifts = torch.arange(_NUM_LIMBS) * _LIMB_BITS
    mask = (1 << _LIMB_BITS) - 1
    last = (1 << (64 - (_NUM_LIMBS - 1) * _LIMB_BITS)) - 1  # a shift of a negative number fills with ones
    masks = torch.tensor([mask] * (_NUM_LIMBS - 1) + [last])
    limbs = ((columns >> shifts[:, None]) & masks[:, None]).double()
    step = max(1, _PRODUCT_ELEMENTS // rows.shape[1])
    block = limbs.new_empty(min(step, rows.shape[0]), rows.shape[1])
    sums = limbs.new_empty(_NUM_LIMBS, rows.shape[0])
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        values = block[: part.shape[0]]
        values.copy_(part)
        sums[:, start : start + step] = torch.mm(limbs, values.T)  # values @ limbs takes twice as long
    return (sums.long() << shifts[:, None]).sum(0)


def digest_text(digest: int) -> str:
    """Sixteen hexadecimal digits for `digests.json`: not every reader of JSON keeps a number beyond 2^53."""
    return f"{digest % (1 << 64):016x}"


def wrap(number: int) -> int:
    """Into the range of int64: digests add modulo 2^64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def combined_digest(digests: dict[str, int]) -> str:
    """One hexadecimal word for a whole model, independent of the order of its tensors."""
    text = "\n".join(f"{name} {value}" for name, value in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _row_factors(hf: TensorSlice) -> Tensor:
    if len(hf.shape) == 1:
        return _factors(2, 0, 1)
    if len(hf.shape) == 2:
        return _factors(2, hf.offsets[0], hf.shape[0])
    # stacked tensors: a leading dimension multiplies its own factors in
    head = _row_factors(TensorSlice(hf.name, hf.offsets[1:], hf.shape[1:]))
    return torch.outer(_factors(len(hf.shape), hf.offsets[0], hf.shape[0]), head).flatten()


def _factors(stream: int, start: int, count: int) -> Tensor:
    size = 1 << max(10, (start + count - 1).bit_length())
    return _table(stream, size)[start : start + count]


@functools.lru_cache(maxsize=16)
def _table(stream: int, size: int) -> Tensor:
    """Odd pseudo-random factors by the SplitMix64 generator (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        z = (np.arange(size, dtype=np.uint64) + np.uint64(stream << 40)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(z.view(np.int64))
