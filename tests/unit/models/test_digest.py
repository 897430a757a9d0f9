"""The additive digest: digests of shards add up to the digest of the tensor, and corrupted data changes it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from grpo_mega.models.digest import (
    _EXACT_ROW_BYTES,
    _adds_bytes_exactly,
    _can_multiply_bytes,
    _factors,
    _multiplies_bytes_fast,
    _row_factors,
    _sums_by_doubles,
    _sums_by_vectors,
    _weighted_by_bytes,
    combined_digest,
    digest_text,
    slice_digest,
    wrap_int64,
)
from grpo_mega.types import TensorSlice

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return a tensor of random bits, which may be NaN or infinity."""
    rng = random.Random(seed)
    return torch.frombuffer(bytearray(rng.randbytes(math.prod(shape) * dtype.itemsize)), dtype=dtype).view(shape)


def whole_digest(values: Tensor) -> int:
    return slice_digest(values, TensorSlice("w", (0,) * values.dim(), tuple(values.shape)))


def random_tiling(shape: tuple[int, ...], rng: random.Random) -> Iterator[TensorSlice]:
    """Yield slices that cover `shape` once: they are split at random positions, each with probability 0.8."""
    slices = [TensorSlice("w", (0,) * len(shape), shape)]
    while slices:
        piece = slices.pop()
        dim = rng.randrange(len(shape))
        if piece.shape[dim] == 1 or rng.random() < 0.2:
            yield piece
            continue
        at = rng.randrange(1, piece.shape[dim])
        for begin, size in ((0, at), (at, piece.shape[dim] - at)):
            offsets, sizes = list(piece.offsets), list(piece.shape)
            offsets[dim], sizes[dim] = offsets[dim] + begin, size
            slices.append(TensorSlice("w", tuple(offsets), tuple(sizes)))


def plain_digest(values: Tensor, hf: TensorSlice) -> int:
    """Compute the formula element by element with Python integers."""

    def factor(stream: int, i: int) -> int:
        z = (i + (stream << 40)) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (z ^ (z >> 31)) | 1

    bits = values.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])
    total = 0
    for index in torch.cartesian_prod(*(torch.arange(n) for n in hf.shape)).view(-1, len(hf.shape)).tolist():
        *rows, column = (o + i for o, i in zip(hf.offsets, index, strict=True))
        weight = factor(1, column)
        for stream, row in enumerate(reversed(rows or [0]), start=2):
            weight *= factor(stream, row)
        total += int(bits[tuple(index)]) * weight
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offsets", [(5,), (3, 1022), (2, 7, 1)], ids=str)
def test_the_digest_equals_its_formula(dtype: torch.dtype, offsets: tuple[int, ...]) -> None:
    hf = TensorSlice("w", offsets, (4, 3, 5)[: len(offsets)])
    values = random_tensor(hf.shape, dtype)
    assert slice_digest(values, hf) == plain_digest(values, hf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(97,), (13, 29), (5, 11, 17)], ids=str)
def test_digests_of_any_tiling_add_up_to_the_whole(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = random_tensor(shape, dtype)
    whole = whole_digest(values)
    for seed in range(8):
        tiles = list(random_tiling(shape, random.Random(seed)))
        assert wrap_int64(sum(slice_digest(values[tile.index], tile) for tile in tiles)) == whole


def test_digests_of_rows_add_up_when_a_tensor_is_read_in_parts() -> None:
    values = random_tensor((3, 700_001), torch.uint8)  # a part has room for one row, but not for two
    whole = whole_digest(values)
    rows = [slice_digest(values[i : i + 1], TensorSlice("w", (i, 0), (1, 700_001))) for i in range(3)]
    assert wrap_int64(sum(rows)) == whole


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_flipped_bit_changes_the_digest(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    values = random_tensor((24, 40), dtype)
    whole, raw = whole_digest(values), values.view(torch.uint8)
    width = 8 * dtype.itemsize
    positions = rng.sample(range(values.numel() * width), 170)
    top = [width * element + width - 1 for element in (0, 3, 959)]  # sign bits
    for bit in (*positions, *top):
        byte, mask = divmod(bit, 8)[0], 1 << bit % 8
        raw.view(-1)[byte] ^= mask
        assert whole_digest(values) != whole, f"bit {bit}"
        raw.view(-1)[byte] ^= mask
    assert whole_digest(values) == whole


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_swapped_rows_columns_and_slices_change_the_digest(dim: int) -> None:
    values = random_tensor((6, 10, 8), torch.bfloat16)
    whole = whole_digest(values)
    size = values.shape[dim]
    for i in range(size):
        order = list(range(size))
        order[i], order[(i + 1) % size] = order[(i + 1) % size], order[i]
        assert whole_digest(values.index_select(dim, torch.tensor(order))) != whole
    assert whole_digest(values.roll(1, dim)) != whole


def test_equal_bytes_at_other_offsets_have_another_digest() -> None:
    values = random_tensor((4, 4), torch.float32)
    digests = {slice_digest(values, TensorSlice("w", (r, c), (4, 4))) for r in range(0, 12, 4) for c in range(0, 12, 4)}
    assert len(digests) == 9


def test_a_strided_view_has_the_digest_of_its_copy() -> None:
    values = random_tensor((9, 12), torch.float32)
    assert whole_digest(values.t()) == whole_digest(values.t().contiguous())
    assert whole_digest(values[::2, 1::3]) == whole_digest(values[::2, 1::3].clone())


def test_positive_and_negative_zeros_and_different_nans_differ() -> None:
    assert whole_digest(torch.tensor([0.0])) == 0
    assert whole_digest(torch.tensor([-0.0])) != 0
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all()
    assert whole_digest(nan[:1]) == whole_digest(torch.tensor([math.nan]))
    assert whole_digest(nan[:1]) != whole_digest(nan[1:])


def test_digests_at_large_offsets_add_up() -> None:
    values = random_tensor((2, 2), torch.float32)
    row, column = 1_000_000, 700_000
    whole = slice_digest(values, TensorSlice("w", (row, column), (2, 2)))
    cells = [
        slice_digest(values[r : r + 1, c : c + 1], TensorSlice("w", (row + r, column + c), (1, 1)))
        for r in range(2)
        for c in range(2)
    ]
    assert wrap_int64(sum(cells)) == whole
    assert whole == plain_digest(values, TensorSlice("w", (row, column), (2, 2)))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)], ids=str)
