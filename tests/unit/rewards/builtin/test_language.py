"""`language_consistency` with words counted by hand; formulas, code and tags do not count."""

from __future__ import annotations

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.rewards.builtin.language import SCRIPTS, language_consistency
from grpo_mega.types import UserError


@pytest.mark.parametrize(
    ("completion", "language", "share"),
    [
        ("We add two and three.", "en", 1.0),
        ("We add 两个", "en", 0.5),
        ("We add 两个", "zh", 0.5),
        ("我们计算", "zh", 1.0),
        ("これは日本語です", "ja", 1.0),
        ("это ответ is four", "ru", 0.5),
        ("das größte Übel", "de", 1.0),
        ("", "en", 0.0),
        ("2 + 2 = 4", "en", 0.0),
        (r"所以 $\frac{abc}{def}$ \boxed{4}", "zh", 1.0),
        ("所以 ```python\nprint(words)\n```", "zh", 1.0),
        ("<think>所以</think>", "zh", 1.0),
        ("답은 사과 apple", "ko", 2 / 3),
    ],
)
def test_the_share_of_words_in_the_language_is_the_reward(completion: str, language: str, share: float) -> None:
    assert language_consistency("", completion, "", language=language) == share


def test_only_the_thought_counts_with_part_think() -> None:
    completion = "<think>we think</think>答案是四"
    assert language_consistency("", completion, "", language="en", part="think") == 1.0
    assert language_consistency("", completion, "", language="en") == 2 / 6
    assert language_consistency("", "no tags", "", language="en", part="think") == 0.0


def test_a_thought_that_the_prompt_opened_counts_with_part_think() -> None:
    completion = "we think</think>答案是四"
    assert language_consistency("assistant\n<think>\n", completion, "", language="en", part="think") == 1.0
    assert language_consistency("assistant\n<think>\n", "we", "", language="en", part="think") == 1.0
    assert language_consistency("Use <think>.", completion, "", language="en", part="think") == 0.0


@pytest.mark.parametrize(("name", "value"), [("language", "klingon"), ("part", "answer")])
def test_a_bad_argument_is_rejected_before_the_run(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{name}='{value}' is unknown"):
        build_rewards([RewardTerm(name="language_consistency", args={"language": "en"} | {name: value})])


def test_every_language_has_a_unicode_script() -> None:
    letters = "aäжأবαשक가あア字தไ"
    known = {script for scripts in SCRIPTS.values() for script in scripts}
    for script in known:
        language = next(name for name, scripts in SCRIPTS.items() if script in scripts)
        assert any(language_consistency("", letter, "", language=language) == 1.0 for letter in letters), script
