"""The contract of a reward, and the conversion of the config's reward terms into callables.

A reward is a function that takes the inputs which its parameters name (inputs.py) and the term's `args`, and returns a
number. It declares its range with `@reward(low=..., high=...)`; without a declaration the range is [0, 1], and a failed
scoring leaves the rollout out. A batched reward is a factory `(**args) -> BatchScorer` that declares its range with
`@batched_reward` (batched.py). A process reward returns a list of steps (end, value) instead of one number.

The config names a reward by its short name (`exact`, `gsm8k`, `format`) or by a path: `./file.py:function`,
`package.module:function` or `package.module.function`. Names, arguments and their values are checked before the run
starts (tests/unit/rewards/test_base.py). Each returned value is checked when it is returned.

This module imports no torch: worker processes import it together with the rewards, and must start fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, Unpack

from grpo_mega.config.plugins import Catalogue, check_args
from grpo_mega.rewards.batched import BatchScorer
from grpo_mega.rewards.inputs import INPUTS, TEXTS, RowContext, ScoringRow, call_inputs
from grpo_mega.rewards.scoring_errors import BadValueError
from grpo_mega.types import UserError

BUILTIN_REWARDS: Mapping[str, str] = {
    "code": "grpo_mega.rewards.builtin.code:code",
    "countdown": "grpo_mega.rewards.builtin.countdown:countdown",
    "exact": "grpo_mega.rewards.builtin.exact:exact",
    "format": "grpo_mega.rewards.builtin.format:answer_format",
    "gsm8k": "grpo_mega.rewards.builtin.gsm8k:gsm8k",
    "json_schema": "grpo_mega.rewards.builtin.json_schema:json_schema",
    "language_consistency": "grpo_mega.rewards.builtin.language:language_consistency",
    "length": "grpo_mega.rewards.builtin.length:length",
    "judge": "grpo_mega.rewards.builtin.judge:judge",
    "math": "grpo_mega.rewards.builtin.math:math",
    "proof": "grpo_mega.rewards.builtin.lean_proof:proof",
    "remote": "grpo_mega.rewards.builtin.remote:remote",
    "reward_model": "grpo_mega.rewards.builtin.reward_model:reward_model",
}
"""Short name -> path of the function; the module is imported only when a config names it."""

Steps = tuple[tuple[int, float], ...]
"""(end, value) of each step that a process reward scored; `end` is the position of the step's last character."""
Value = float | Steps
OnFailure = Literal["floor", "drop"]
"""Effect of a failed scoring: the term scores its floor, or the rollout has no reward and is left out of the loss."""

