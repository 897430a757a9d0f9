"""tools/dev/check_words.py finds private words, British spelling and docstrings that are fragments, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.dev.check_words import findings, main


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("x = 1  # the door of the scheduler\n", "door"),
        ("def stand_in() -> None: ...\n", "stand_in"),
        ('raise ValueError("waited in vain")\n', "in vain"),
        ("values = quantise(values)\n", "quantise"),
        ('"""Of this rank."""\n', "Of"),
        ('def f() -> None:\n    """Whether it fits."""\n', "Whether"),
        ('class A:\n    """What a rank holds."""\n', "What"),
    ],
)
def test_a_private_word_is_found_with_its_line(text: str, word: str, tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(text)
    (found,) = findings(file)
    assert f": {word!r}: " in found
    assert main([str(file)]) == 1


def test_plain_words_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "module.py"
    file.write_text('"""Return the ranks that have not reached the barrier."""\nindoor = "optimistic, as of today"\n')
    assert main([str(file)]) == 0
    assert capsys.readouterr().out == ""
