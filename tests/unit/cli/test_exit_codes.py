"""A command prints an expected error as one line and returns its exit code; other errors keep their traceback."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.types import UserError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--step=9 was not found", remedy="use 1 to 8"), 2, "error: --step=9 was not found; use 1 to 8\n"),
        (RuntimeError("a rank failed"), 1, "error: a rank failed\n"),
        (FileNotFoundError(errno.ENOENT, "No such file"), 2, "error: [Errno 2] No such file\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: [Errno 28] No space left\n"),
        (OSError(errno.EIO, "Input/output error"), 1, "error: [Errno 5] Input/output error\n"),
    ],
)
def test_an_expected_error_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int, line: str
) -> None:
    @errors_as_exit_codes(RuntimeError, OSError)
    def main(argv: Sequence[str]) -> int:
        assert argv == ["run"]
        raise error

    assert main(["run"]) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("error", [RuntimeError("a defect"), ValueError("a defect"), FileNotFoundError("a defect")])
def test_an_error_that_the_command_does_not_expect_leaves_it(error: Exception) -> None:
    @errors_as_exit_codes()
    def main() -> int:
        raise error

    with pytest.raises(type(error), match="a defect"):
        main()


def test_a_closed_pipe_is_no_failure_of_the_command() -> None:
    @errors_as_exit_codes(OSError)
    def main() -> int:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        main()


def test_a_command_keeps_its_own_exit_code_and_documentation() -> None:
    @errors_as_exit_codes()
    def main() -> int:
        """Run the command line and return the exit code."""
        return 3

    assert main() == 3
    assert main.__doc__ == "Run the command line and return the exit code."
