"""Reward `code`: the completion's Python program passes its tests, in a sandbox (sandbox.py) and never outside of it.

The program is the last fenced Python block of the completion, else all of it. The reference holds the tests:
`{"inputs": [...], "outputs": [...]}`, what the program reads and must write, a process each; or
`{"tests": ["assert add(1, 2) == 3", ...], "setup": "import math"}`, statements that run after the program in its own
process; or the text of such tests, which is one test. Where programs must not know that they are tested, use the first
form: in the second, one that goes looking for the tests in its own process can find them.
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
from grpo_mega.sandbox.sandbox import Limits, Outcome, Sandbox, check_limits, python_command, require_isolation
from grpo_mega.types import UserError

_FENCE = re.compile(r"^[ \t]{0,3}```[ \t]*(\w*)[ \t]*\r?$", re.MULTILINE)
_PYTHON = ("", "python", "python3", "py")
_MEGABYTE = 1 << 20
_SHORTEST_SECONDS = 0.05  # what is left must suffice to start a process

# Runs before the program does: what it needs later is kept in names that the program would have to look for.
_TESTER = """
import json, os
def _run(_json=json, _os=os):
    with open(3, encoding="utf-8") as file:
        job = _json.load(file)
    report, write = _os.dup(1), _os.write
    _os.dup2(_os.open("/dev/null", _os.O_WRONLY), 1)
    space = {"__name__": "program"}
    exec(compile(job["program"], "program.py", "exec"), space)
    exec(compile(job["setup"], "setup.py", "exec"), space)
    for number, test in enumerate(job["tests"]):
        try:
            exec(compile(test, "test.py", "exec"), space)
        except BaseException:
            continue
        write(report, f"{job['word']} {number}\\n".encode())
_run()
"""


@dataclass(frozen=True)
class Tests:
    """Of one prompt: pairs of input and output, or statements that raise when they fail."""

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
    """Refuse values that `code` cannot work with, and a machine without isolation.

    Raises:
        UserError: a limit is not positive, `partial` is neither true nor false, or a program cannot be isolated here.
    """
    if not isinstance(partial, bool):
        raise UserError(f"partial={partial!r} is neither true nor false", remedy="use one of them")
    check_limits(seconds, 4.0, memory_mb=memory_mb, file_mb=file_mb, output_kb=output_kb, processes=processes)
    if memory_mb < 64:
        raise UserError(f"memory_mb={memory_mb} is too little for Python to start", remedy="use 64 or more")
    require_isolation()


def longest_seconds(seconds: float = 4.0, **_: object) -> float:
    """How long one scoring may take by its own limit."""
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
    """1 when the program passes all tests, else 0; with `partial`, the share that it passes.

    Args:
        prompt: not looked at.
        completion: its program is extracted.
        reference: the tests, see above.
        partial: count the tests that pass; all are run then.
        seconds: wall clock of all tests together, the start of the sandbox included; also CPU time of each process.
        memory_mb: address space of each process.
        file_mb: all that a program may write, in memory.
        output_kb: what a program may print to a test; more is a wrong answer.
        processes: processes and threads at the same time.

    Raises:
        ValueError: the reference holds no tests.
        SandboxError: the isolation was lost; the program was not run.
    """
    deadline = time.monotonic() + seconds
    tests = _tests(reference)
    program = program_of(completion)
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
            passed += _passed_statements(sandbox, program, tests, deadline)
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


def program_of(completion: str) -> str:
    """The last fenced block that is Python or says nothing, else everything."""
    fences = list(_FENCE.finditer(completion))
    for opening, closing in zip(reversed(fences[:-1]), reversed(fences[1:]), strict=True):
        if opening[1].lower() in _PYTHON and not closing[1]:
            block = completion[opening.end() : closing.start()]
            if opening[1] or block.strip():
                return block.removeprefix("\n")
    return completion


def same_output(expected: str, printed: str) -> bool:
    """Equal line by line but for white space at their ends, or word by word with equal decimal numbers."""
    lines, wanted = printed.rstrip().splitlines(), expected.rstrip().splitlines()
    if [line.rstrip() for line in lines] == [line.rstrip() for line in wanted]:
        return True
    if len(lines) != len(wanted):
        return False
    words, wished = printed.split(), expected.split()
    return len(words) == len(wished) and all(map(_same_word, words, wished))


def _same_word(word: str, wished: str) -> bool:
    if word == wished:
        return True
    try:
        return len(word) < 100 and len(wished) < 100 and Decimal(word) == Decimal(wished)
    except InvalidOperation:
        return False


def _passed_statements(sandbox: Sandbox, program: str, tests: Tests, deadline: float) -> int:
    """How many hold: the tester says so with a word that the program does not know when it starts."""
    word = secrets.token_hex(16)
    job = {"program": program, "setup": tests.setup, "tests": tests.statements, "word": word}
    argv = [*python_command()[:-1], _TESTER]
    left = max(_SHORTEST_SECONDS, deadline - time.monotonic())
    outcome: Outcome = sandbox.run(argv, seconds=left, source=json.dumps(job))
    said = set(outcome.stdout.splitlines())
    return sum(f"{word} {number}" in said for number in range(len(tests.statements)))


@functools.lru_cache(maxsize=1024)
def _tests(reference: str) -> Tests:
    """The tests of a reference.

    Raises:
        ValueError: it holds none, or not in this form.
    """
    if not reference.lstrip().startswith("{"):
        if not reference.strip():
            raise ValueError("the reference is empty, so there is no test; correct the data or its answer_key")
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
        raise ValueError(f"the reference {reference[:80]!r} holds no tests ({error}); correct the data") from error
    texts = (tests.setup, *tests.statements, *(text for pair in tests.pairs for text in pair))
    if not tests.number or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the reference {reference[:80]!r} holds no tests, or some that are no text; correct the data")
    return tests
