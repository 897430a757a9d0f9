"""Other values next to a box."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.final_answers.alternatives import (
    offers_other_value_behind,
    value_joined_before,
    value_of_same_name_before,
)


@pytest.mark.parametrize(
    "behind",
    [
        ", though 5 also works",
        "; $5$ is equally valid",
        ". 5 also satisfies the equation.",
        " ($5$ is also accepted)",
        "; the truth is 5.",
        " for even n, 5 for odd n",
        " when x>0; when x<0 it is 5",
        "\n\nOther solution: 5",
        "\n\nThe other possibility is 5.",
        "\n\n**Final**: 5",
        "\n\nEdit: it is 5",
        "\n\nSo x=5.",
    ],
)
def test_a_value_behind_that_the_text_offers_is_another_value(behind: str) -> None:
    assert offers_other_value_behind(f"box{behind}", 3, ["4"])
    assert not offers_other_value_behind(f"box{behind}", 3, ["5"])


@pytest.mark.parametrize(
    "behind",
    [
        "",
        ", which is even.",
        " when $x = 5$.",
        ", since 5 is not prime.",
        "\n\nCheck: $4 + 1 = 5$, which is correct.",
        ", where $n = 5$ is the number of people.",
        ". Thus we are done with all 5 cases.",
    ],
)
def test_a_value_in_a_reason_is_no_other_value(behind: str) -> None:
    assert not offers_other_value_behind(f"box{behind}", 3, ["4"])


def test_the_number_of_a_content_with_a_unit_is_no_other_value() -> None:
    assert not offers_other_value_behind("72 apples\nSo it is 72.", 9, ["72 apples"])
    assert offers_other_value_behind("45 apples\nSo it is 5.", 9, ["45 apples"])
    assert offers_other_value_behind("-5; 5 is valid too", 2, ["-5"])


@pytest.mark.parametrize(
    ("before", "value"),
    [("7 and ", "7"), ("The roots are 3/4 and $", "3/4"), ("we add 3 and 4 to get ", None), ("$x=3$ and $y=", None)],
)
def test_the_number_that_and_joins_to_a_box(before: str, value: str | None) -> None:
    assert value_joined_before(before) == value


@pytest.mark.parametrize(
    ("before", "value"),
    [
        ("$x=3, x=", "3"),
        ("$x = 3$ or $x = ", "3"),
        (r"$x_1=3 \text{ or } x_2=", "3"),
        (r"x = 3 ; \quad x =", "3"),
        ("$x=3, y=", None),
        ("$2x=8, x=", None),
        ("$x = 2 + 2 = ", None),
    ],
)
def test_another_value_of_the_same_name_is_found(before: str, value: str | None) -> None:
    assert value_of_same_name_before(before) == value


@pytest.mark.parametrize(
    ("behind", "offers"),
    [
        (". If that fails, try 7.", True),
        (", i.e. 7", True),
        ("; the key says 7 and the key is right", True),
        (". Recomputing gives 7.", True),
        ("\n\n> 7", True),
        (" for 7 people.", False),
        (". Check: 7 - 2 = 5, and 7.", False),
        (", since the sides are 7.", False),
        (" and the minimum is 7.", False),
        ("\n\nQuestion: 7", False),
        (", i.e. 5.0", False),
        (r". $\blacksquare$", False),
    ],
)
def test_a_value_that_ends_a_clause_is_offered(behind: str, offers: bool) -> None:
    assert offers_other_value_behind(f"5{behind}", 1, ["5"]) == offers


def test_a_number_of_the_prompt_may_be_repeated_unless_it_is_called_valid() -> None:
    prompt = "Tom has 12 apples and gives away 7."
    assert offers_other_value_behind("5. He gave away 7.", 1, ["5"])
    assert not offers_other_value_behind("5. He gave away 7.", 1, ["5"], prompt)
    assert offers_other_value_behind("5, but 7 is right too.", 1, ["5"], prompt)
    assert offers_other_value_behind("5. He gave away 77.", 1, ["5"], prompt)
