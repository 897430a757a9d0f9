"""A position-dependent 64-bit digest of a tensor that adds up over disjoint slices.

digest(X) = sum over elements of bits(x[r, c]) * a[r] * b[c] mod 2^64, where r numbers the rows of X (all leading
dimensions flattened), c its last dimension, and a, b are fixed pseudo-random odd numbers. The digest of a slice uses
its position in the whole tensor. The digests of shards that tile X therefore add up to digest(X), without a gather.
A single flipped bit always changes the digest, because odd factors are invertible. Any other fixed corruption has a
probability of about 2^-63 to leave it unchanged. The digest protects against errors, not against an adversary.
Asserted by tests/unit/models/test_digest.py.
"""

from __future__ import annotations

import functools
import hashlib
import os

import numpy as np
import torch
from torch import Tensor

from grpo_mega.types import TensorSlice

_MAX_THREADS = 4
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements converted to 64 bits at a time. On a CPU they stay in the cache of a core; a GPU kernel needs more work.
_ELEMENTS_AT_ONCE = {"cpu": 1 << 15}
_ELEMENTS_ELSEWHERE = 1 << 20
# Bytes are multiplied as signed numbers. A factor has eight digits of base 256. A sum over fewer than 2^17 products of
# at most 2^14 fits into the 32 bits in which processors add such products.
_DIGITS, _EXACT_ROW_BYTES, _BYTES_AT_ONCE, _FEW_ELEMENTS = 8, 1 << 17, 1 << 20, 1 << 14
_LAST_COLUMN = 1 << 18  # columns whose digits are cached: 8 bytes for each byte of an element
# A sum of products is exact in doubles while it is at most 2^53: 2^12 products of an element and a digit of a factor.
_COLUMNS_AT_ONCE, _DOUBLES_AT_ONCE, _FEW_ROWS = 1 << 12, 1 << 18, 16
_DIGIT_BITS = {1: 33, 2: 27, 4: 11}
"""Bytes of an element -> bits of a digit: |element| <= 2^8, 2^15 or 2^31, |digit| <= half of 2^bits."""


def slice_digest(values: Tensor, hf: TensorSlice) -> int:
    """Return the digest of `values` as the slice `hf`, in [-2^63, 2^63); 0 for an empty slice."""
    if not values.numel():
        return 0
    # not `contiguous()`, which would copy a slice of columns
    rows = values.detach().view(_BITS[values.element_size()]).reshape(-1, values.shape[-1])
    weights = _row_factors(hf).to(values.device)
    if _can_multiply_bytes(rows, hf.offsets[-1] + hf.shape[-1]):
        return wrap_int64(_weighted_by_bytes(rows, hf.offsets[-1], weights))
    if rows.device.type == "cpu" and rows.itemsize < 8 and rows.shape[0] >= _FEW_ROWS:
        sums = _sums_by_doubles(rows, hf.offsets[-1])
    else:
        sums = _sums_by_vectors(rows, _factors(1, hf.offsets[-1], hf.shape[-1]).to(values.device))
    return wrap_int64(int((sums * weights).sum()))


