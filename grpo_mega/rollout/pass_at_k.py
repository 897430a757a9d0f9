"""Computes pass@k and maj@k from n samples per prompt. Pure.

Asserted by tests/unit/rollout/test_pass_at_k.py, against enumeration of all subsets in exact fractions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence

from grpo_mega.rewards.builtin.gsm8k import final_answer as final_numbers
from grpo_mega.rewards.final_answers.answer_boxes import last_box_content
from grpo_mega.rewards.thought import answer_part

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MARKER = "####"
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return 1 - C(n - c, k) / C(n, k): the probability that k of n samples contain a correct one.

    The k samples are drawn without replacement; c of the n samples are correct. The estimate of the probability for k
    new samples is unbiased for every k <= n.

    Args:
        num_samples: n, samples of one prompt.
        num_right: c, correct ones.
        k: samples that are drawn, 1 <= k <= n.

    Raises:
        ValueError: k is not within 1 to n, or c is not within 0 to n.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code", arXiv:2107.03374, equation 1.
    """
    if not (1 <= k <= num_samples and 0 <= num_right <= num_samples):
        raise ValueError(f"pass@{k} is not defined for {num_samples} samples with {num_right} correct ones")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority_at_k(answers: Sequence[Hashable | None], is_right: Sequence[bool], k: int) -> float:
    """Return the probability that the most frequent answer of k samples is correct.

    It is the mean over the n // k disjoint blocks of k samples, which is unbiased because every block has samples of
    its own. A sample without an answer (None) has no vote. If several answers are equally frequent, each is chosen with
    the same probability. The correctness of an answer is the mean over the samples with that answer.

    Args:
        answers: the final answer of each sample, comparable by ==.
        is_right: True for each sample that the reward considers correct.
        k: votes, 1 <= k <= n.

    Raises:
        ValueError: k is out of range.

    Source: self-consistency: Wang et al., arXiv:2203.11171.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} is not defined for {len(answers)} samples")
    runs = [range(begin, begin + k) for begin in range(0, len(answers) - k + 1, k)]
    return math.fsum(_majority([(answers[i], is_right[i]) for i in run]) for run in runs) / len(runs)


def _majority(votes: Sequence[tuple[Hashable | None, bool]]) -> float:
    counts = Counter(answer for answer, _ in votes if answer is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    chosen = [answer for answer, count in counts.items() if count == most]
    return math.fsum(sum(right for answer, right in votes if answer == c) / most for c in chosen) / len(chosen)


def final_answer(completion: str) -> Hashable | None:
    r"""Return the final answer of a completion, for counting votes; None for an empty completion.

    The answer is the content of the last `\boxed{x}`, else the text after the last `#### x`, else the text between the
    last <answer> tags, else the last number, else the whole text. A thought is not read. Numbers compare by value,
    other answers as text. An expression with a variable is text.
    """
    completion = answer_part("", completion)
    marked = last_box_content(completion)
    if marked is None and _MARKER in completion:
        marked = completion.rpartition(_MARKER)[2].partition("\n")[0]
    if marked is None and (tagged := _ANSWER_TAG.findall(completion)):
        marked = tagged[-1]
    if marked is None:
        return final_numbers(completion, strict=False) or _text(completion)
    numbers = final_numbers(f"{_MARKER} {marked}", strict=True) if _VARIABLE.search(marked) is None else None
    return numbers or _text(marked)


def _text(answer: str) -> str | None:
    return " ".join(answer.split()) or None