def test_an_empty_slice_adds_nothing(shape: tuple[int, ...]) -> None:
    assert whole_digest(torch.empty(shape)) == 0


def test_wrap_stays_within_64_bits() -> None:
    assert wrap_int64(2**63 - 1) == 2**63 - 1
    assert wrap_int64(2**63) == -(2**63)
    assert wrap_int64(-(2**63) - 1) == 2**63 - 1
    assert wrap_int64(3 * 2**64 + 5) == 5
    assert wrap_int64(wrap_int64(2**63 - 1) + wrap_int64(2**63 - 1)) == -2


def test_the_combined_digest_depends_only_on_names_and_values() -> None:
    one = combined_digest({"a": 1, "b": -2})
    assert one == combined_digest({"b": -2, "a": 1})
    assert len({one, combined_digest({"a": -2, "b": 1}), combined_digest({"a": 1, "b": 2}), combined_digest({})}) == 4
    assert len(one) == 16


@pytest.mark.parametrize(("digest", "text"), [(0, "0" * 16), (-1, "f" * 16), (2**63 - 1, "7" + "f" * 15)])
def test_the_text_of_a_digest_has_sixteen_digits(digest: int, text: str) -> None:
    assert digest_text(digest) == text


def vectorized_digest(rows: Tensor, hf: TensorSlice) -> int:
    columns = _factors(1, hf.offsets[1], hf.shape[1])
    return wrap_int64(int((_sums_by_vectors(rows, columns) * _row_factors(hf)).sum()))


@pytest.mark.skipif(not _adds_bytes_exactly(), reason="this processor has no exact sums of 8-bit products")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("columns", [1, 7, 1000, 4096, -1])
def test_byte_products_are_exact_for_the_largest_sums(dtype: torch.dtype, columns: int) -> None:
    if columns < 0:
        columns = _EXACT_ROW_BYTES // dtype.itemsize - 1
    ends = [torch.full((1, columns), value, dtype=dtype) for value in (torch.iinfo(dtype).min, torch.iinfo(dtype).max)]
    noise = random_tensor((5, columns * dtype.itemsize), torch.uint8).view(dtype)
    rows, hf = torch.cat([*ends, noise]), TensorSlice("w", (11, 3), (7, columns))
    assert wrap_int64(_weighted_by_bytes(rows, 3, _row_factors(hf))) == vectorized_digest(rows, hf)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize(("start", "end", "step"), [(0, 512, 1), (1, 510, 1), (8, 508, 1), (3, 512, 4)])
def test_slices_of_columns_have_the_digest_of_the_vector_sums(
    dtype: torch.dtype, start: int, end: int, step: int
) -> None:
    whole = random_tensor((300, 512 * dtype.itemsize), torch.uint8).view(dtype)
    rows = whole[1::2, start:end:step]
    hf = TensorSlice("w", (0, start), tuple(rows.shape))
    assert slice_digest(rows, hf) == vectorized_digest(rows, hf)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("columns", [1, 768, 4096, 4097, 9001])
def test_sums_by_doubles_are_exact_for_the_largest_values(dtype: torch.dtype, columns: int) -> None:
    ends = [torch.full((9, columns), value, dtype=dtype) for value in (torch.iinfo(dtype).min, torch.iinfo(dtype).max)]
    noise = random_tensor((270, columns * dtype.itemsize), torch.uint8).view(dtype)
    rows, first = torch.cat([*ends, noise]), 250_000
    assert torch.equal(_sums_by_doubles(rows, first), _sums_by_vectors(rows, _factors(1, first, columns)))


def test_large_slices_use_byte_products_if_the_processor_has_instructions_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = torch.zeros(256, 64, dtype=torch.int16)
    for supported in (True, False):
        _multiplies_bytes_fast.cache_clear()
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda answer=supported: answer)
        assert _can_multiply_bytes(rows, 64) == (supported and _adds_bytes_exactly())
    _multiplies_bytes_fast.cache_clear()
    monkeypatch.undo()
    assert _can_multiply_bytes(rows, 64) == (torch.cpu._is_vnni_supported() and _adds_bytes_exactly())
    assert not _can_multiply_bytes(rows[:1], 64)
    assert not _can_multiply_bytes(torch.zeros(1, _EXACT_ROW_BYTES, dtype=torch.uint8), _EXACT_ROW_BYTES)


def test_a_processor_with_saturating_sums_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(rows: Tensor, factors: Tensor) -> Tensor:
        """Add pairs of products in 16 bits, as vpmaddubsw does."""
        products = rows[:, :, None].int() * factors[None].int()
        return products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1).sum(1).int()

    _adds_bytes_exactly.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not _adds_bytes_exactly()
    _adds_bytes_exactly.cache_clear()