def _sums_by_doubles(rows: Tensor, first_column: int) -> Tensor:
    """Return [R] int64: the sum over c of rows[r, c] * factor of column first_column + c mod 2^64.

    A factor is a sum of few digits times powers of two. Rows times digits is a product of matrices in float64, in which
    every partial sum is an integer of at most 2^53, so it is exact in any order. Without 8-bit products in hardware
    this is twice as fast as products of 64-bit integers.
    """
    (count, width), bits = rows.shape, _DIGIT_BITS[rows.itemsize]
    sums = torch.zeros(count, dtype=torch.int64)
    columns = min(width, _COLUMNS_AT_ONCE)
    step = min(count, max(1, _DOUBLES_AT_ONCE // columns))
    block = torch.empty(step * columns, dtype=torch.float64)
    for start in range(0, width, columns):
        digits = _wide_digits(_factors(1, first_column + start, min(columns, width - start)), bits)
        shifts = bits * torch.arange(len(digits))[:, None]
        for first in range(0, count, step):
            part = rows[first : first + step, start : start + columns]
            values = block[: part.numel()].view(part.shape)
            values.copy_(part)
            sums[first : first + step] += ((digits @ values.t()).long() << shifts).sum(0)
    return sums


def _sums_by_vectors(rows: Tensor, columns: Tensor) -> Tensor:
    """Return [R] int64: the sum over c of rows[r, c] * columns[c] mod 2^64."""
    step = max(1, _ELEMENTS_AT_ONCE.get(rows.device.type, _ELEMENTS_ELSEWHERE) // rows.shape[1])
    products = columns.new_empty(min(step, rows.shape[0]), rows.shape[1])
    sums = columns.new_empty(rows.shape[0])
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        block = products[: part.shape[0]]
        torch.mul(part, columns, out=block)
        torch.sum(block, 1, out=sums[start : start + step])
    return sums


def _can_multiply_bytes(rows: Tensor, last_column: int) -> bool:
    """Return True if a product of 8-bit matrices is faster, and exact."""
    return (
        rows.device.type == "cpu"
        and rows.itemsize < 8
        and rows.shape[1] * rows.itemsize < _EXACT_ROW_BYTES
        and last_column <= _LAST_COLUMN
        and rows.numel() >= _FEW_ELEMENTS
        and _multiplies_bytes_fast()
    )


def _weighted_by_bytes(rows: Tensor, first_column: int, weights: Tensor) -> int:
    """Return the sum over r, c of rows[r, c] * columns[c] * weights[r], as a matrix product of bytes.

    An element is a sum of its bytes, and only the highest byte has a sign. An unsigned byte whose
    highest bit is flipped is, read as a signed number, the byte minus 128. So the rows are multiplied with these bits
    flipped, and 128 times the factors of the flipped bytes is added to each row.
    """
    itemsize, (count, width) = rows.itemsize, rows.shape
    digits = _digits(_table_size(first_column, width), itemsize)[
        first_column * itemsize : (first_column + width) * itemsize
    ]
    words = _as_words(rows)
    flip = torch.frombuffer(bytearray(_sign_bits(itemsize) * (words.itemsize // itemsize)), dtype=words.dtype)
    step = max(1, _BYTES_AT_ONCE // (width * itemsize))
    block = words.new_empty(min(step, count), words.shape[1])
    sums = torch.empty(count, _DIGITS, dtype=torch.int32)
    for start in range(0, count, step):
        part = words[start : start + step]
        flipped = block[: part.shape[0]]
        torch.bitwise_xor(part, flip, out=flipped)
        sums[start : start + step] = torch._int_mm(flipped.view(torch.int8), digits)
    by_digit: list[int] = (sums.long() * weights[:, None]).sum(0).tolist()
    added = 128 * sum(1 << (8 * i) for i, byte in enumerate(_sign_bits(itemsize)) if byte)
    factors = int(_factors(1, first_column, width).sum()) * int(weights.sum())
    return sum(number << (8 * i) for i, number in enumerate(by_digit)) + added * factors


def _sign_bits(itemsize: int) -> bytes:
    """Return 0x80 for each unsigned byte of an element, the lowest byte first."""
    return b"\x80" * (itemsize - 1) + (b"\x00" if itemsize > 1 else b"\x80")


def _as_words(rows: Tensor) -> Tensor:
    """Return the rows as 64-bit words if their memory allows it; flipping them is four times as fast as 16 bits."""
    places = rows.shape[1], rows.storage_offset(), rows.stride(0)
    whole = rows.stride(1) == 1 and all(place * rows.itemsize % 8 == 0 for place in places)
    return rows.view(torch.int64) if whole else rows


def digest_threads() -> int:
    """Return how many threads compute digests of tensors in host memory: more than there are cores take longer."""
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)))


def digest_text(digest: int) -> str:
    """Return sixteen hexadecimal digits for `digests.json`; some JSON readers lose digits of numbers above 2^53."""
    return f"{digest % (1 << 64):016x}"


def wrap_int64(number: int) -> int:
    """Return the number modulo 2^64 in the range of int64; digests add modulo 2^64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def combined_digest(digests: dict[str, int]) -> str:
    """Return one hexadecimal word for a whole model, independent of the order of its tensors."""
    text = "\n".join(f"{name} {value}" for name, value in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _row_factors(hf: TensorSlice) -> Tensor:
    if len(hf.shape) == 1:
        return _factors(2, 0, 1)
    if len(hf.shape) == 2:
        return _factors(2, hf.offsets[0], hf.shape[0])
    # a stacked tensor multiplies with the factors of its leading dimension too
    head = _row_factors(TensorSlice(hf.name, hf.offsets[1:], hf.shape[1:]))
    return torch.outer(_factors(len(hf.shape), hf.offsets[0], hf.shape[0]), head).flatten()


def _factors(stream: int, start: int, count: int) -> Tensor:
    return _table(stream, _table_size(start, count))[start : start + count]


def _table_size(start: int, count: int) -> int:
    return 1 << max(10, (start + count - 1).bit_length())


@functools.lru_cache(maxsize=16)
def _table(stream: int, size: int) -> Tensor:
    """Return odd pseudo-random factors from the SplitMix64 generator (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        z = (np.arange(size, dtype=np.uint64) + np.uint64(stream << 40)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(z.view(np.int64))


@functools.lru_cache(maxsize=16)
def _digits(size: int, itemsize: int) -> Tensor:
    """Return [size * itemsize, 8] int8: the digits in [-128, 128) of the factor of each byte of each column.

    The lowest digit is first.
    """
    rest = (_table(1, size)[:, None] << (8 * torch.arange(itemsize))).flatten()
    digits = torch.empty(len(rest), _DIGITS, dtype=torch.int8)
    for i in range(_DIGITS):
        digits[:, i] = rest
        rest = (rest - digits[:, i]) >> 8  # the carry out of the highest digit is a multiple of 2^64
    return digits


def _wide_digits(factors: Tensor, bits: int) -> Tensor:
    """Return [digits, C] float64: the digits of base 2^bits of each factor, the lowest first, at most half the base."""
    half, rest, digits = 1 << (bits - 1), factors, []
    for _ in range(-(-64 // bits)):
        digit = ((rest + half) & (2 * half - 1)) - half
        digits.append(digit)
        rest = (rest - digit) >> bits  # the carry out of the highest digit is a multiple of 2^64
    return torch.stack(digits).double()


@functools.lru_cache(maxsize=1)
def _multiplies_bytes_fast() -> bool:
    """Return True if this processor has instructions for 8-bit products, and adds them exactly.

    Without them torch computes such a product one element at a time, at a tenth of the speed of doubles.
    """
    return torch.cpu._is_vnni_supported() and _adds_bytes_exactly()


@functools.lru_cache(maxsize=1)
def _adds_bytes_exactly() -> bool:
    """Return True if this processor adds products of bytes without overflow.

    Processors without VNNI or AMX add pairs of products in 16 bits, which overflow.
    """
    ends = torch.tensor([-128, 127], dtype=torch.int8)
    rows, factors = ends.repeat_interleave(4096).view(2, 4096), ends.repeat(4096, _DIGITS // 2)
    factors[2048:] = 127  # products of both signs, and of one sign only
    return torch.equal(torch._int_mm(rows, factors).long(), rows.long() @ factors.long())
