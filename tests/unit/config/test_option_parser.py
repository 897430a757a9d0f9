"""Unknown options are named before missing arguments; everything else is parsed as argparse does."""

from __future__ import annotations

import argparse

import pytest

from grpo_mega.config.option_parser import OptionParser


def parser() -> OptionParser:
    made = OptionParser(prog="plan")
    made.config_keys = ["train.steps", "sampling.group_size", "sampling.max_tokens", "evaluation.max_tokens"]
    made.add_argument("config")
    made.add_argument("overrides", nargs="*")
    made.add_argument("--nodes", type=int)
    made.add_argument("--num-gpus", type=int)
    made.add_argument("-v", "--verbose", action="store_true")
    made.add_argument("--hidden", action="store_true", help=argparse.SUPPRESS)
    return made


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--bogus"], "its options are --help, --nodes, --num-gpus, --verbose"),
        (["--node"], None),
        (["--noeds", "3"], "did you mean --nodes?"),
        (["c.yaml", "--num_gpus=2"], "did you mean --num-gpus?"),
        (["c.yaml", "--hiden"], "its options are"),
        (["c.yaml", "--train.steps=3"], "did you mean the override train.steps=3?"),
        (["c.yaml", "--train-step"], "did you mean the override train.steps=VALUE?"),
        (["c.yaml", "--max-tokens", "8"], "did you mean the override sampling.max_tokens=VALUE?"),
        (["c.yaml", "-x"], "-x is not an option of plan"),
    ],
    ids=str,
)
def test_an_unknown_option_is_answered_in_one_line_with_the_nearest(
    arguments: list[str], remedy: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_intermixed_args(arguments)
    message = capsys.readouterr().err
    assert caught.value.code == 2
    if remedy is None:  # an abbreviation of a known option: argparse reports what is missing
        assert "not an option" not in message
    else:
        assert remedy in message
        assert message.startswith("error: -")
        assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["c.yaml", "--nodes", "-3", "a.b=-1"], ("c.yaml", ["a.b=-1"], -3)),
        (["c.yaml", "a.b=1", "--nodes=3", "c.d=2"], ("c.yaml", ["a.b=1", "c.d=2"], 3)),
        (["-v", "c.yaml", "--nod", "3"], ("c.yaml", [], 3)),
        (["c.yaml", "--", "--bogus"], ("c.yaml", ["--bogus"], None)),
        (["-", "-1.5"], ("-", ["-1.5"], None)),
    ],
    ids=str,
)
def test_everything_else_is_parsed_as_before(arguments: list[str], found: tuple[str, list[str], int | None]) -> None:
    args = parser().parse_intermixed_args(arguments)
    assert (args.config, args.overrides, args.nodes) == found
