"""The supervised fine-tuning that trains a tiny base: a file of examples, a config, and a run of one rank on the CPU.

It is an ordinary run (docs/sft.md) in a process of its own: `model.init=random`, one epoch over the examples, and its
exported model is the base. One thread computes it, so the weights do not depend on the caller's environment.
Asserted by tests/unit/tiny_base/test_base_folder.py and, for the accuracy, tests/e2e/test_quickstart.py.
"""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from grpo_mega.config.model_sections import BaseConfig
from grpo_mega.parallel.heartbeat import FOLDER_VARIABLE
from grpo_mega.parallel.ports import free_port
from grpo_mega.tiny_base.examples import Draw
from grpo_mega.tiny_base.recipe import save_untrained
from grpo_mega.types import UserError

log = logging.getLogger("grpo_mega.tiny_base")

WARMUP_FRACTION = 0.05
LOG_SECONDS = 5.0
_POLL_SECONDS = 0.1
_ROW_TOKENS = 1024


def train_base(recipe: BaseConfig, draw: Draw, work: Path) -> Path:
    """Train the base of a recipe in the new folder `work`; return the Hugging Face folder in it.

    Raises:
        UserError: an example cannot be encoded, or is longer than the model's positions.
        RuntimeError: the run failed. The message names the file with its output.
    """
    work.mkdir(parents=True)
    save_untrained(recipe, work / "untrained")
    write_examples(draw, recipe.steps * recipe.batch_size, recipe.seed, work / "examples.jsonl")
    config = work / "sft.yaml"
    config.write_text(yaml.safe_dump(sft_values(recipe, work), sort_keys=False))
    log.info("pre-training a base model on %s: %d steps of %d examples", recipe.task, recipe.steps, recipe.batch_size)
    _run(config, work / "run", recipe.steps, work / "output.log")
    return work / "run" / "hf"


def write_examples(draw: Draw, count: int, seed: int, path: Path) -> None:
    """Write `count` drawn examples as rows with a prompt and a completion."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for prompt, completion in (draw(rng) for _ in range(count)):
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def sft_values(recipe: BaseConfig, work: Path) -> dict[str, Any]:
    """Return the config of the run, as in a YAML file."""
    longest = recipe.architecture.max_positions
    return {
        "run": {"dir": str(work / "run"), "seed": recipe.seed, "world_size": 1},
        "model": {"path": str(work / "untrained"), "init": "random"},
        "policy": {"modules": "local"},
        "data": {
            "train": str(work / "examples.jsonl"),
            "prompts_per_step": recipe.batch_size,
            "template": "plain",
            "max_example_tokens": longest,
        },
        "optimizer": {
            "lr": recipe.learning_rate,
            "schedule": "cosine",
            "warmup_updates": round(WARMUP_FRACTION * recipe.steps),
            "beta1": 0.9,
            "beta2": 0.99,
        },
        "train": {
            "objective": "sft",
            "steps": recipe.steps,
            "max_tokens_per_microbatch": max(_ROW_TOKENS, longest),
        },
        "precision": {"dtype": "fp32"},
        "observe": {"tensorboard": False, "alarms": False},
    }


def _run(config: Path, folder: Path, steps: int, output: Path) -> None:
    """Run the training in a process of its own, with its output in a file; log its progress meanwhile."""
    started = logged = time.monotonic()
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "grpo_mega.train", str(config)],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                if time.monotonic() - logged > LOG_SECONDS:
                    logged = time.monotonic()
                    _log_progress(folder, steps, logged - started)
        finally:
            if process.poll() is None:  # a stop request of this process
                process.kill()
                process.wait()
    if process.returncode:
        _raise_failure(process.returncode, output)
    _log_progress(folder, steps, time.monotonic() - started)


def _environment() -> dict[str, str]:
    """Return the environment of one rank on the CPU, without what a launcher has set for the ranks of the caller."""
    of_caller = ("TORCHELASTIC_", "GROUP_", FOLDER_VARIABLE)  # its rank also writes its heartbeats there
    kept = {name: value for name, value in os.environ.items() if not name.startswith(of_caller)}
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **rank, **address, **settings}


def _log_progress(folder: Path, steps: int, seconds: float) -> None:
    """Log the last step whose metrics the run has written, if it has written any."""
    try:
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    except (FileNotFoundError, IndexError, ValueError):
        return
    log.info("pre-training step %d/%d, loss %.3f, %.0f s", last["step"], steps, last["train/loss"], seconds)


def _raise_failure(code: int, output: Path) -> None:
    """Raise the error of a run that ended with an exit code other than 0."""
    lines = output.read_text(errors="replace").splitlines()
    reason = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    if code == 2 and reason is not None:
        raise UserError(
            f"the tiny base cannot be pre-trained: {reason.removeprefix('error: ')}",
            remedy="change model.base; data.max_example_tokens is model.base.architecture.max_positions",
        )
    tail = "\n".join(lines[-20:])
    raise RuntimeError(f"the pre-training of the tiny base failed with exit code {code} ({output}):\n{tail}")
