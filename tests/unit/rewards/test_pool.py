"""The reward pool returns every key, whatever its reward does, and leaves no process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards.pool import RewardPool
from grpo_mega.types import Reward, UserError
from grpo_mega.workers import json_worker

USER_REWARDS = '''
import glob, json, os, signal, sys, time
from grpo_mega.rewards import reward

@reward(low=-0.5, high=1.0)
def obey(prompt, completion, reference):
    """Behave as the completion requests."""
    what, _, argument = completion.partition(" ")
    if what == "sleep": time.sleep(float(argument))
    if what == "mark":
        path, _, ended = argument.partition(" ")
        open(f"{path}.{os.getpid()}", "x").close()
        if len(glob.glob(f"{path}.*")) <= int(ended): time.sleep(600)
    if what == "await":
        while not os.path.exists(argument): time.sleep(0.01)
        open(f"{argument}.{reference}", "x").close()
    if what == "spin":
        while True: pass
    if what == "ignore_alarm":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        while True: pass
    if what == "exit": os._exit(3)
    if what == "segv": os.kill(os.getpid(), signal.SIGSEGV)
    if what == "raise": raise KeyError("no such thing")
    if what == "leave": sys.exit("leaving")
    if what == "write": os.write(int(sys.argv[1]), argument.encode("latin-1"))
    if what == "close": os.closerange(3, 65536)
    if what == "replace":
        os.close(int(sys.argv[1]))
        os.open(os.devnull, os.O_RDWR)
    if what == "child": return float(os.system(f"test -e /proc/self/fd/{sys.argv[1]}") != 0)
    if what == "print": print("noise on stdout", flush=True)
    if what == "steps": return json.loads(argument)
    return {"none": None, "text": "1.0", "nan": float("nan"), "high": 1.5}.get(what, 1.0)

@reward(low=0.0, high=1.0)
def is_clean(prompt, completion, reference):
    ranks = [k for k in os.environ if k in ("RANK", "WORLD_SIZE") or k.startswith(("MASTER_", "VLLM_", "TORCH"))]
    heavy = [m for m in ("torch", "vllm", "megatron", "pydantic") if m in sys.modules]
    files = [f for f in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{f}")]
    sockets = [f for f in files if os.readlink(f"/proc/self/fd/{f}").startswith("socket:") and int(f) > 2]
    if ranks or heavy or len(sockets) != 1: raise RuntimeError(str((ranks, heavy, sockets)))
    return 1.0
'''


@pytest.fixture(autouse=True)
def user_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_rewards.py").write_text(USER_REWARDS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


OBEY = RewardTerm(name="user_rewards:obey")


def score_all(
    completions: list[str], *, terms: list[RewardTerm], workers: int = 1, timeout_seconds: float = 60.0
) -> dict[int, Reward]:
    """Score with a time limit that a busy machine does not reach, unless the test needs one that is reached."""
    with RewardPool(terms, workers=workers, timeout_seconds=timeout_seconds) as pool:
        for key, completion in enumerate(completions):
            pool.submit(key, "prompt", completion, "7")
        return pool.collect()


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_value_is_the_weighted_sum_of_the_components() -> None:
    terms = [RewardTerm(name="gsm8k", weight=2.0), RewardTerm(name="format", weight=0.5)]
    rewards = score_all(["#### 7", "it is 7", "#### 8", ""], terms=terms)
    assert [rewards[key].value for key in range(4)] == [2.5, 2.0, 0.5, 0.0]
    assert rewards[1] == Reward(value=2.0, components={"gsm8k": 1.0, "format": 0.0}, failures=())


@pytest.mark.parametrize("workers", [1, 3])
def test_a_reward_that_fails_scores_its_floor_and_affects_no_other_scoring(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    bad = ["sleep 30", "spin", "exit", "segv", "raise", "leave", "none", "text", "nan", "high"]
    completions = [text for what in bad for text in (what, "fine", "#### 7")]
    terms = [OBEY, RewardTerm(name="gsm8k", weight=0.25)]
    with caplog.at_level(logging.WARNING):
        rewards = score_all(completions, terms=terms, workers=workers, timeout_seconds=2.0)
    assert sorted(rewards) == list(range(30))
    for key, completion in enumerate(completions):
        failed = completion in bad
        assert rewards[key].failures == (("obey",) if failed else ()), completion
        assert rewards[key].components["obey"] == (-0.5 if failed else 1.0)
        assert rewards[key].components["gsm8k"] == float(completion == "#### 7")  # scored even after a crash
        assert rewards[key].value == (-0.5 if failed else 1.0) + 0.25 * (completion == "#### 7")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4  # one for each kind, however many failed
    assert any("obey timed out for 2 of 30 completions, which score its floor -0.5" in line for line in lines)
    assert any("obey crashed for 2 of 30" in line for line in lines)
    assert any("obey raised an exception for 2 of 30" in line and "completion='raise'" in line for line in lines)
    assert any("obey returned no number in its range for 4 of 30" in line and "NoneType" in line for line in lines)


def test_an_exception_is_logged_with_its_traceback_and_row_and_a_bad_value_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING), RewardPool([OBEY], workers=1, timeout_seconds=60.0) as pool:
        for key, completion in enumerate(["fine", "raise", "raise", "nan"]):
            pool.submit(key, "the question", completion, "7", dataset="sums", index=10 + key)
        pool.collect()
    raised, bad = (record.getMessage() for record in caplog.records)
    assert "raised an exception for 2 of 4 completions, which score its floor -0.5" in raised
    assert "row 11 of data set sums, prompt='the question', completion='raise', reference='7'" in raised
    assert 'if what == "raise": raise KeyError("no such thing")' in raised  # the line of the user's file
    assert raised.endswith("KeyError: 'no such thing'")
    assert "worker.py" not in raised
    assert "returned no number in its range for 1 of 4 completions" in bad
    assert "row 13 of data set sums" in bad
    assert "Traceback" not in bad


def test_a_failed_scoring_leaves_the_reward_without_a_value_if_failures_drop() -> None:
    terms = [OBEY, RewardTerm(name="gsm8k", weight=0.25)]
    with RewardPool(terms, workers=1, timeout_seconds=60.0, on_failure="drop") as pool:
        for key, completion in enumerate(["raise", "nan", "exit", "#### 7"]):
            pool.submit(key, "", completion, "7")
        found = pool.collect()
    for key in range(3):
        assert found[key] == Reward(value=None, components={"gsm8k": 0.0}, failures=("obey",))
    assert found[3] == Reward(value=1.25, components={"obey": 1.0, "gsm8k": 1.0})


def test_a_term_scores_only_the_rows_of_its_sets() -> None:
    terms = [
        RewardTerm(name="gsm8k", datasets=("sums",)),
        RewardTerm(name="exact", weight=2.0, datasets=("words", "names")),
        RewardTerm(name="format", weight=0.5),
    ]
    with RewardPool(terms, workers=1, timeout_seconds=60.0) as pool:
        for key, dataset in enumerate(["sums", "words", "names"]):
            pool.submit(key, "", "#### 7", "#### 7", dataset=dataset)
        found = pool.collect()
    assert found[0] == Reward(value=1.5, components={"gsm8k": 1.0, "format": 1.0})
    assert found[1] == found[2] == Reward(value=2.5, components={"exact": 1.0, "format": 1.0})


def test_steps_come_back_weighted_and_a_number_beside_them_ends_with_the_completion() -> None:
    text = "steps [[4, 0.5], [9, -0.25]]"
    terms = [RewardTerm(name="user_rewards:obey", weight=2.0), RewardTerm(name="user_rewards:is_clean", weight=3.0)]
    with RewardPool(terms, workers=1, timeout_seconds=60.0) as pool:
        pool.submit(0, "", text, "")
        pool.submit(1, "", "fine", "")
        found = pool.collect()
    assert found[0].steps == ((4, 1.0), (9, -0.5), (len(text) - 1, 3.0))
    assert found[0].components == {"obey": 0.125, "is_clean": 1.0}
    assert found[0].value == 2.0 * 0.125 + 3.0
    assert found[1].steps is None


@pytest.mark.parametrize(
    "steps", ["[]", "[[1]]", "[[1, 2, 3]]", "[[-1, 0.5]]", "[[0.5, 0.5]]", "[[1, 2.0]]", "[[1, null]]"]
)
def test_malformed_steps_fail_like_any_other_value(steps: str) -> None:
    with RewardPool([OBEY], workers=1, timeout_seconds=60.0) as pool:
        pool.submit(0, "", f"steps {steps}", "")
        found = pool.collect()[0]
    assert (found.value, found.failures, found.steps) == (-0.5, ("obey",), None)


def test_failures_are_counted_over_the_life_of_the_pool() -> None:
    with RewardPool([OBEY], workers=1, timeout_seconds=60.0) as pool:
        for _ in range(2):
            for key, completion in enumerate(["raise", "fine", "exit"]):
                pool.submit(key, "", completion, "")
            assert len(pool.collect()) == 3
        assert pool.failure_counts == {"obey": 4}
        assert pool.collect() == {}


def test_a_catastrophic_regular_expression_is_ended_at_the_time_limit_by_the_process_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(json_worker, "GRACE_SECONDS", 60.0)  # on a busy machine an alarm may come late
    terms = [RewardTerm(name="format", args={"pattern": "(a+)+b$"})]
    rewards = score_all(["a" * 60, "aab", "a" * 60], terms=terms, timeout_seconds=2.0)
    assert f"exit status -{signal.SIGALRM}" in caplog.text  # the parent would have sent SIGKILL
    assert [rewards[key].failures for key in range(3)] == [("format",), (), ("format",)]
    assert rewards[1].value == 1.0


def test_a_reward_that_disables_the_alarm_is_ended_by_the_parent() -> None:
    rewards = score_all(["ignore_alarm", "fine"], terms=[OBEY], timeout_seconds=2.0)
    assert rewards[0].failures == ("obey",)
    assert rewards[1] == Reward(value=1.0, components={"obey": 1.0})


def test_scoring_continues_while_the_caller_does_something_else(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with RewardPool([OBEY], workers=2, timeout_seconds=60.0) as pool:
        for key in range(4):
            pool.submit(key, "", f"await {gate}", str(key))
        gate.touch()  # a submit that waits for its scoring would never return
        assert wait_until(lambda: len(list(tmp_path.glob("gate.*"))) == 4)  # before `collect`
        assert {reward.failures for reward in pool.collect().values()} == {()}


def test_values_do_not_depend_on_the_number_of_workers() -> None:
    completions = [f"step {i}\n#### {i % 9}" + "x" * (i % 7 * 20_000) for i in range(120)]
    terms = [RewardTerm(name="gsm8k"), RewardTerm(name="format", weight=0.1)]
    assert score_all(completions, terms=terms, workers=1) == score_all(completions, terms=terms, workers=3)


def test_any_text_reaches_the_worker_unchanged() -> None:
    texts = ["\0", "\ud800", "\u2028\n\r\n", "\U0001f600" * 1000, '"\\', "x" * 300_000]
    with RewardPool([RewardTerm(name="exact")], workers=1, timeout_seconds=60.0) as pool:
        for key, text in enumerate(texts):
            pool.submit(key, text, text, text)
        assert [reward.value for _, reward in sorted(pool.collect().items())] == [1.0] * len(texts)


def test_workers_inherit_nothing_of_ranks_and_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "VLLM_HOST_IP"):
        monkeypatch.setenv(name, "1")
    (reward,) = score_all(["fine"], terms=[RewardTerm(name="user_rewards:is_clean")]).values()
    assert reward.value == 1.0


def test_output_of_a_reward_does_not_reach_the_stdout_of_the_parent(capfd: pytest.CaptureFixture[str]) -> None:
    (reward,) = score_all(["print"], terms=[OBEY]).values()
    assert reward.value == 1.0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "noise on stdout" in captured.err


@pytest.mark.parametrize(
    ("completion", "shown"),
    [
        ("write garbage\n", "contained b'garbage'"),
        ("write no end of line", "contained b'no end of line["),
        ("write \xff\n", r"contained b'\xff'"),
        ("write \n", "contained b''"),
        ("write 5\n", "contained 5"),
        ("write null\n", "contained None"),
        ("write [7, 0, 1.0, null, 0.0]\n", "contained [7, 0, 1.0, None, 0.0]"),
        ('write [0, 0, "1.0", null, 0.0]\n', "contained [0, 0, '1.0', None, 0.0]"),
        ("write [0, 0, NaN, null, 0.0]\n", "contained [0, 0, nan, None, 0.0]"),
        ("write [0, 0, 1.0, null]\n", "contained [0, 0, 1.0, None]"),
        ("write [0, 0, null, null, 0.0]\n", "contained [0, 0, None, None, 0.0]"),
        ('write [0, 0, null, ["sneezed", ""], 0.0]\n', "contained [0, 0, None, ['sneezed', '']"),
        ("close", "exit status 1"),
        ("replace", "exit status 1"),
    ],
    ids=repr,
)
def test_a_reward_that_writes_to_the_connection_of_its_worker_or_closes_it_crashes_that_scoring_only(
    completion: str, shown: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with RewardPool([OBEY], workers=1, timeout_seconds=60.0) as pool:
        for key, text in enumerate([completion, "fine"]):
            pool.submit(key, "", text, "")
        found = pool.collect()
        assert pool.failure_counts == {"obey": 1}
    assert (found[0].value, found[0].failures) == (-0.5, ("obey",))
    assert (found[1].value, found[1].failures) == (1.0, ())
    assert "obey crashed for 1 of 2 completions" in caplog.text
    assert shown in caplog.text
    assert "Traceback" not in capfd.readouterr().err


def test_programs_that_a_reward_starts_do_not_get_the_connection() -> None:
    with RewardPool([OBEY], workers=1, timeout_seconds=60.0) as pool:
        pool.submit(0, "", "child", "")
        assert pool.collect()[0].value == 1.0


def test_a_worker_that_is_killed_while_idle_is_replaced_without_a_failure() -> None:
    with RewardPool([OBEY], workers=2, timeout_seconds=60.0) as pool:
        victims = pool.worker_pids
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: len(pool.worker_pids) == 2 and not set(victims) & set(pool.worker_pids))
        pool.submit(0, "", "fine", "")
        assert pool.collect()[0].failures == ()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP])
def test_a_scoring_whose_worker_another_program_ends_is_made_again_once(tmp_path: Path, number: signal.Signals) -> None:
    # a stopped worker is found by the limit; a worker that is ended must not reach it before the signal
    with RewardPool([OBEY], workers=1, timeout_seconds=5.0 if number == signal.SIGSTOP else 60.0) as pool:
        for times in (1, 2):
            mark = tmp_path / f"in_scoring_{times}"
            for key, text in enumerate([f"mark {mark} {times}", "fine"]):
                pool.submit(key, "", text, "")
            for disturbed in range(times):
                assert wait_until(lambda n=disturbed, m=mark: len(list(tmp_path.glob(f"{m.name}.*"))) > n)  # type: ignore[misc]
                (pid,) = pool.worker_pids
                assert mark.with_suffix(f".{pid}").exists()
                os.kill(pid, number)
            found = pool.collect()
            assert found[0].failures == (() if times == 1 else ("obey",)), times
            assert (found[0].value, found[1].value) == (1.0 if times == 1 else -0.5, 1.0)


def test_a_wrong_term_is_rejected_before_a_worker_starts() -> None:
    with pytest.raises(UserError, match="did you mean 'exact'"):
        RewardPool([RewardTerm(name="exakt")], workers=1, timeout_seconds=1.0)


def test_a_key_submitted_twice_and_a_closed_pool_are_errors() -> None:
    with RewardPool([OBEY], workers=1, timeout_seconds=60.0) as pool:
        pool.submit(5, "", "fine", "")
        with pytest.raises(ValueError, match="key=5 was submitted twice"):
            pool.submit(5, "", "fine", "")
        pool.collect()
        pool.submit(5, "", "fine", "")
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(6, "", "fine", "")
    with pytest.raises(RuntimeError, match="closed"):
        pool.collect()


def test_a_module_that_cannot_be_imported_in_the_worker_stops_the_start(tmp_path: Path) -> None:
    module = "import __main__\nif getattr(__main__, '__spec__', None) and 'worker' in __main__.__spec__.name: {}\n"
    rest = "from grpo_mega.rewards import reward\n@reward(low=0.0, high=1.0)\ndef f(p, c, r): return 1.0\n"
    (tmp_path / "raises_there.py").write_text("import os\n" + module.format("raise OSError('no disk')") + rest)
    (tmp_path / "dies_there.py").write_text("import os\n" + module.format("os._exit(7)") + rest)
    with pytest.raises(RuntimeError, match="no disk"):
        RewardPool([RewardTerm(name="raises_there:f")], workers=1, timeout_seconds=1.0)
    with pytest.raises(RuntimeError, match=r"3 reward workers in a row .* exit status 7"):
        RewardPool([RewardTerm(name="dies_there:f")], workers=1, timeout_seconds=1.0)


def test_close_kills_workers_in_the_middle_of_a_scoring() -> None:
    pool = RewardPool([OBEY], workers=1, timeout_seconds=3600.0)  # a close that waits for the scoring would time out
    pids = pool.worker_pids
    pool.submit(0, "", "spin", "")
    time.sleep(0.1)
    pool.close()
    assert not any(is_running(pid) for pid in pids)


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start a program with one worker that loops and ignores its alarm, and one idle worker."""
    script = (
        f"import sys, time; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from grpo_mega.config.rollout_sections import RewardTerm\n"
        "from grpo_mega.rewards.pool import RewardPool\n"
        "pool = RewardPool([RewardTerm(name='user_rewards:obey')], workers=2, timeout_seconds=600.0)\n"
        "pool.submit(0, '', 'ignore_alarm', '')\n"
        "time.sleep(0.2)\n"
        "import json; print(json.dumps(pool.worker_pids), flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    yield process, pids
    process.kill()
    process.wait()
    process.stdout.close()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_no_worker_outlives_a_parent_that_was_killed(parent: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, pids = parent
    assert all(is_running(pid) for pid in pids)
    process.kill()
    process.wait()
    assert wait_until(lambda: not any(is_running(pid) for pid in pids))
