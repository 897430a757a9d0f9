r"""Tables of the words, commands and signs that an answer may contain. docs/rewards.md describes them."""

from __future__ import annotations


def split_words(text: str) -> list[str]:
    """Return the words of a table that is written as one text."""
    return text.split()


_SIGNS = {
    "\u2212\u2013\u2014\ufe63\uff0d\u2010\u2011": "-",
    "\u00d7": r" \times ",
    "\u22c5\u00b7\u2217\u2219": r" \cdot ",
    "\u00f7\u2044\u2215": "/",
    "\u2264\u2a7d": "<=",
    "\u2265\u2a7e": ">=",
    "\u2260": "!=",
    "\u2248\u2243": r" \approx ",
    "\u00b1": r" \pm ",
    "\u2213": r" \mp ",
    "\u221a": r" \radical ",
    "\u03c0": r" \pi ",
    "\u221e": r" \infty ",
    "\u222a": r" \cup ",
    "\u2229": r" \cap ",
    "\u2208": r" \in ",
    "\u2205\u2300": r" \emptyset ",
    "\u211d": r" \mathbb{R} ",
    "\u2124": r" \mathbb{Z} ",
    "\u2115": r" \mathbb{N} ",
    "\u211a": r" \mathbb{Q} ",
    "\u2026\u22ef": "...",
    "\u2018\u2019\u2032": "'",
    "\u201c\u201d": '"',
    "\u27e8\u2329": r"\langle ",
    "\u27e9\u232a": r"\rangle ",
    "\u2192\u21d2": "->",
    "\u00bd": r"\frac{1}{2}",
    "\u00bc": r"\frac{1}{4}",
    "\u00be": r"\frac{3}{4}",
    "\u2153": r"\frac{1}{3}",
    "\u2154": r"\frac{2}{3}",
    "\u20ac": r" \euro ",
    "\u00a3": r" \pounds ",
    "\u00a5": r" \yen ",
    "\u200b\u2060\ufeff": " ",
}
_GREEK_LETTERS = split_words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi "
    "psi omega"
)
UNICODE = {character: text for characters, text in _SIGNS.items() for character in characters} | {
    chr(code): f" \\{name} "
    for code, name in zip(
        [code for code in range(0x3B1, 0x3CA) if code != 0x3C2], _GREEK_LETTERS, strict=True
    )  # 0x3C2 is the final sigma
}
"""A character and the text that replaces it."""

GREEK = {name: f"\\{name}" for name in _GREEK_LETTERS}
GREEK |= {name.capitalize(): f"\\{name.capitalize()}" for name in _GREEK_LETTERS}
GREEK |= {"varepsilon": "\\epsilon", "varphi": "\\phi", "vartheta": "\\theta", "varrho": "\\rho", "ell": "\\ell"}
GREEK |= {"pi": "pi", "infty": "oo", "emptyset": "empty", "varnothing": "empty", "oslash": "empty", "hbar": "\\hbar"}
"""A command and the symbol that it names."""

FUNCTION_NAMES = frozenset(
    split_words("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp frac sqrt binom radical")
)

PLAIN_NAMES = {name: ("function", name) for name in FUNCTION_NAMES - {"frac", "binom", "radical"}}
PLAIN_NAMES |= {"asin": ("function", "arcsin"), "acos": ("function", "arccos"), "atan": ("function", "arctan")}
PLAIN_NAMES |= {"pi": ("symbol", "pi"), "Pi": ("symbol", "pi"), "oo": ("symbol", "oo"), "inf": ("symbol", "oo")}
PLAIN_NAMES |= {"infty": ("symbol", "oo"), "infinity": ("symbol", "oo"), "U": ("symbol", "U")}
"""A run of letters outside of a command that is one token."""

TEXT_COMMANDS = frozenset(
    split_words("text textbf textit textrm textsf texttt mathrm mbox hbox operatorname rm textnormal")
)

STYLES = dict.fromkeys(("mathbf", "boldsymbol", "bm", "vec", "overrightarrow"), "vec")
STYLES |= {"hat": "hat", "widehat": "hat", "bar": "bar", "overline": "bar", "tilde": "tilde", "dot": "dot"}
STYLES |= {"mathbb": "bb", "mathcal": "cal", "mathfrak": "frak", "mathit": "", "mathsf": "sf"}
"""A command that changes the look of its argument, and the prefix of the symbol's name."""

