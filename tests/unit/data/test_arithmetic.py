"""The generated task: which pairs are for pre-training, training and evaluation."""

from grpo_mega.data import arithmetic


def test_the_three_sets_are_disjoint_and_contain_all_ten_thousand_pairs() -> None:
    together = [*arithmetic.pairs("pretrain"), *arithmetic.pairs("train"), *arithmetic.pairs("heldout")]
    assert len(together) == len(set(together)) == 10_000
    assert all(0 <= a < 100 and 0 <= b < 100 for a, b in together)
    assert len(arithmetic.pairs("heldout")) == 300


def test_the_sets_never_change() -> None:
    assert arithmetic.pairs("heldout")[:3] == ((51, 3), (23, 69), (59, 69))
    assert arithmetic.pairs("train")[:3] == ((96, 24), (77, 31), (47, 63))


def test_heldout_pairs_are_spread_over_the_whole_range() -> None:
    tens = {(a // 20, b // 20) for a, b in arithmetic.pairs("heldout")}
    assert len(tens) == 25


def test_question_and_answer_are_written_without_blanks() -> None:
    assert arithmetic.question((7, 58)) == "7+58="
    assert arithmetic.answer((7, 58)) == "65"
    assert set(arithmetic.question((90, 12)) + arithmetic.answer((99, 99))) <= set(arithmetic.ALPHABET)
