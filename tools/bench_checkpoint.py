"""Measure saving, verifying and loading a checkpoint of more than 1 GB on one rank, next to `cp` of the same files.

    python tools/bench_checkpoint.py

One process holds a bf16 policy with fp32 master weights and moments. The methods run alternately, the minimum of the
rounds counts, and the files are in the page cache:

- cp: `cp -r` of the checkpoint and fsync of its files;
- save: everything from the live state to the visible checkpoint: digests of the live tensors, writing, reading back and
  comparing, manifest, fsync and rename. `live_digests`, `write` and `read_back` are its parts;
- stop: the time for which an asynchronous save of the same state stops the loop: digests of the live tensors, copy to
  host memory, and, once the files are written, comparison, manifest and rename. `copy` is a part; `background` is the
  time of the thread that writes and reads back;
- load: verification of the files (`verify_files`), reading into the policy (`read`), comparison of the live weights
  with the manifest (`verify_live`). `verify` is the sum of both comparisons.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grpo_mega.checkpoint import manager as managers
from grpo_mega.checkpoint.background import BackgroundSaves
from grpo_mega.checkpoint.manager import CheckpointManager, LoopState
from grpo_mega.checkpoint.verification import verify_checkpoints
from grpo_mega.cli.compare_logits_worker import make_rows
from grpo_mega.config.data_sections import DataConfig
from grpo_mega.config.model_sections import ModelConfig
from grpo_mega.config.rollout_sections import RewardConfig
from grpo_mega.config.schema import Config, TrainConfig
from grpo_mega.formats.file_parts import CopiedFiles
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.interfaces import Policy
from grpo_mega.observe.run_folder import CheckpointsToVerify
from grpo_mega.parallel.ports import free_port
from grpo_mega.parallel.ranks import Ranks, init_ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.trainer.phases import Phases
from grpo_mega.types import Microbatch

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 768, 2048, 8, 12, 4, 64, 32000
BARS = {
    "save_against_cp": 0.5,
    "load_against_cp": 0.5,
    "verify_files_fraction_of_read": 0.3,
    "verify_fraction_of_read": 0.3,
    "stop_fraction_of_save": 0.1,
}


def make_model(folder: Path) -> None:
    """Write a random dense model as a Hugging Face folder."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def make_policy(folder: Path, ranks: Ranks, config: Config) -> Policy:
    """Return the policy after one update, with random moments."""
    from grpo_mega.policy.phase_offload import optimizer_tensors
    from grpo_mega.policy.policy import MegatronPolicy

    policy = MegatronPolicy(config, checkpoint_spec(folder), folder, ranks, with_reference=False)
    policy.update(make_rows([[1, 2, 3, 4], [5, 6, 7, 8]], config), _NegativeLogProb(), 1e-6)
    for tensor in optimizer_tensors(policy.parts.optimizer):
        tensor.normal_()
    return policy


