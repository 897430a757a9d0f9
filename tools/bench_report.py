"""Measure the report of a long run: the time to make the page, its bytes, and the time in which a browser opens it.

    python tools/bench_report.py [--steps 1000] [--groups 8] [--members 8] [--tokens 300] [--dir DIR] [--json]

A run folder of that size is written: every metric of the table in every step, phases of 16 ranks, rollout files with
the log-probs of engine and policy, and a tokenizer of 20,000 words, so that the page has the text and the mismatch of
each token. Then `grpo-mega report` makes the page in a process of its own. Chromium (Debian's package) opens it
headless; the time counts from the start of the navigation until all scripts of the page have run. Without Chromium it
is left out.

Exit code 0: at most 60 s to make, 30 MB, and 3 s to open; 1: more.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grpo_mega.observe.metric_table import METRICS
from grpo_mega.observe.rollout_files.columns import RaggedColumn, RolloutColumns
from grpo_mega.observe.rollout_files.part_writer import write_part
from tools.bench_rollout_files import make_columns

MAX_SECONDS, MAX_BYTES, MAX_OPEN_SECONDS = 60.0, 30e6, 3.0
_WORDS, _RANKS = 20_000, 16
_PHASES = ("rollout", "reward", "log_probs", "train", "sync", "checkpoint")


def make_run(folder: Path, steps: int, groups: int, members: int, tokens: int) -> None:
    """Write the run folder."""
    rng = random.Random(0)
    words = _write_tokenizer(folder / "hf", rng)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"sampling": {"group_size": members}, "train": {"steps": steps}}), encoding="utf-8"
    )
    names = [name for name in METRICS if "*" not in name]
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as metrics:
        for step in range(1, steps + 1):
            metrics.write(json.dumps({"step": step, **{name: rng.random() for name in names}}) + "\n")
    with (folder / "timeline.jsonl").open("w", encoding="utf-8") as timeline:
        for step in range(1, steps + 1):
            spans = [[phase, round(i + rng.random(), 4), round(rng.random(), 4)] for i, phase in enumerate(_PHASES)]
            ranks = {str(rank): spans for rank in range(_RANKS)}
            line = {"step": step, "started": 1e9 + step, "hosts": dict.fromkeys(ranks, "node-0001"), "ranks": ranks}
            timeline.write(json.dumps(line) + "\n")
    for step in range(1, steps + 1):
        columns = _columns(step, groups * members, tokens, members, words)
        write_part(folder / "rollouts" / f"step_{step:06d}", 0, 1, columns)


def _write_tokenizer(folder: Path, rng: random.Random) -> list[str]:
    """Write a tokenizer with one token per word, and return the words with their leading blanks."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = "etaoinshrdlucmfwypvbgk"
    words = sorted({"".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(2 * _WORDS)})[:_WORDS]
    vocabulary = {"<eos>": 0, **{f"Ġ{word}": i for i, word in enumerate(words, 1)}}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    return ["<eos>", *(f" {word}" for word in words)]


def _columns(step: int, rollouts: int, tokens: int, members: int, words: Sequence[str]) -> RolloutColumns:
    columns = make_columns(rollouts, tokens, seed=step)
    number = np.arange(rollouts, dtype=np.int32)
    ids = columns.completion_ids.values % len(words)
    texts = ["".join(words[i] for i in row) for row in ids.reshape(rollouts, tokens).tolist()]
    return replace(
        columns,
        step=step,
        group=number // members,
        member=number % members,
        prompt_index=(number // members).astype(np.int64),
        prompt=[f"problem {i // members} of step {step}" for i in range(rollouts)],
        completion=texts,
        answer=["42"] * rollouts,
        completion_ids=RaggedColumn(ids.astype(np.int32), columns.completion_ids.offsets),
    )


def measure(folder: Path) -> dict[str, Any]:
    """Make the page of the run folder and open it; `open_seconds` is None without Chromium."""
    page = folder / "report.html"
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "grpo_mega.cli.main", "report", str(folder)], check=True, capture_output=True)
    seconds = time.monotonic() - begin
    return {"seconds": seconds, "bytes": page.stat().st_size, "open_seconds": open_page(page)}


def open_page(page: Path) -> float | None:
    """Return the seconds until a headless Chromium has run all scripts of the page; None without Chromium.

    Raises:
        RuntimeError: the scripts did not run to their end.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        return None
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        dump = subprocess.run(
            [*command, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True, timeout=300
        )
    found = re.search(r'data-milliseconds="(\d+)"', dump.stdout)
    if found is None:
        raise RuntimeError(f"the scripts of {page} did not run to their end: {dump.stderr[-2000:]}")
    return int(found[1]) / 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="steps of the run (default 1000)")
    parser.add_argument("--groups", type=int, default=8, help="groups per step (default 8)")
    parser.add_argument("--members", type=int, default=8, help="rollouts per group (default 8)")
    parser.add_argument("--tokens", type=int, default=300, help="tokens per rollout (default 300)")
    parser.add_argument("--dir", type=Path, help="file system of the run folder (default: that of temporary files)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args(argv)
    if min(args.steps, args.groups, args.members, args.tokens) < 1:
        print("error: --steps, --groups, --members and --tokens must be at least 1; correct them", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bench_report_", dir=args.dir) as work:
        make_run(Path(work), args.steps, args.groups, args.members, args.tokens)
        found = measure(Path(work))
    opened = found["open_seconds"]
    rollouts = args.steps * args.groups * args.members
    shown = "Chromium was not found" if opened is None else f"opened in {opened:.2f} s"
    print(f"report of {args.steps} steps and {rollouts:,} rollouts with {args.tokens} tokens each:")
    print(f"  made in {found['seconds']:.1f} s, {found['bytes'] / 1e6:.1f} MB, {shown}")
    if args.json:
        head = {"name": "report", "measured": found["seconds"], "reference": MAX_SECONDS, "unit": "seconds"}
        conditions = {"steps": args.steps, "rollouts": rollouts, "tokens": args.tokens}
        print(json.dumps({**head, "ratio": found["seconds"] / MAX_SECONDS, **found, "conditions": conditions}))
    is_slow = found["seconds"] > MAX_SECONDS or (opened or 0.0) > MAX_OPEN_SECONDS
    return int(is_slow or found["bytes"] > MAX_BYTES)


if __name__ == "__main__":
    sys.exit(main())
