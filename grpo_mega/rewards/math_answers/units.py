"""Read the unit behind a number: `square units`, `cm per hour`, `m/s`, `yd^{2}`.

A unit is a product of powers of names. `5 cm` and `5 centimeters` have equal units. No unit is converted: `5 m` and
`500 cm` differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega.rewards.math_answers.tokens import Token
from grpo_mega.rewards.math_answers.vocabulary import split_words

Unit = frozenset[tuple[str, int]]

_NAMES = {
    "m": "meter metre",
    "cm": "centimeter centimetre",
    "mm": "millimeter millimetre",
    "km": "kilometer kilometre kms",
    "ft": "foot feet",
    "in": "inch inches",
    "yd": "yard",
    "mi": "mile",
    "s": "sec second",
    "min": "minute",
    "hr": "hour h",
    "day": "d",
    "yr": "year",
    "kg": "kilogram kgs",
    "g": "gram",
    "mg": "milligram",
    "lb": "pound lbs",
    "oz": "ounce",
    "L": "liter litre l",
    "mL": "milliliter millilitre ml",
    "gal": "gallon",
    "N": "newton",
    "J": "joule",
    "W": "watt",
    "Pa": "pascal",
    "Hz": "hertz",
    "K": "kelvin",
    "A": "ampere amp",
    "V": "volt",
    "C": "coulomb",
    "rad": "radian",
    "degree": "deg",
    "dollar": "usd",
    "cent": "",
    "euro": "eur",
    "percent": "pct percentage",
    "unit": "",
}
_SYNONYMS = {name: symbol for symbol, names in _NAMES.items() for name in (symbol, *names.split())}
_COMPOUND = {"mph": (("mi", 1), ("hr", -1)), "kph": (("km", 1), ("hr", -1)), "kmh": (("km", 1), ("hr", -1))}
_COUNTED = frozenset(
    split_words(
        "apple apples arrangement arrangements bag bags ball balls banana bananas bird birds board boards book books "
        "bottle bottles box boxes boy boys brick bricks bus buses byte bytes bit bits cake cakes candle candles candy "
        "candies car cars card cards case cases cat cats chair chairs chicken chickens child children choice choices "
        "circle circles class classes coin coins color colors combination combinations committee "
        "committees cookie cookies cow cows cube cubes cup cups customer customers desk desks digit digits dog dogs "
        "doll dolls edge edges egg eggs element elements employee employees face faces fish flower flowers friend "
        "friends function functions game games girl girls glass glasses goal goals grape grapes group groups guest "
        "guests hat hats horse horses house houses integer integers item items jar jars letter letters line lines "
        "man marble marbles match matches member members men mango mangoes month months number numbers orange oranges "
        "outcome outcomes page pages pair pairs path paths pen pens pencil pencils people person permutation "
        "permutations pie pies piece pieces pizza pizzas plant plants player players point points pole poles prime "
        "primes problem problems quarterly quart quarts rectangle rectangles region regions revolution revolutions "
        "root roots rose roses row rows sandwich sandwiches seat seats sequence sequences set sets sheep shirt shirts "
        "shoe shoes side sides song songs square squares star stars step steps sticker stickers stone stones string "
        "strings student students subset subsets term terms ticket tickets tile tiles times toy toys train trains "
        "tree trees triangle triangles trip trips value values vertex vertices vote votes ways way week weeks wheel "
        "wheels woman women word words worker workers year years acre acres hectare hectares ton tons tonne tonnes "
        "kilowatt kilowatts kw kwh watt-hour volts ohm ohms farad mole moles mol atm bar ev kpa khz mhz ghz mph rpm "
        "pint pints cup bushel bushels decade decades century centuries fortnight dm nm um light-year parsec knot "
        "knots calorie calories kcal cal gbp inr rupee rupees peso pesos yuan franc francs krona penny pennies pence "
        "nickel nickels dime dimes pp ppm kb mb gb tb gram-force dozen-egg turn turns lap laps floor floors room rooms "
        "table tables cent cents dollar dollars minute minutes hour hours"
    )
)
"""Names of counted things that may follow a number. Any other word changes the number, or means something else."""

NOT_UNITS = frozenset(
    split_words(
        "or and not nor either neither maybe perhaps possibly approximately approx about around to than less more "
        "least most is are was no yes if but unless except else otherwise some any all other wrong incorrect true "
        "false am pm even odd half third quarter double twice dozen hundred thousand million billion trillion "
        "zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty "
        "seventy eighty ninety infinity infinite negative minus plus times over divided multiplied root factorial "
        "choose mod base vs versus between from with without solution solutions answer answers undefined none "
        "nothing only also alternatively instead actually so then hence thus equals equal remainder i squared "
        "cubed doubled tripled halved halves thirds quarters fourth fourths fifth fifths sixth sixths seventh "
        "sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths gross bn "
        "mn more-or-less below above under beyond"
    )
)
"""Words that change the value before them, and are no unit in a reference."""
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""Words that multiply a number by a power of ten."""

