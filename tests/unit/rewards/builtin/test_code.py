"""`code` scores programs by their tests in each form, and hostile programs cost only their own time limit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.rewards.builtin.code import code, program_of, same_output
from grpo_mega.rewards.pool import RewardPool
from grpo_mega.rewards.thought import answer_part
from grpo_mega.sandbox.sandbox import require_isolation
from grpo_mega.types import UserError


@pytest.fixture(scope="module", autouse=True)
def isolation() -> None:
    try:
        require_isolation()
    except UserError as error:
        pytest.skip(str(error))


SQUARES = json.dumps({"inputs": ["2\n", "3\n", "10\n"], "outputs": ["4\n", "9\n", "100\n"]})
ADD = json.dumps({"tests": ["assert add(1, 2) == 3", "assert add(-1, 1) == zero"], "setup": "zero = 0"})


def fenced(program: str) -> str:
    return f"This should do it:\n\n```python\n{program}\n```\n\nIt squares."


@pytest.mark.parametrize(
    ("program", "whole", "share"),
    [
        ("print(int(input()) ** 2)", 1.0, 1.0),
        ("print(int(input()) * 2)", 0.0, 1 / 3),
        ("print(float(input()) ** 2)", 1.0, 1.0),
        ("n = int(input())\nprint(n * n)\nraise SystemExit(1)", 0.0, 0.0),
        ("n = int(input()\n", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_a_program_is_scored_by_its_output(program: str, whole: float, share: float) -> None:
    assert code("", fenced(program), SQUARES, seconds=60.0) == whole
    assert code("", fenced(program), SQUARES, seconds=60.0, partial=True) == share


@pytest.mark.parametrize(
    ("program", "whole", "share"),
    [
        ("def add(a, b):\n    return a + b", 1.0, 1.0),
        ("def add(a, b):\n    return abs(a) + b", 0.0, 0.5),
        ("print('noise')\ndef add(a, b):\n    print(a)\n    return a + b", 1.0, 1.0),
        ("def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    exit(1)", 1.0, 1.0),
        ("import os\nos._exit(0)", 0.0, 0.0),
        ("raise SystemExit(0)", 0.0, 0.0),
        ("print('0\\n1\\npassed')\ndef add(a, b): exit(0)", 0.0, 0.0),
        ("def add(a, b):\n    raise KeyboardInterrupt", 0.0, 0.0),
        ("class E:\n    def __eq__(self, other): return True\ndef add(a, b): return E()", 0.0, 0.0),
        ("class E(int):\n    def __eq__(self, other): return True\ndef add(a, b): return E(7)", 0.0, 0.0),
        ("import unittest.mock\ndef add(a, b): return unittest.mock.ANY", 0.0, 0.0),
        ("import builtins\nbuiltins.exec = lambda *a: None\ndef add(a, b): return 7", 0.0, 0.0),
        ("import builtins\nbuiltins.all = lambda *a: True\ndef add(a, b): return 7", 0.0, 0.0),
        ("import sys\nsys.settrace(lambda *a: None)\ndef add(a, b): return a + b", 1.0, 1.0),
    ],
)
def test_a_program_is_scored_by_the_statements_that_pass(program: str, whole: float, share: float) -> None:
    assert code("", fenced(program), ADD, seconds=60.0) == whole
    assert code("", fenced(program), ADD, seconds=60.0, partial=True) == share


def test_a_reference_that_is_python_is_one_test() -> None:
    tests = "def check(f):\n    assert f(2) == 4\n\ncheck(square)"
    assert code("", fenced("def square(x): return x * x"), tests, seconds=60.0) == 1.0
    assert code("", fenced("def square(x): return x + 1"), tests, seconds=60.0) == 0.0


def test_a_program_does_not_see_the_files_of_its_earlier_tests() -> None:
    program = "import os\nprint(int(input()) ** 2 if not os.listdir('.') else 'seen')\nopen('left', 'w').close()"
    assert code("", fenced(program), SQUARES, seconds=60.0) == 1.0


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\nfirst\n```\nbetter:\n```py\nsecond\n```", "second\n"),
        ("```\nplain\n```", "plain\n"),
        ("```python\nprogram\n```\nand its output:\n```text\n4\n```", "program\n"),
        ("just = 1", "just = 1"),
        ("```python\nnever closed", "never closed"),
        ("```c++\nint main(){}\n```", ""),
        ("```\nprint(1)\n```\nOutput:\n```\n1\n```", "print(1)\n"),
        ("```\n1\n```", "1\n"),
        ("```python\n```\n", ""),
        ("```python\nprint(1)\n```\n```python\n\n```\n", "print(1)\n"),
        ("```python\nf = abs\n```\n```python\n>>> f(-1)\n1\n```", "f = abs\n"),
        ("```pycon\n1\n```\n```main.py\nprint(1)\n```\n```sh\npython main.py\n```", "print(1)\n"),
        ("```python\nfirst\n\nBetter:\n```python\nsecond\n```", "second\n"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ("1. Run\n     ```python\n     if a:\n         b\n     ```", "if a:\n    b\n"),
    ],
)
def test_the_program_is_the_last_block_of_python(completion: str, program: str) -> None:
    assert program_of(completion) == program


# Completions on which graders of other systems took the wrong block; `@@` stands for the program.
RECORDED = {
    "an output block without a label after the program": "Here:\n```python\n@@```\n\nExample output:\n```\n4\n```\n",
    "a text block after the program": "```python\n@@```\n```text\n4\n```\n",
    "a c++ translation after the program": "```python\n@@```\n\nIn C++:\n```c++\nint main(){}\n```\n",
    "label python3.11": "x\n```python3.11\n@@```\n",
    "info string": 'x\n```python title="a.py"\n@@```\n',
    "tildes": "x\n~~~python\n@@~~~\n",
    "unclosed fence": "Here\n```python\n@@",
    "a draft in the thought": "<think>\n```python\nbad```\n</think>\n```python\n@@```\n",
}


@pytest.mark.parametrize("completion", RECORDED.values(), ids=RECORDED.keys())
def test_the_program_of_every_recorded_case_is_found(completion: str) -> None:
    program = "print(int(input())**2)\n"
    assert program_of(answer_part("", completion.replace("@@", program))) == program


@pytest.mark.parametrize("label", ["Python", "PYTHON3", "py", "py3", "python3.11", "python title='a'", "{.python}"])
@pytest.mark.parametrize("fence", ["```", "~~~~"])
def test_every_usual_label_of_python_is_known(label: str, fence: str) -> None:
    assert program_of(f"{fence}text\n0\n{fence}\n{fence}{label}\na\n{fence}\n{fence}\n1\n{fence}") == "a\n"


def test_a_program_in_the_thought_is_not_run() -> None:
    right, wrong = fenced("print(int(input()) ** 2)"), fenced("print(0)")
    assert code("", f"<think>{right}</think>{wrong}", SQUARES, seconds=60.0) == 0.0
    assert code("<think>\n", right, SQUARES, seconds=60.0) == 0.0
    assert code("<think>\n", f"{wrong}</think>{right}", SQUARES, seconds=60.0) == 1.0


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n", "1 2", True),
        ("1 2  \n\n", "1 2\n", True),
        ("1.0 2", "1 2", True),
        ("1\n2", "1 2", False),
        ("1 2 3", "1 2", False),
        ("yes", "Yes", False),
        ("nan", "NaN", False),
        ("", "", True),
        ("1e999999999", "1e999999998", False),
    ],
)
def test_output_is_compared_by_lines_and_numbers(printed: str, expected: str, same: bool) -> None:
    assert same_output(expected, printed) is same


@pytest.mark.long
def test_every_labeled_program_scores_its_value() -> None:
    """The rows were written from docs/rewards.md: programs in every kind of block, honest ones and attacks."""
    text = (Path(__file__).parent / "labeled_attacks_on_code.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) >= 113
    wrong = [
        (row["what"], row["value"], value)
        for row in rows
        if (value := code(row["prompt"], row["completion"], row["answer"], **{"seconds": 20.0} | row["args"]))
        != row["value"]
    ]
    assert wrong == []


HOSTILE = [
    "while True: pass",
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "print(len('a' * 10**10))",
    "print(9**9**9)",
    "import re\nre.match('(a+)+b', 'a' * 100)",
    "print(open('/etc/passwd').read(), open('/root/.ssh/id_rsa').read())",
    "import socket\nsocket.create_connection(('127.0.0.1', 22))",
    "while True: print('x' * 10**6)",
    "import os, signal\nos.killpg(0, signal.SIGKILL)\nos.kill(os.getppid(), signal.SIGKILL)",
    "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass",
]


def test_hostile_programs_cost_only_their_own_time(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("4")
    programs = [*HOSTILE, f"open({str(secret)!r}, 'w').write('mine')", f"print(open({str(secret)!r}).read())"]
    terms = [RewardTerm(name="code", args={"seconds": 2.0})]
    with RewardPool(terms, workers=1, timeout_seconds=60.0) as pool:
        before = pool.worker_pids
        for key, program in enumerate(programs):
            pool.submit(key, "", fenced(program), '{"inputs": ["2"], "outputs": ["4"]}')
        rewards = pool.collect()
        assert pool.worker_pids == before
    assert [rewards[key].value for key in range(len(programs))] == [0.0] * len(programs)
    assert not any(reward.failures for reward in rewards.values())
    assert secret.read_text() == "4"
    assert code("", fenced("print(int(input()) ** 2)"), SQUARES, seconds=60.0) == 1.0


@pytest.mark.parametrize("reference", ["", "{}", '{"inputs": ["1"], "outputs": []}', '{"tests": [1]}', '{"tests": 7}'])
def test_a_reference_without_tests_is_an_error_of_the_data(reference: str) -> None:
    with pytest.raises(ValueError, match="the reference"):
        code("", "print(1)", reference)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"partial": 1}, "partial=1 must be true or false"),
        ({"seconds": 0}, "seconds=0 must be"),
        ({"memory_mb": 10}, "memory_mb=10 must be at least 64"),
        ({"processes": 0}, "processes=0 must be"),
        ({"file_mb": 1.5}, "file_mb=1.5 must be"),
        ({"seconds": 5}, "'code', 5 s, must be less than reward.timeout_seconds=5"),
    ],
)
def test_a_bad_argument_is_rejected_before_the_run(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_rewards([RewardTerm(name="code", args=args)], 5.0)
    assert message in str(caught.value)


def test_programs_do_not_get_the_environment_variables_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "SECRET_TOKEN", "4")
    tests = json.dumps({"inputs": [""], "outputs": ["None"]})
    assert code("", fenced("import os\nprint(os.environ.get('SECRET_TOKEN'))"), tests, seconds=60.0) == 1.0
