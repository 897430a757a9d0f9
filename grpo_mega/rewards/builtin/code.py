"""Reward `code`: the Python program of the completion passes its tests. It runs only in the sandbox.

The program is the last fenced block of the answer whose label names Python (`python`, `Python`, `py`, `python3.11`).
Without such a block it is the last block without a label, where blocks that look like a program come before outputs. An
answer without any fence is a program as a whole. A thought is not part of the answer (thought.py). fenced_blocks.py
finds the blocks. The reference holds the tests in one of three forms:

- `{"inputs": [...], "outputs": [...]}`: the input and the expected output of the program, one process per pair.
- `{"tests": ["assert add(1, 2) == 3", ...], "setup": "import math"}`: statements that run after the program, in its
  process.
- the text of such statements, which is one test.

Use the first form if programs must not see their tests. In the other forms a program can search its own process for
them.
"""

from __future__ import annotations

import functools
import json
import math
import re
import secrets
import time
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from grpo_mega.rewards.base import reward
from grpo_mega.rewards.fenced_blocks import fenced_blocks
from grpo_mega.rewards.statement_tester import tester_source
from grpo_mega.rewards.thought import answer_part
from grpo_mega.sandbox.sandbox import Limits, Outcome, Sandbox, check_limits, python_command, require_isolation
from grpo_mega.types import UserError

_PYTHON = re.compile(
    r"(?:python|py|ipython|cpython|pypy)(?:[-_]?[23](?:\.[0-9]{1,3}){0,2})?(?:[-_](?:code|exec|script))?|[\w.-]*\.py"
)
_PYTHON_SESSION = re.compile(r"\s*>>>")
_STATEMENT = re.compile(
    r"^[ \t]*(?:def|class|import|from|for|while|if|with|try|return|print|async|@)\b|[\w\])] ?=|\w\(", re.M
)
_MEGABYTE = 1 << 20
_SHORTEST_SECONDS = 0.05  # enough time to start a process


@dataclass(frozen=True)
class Tests:
    """The tests of one prompt: pairs of input and output, or statements that raise when they fail."""

    pairs: tuple[tuple[str, str], ...] = ()
    statements: tuple[str, ...] = ()
    setup: str = ""

    @property
    def number(self) -> int:
        return len(self.pairs) + len(self.statements)


def check_code_args(
    partial: bool = False,
    seconds: float = 4.0,
    memory_mb: int = 512,
    file_mb: int = 16,
    output_kb: int = 1024,
    processes: int = 8,
) -> None:
    """Check the arguments of `code`, and that this machine offers isolation.

    Raises:
        UserError: a limit is out of range, `partial` is not a boolean, or isolation is unavailable.
    """
    if not isinstance(partial, bool):
        raise UserError(f"partial={partial!r} must be true or false", remedy="use one of them")
    check_limits(seconds, 4.0, memory_mb=memory_mb, file_mb=file_mb, output_kb=output_kb, processes=processes)
    if memory_mb < 64:
        raise UserError(
            f"memory_mb={memory_mb} must be at least 64, which Python needs to start", remedy="use 64 or more"
        )
    require_isolation()


def longest_seconds(seconds: float = 4.0, **_: object) -> float:
    """Return the limit in seconds that the reward keeps for one scoring."""
    return seconds