class _NegativeLogProb:
    needs_reference = False

    def __call__(
        self, log_probs: torch.Tensor, entropy: torch.Tensor, microbatch: Microbatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -log_probs, {}


class PartTimes:
    """Seconds of named parts; the minimum over all rounds counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def measure(self, name: str, action: Callable[[], Any]) -> Any:
        """Run `action` and keep its seconds if they are the fewest so far."""
        begin = time.perf_counter()
        result = action()
        self.add(name, time.perf_counter() - begin)
        return result

    def add(self, name: str, seconds: float) -> None:
        """Keep these seconds if they are the fewest so far."""
        self.seconds[name] = min(seconds, self.seconds.get(name, seconds))

    @contextmanager
    def watching(self, owner: Any, name: str, label: str) -> Any:
        """Measure every call of the function `name` of `owner`."""
        real = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: self.measure(label, lambda: real(*args, **kwargs)))
        try:
            yield
        finally:
            setattr(owner, name, real)


def copy(source: Path, out: Path) -> None:
    """Copy a checkpoint with `cp`, and flush the files to disk."""
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    for path in out.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure_save(manager: CheckpointManager, policy: Policy, step: int, watch: PartTimes) -> Path:
    """Save while the loop waits, and return the checkpoint."""
    from megatron.core import dist_checkpointing

    from grpo_mega.policy import sharded_state

    def save() -> None:
        manager.stage_if_due(policy, LoopState(step, step), is_due=True)
        manager.publish(wait=True)

    with (
        watch.watching(sharded_state, "state_records", "live_digests"),
        watch.watching(managers, "read_back", "read_back"),
        watch.watching(dist_checkpointing, "save", "write"),
    ):
        watch.measure("save", save)
    return manager.path_of(step)


def measure_stop(manager: CheckpointManager, background: BackgroundSaves, policy: Policy, watch: PartTimes) -> None:
    """Save in the background, and measure only what the loop waits for."""
    begin = time.perf_counter()
    with watch.watching(CopiedFiles, "add_file", "copy"):
        manager.stage_if_due(policy, LoopState(1, 1), is_due=True)
    staged = time.perf_counter()
    while background.is_writing:
        time.sleep(0.01)
    written = time.perf_counter()
    manager.publish(wait=False)
    assert manager.path_of(1).is_dir(), "the checkpoint is not visible"
    watch.add("background", written - staged)
    watch.add("stop", staged - begin + time.perf_counter() - written)


def run(work: Path, rounds: int, ranks: Ranks, config: Config) -> dict[str, Any]:
    """Run all methods alternately and return the summary."""
    policy = make_policy(work / "model", ranks, config)
    watch, background = PartTimes(), BackgroundSaves(600.0)
    on_device = Phases(policy).checkpointing
    waiting = CheckpointManager(work / "checkpoints", 1, on_device, is_first=True)
    continuing = CheckpointManager(work / "background", 1, on_device, is_first=True, background=background)
    size = 0
    for number in range(1, rounds + 1):
        checkpoint = measure_save(waiting, policy, number, watch)
        size = sum(path.stat().st_size for path in checkpoint.rglob("*"))
        watch.measure("cp", partial(copy, checkpoint, work / "copy"))
        shutil.rmtree(work / "copy")
        measure_stop(continuing, background, policy, watch)

        def load(source: Path = checkpoint) -> None:
            wanted = CheckpointsToVerify((source,))
            watch.measure("verify_files", lambda: verify_checkpoints(wanted, "", ranks))
            with watch.watching(policy, "load", "read"), watch.watching(policy, "live_records", "verify_live"):
                waiting.load(policy, source)

        watch.measure("load", load)
    seconds = watch.seconds
    seconds["verify"] = seconds["verify_files"] + seconds["verify_live"]
    ratios = {
        "save_against_cp": seconds["cp"] / seconds["save"],
        "load_against_cp": seconds["cp"] / seconds["load"],
        "verify_files_fraction_of_read": seconds["verify_files"] / seconds["read"],
        "verify_fraction_of_read": seconds["verify"] / seconds["read"],
        "stop_fraction_of_save": seconds["stop"] / seconds["save"],
    }
    return {
        "name": "checkpoint",
        "measured": {name: round(value, 3) for name, value in ratios.items()},
        "reference": BARS,
        "ratio": round(ratios["save_against_cp"], 3),
        "unit": "ratio of times",
        "bytes": size,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "conditions": {"cpus": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__},
    }


def main() -> None:
    """Run the benchmark and print JSON as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the files; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="no effect: the last line is always JSON")
    args = parser.parse_args()
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(rank, MASTER_PORT=str(free_port()))
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        make_model(work / "model")
        config = Config(
            model=ModelConfig(path=str(work / "model")),
            data=DataConfig(train="arithmetic:train"),
            reward=RewardConfig(terms=({"name": "exact"},)),
            train=TrainConfig(steps=1),
        )
        ranks = init_ranks(Topology(1), 600.0)
        print(json.dumps(run(work, args.rounds, ranks, config)))
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
