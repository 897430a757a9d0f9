"""Files of carried rollouts in a checkpoint, and the states that have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_mega.checkpoint.carried_parts import CARRIED, CarriedParts, rank_of_part
from grpo_mega.checkpoint.manager import LoopState
from grpo_mega.checkpoint.written_state import _owner


@dataclass(frozen=True)
class Part:
    """A part that is its own content."""

    content: bytes

    def to_bytes(self) -> bytes:
        return self.content


def joined(paths: Sequence[Path]) -> Part:
    return Part(b" ".join(path.read_bytes() for path in paths))


def test_the_first_rank_of_each_shard_writes_and_every_rank_reads_all_parts(tmp_path: Path) -> None:
    (tmp_path / CARRIED).mkdir()
    for rank in (0, 1, 2, 3):
        CarriedParts(rank, rank % 2 == 0, joined).write(tmp_path, Part(f"of rank {rank}".encode()), None)
    names = sorted(path.name for path in (tmp_path / CARRIED).iterdir())
    assert names == ["rank_00000.safetensors", "rank_00002.safetensors"]
    assert CarriedParts(1, False, joined).load(tmp_path) == Part(b"of rank 0 of rank 2")
    assert CarriedParts(1, False, joined).load(tmp_path / "other") is None


def test_the_rank_that_wrote_a_part_reads_it_back() -> None:
    assert [rank_of_part(name) for name in ("rank_00012.safetensors", "rank_12.txt", "common.pt")] == [12, None, None]
    names = ("carried/rank_00003.safetensors", "__5_0.distcp", "common.pt")
    assert [_owner(name) for name in names] == [3, 5, 0]


def test_a_state_has_carried_rollouts_beside_its_counters() -> None:
    state = LoopState(3, 6, None, "digest", Part(b""))
    assert state.counters == {"step": 3, "policy_version": 6, "kl_coef": None, "prompts_digest": "digest"}
    assert state.after(4, 2, None, Part(b"new")).carried == Part(b"new")
    assert state.after(4, 2, None).carried is None
    assert state.over("digest", same_run=True).carried == Part(b"")
    assert state.over("digest", same_run=False).carried is None, "another run begins without them"
