"""Metrics of the answers' text: how much of it repeats, and how much is in a script that the prompt does not use. Pure.

Each function returns sums over the answers that a rank has. The sums of all ranks are added before the division, so a
metric is the same for every layout.
Asserted by tests/unit/trainer/test_text_metrics.py.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]
NGRAM = 4
"""Tokens of an n-gram."""
_CHUNK_TOKENS = 1 << 18
"""Answers are hashed in groups of about this number of tokens, whose arrays of 8 bytes per token are used again."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

# First code points of ranges with one script each; 0 is no letter of a script. A letter outside of these is script 1,
# as Latin is. Kana, Han and Hangul are different scripts: an answer in Chinese to a Korean question counts.
_RANGES = (
    *((0x0000, 0), (0x0041, 1), (0x005B, 0), (0x0061, 1), (0x007B, 0), (0x00C0, 1)),
    *((0x0250, 0), (0x0370, 2), (0x0400, 3), (0x0530, 4), (0x0590, 5), (0x0600, 6), (0x0780, 0), (0x0900, 7)),
    *((0x0980, 8), (0x0E00, 9), (0x0E80, 8), (0x10A0, 10), (0x1100, 11), (0x1200, 8), (0x1E00, 1), (0x1F00, 2)),
    *((0x2000, 0), (0x3040, 12), (0x3100, 0), (0x3130, 11), (0x3190, 0), (0x3400, 13), (0x4DC0, 0), (0x4E00, 13)),
    *((0xA000, 8), (0xAC00, 11), (0xD7B0, 0), (0xF900, 13), (0xFB00, 0), (0x20000, 13), (0x323B0, 0)),
)
_STARTS = np.array([start for start, _ in _RANGES])
_SCRIPTS = np.array([script for _, script in _RANGES])
_SCRIPT_OF = np.repeat(_SCRIPTS, np.diff(_STARTS, append=_STARTS[-1] + 1)).astype(np.uint8)
"""Script of each code point; code points beyond the end have the script of the last."""
_ASCII_LETTERS = string.ascii_letters.encode()


def repetition_sums(token_ids: Ints, offsets: Ints, n: int = NGRAM) -> NDArray[np.float64]:
    """Return [repeated n-grams, n-grams] of all answers.

    An n-gram is repeated if it occurred earlier in the same answer. n-grams are compared by a 64-bit hash.

    Args:
        token_ids: [T], the answers one after the other.
        offsets: [N + 1], answer i has the tokens `offsets[i]` to `offsets[i + 1] - 1`.
        n: tokens of an n-gram.
    """
    found, first = np.zeros(2), 0
    while first < len(offsets) - 1:
        after = int(np.searchsorted(offsets, offsets[first] + _CHUNK_TOKENS, side="right")) - 1
        last = max(first + 1, after)
        bounds = offsets[first : last + 1]
        found += _repetition_sums(token_ids[bounds[0] : bounds[-1]], bounds, n)
        first = last
    return found


def _repetition_sums(token_ids: Ints, offsets: Ints, n: int) -> NDArray[np.float64]:
    """Return `repetition_sums` of a few answers; the first offset may be any number."""
    answer = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    num = len(token_ids) - n + 1
    if num <= 0:
        return np.zeros(2)
    with np.errstate(over="ignore"):  # equal n-grams of two answers have different codes
        codes = (answer[:num].astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
        for place in range(n):
            codes ^= token_ids[place : place + num].astype(np.uint64)
            codes *= _MULTIPLIER
            codes ^= codes >> np.uint64(29)
    inside = codes[answer[:num] == answer[n - 1 :]]
    ordered = np.sort(inside)  # much faster than np.unique
    repeated = int(np.count_nonzero(ordered[1:] == ordered[:-1]))
    return np.array([float(repeated), float(len(inside))])


def script_sums(prompts: Sequence[str], answers: Sequence[str]) -> NDArray[np.float64]:
    """Return [letters in a script that the prompt does not use, letters] of all answers.

    Scripts are those of Unicode's blocks: Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Devanagari, Thai, Georgian,
    Hangul, Kana, Han, and all others together. Digits, punctuation and symbols are no letters. For a prompt without
    letters, such as `1+2=`, every script is another one than Latin.

    Args:
        prompts: [N], the prompt of each answer.
        answers: [N].
    """
    num_scripts = int(_SCRIPTS.max()) + 1
    used = _script_counts(prompts, num_scripts) > 0
    used[~used[:, 1:].any(axis=1), 1] = True
    counts = _script_counts(answers, num_scripts)
    counts[:, 0] = 0
    return np.array([float(counts[~used].sum()), float(counts.sum())])


def _script_counts(texts: Sequence[str], num_scripts: int) -> Ints:
    """Return the characters of each script in each text, [N, scripts]."""
    counts = np.zeros((len(texts), num_scripts), np.int64)
    for row, text in enumerate(texts):
        if text.isascii():  # letters of ASCII are Latin
            others = len(text.encode().translate(None, _ASCII_LETTERS))
            counts[row, :2] = others, len(text) - others
            continue
        points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        scripts = _SCRIPT_OF[np.minimum(points, len(_SCRIPT_OF) - 1)]
        counts[row] = np.bincount(scripts, minlength=num_scripts)
    return counts


def text_metrics(repetition: NDArray[np.float64], scripts: NDArray[np.float64]) -> dict[str, float]:
    """Return the metrics from the sums of all ranks; a fraction of nothing is 0.

    Args:
        repetition: [K] with K = 2, the sum of `repetition_sums`.
        scripts: [K], the sum of `script_sums`.
    """
    return {
        f"rollout/{name}_fraction": float(part / whole) if whole else 0.0
        for name, (part, whole) in (("repeated_ngram", repetition), ("other_script", scripts))
    }
