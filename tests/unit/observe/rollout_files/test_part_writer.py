"""Parts are whole or not there, equal for equal rollouts, and small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from grpo_mega.observe.rollout_files import part_writer
from grpo_mega.observe.rollout_files.columns import RaggedColumn
from grpo_mega.observe.rollout_files.part_writer import RolloutFileError, write_part
from grpo_mega.observe.rollout_files.reader import read_rows
from tests.helpers.jobs import REPOSITORY
from tests.helpers.step_columns import DEFAULTS, columns_of

FULL = """
import resource, signal
from pathlib import Path
from grpo_mega.observe.rollout_files.part_writer import write_part
from tests.helpers.step_columns import columns_of
import numpy as np

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
ids = np.random.default_rng(0).integers(0, 150_000, 100_000).tolist()
row = {"completion_ids": ids, "sampler_log_probs": [0.0] * 100_000, "old_log_probs": None}
write_part(Path(r"FOLDER"), 3, 4, columns_of(row))
"""


def test_a_part_has_all_data_for_scripts_and_replay(tmp_path: Path) -> None:
    changed = {
        "reward_failures": ["format"],
        "loss_mask": [True, False, True],
        "steps": [(0, 0.5), (2, 1.0)],
        "expert_choices": list(range(20)),
    }
    write_part(tmp_path, 0, 1, columns_of(changed, {}, expert_shape=(2, 2)))
    first, second = read_rows(tmp_path)
    assert first == DEFAULTS | changed | {"step": 12, "group": 0}
    assert second == DEFAULTS | {"step": 12, "group": 1}
    metadata = pq.read_schema(tmp_path / "part-00000.parquet").metadata
    assert metadata == {
        b"grpo_mega.rollouts": b"3",
        b"grpo_mega.part": b"0",
        b"grpo_mega.num_parts": b"1",
        b"grpo_mega.expert_shape": b"2,2",
    }


@pytest.mark.parametrize("text", ["a\nb", "\u2028", "naïve \x00", "\x1b[31m", ""])
def test_any_text_comes_back(tmp_path: Path, text: str) -> None:
    write_part(tmp_path, 0, 1, columns_of({"completion": text}))
    assert [row["completion"] for row in read_rows(tmp_path)] == [text]


def test_a_lone_surrogate_is_written_as_its_number(tmp_path: Path) -> None:
    write_part(tmp_path, 0, 1, columns_of({"completion": "a\ud800b"}))
    assert [row["completion"] for row in read_rows(tmp_path)] == ["a\\ud800b"]


def test_a_rollout_without_a_reward_has_null(tmp_path: Path) -> None:
    write_part(tmp_path, 0, 1, columns_of({"reward": None, "reward_failures": ["judge"]}, {"reward": 0.0}))
    assert [row["reward"] for row in read_rows(tmp_path)] == [None, 0.0]


def test_equal_rollouts_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_part(tmp_path / name, 0, 1, columns_of({}, {"completion": "other"}))
    assert (tmp_path / "one" / "part-00000.parquet").read_bytes() == (
        tmp_path / "two" / "part-00000.parquet"
    ).read_bytes()


def test_a_shard_without_rollouts_has_a_part_without_rows(tmp_path: Path) -> None:
    write_part(tmp_path, 0, 1, columns_of({}).take(np.array([], np.int64)))
    assert read_rows(tmp_path) == []


def test_a_failed_write_leaves_no_file_and_says_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts" / "step_000012"
    ended = subprocess.run(
        [sys.executable, "-c", FULL.replace("FOLDER", str(folder))],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    last = ended.stderr.strip().splitlines()[-1]
    assert "RolloutFileError: rollouts of step 12" in last
    assert "part-00003.parquet cannot be written" in last
    assert "File too large" in last
    assert "bytes free" in last
    assert "the same command continues" in last
    assert list(folder.iterdir()) == []


def test_a_kill_before_the_rename_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(part_writer.os, "fsync", kill)
    with pytest.raises(Killed):
        write_part(tmp_path, 0, 1, columns_of({}))
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000.parquet.tmp"]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("")
    with pytest.raises(RolloutFileError, match=r"part-00000\.parquet cannot be written"):
        write_part(tmp_path / "rollouts" / "step_000001", 0, 1, columns_of({}))


def test_all_columns_but_text_take_at_most_six_bytes_per_token(tmp_path: Path) -> None:
    """Tokens of a vocabulary of 151,936 with frequencies like those of words, and log-probs of full float32 precision,
    without those of the policy, which take as much as those of the engine."""
    rng = np.random.default_rng(0)
    count, length = 64, 1000
    tokens = rng.permutation(151_936)[np.minimum(rng.zipf(1.3, count * length), 151_936) - 1].astype(np.int32)
    log_probs = np.log(rng.uniform(1e-3, 1.0, count * length)).astype(np.float32)
    offsets = np.arange(0, count * length + 1, length)
    columns = columns_of(*[{"old_log_probs": None, "completion": "", "prompt": "", "answer": ""}] * count)
    given = {
        "completion_ids": RaggedColumn(tokens, offsets),
        "sampler_log_probs": RaggedColumn(log_probs, offsets),
    }
    write_part(tmp_path, 0, 1, type(columns)(**{**vars(columns), **given}))
    size = (tmp_path / "part-00000.parquet").stat().st_size
    assert 3 < size / (count * length) < 6
