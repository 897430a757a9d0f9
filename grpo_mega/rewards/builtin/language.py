"""Reward `language_consistency`: the fraction of words in the desired language, recognized by their script.

Formulas, code and LaTeX commands do not count. A run of letters is a word; in scripts that are written without spaces
every character is a word. Languages that share a script cannot be distinguished.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping

from grpo_mega.rewards.base import reward
from grpo_mega.rewards.thought import with_opened_tag
from grpo_mega.types import UserError

_LATIN = ("LATIN",)
SCRIPTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("en", "de", "es", "fr", "id", "it", "nl", "pl", "pt", "tr", "vi"), _LATIN),
    "ar": ("ARABIC",),
    "bn": ("BENGALI",),
    "el": ("GREEK",),
    "fa": ("ARABIC",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "ta": ("TAMIL",),
    "th": ("THAI",),
    "uk": ("CYRILLIC",),
    "zh": ("CJK",),
}
"""Language code -> first words of the Unicode names of its letters."""
PARTS = ("all", "think")

_NO_LANGUAGE = re.compile(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\[a-zA-Z]+|</?[a-z]{1,20}>", re.DOTALL)
_MARKS = "".join(chr(c) for c in range(0x300, 0x3100) if unicodedata.category(chr(c))[0] == "M") + "\u200c\u200d"
"""Characters that belong to the letter before them: accents, vowel signs of Indic scripts, joiners."""
_WORD = re.compile(rf"[^\W\d_](?:[^\W\d_]|[{re.escape(_MARKS)}])*")
_WIDTHS = frozenset(("FULLWIDTH", "HALFWIDTH"))
_SPACELESS = frozenset(("CJK", "HIRAGANA", "KATAKANA", "THAI"))


def check_language_args(language: str, part: str = "all") -> None:
    """Check the arguments of `language_consistency`.

    Raises:
        UserError: the language or the part is unknown.
    """
    if language not in SCRIPTS:
        raise UserError(f"language={language!r} is unknown", remedy=f"use one of {', '.join(sorted(SCRIPTS))}")
    if part not in PARTS:
        raise UserError(f"part={part!r} is unknown", remedy=f"use one of {', '.join(PARTS)}")


@reward(low=0.0, high=1.0, check_args=check_language_args)
def language_consistency(prompt: str, completion: str, reference: str, language: str, part: str = "all") -> float:
    """Return (words in the desired language) / (all words); 0 if there are no words.

    Args:
        prompt: if it ends with `<think>`, the completion begins inside of the thought.
        completion: its words are counted.
        reference: not used.
        language: a two-letter code, see SCRIPTS.
        part: `all`, or `think` for the text between the first `<think>` and `</think>`.
    Source: DeepSeek-R1, arXiv:2501.12948, section 2.3.2: the proportion of words in the target language.
    Differs: languages are recognized by their script.
    """
    if part == "think":
        together = with_opened_tag(prompt, completion, ("think",))
        completion = together.partition("<think>")[2].partition("</think>")[0]
    scripts, matching, total = SCRIPTS[language], 0, 0
    for run in _WORD.findall(_NO_LANGUAGE.sub(" ", completion)):
        for script, number in _words_by_script(run):
            total += number
            matching += number if script in scripts else 0
    return matching / total if total else 0.0


def _words_by_script(run: str) -> list[tuple[str, int]]:
    """Return (script, number of words) of a run of letters.

    Adjacent letters of one script form one word; in the scripts of `_SPACELESS` each letter is a word.
    """
    words: list[tuple[str, int]] = []
    for character in run:
        if character in _MARKS:
            continue
        script = _script(character)
        if words and words[-1][0] == script:
            if script in _SPACELESS:
                words[-1] = (script, words[-1][1] + 1)
        else:
            words.append((script, 1))
    return words


@functools.lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    """Return the first word of the Unicode name of a letter that says its script."""
    words = unicodedata.name(character, "UNKNOWN").replace("-", " ").split()
    name = words[1] if words[0] in _WIDTHS and len(words) > 1 else words[0]
    return "CJK" if name == "IDEOGRAPHIC" else name  # U+3005 repeats the ideograph before it
