"""pass@k and maj@k compared with enumeration, and equality of final answers."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, permutations, product

import pytest

from grpo_mega.rollout.pass_at_k import final_answer, majority_at_k, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_fraction_of_subsets_with_a_correct_sample(n: int) -> None:
    for num_right, k in product(range(n + 1), range(1, n + 1)):
        right = [True] * num_right + [False] * (n - num_right)
        subsets = list(combinations(right, k))
        expected = Fraction(sum(any(subset) for subset in subsets), len(subsets))
        assert pass_at_k(n, num_right, k) == pytest.approx(float(expected), abs=1e-12)


def test_pass_at_k_keeps_small_probabilities_for_many_samples() -> None:
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)
    assert pass_at_k(10_000, 10_000, 1) == 1.0
    assert pass_at_k(200, 3, 100) == pytest.approx(1 - (100 * 99 * 98) / (200 * 199 * 198), rel=1e-12)


@pytest.mark.parametrize(("n", "right", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 2), (4, -1, 2)])
def test_undefined_arguments_are_an_error(n: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="is not defined"):
        pass_at_k(n, right, k)


def expected_majority(votes: tuple[tuple[str | None, bool], ...]) -> Fraction:
    answers = [answer for answer, _ in votes if answer is not None]
    tops = [a for a in set(answers) if answers.count(a) == max(answers.count(b) for b in answers)]
    shares = [Fraction(sum(right for b, right in votes if b == a), answers.count(a)) for a in tops]
    return sum(shares, Fraction(0)) / len(tops) if tops else Fraction(0)


def test_majority_over_all_orders_is_the_mean_over_subsets() -> None:
    samples: list[tuple[str | None, bool]] = [("7", True), ("7", True), ("8", False), ("8", False), (None, False)]
    for k in (1, 2, 3, 5):
        orders = list(permutations(samples))
        over_orders = sum(majority_at_k([a for a, _ in o], [r for _, r in o], k) for o in orders) / len(orders)
        subsets = [expected_majority(subset) for subset in combinations(samples, k)]
        assert over_orders == pytest.approx(float(sum(subsets) / len(subsets)), abs=1e-12)


def test_majority_by_hand() -> None:
    right = [True, True, False, False, False]
    assert majority_at_k(["7", "7", "8", "9", "9"], right, 5) == 0.5  # 7 and 9 tie
    assert majority_at_k(["7", "7", "8", "9", "10"], right, 5) == 1.0
    assert majority_at_k(["7", "7", None, None, None], right, 5) == 1.0  # no answer, no vote
    assert majority_at_k([None] * 5, right, 5) == 0.0
    assert majority_at_k(["7", "7", "8", "9", "9"], right, 2) == 0.5  # runs (7, 7) and (8, 9); the fifth is left over
    with pytest.raises(ValueError, match=r"maj@6 .* 5 samples"):
        majority_at_k(["7"] * 5, right, 6)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("so\n#### 1,000", "#### 1000.0", True),
        ("12 less 9 leaves 3", "the answer is 3", True),
        (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", True),
        (r"\boxed{x + 2}", r"\boxed{y + 2}", False),
        (r"\boxed{x  + 2}", r"so \boxed{x + 2}", True),
        ("<answer> B </answer>", "<think>A</think><answer>B</answer>", True),
        (r"<think>\boxed{5}</think>It is 6.", "6", True),
        (r"so \boxed{5}</think>It is 6.", "6", True),
        ("yes", "no", False),
        ("#### x", "#### y", False),
        ("66", "6", False),
    ],
)
def test_final_answers_are_compared_by_value(first: str, second: str, same: bool) -> None:
    assert (final_answer(first) == final_answer(second)) is same


def test_an_empty_completion_has_no_answer() -> None:
    assert final_answer(" \n") is None
    assert final_answer("<answer> </answer>") is None
