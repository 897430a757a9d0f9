"""Fenced blocks by CommonMark's rules, and by this project's for texts that break them."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.fenced_blocks import fenced_blocks


def found(text: str) -> list[tuple[str, str]]:
    return [(block.label, block.content) for block in fenced_blocks(text)]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("a\n```\nb\n```\nc\n~~~ py\nd\n~~~", [("", "b\n"), ("py", "d\n")]),
        ("```\n<\n>\n```", [("", "<\n>\n")]),  # CommonMark 0.31, example 119 and those after it
        ("``\nfoo\n``", []),
        ("```\naaa\n~~~\n```", [("", "aaa\n~~~\n")]),
        ("````py\naaa\n```\n``````", [("py", "aaa\n```\n")]),
        ("```py", [("py", "")]),
        ("```\n\n  \n```", [("", "\n  \n")]),
        (" ```py\n aaa\naaa\n```", [("py", "aaa\naaa\n")]),
        ("  ```py\naaa\n  aaa\naaa\n  ```", [("py", "aaa\naaa\naaa\n")]),
        ("```py\naaa\n   ```", [("py", "aaa\n")]),
        ("```py\naaa\n    ```", [("py", "aaa\n    ```")]),  # indented by four columns: not a closing fence
        ("```py\naaa\n``` \t\nb", [("py", "aaa\n")]),
        ("``` aa`a\nb\n", []),
        ("~~~ aa`a ~~~\nfoo\n~~~", [("aa", "foo\n")]),
        ("> ```py\n> aaa\n\nbbb", [("py", "aaa\n")]),
        ("> ```py\n> if a:\n>     b\n> ```\nc", [("py", "if a:\n    b\n")]),
        ("1. Do:\n\n   ```py\n   if a:\n       b\n   ```\n", [("py", "if a:\n    b\n")]),
        ("- ```py\n  a\n  ```", [("py", "a\n")]),
        ("```py\r\na\r\n```\r\n", [("py", "a\r\n")]),
    ],
)
def test_blocks_follow_commonmark(text: str, blocks: list[tuple[str, str]]) -> None:
    assert found(text) == blocks


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("1. x\n     ```py\n     a\n     ```", [("py", "a\n")]),
        ("\t```py\n\tif a:\n\t\tb\n\t```", [("py", "if a:\n\tb\n")]),
        ("```py\na\nBetter:\n```py\nb\n```", [("py", "a\nBetter:\n"), ("py", "b\n")]),
        ("````markdown\nRun:\n```py\na\n```\n````", [("py", "a\n")]),
        ("~~~\n```py\na\n```\n~~~", [("py", "a\n")]),
        ("The program: ```py\na\n```\nIt runs.", [("py", "a\n")]),
        ("Use ```py``` and ```a``` here.\n", []),
        ("```py\na```", [("py", "a")]),
        ("```py\nprint(1)```\n", [("py", "print(1)")]),
        ("Traceback:\n    ~~~^~~~\n```py\na\n```", [("py", "a\n")]),
    ],
)
def test_blocks_that_break_the_rules_are_still_read(text: str, blocks: list[tuple[str, str]]) -> None:
    assert found(text) == blocks


@pytest.mark.parametrize(
    ("info", "label"),
    [
        ("python3.11", "python3.11"),
        (" Python", "python"),
        ("python title='a.py'", "python"),
        ("c++", "c++"),
        ("{.python .numberLines}", "python"),
        ("{python}", "python"),
        ("python{1,3}", "python"),
        ("python,linenos", "python"),
        ("python:main.py", "python"),
        ("language-python", "python"),
        ("", ""),
    ],
)
def test_the_label_is_the_first_word_of_the_info_string(info: str, label: str) -> None:
    assert found(f"```{info}\na\n```") == [(label, "a\n")]


def test_an_unclosed_block_is_marked() -> None:
    assert [b.is_closed for b in fenced_blocks("```\na\n```\n```\nb")] == [True, False]


def test_long_texts_take_linear_time() -> None:
    assert len(found("```py\na\n```\n" * 20_000)) == 20_000
    assert len(found("```\n" * 100_001)) == 50_001
    assert found("> " * 300_000 + "x") == []
    assert len(found("~~~\n```\n" * 20_000)) > 0