FONTS = frozenset(("mathbf", "boldsymbol", "bm", "mathit", "mathsf"))
"""Styles that mean nothing around a number or an expression."""

COMMANDS: dict[str, tuple[str, str] | None] = dict.fromkeys(
    (",", ";", ":", "!", " ", ">", "quad", "qquad", "thinspace", "enspace", "/", "mathopen", "mathclose", "nobreak")
)
COMMANDS |= dict.fromkeys(("cdot", "ast", "bullet"), ("mark", "*"))
COMMANDS |= dict.fromkeys(("le", "leq", "leqslant", "leqq"), ("mark", "<="))
COMMANDS |= dict.fromkeys(("ge", "geq", "geqslant", "geqq"), ("mark", ">="))
COMMANDS |= dict.fromkeys(("ne", "neq"), ("mark", "!="))
COMMANDS |= dict.fromkeys(("approx", "simeq", "thickapprox"), ("mark", "~="))
COMMANDS |= dict.fromkeys(("ldots", "dots", "cdots", "dotsc", "dotsb"), ("mark", "..."))
COMMANDS |= dict.fromkeys(("dfrac", "tfrac", "cfrac", "nicefrac", "sfrac"), ("function", "frac"))
COMMANDS |= dict.fromkeys(("dbinom", "tbinom"), ("function", "binom"))
COMMANDS |= dict.fromkeys(("lvert", "rvert", "vert", "mid"), ("mark", "|"))
COMMANDS |= dict.fromkeys(("to", "rightarrow", "mapsto", "implies", "Rightarrow"), ("mark", "arrow"))
COMMANDS |= dict.fromkeys(("lor", "vee"), ("mark", "lor"))
COMMANDS |= dict.fromkeys(("land", "wedge"), ("mark", "land"))
COMMANDS |= {name: ("mark", name) for name in ("pm", "mp", "cup", "cap", "in", "lfloor", "rfloor", "lceil", "rceil")}
COMMANDS |= {name: ("symbol", f"\\{name}") for name in ("gcd", "max", "min", "lcm")}
COMMANDS |= {
    "times": ("mark", "times"),
    "div": ("mark", "/"),
    "lt": ("mark", "<"),
    "gt": ("mark", ">"),
    "{": ("mark", "\\{"),
    "}": ("mark", "\\}"),
    "lbrace": ("mark", "\\{"),
    "rbrace": ("mark", "\\}"),
    "langle": ("mark", "("),
    "rangle": ("mark", ")"),
    "lbrack": ("mark", "["),
    "rbrack": ("mark", "]"),
    "colon": ("mark", ":"),
    "%": ("mark", "percent"),
    "percent": ("mark", "percent"),
    "&": ("word", "and"),
    "$": ("mark", "dollar"),
    "euro": ("mark", "euro"),
    "pounds": ("mark", "pound"),
    "yen": ("mark", "yen"),
    "degree": ("mark", "degree"),
    "prime": ("mark", "'"),
    "setminus": ("mark", "setminus"),
    "backslash": ("mark", "setminus"),
    "row": ("mark", "row"),
    "R": ("symbol", r"\bb{R}"),
    "e": ("symbol", "e"),
    "bigcup": ("mark", "cup"),
    "#": ("mark", "#"),
    "_": ("mark", "_"),
    "|": ("mark", "norm"),
    "Vert": ("mark", "norm"),
    "lVert": ("mark", "norm"),
    "rVert": ("mark", "norm"),
    "det": ("unknown", "det"),
}
"""A command and its token; None for white space."""

WORDS = frozenset(
    split_words(
        "or and no yes not is the so if for all any odd even none true false both only either per sq cu dne cm mm km "
        "kg mg ml ft yd mi mph kph hr hrs min sec lb lbs oz gal deg rad hz khz kw kwh mw ev pa kpa am pm rpm usd eur "
        "gbp pct day days mod men mins in at to by of than maybe nor xor vs are"
    )
)
"""Runs of letters that are a word and not a product of variables."""