_DECLARATION = "__reward_declaration__"
_REWARDS = Catalogue("reward", BUILTIN_REWARDS, _DECLARATION)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Term(Protocol):
    """One entry of `reward.terms`; the config's RewardTerm has this form."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def args(self) -> Mapping[str, Any]: ...

    @property
    def datasets(self) -> Sequence[str] | None: ...


@dataclass(frozen=True)
class RewardDeclaration:
    """The declared range of a reward; `low` is also the floor, the value of a failed scoring."""

    low: float
    high: float
    check_args: Callable[..., None] | None = None
    seconds: Callable[..., float] | None = None
    is_batched: bool = False
    range_of: Callable[..., tuple[float, float]] | None = None
    inputs_of: Callable[..., Sequence[str]] | None = None
    on_failure: OnFailure = "floor"


_UNDECLARED = RewardDeclaration(0.0, 1.0, on_failure="drop")


def reward(
    *,
    low: float,
    high: float,
    check_args: Callable[..., None] | None = None,
    seconds: Callable[..., float] | None = None,
    on_failure: OnFailure = "floor",
) -> Callable[[_Function], _Function]:
    """Declare that the decorated function is a reward with values in [low, high].

    Args:
        low: least value, finite; also the floor, the value of a failed scoring.
        high: greatest value, finite.
        check_args: called with the term's `args` before the run starts; raises UserError for a bad value.
        seconds: called with the term's `args`; returns the limit in seconds that the function itself keeps for one
            scoring. It must be less than `reward.timeout_seconds`, at which the whole process is killed.
        on_failure: effect of a failed scoring, unless `reward.on_failure` is set.

    Raises:
        ValueError: the range is empty or not finite.
    """
    return _declare_range(RewardDeclaration(low, high, check_args, seconds, on_failure=on_failure))


def batched_reward(
    *,
    low: float,
    high: float,
    check_args: Callable[..., None] | None = None,
    range_of: Callable[..., tuple[float, float]] | None = None,
    inputs_of: Callable[..., Sequence[str]] | None = None,
    on_failure: OnFailure = "drop",
) -> Callable[[_Function], _Function]:
    """Declare that the decorated function returns a `BatchScorer` (batched.py) with values in [low, high].

    Args:
        low: least value, finite; also the floor, the value of a failed scoring.
        high: greatest value, finite.
        check_args: as for `reward`.
        range_of: called with the term's `args`; returns (low, high) if the range depends on the arguments.
        inputs_of: called with the term's `args`; returns the names of the inputs (inputs.py) that the scorer reads.
            None: all. Inputs that no term reads are not loaded.
        on_failure: as for `reward`.

    Raises:
        ValueError: the range is empty or not finite.
    """
    return _declare_range(
        RewardDeclaration(
            low, high, check_args, None, is_batched=True, range_of=range_of, inputs_of=inputs_of, on_failure=on_failure
        )
    )


def _declare_range(declaration: RewardDeclaration) -> Callable[[_Function], _Function]:
    low, high = declaration.low, declaration.high
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"a reward's range must be finite with low < high, got low={low} high={high}")

    def declare(function: _Function) -> _Function:
        setattr(function, _DECLARATION, declaration)
        return function

    return declare


@dataclass(frozen=True)
class RewardComponent:
    """One resolved term.

    Attributes:
        name: its unique key in `Reward.components`; repeated terms get `_2`, `_3`, ...
        function: the reward, or the factory of a batched reward.
        low: least value, and the floor of a failed scoring.
        high: greatest value.
        weight: factor of the term in the sum.
        args: keyword arguments of the function.
        is_batched: True for a batched reward.
        by_position: True if prompt, completion and reference are passed by position.
        inputs: names of the inputs that are passed by keyword; of a batched reward, those that its scorer reads.
        datasets: names of the data sets whose rows the term scores; None: all.
        on_failure: effect of a failed scoring.
    """

    name: str
    function: Callable[..., Any]
    low: float
    high: float
    weight: float
    args: Mapping[str, Any]
    is_batched: bool = False
    by_position: bool = True
    inputs: tuple[str, ...] = ()
    datasets: tuple[str, ...] | None = None
    on_failure: OnFailure = "floor"

    def __call__(self, prompt: str, completion: str, reference: str, **context: Unpack[RowContext]) -> Value:
        """Return the value of one row (`score`)."""
        return self.score(ScoringRow(prompt, completion, reference, **context))

    def score(self, row: ScoringRow) -> Value:
        """Return the unweighted value in [low, high], or the value of every step of a process reward.

        Raises:
            BadValueError: the function did not return a number in the range, or a list of steps with such numbers.
            Exception: any exception of the function itself.
        """
        if not self.is_batched:
            return self.checked(self.called(row))
        scorer = self.open()
        try:
            scorer.submit(0, row)
            return self.checked(scorer.collect()[0])
        finally:
            scorer.close()

    def called(self, row: ScoringRow) -> object:
        """Return what the function returns for the row. `checked` turns it into a value."""
        texts = [row.input(name) for name in TEXTS] if self.by_position else []
        return self.function(*texts, **{name: row.input(name) for name in self.inputs}, **self.args)

    def applies_to(self, dataset: str) -> bool:
        """Return True if the term scores rows of this data set."""
        return self.datasets is None or dataset in self.datasets

    def open(self) -> BatchScorer:
        """Return the scorer of a batched reward. It holds a model, threads or connections until it is closed."""
        assert self.is_batched, self.name
        scorer: BatchScorer = self.function(**self.args)
        return scorer

    def checked(self, value: object) -> Value:
        """Return a reward's value as a float in [low, high], or as steps with such values.

        Raises:
            BadValueError: the value is not a number in the range (NaN is not), or not a list of steps.
            Exception: the value itself is an exception, the reason why there is no number.
        """
        if isinstance(value, Exception):
            raise value
        return self._steps(value) if isinstance(value, list | tuple) else self._number(value)

    def _steps(self, value: Sequence[Any]) -> Steps:
        found = []
        for step in value:
            if not (isinstance(step, list | tuple) and len(step) == 2 and type(step[0]) is int and step[0] >= 0):
                raise BadValueError(
                    f"returned {step!r} among its steps; a step must be (end, value) with end >= 0"[:200]
                )
            found.append((step[0], self._number(step[1])))
        if not found:
            raise BadValueError("returned an empty list of steps; a completion must have at least one")
        return tuple(found)

    def _number(self, value: object) -> float:
        if not (hasattr(value, "__float__") or hasattr(value, "__index__")):
            raise BadValueError(f"returned {type(value).__name__}, not a number")
        number = float(value)  # type: ignore[arg-type]
        if not self.low <= number <= self.high:  # also true for NaN
            undeclared = getattr(self.function, _DECLARATION, None) is None
            kind = "of a function without @grpo_mega.rewards.reward(low=..., high=...)" if undeclared else "it declares"
            raise BadValueError(f"returned {number}, outside the range [{self.low}, {self.high}] {kind}")
        return number


def build_rewards(
    terms: Sequence[Term], timeout_seconds: float | None = None, on_failure: OnFailure | None = None
) -> tuple[RewardComponent, ...]:
    """Resolve and check the reward terms of a config, in order.

    Args:
        terms: the entries of `reward.terms`.
        timeout_seconds: the limit of one scoring, which each reward's own limit must stay below; None skips this check.
        on_failure: effect of a failed scoring for all terms; None: what each reward declares.

    Raises:
        UserError: there are no terms, a name is unknown, a path cannot be imported, or an argument is unknown or has a
            wrong value. The message names the term.
    """
    if not terms:
        raise UserError("reward.terms is empty; a run needs at least one term", remedy="add for example {name: exact}")
    seen: dict[str, int] = {}
    components = []
    for position, term in enumerate(terms):
        where = f"reward.terms[{position}]"
        function = _REWARDS.find(where, term.name)
        declaration = getattr(function, _DECLARATION, _UNDECLARED)
        by_position, inputs = (False, ()) if declaration.is_batched else call_inputs(function, term.args)
        texts = [""] * len(TEXTS) if by_position else []
        check_args(where, term.name, term.args, function, texts, declaration.check_args, inputs)
        _check_own_limit(where, term, declaration, timeout_seconds)
        short = term.name.replace(":", ".").rsplit(".", 1)[-1]
        seen[short] = seen.get(short, 0) + 1
        name = short if seen[short] == 1 else f"{short}_{seen[short]}"
        low, high = declaration.low, declaration.high
        if declaration.range_of is not None:
            low, high = declaration.range_of(**term.args)
        if declaration.is_batched:
            inputs = INPUTS if declaration.inputs_of is None else tuple(declaration.inputs_of(**term.args))
        components.append(
            RewardComponent(
                name, function, low, high, term.weight, dict(term.args), declaration.is_batched, by_position, inputs,
                None if term.datasets is None else tuple(term.datasets), on_failure or declaration.on_failure,
            )
        )  # fmt: skip
    return tuple(components)


def full_marks(components: Sequence[RewardComponent]) -> dict[str, float]:
    """Return the highest value of each component by its name."""
    return {component.name: component.high for component in components}


def needs_fields(components: Sequence[RewardComponent]) -> bool:
    """Return True if a reward reads the other columns of the rows of data, which are loaded only then."""
    return any("fields" in component.inputs for component in components)


def _check_own_limit(where: str, term: Term, declaration: RewardDeclaration, timeout_seconds: float | None) -> None:
    if timeout_seconds is None or declaration.seconds is None:
        return
    own = declaration.seconds(**term.args)
    if own >= timeout_seconds:
        raise UserError(
            f"{where}: the limit of {term.name!r}, {own:g} s, must be less than "
            f"reward.timeout_seconds={timeout_seconds:g}, at which its process is killed",
            remedy="raise reward.timeout_seconds or lower the limits in args",
        )
