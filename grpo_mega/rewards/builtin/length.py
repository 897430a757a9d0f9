"""Reward `length`: a soft penalty on the length of the completion, 0 where it is as wished and -1 at worst.

Kinds: `overlong` (0 up to `limit - buffer`, falling linearly to -1 at `limit`) and `target` (|length - limit| over
`buffer`, at most 1). Lengths are of the text: characters, words, or tokens of a `tokenizer.json`. The penalty on the
policy's own tokens that DAPO applies is `algorithm.overlong_buffer_fraction`; this reward is for everything else.
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
    """Refuse values that `length` cannot work with.

    Raises:
        UserError: an unknown kind or unit, a limit or buffer that makes no penalty, a tokenizer missing or superfluous.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} is unknown", remedy=f"use one of {', '.join(KINDS)}")
    if unit not in UNITS:
        raise UserError(f"unit={unit!r} is unknown", remedy=f"use one of {', '.join(UNITS)}")
    for name, value in (("limit", limit), ("buffer", buffer)):
        if type(value) is not int or value < 1:
            raise UserError(f"{name}={value!r} is no whole number above 0", remedy=f"give a number of {unit}")
    if kind == "overlong" and buffer > limit:
        raise UserError(
            f"buffer={buffer} is more than limit={limit}: an empty completion would be penalised", remedy="lower it"
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
    """The penalty, in [-1, 0].

    overlong: 0 for n <= limit - buffer, else (limit - buffer - n) / buffer, at least -1.
    target: -|n - limit| / buffer, at least -1.

    Args:
        prompt: not looked at.
        completion: its length n counts.
        reference: not looked at.
        limit: overlong: where the penalty reaches -1; target: the wished length.
        buffer: over how much it falls from 0 to -1.
        kind: `overlong` or `target`.
        unit: `characters`, `words` (between white space) or `tokens`.
        tokenizer: path of a tokenizer.json (or its folder), for `unit: tokens`.
    Source: overlong: DAPO, arXiv:2503.14476, eq. 13; target: LCPO-Exact, arXiv:2503.04697, eq. 1.
    Differs: of the text in the unit asked for; target is scaled by `buffer` and bounded.
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
    """Lone surrogates, which no tokenizer takes, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