@reward(low=0.0, high=1.0, check_args=check_code_args, seconds=longest_seconds)
def code(
    prompt: str,
    completion: str,
    reference: str,
    partial: bool = False,
    seconds: float = 4.0,
    memory_mb: int = 512,
    file_mb: int = 16,
    output_kb: int = 1024,
    processes: int = 8,
) -> float:
    """Return 1 when the program passes all tests, else 0; with `partial`, the fraction of tests that it passes.

    Args:
        prompt: if it ends with an opened thought, the completion begins inside of it.
        completion: the program is extracted from it.
        reference: the tests, see the docstring of this module.
        partial: return the fraction of passed tests; all tests run then.
        seconds: wall-clock limit of all tests together with the start of the sandbox; also the CPU limit per process.
        memory_mb: limit of the address space of each process, in MiB.
        file_mb: limit of all files of a program, which are in memory, in MiB.
        output_kb: limit of the output in one test, in KiB; a program that prints more fails the test.
        processes: limit of processes and threads at the same time.

    Raises:
        ValueError: the reference contains no tests.
        SandboxError: the isolation was lost; the program did not run.
    """
    deadline = time.monotonic() + seconds
    tests = _parse_tests(reference)
    program = program_of(answer_part(prompt, completion))
    if not program.strip():
        return 0.0
    limits = Limits(
        cpu_seconds=math.ceil(seconds),
        memory_bytes=memory_mb * _MEGABYTE,
        file_bytes=file_mb * _MEGABYTE,
        output_bytes=output_kb * 1024,
        processes=processes,
    )
    passed = 0
    with Sandbox(limits) as sandbox:
        if tests.statements:
            passed += _count_passed_statements(sandbox, program, tests, deadline)
        for given, expected in tests.pairs:
            left = deadline - time.monotonic()
            if left < _SHORTEST_SECONDS:
                break
            outcome = sandbox.run_python(program, seconds=left, stdin=given)
            right = outcome.succeeded and same_output(expected, outcome.stdout)
            passed += right
            if not right and not partial:
                break
    return passed / tests.number if partial else float(passed == tests.number)


def program_of(answer: str) -> str:
    """Return the program of an answer; empty if the answer has fenced blocks, but none with a Python program."""
    blocks = list(fenced_blocks(answer))
    if not blocks:
        return answer
    python = [b for b in blocks if _PYTHON.fullmatch(b.label) and not _PYTHON_SESSION.match(b.content)]
    unlabeled = [] if python else [b for b in blocks if not b.label and not _PYTHON_SESSION.match(b.content)]
    programs = [b.content for b in python or unlabeled if b.content.strip()]
    return next((p for p in reversed(programs) if python or _STATEMENT.search(p)), programs[-1] if programs else "")


def same_output(expected: str, printed: str) -> bool:
    """Compare line by line without white space at line ends, or word by word with decimal numbers by value."""
    lines, expected_lines = printed.rstrip().splitlines(), expected.rstrip().splitlines()
    if [line.rstrip() for line in lines] == [line.rstrip() for line in expected_lines]:
        return True
    if len(lines) != len(expected_lines):
        return False
    words, expected_words = printed.split(), expected.split()
    return len(words) == len(expected_words) and all(map(_same_word, words, expected_words))


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    try:
        return len(word) < 100 and len(expected) < 100 and Decimal(word) == Decimal(expected)
    except InvalidOperation:
        return False


def _count_passed_statements(sandbox: Sandbox, program: str, tests: Tests, deadline: float) -> int:
    """Return the number of passed statements, which the tester reports with a secret that the program does not know."""
    secret = secrets.token_hex(16)
    job = {"program": program, "setup": tests.setup, "tests": tests.statements, "secret": secret}
    argv = [*python_command()[:-1], _tester()]
    left = max(_SHORTEST_SECONDS, deadline - time.monotonic())
    outcome: Outcome = sandbox.run(argv, seconds=left, source=json.dumps(job))
    lines = set(outcome.stdout.splitlines())
    return sum(f"{secret} {number}" in lines for number in range(len(tests.statements)))


@functools.cache
def _tester() -> str:
    return tester_source()


@functools.lru_cache(maxsize=1024)
def _parse_tests(reference: str) -> Tests:
    """Parse the tests of a reference.

    Raises:
        ValueError: the reference contains no tests, or not in one of the three forms.
    """
    if not reference.lstrip().startswith("{"):
        if not reference.strip():
            raise ValueError("the reference is empty; correct the data or its answer_key")
        return Tests(statements=(reference,))
    try:
        found = json.loads(reference)
        statements = found.get("tests", [])
        tests = Tests(
            pairs=tuple(zip(found.get("inputs", []), found.get("outputs", []), strict=True)),
            statements=(statements,) if isinstance(statements, str) else tuple(statements),
            setup=found.get("setup", ""),
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the reference {reference[:80]!r} contains no tests ({error}); correct the data") from error
    texts = (tests.setup, *tests.statements, *(text for pair in tests.pairs for text in pair))
    if not tests.number or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"the reference {reference[:80]!r} contains no tests, or tests that are not strings; correct the data"
        )
    return tests
