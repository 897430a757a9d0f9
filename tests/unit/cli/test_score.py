"""tools/score.py: rows in, rows with `reward` out; bad input ends with exit 2, file and line."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.step_columns import write_step

TOOL = Path(__file__).resolve().parents[3] / "tools" / "score.py"


def run_score(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--workers", "1", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_rows_keep_order_and_keys_and_get_a_reward(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "completion": "#### 7", "answer": "steps #### 7", "id": "a"},
        {"prompt": "q", "completion": "it is 7", "answer": 7},
        {"prompt": "q", "completion": "\ud800", "answer": "7"},
        {"prompt": "q", "completion": "#### 7", "answer": "nothing"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")  # with a BOM
    done = run_score("--reward", "gsm8k", "--args", '{"strict": true}', "--json", "rows.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *scored, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert scored == [row | {"reward": value} for row, value in zip(rows, [1.0, 0.0, 0.0, 0.0], strict=True)]
    assert summary == {"reward_name": "gsm8k", "num_rows": 4, "reward_mean": 0.25, "num_failures": 1}
    assert "does not end in a number" in done.stderr


def test_a_reward_gets_the_same_inputs_as_in_a_run(tmp_path: Path) -> None:
    code = (
        "import json\nfrom grpo_mega.rewards import reward\n@reward(low=0, high=9)\n"
        "def f(*, prompt, completion, reference, messages, completion_with_special_tokens, fields, dataset):\n"
        "    with open('seen.jsonl', 'a') as file: file.write(json.dumps(locals(), default=str) + '\\n')\n"
        "    if 'level' not in fields: raise KeyError('level')\n"
        "    return fields['level']\n"
    )
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    rows = [
        {"prompt": chat, "completion": "7", "answer": 7, "level": 3, "dataset": "sums",
         "completion_with_special_tokens": "7<|end|>"},
        {"prompt": "q", "completion": "7", "answer": "7"},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = run_score("--reward", "mine:f", "--on-failure", "drop", "--json", "rows.jsonl", cwd=tmp_path)
    *scored, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["reward"] for row in scored] == [3.0, None]
    assert (summary["reward_mean"], summary["num_failures"]) == (3.0, 1)
    assert "if 'level' not in fields: raise KeyError('level')" in done.stderr
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert [{key: found[key] for key in sorted(found) if key != "file"} for found in seen] == [
        {"completion": "7", "completion_with_special_tokens": "7<|end|>", "dataset": "sums", "fields": {"level": 3},
         "messages": chat, "prompt": "s\n\nq", "reference": "7"},
        {"completion": "7", "completion_with_special_tokens": "7", "dataset": "", "fields": {},
         "messages": [{"role": "user", "content": "q"}], "prompt": "q", "reference": "7"},
    ]  # fmt: skip


def test_a_users_reward_is_found_in_the_working_directory(tmp_path: Path) -> None:
    code = "from grpo_mega.rewards import reward\n@reward(low=0, high=9)\ndef f(p, c, r, n=1): return len(c) * n\n"
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "", "completion": "abc", "answer": ""}\n', encoding="utf-8")
    done = run_score("--reward", "mine:f", "--args", '{"n": 2}', "rows.jsonl", cwd=tmp_path)
    assert json.loads(done.stdout)["reward"] == 6.0


@pytest.mark.parametrize(
    ("line", "arguments", "fragment"),
    [
        (b"{not json", ("--reward", "exact"), "rows.jsonl:2: b'{not json' is not JSON"),
        (b"\xff\xfe", ("--reward", "exact"), "rows.jsonl:2: "),
        (b"[1]", ("--reward", "exact"), "rows.jsonl:2: a row must be an object"),
        (b'{"prompt": "a", "answer": "b"}', ("--reward", "exact"), "rows.jsonl:2: 'completion' is missing"),
        (
            b'{"prompt": 1, "completion": "", "answer": "b"}',
            ("--reward", "exact"),
            "rows.jsonl:2: prompt=1 must be a string",
        ),
        (
            b'{"prompt": [{"role": "user"}], "completion": "", "answer": "b"}',
            ("--reward", "exact"),
            'rows.jsonl:2: prompt=[{"role": "user"}] must be a string',
        ),
        (
            b'{"prompt": "", "completion": "", "answer": "", "messages": "x"}',
            ("--reward", "exact"),
            'rows.jsonl:2: messages="x" must be a list of {role, content}',
        ),
        (
            b'{"prompt": "", "completion": "", "answer": "", "dataset": 3}',
            ("--reward", "exact"),
            "rows.jsonl:2: dataset=3 must be a string",
        ),
        (b'{"prompt": "", "completion": "", "answer": true}', ("--reward", "exact"), "rows.jsonl:2: answer=true"),
        (b"", ("--reward", "exakt"), "did you mean 'exact'"),
        (b"", ("--reward", "exact", "--args", "[1]"), "--args=[1] must be a JSON object"),
        (b"", ("--reward", "exact", "--args", "{"), "--args={ must be a JSON object"),
        (b"", ("--reward", "exact", "--timeout-seconds", "0"), "both must be positive"),
        (b"", ("--reward", "exact", "--timeout-seconds", "nan"), "both must be positive and finite"),
    ],
)
def test_wrong_input_is_exit_2_with_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: bytes,
    arguments: tuple[str, ...],
    fragment: str,
) -> None:
    good = b'{"prompt": "", "completion": "", "answer": ""}\n'
    (tmp_path / "rows.jsonl").write_bytes(good + line + b"\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["score.py", "--workers", "1", *arguments, "rows.jsonl"])
    assert runpy.run_path(str(TOOL))["main"]() == 2  # in this process: a new process per case would be slow
    message = capsys.readouterr().err
    assert fragment in message
    assert len(message.splitlines()) == 1


def test_a_missing_file_is_exit_2(tmp_path: Path) -> None:
    done = run_score("--reward", "exact", "absent.jsonl", cwd=tmp_path)
    assert (done.returncode, done.stderr.startswith("error: absent.jsonl: No such file")) == (2, True)


def test_the_rollouts_of_a_step_are_scored_with_another_reward(tmp_path: Path) -> None:
    rows = [{"completion": "#### 46", "reward": 0.0}, {"completion": "#### 47", "reward": 0.0}]
    folder = write_step(tmp_path, 12, rows[:1], rows[1:])
    for given, expected in ((folder, [1.0, 0.0]), (folder / "part-00000.parquet", [1.0])):
        done = run_score("--reward", "gsm8k", str(given), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        scored = [json.loads(line) for line in done.stdout.splitlines()]
        assert [row["reward"] for row in scored] == expected
        assert scored[0]["completion_ids"] == [4, 6, 0]
    (folder / "part-00001.parquet").write_bytes(b"")
    done = run_score("--reward", "gsm8k", str(folder), cwd=tmp_path)
    assert done.returncode == 2
    assert "part-00001.parquet is damaged" in done.stderr
