"""Reward `length`: a soft penalty on the length of the completion, from 0 (no penalty) to -1.

Kinds: `overlong` (0 up to `limit - buffer`, falling linearly to -1 at `limit`) and `target` (|length - limit| over
`buffer`, at most 1). The length is that of the text, in characters, words, or tokens of a `tokenizer.json`. For DAPO's
penalty on the policy's own tokens use `algorithm.overlong_buffer_fraction` instead.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from grpo_mega.rewards.base import reward
from grpo_mega.types import UserError

KINDS = ("overlong", "target")
UNITS = ("characters", "words", "tokens")


def check_length_args(
    limit: int, buffer: int, kind: str = "overlong", unit: str = "characters", tokenizer: str | None = None
) -> None:
    """Check the arguments of `length`.

    Raises:
        UserError: the kind or unit is unknown, limit or buffer is out of range, or tokenizer does not fit the unit.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} is unknown", remedy=f"use one of {', '.join(KINDS)}")
    if unit not in UNITS:
        raise UserError(f"unit={unit!r} is unknown", remedy=f"use one of {', '.join(UNITS)}")
    for name, value in (("limit", limit), ("buffer", buffer)):
        if type(value) is not int or value < 1:
            raise UserError(f"{name}={value!r} must be a whole number above 0", remedy=f"give a number of {unit}")
    if kind == "overlong" and buffer > limit:
        raise UserError(
            f"buffer={buffer} is more than limit={limit}: an empty completion would be penalized", remedy="lower it"
        )
    if (unit == "tokens") != (tokenizer is not None):
        raise UserError(
            f"unit={unit!r} with tokenizer={tokenizer!r}", remedy="give both unit: tokens and tokenizer, or neither"
        )
    if tokenizer is not None:
        try:
            _tokenizer(tokenizer)
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"tokenizer={tokenizer!r} cannot be read ({error})", remedy="name a tokenizer.json"
            ) from error


@reward(low=-1.0, high=0.0, check_args=check_length_args)
def length(
    prompt: str,
    completion: str,
    reference: str,
    limit: int,
    buffer: int,
    kind: str = "overlong",
    unit: str = "characters",
    tokenizer: str | None = None,
) -> float:
    """Return the penalty, in [-1, 0].

    overlong: 0 for n <= limit - buffer, else (limit - buffer - n) / buffer, at least -1.
    target: -|n - limit| / buffer, at least -1.

    Args:
        prompt: not used.
        completion: n is its length in `unit`.
        reference: not used.
        limit: for overlong the length at which the penalty reaches -1; for target the desired length.
        buffer: the distance over which the penalty falls from 0 to -1.
        kind: `overlong` or `target`.
        unit: `characters`, `words` (between white space) or `tokens`.
        tokenizer: path of a tokenizer.json (or its folder), for `unit: tokens`.
    Source: overlong: DAPO, arXiv:2503.14476, eq. 13; target: LCPO-Exact, arXiv:2503.04697, eq. 1.
    Differs: measures the text in `unit`; target is scaled by `buffer` and bounded.
    """
    if unit == "tokens":
        assert tokenizer is not None, unit
        number = len(_tokenizer(tokenizer).encode(_encodable(completion), add_special_tokens=False).ids)
    else:
        number = len(completion) if unit == "characters" else len(completion.split())
    penalty = abs(number - limit) if kind == "target" else max(0, number - (limit - buffer))
    return -min(1.0, penalty / buffer)


@functools.lru_cache(maxsize=4)
def _tokenizer(path: str) -> Any:
    from tokenizers import Tokenizer

    file = Path(path)
    return Tokenizer.from_file(str(file / "tokenizer.json" if file.is_dir() else file))


def _encodable(text: str) -> str:
    """Replace lone surrogates, which no tokenizer accepts, by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