_WITHOUT_POWERS = frozenset(("percent", "degree", "dollar", "cent", "euro"))
_MOST_WORDS = 5


def read_unit(tokens: Sequence[Token]) -> Unit | None:
    """Return the unit that all tokens form; None when they form no unit."""
    powers: dict[str, int] = {}
    sign, next_power, position, num_words = 1, 1, 0, 0
    last: str | None = None
    while position < len(tokens):
        kind, text = tokens[position]
        position += 1
        lower = text.casefold()
        if kind == "mark" and text == "^" and last is not None:
            exponent, position = _read_exponent(tokens, position)
            if not exponent:
                return None
            powers[last] += (1 if powers[last] > 0 else -1) * (exponent - 1)
            last = None
        elif (kind == "mark" and text == "/") or (kind == "word" and lower == "per"):
            if sign < 0 or position == len(tokens):
                return None
            sign = -1
        elif kind == "mark" and text in ("*", ".", "-"):
            continue
        elif kind == "word" and lower in ("square", "sq", "cubic", "cu"):
            next_power = 2 if lower.startswith("sq") else 3
        elif kind == "word" and lower in ("squared", "cubed") and last is not None:
            powers[last] *= 2 if lower == "squared" else 3
        elif kind == "symbol" and text in ("C", "F") and last == "degree" and position == len(tokens):
            powers = {**powers, text: powers.get(text, 0) + 1}
        elif (kind in ("word", "upright") and _may_be_unit(text)) or text in ("degree", "percent"):
            num_words += 1
            for name, power in _COMPOUND.get(lower, ((_canonical_name(text), 1),)):
                last = name
                powers[name] = powers.get(name, 0) + sign * next_power * power
            next_power = 1
        elif kind != "word" or (lower not in ("of", "the", "a") and (lower != "old" or last != "yr")):
            return None
    if not 0 < num_words <= _MOST_WORDS or next_power != 1:
        return None
    if any(abs(power) > 1 and (name in _WITHOUT_POWERS or name in _COUNTED) for name, power in powers.items()):
        return None
    return frozenset((name, power) for name, power in powers.items() if power)


def _may_be_unit(text: str) -> bool:
    """Return True for a name of the lists above: any other word may change a value (`5 tens`, `5 or`)."""
    if len(text) == 1:
        return text in _SYNONYMS
    lower = text.casefold()
    return (
        any(name in _SYNONYMS for name in (text, lower, lower.removesuffix("s")))
        or lower in _COUNTED | _COMPOUND.keys()
    )


def _read_exponent(tokens: Sequence[Token], position: int) -> tuple[int | None, int]:
    texts = [token.text for token in tokens[position : position + 4]]
    if texts and texts[0].isdigit():
        return _small(texts[0]), position + 1
    if len(texts) >= 3 and texts[0] == "{" and texts[1].isdigit() and texts[2] == "}":
        return _small(texts[1]), position + 3
    if len(texts) == 4 and texts[0] == "{" and texts[1] == "-" and texts[2].isdigit() and texts[3] == "}":
        exponent = _small(texts[2])
        return (None if exponent is None else -exponent), position + 4
    return None, position


def _small(digits: str) -> int | None:
    return int(digits) if len(digits) == 1 else None


def _canonical_name(text: str) -> str:
    for name in (text, text.casefold(), text.casefold().removesuffix("s")):
        if name in _SYNONYMS:
            return _SYNONYMS[name]
    return text.casefold().removesuffix("s") if len(text) > 3 else text
