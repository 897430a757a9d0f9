"""Measure peak memory and time of log-probs from hidden states: the sliced kernel and the naive method in one run.

    python tools/bench_logprobs.py [--tokens 4096] [--rounds 2] [--json]

Naive: logits = hidden @ weight^T, log_softmax of the full logits, gather, backward. The sliced kernel also computes the
entropy. Every measurement is a new process: inputs are allocated and touched, and a small pass warms up the libraries.
Then the peak of resident memory is reset (Linux: /proc/self/clear_refs), and forward plus backward run once. "Extra" is
the peak minus the resident memory before; it includes the gradients of hidden states and head, which both methods
return.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from grpo_mega.parallel.vocab_parallel import vocab_parallel_log_probs

MIB = 2**20
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return log-probs from full logits; the logits are freed before the backward pass."""
    return torch.log_softmax(hidden @ weight.t(), dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)


def sliced(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return log-probs of the sliced kernel, which also computes the entropy."""
    return vocab_parallel_log_probs(hidden, weight, labels, temperature=1.0, vocab_size=len(weight), group=None)[0]


def resident_bytes(field: str) -> int:
    """Return `VmRSS` (current) or `VmHWM` (peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status does not contain {field}; this benchmark needs Linux")


def inputs(num_tokens: int, hidden_size: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden [T, H], weight [V, H], labels [T] and the gradient of the log-probs [T], all pages touched."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).requires_grad_()
    weight = (0.1 * torch.randn(vocab_size, hidden_size, generator=generator)).requires_grad_()
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    upstream = torch.randn(num_tokens, generator=generator) / num_tokens
    return hidden, weight, labels, upstream


def measure(way: str, num_tokens: int, hidden_size: int, vocab_size: int, out: Path | None) -> dict[str, float]:
    """Measure one forward and backward pass in this process; save log-probs and gradients to `out`."""
    log_probs_of: LogProbs = {"naive": naive, "ours": sliced}[way]
    small = inputs(64, hidden_size, 1024)
    (log_probs_of(*small[:3]) * small[3]).sum().backward()
    hidden, weight, labels, upstream = inputs(num_tokens, hidden_size, vocab_size)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start, cpu_start = time.perf_counter(), time.process_time()
    log_probs = log_probs_of(hidden, weight, labels)
    (log_probs * upstream).sum().backward()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    extra = resident_bytes("VmHWM") - before
    if out is not None:
        torch.save({"log_probs": log_probs.detach(), "hidden": hidden.grad, "weight": weight.grad}, out)
    return {"extra_bytes": extra, "seconds": seconds, "cpu_seconds": cpu_seconds}


def in_fresh_process(way: str, num_tokens: int, args: argparse.Namespace, out: Path | None) -> dict[str, float]:
    """Run `measure` in a new process and return its result."""
    command = [sys.executable, __file__, "--way", way, "--tokens", str(num_tokens)]
    command += ["--hidden-size", str(args.hidden_size), "--vocab-size", str(args.vocab_size)]
    command += [] if out is None else ["--out", str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def largest_difference(measured: Path, reference: Path) -> dict[str, float]:
    """Return max |a - b| / max |b| for each tensor."""
    ours, theirs = torch.load(measured), torch.load(reference)
    return {name: ((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs}


def compare(args: argparse.Namespace) -> dict[str, object]:
    """Make all measurements, interleaved; return the minimum time and maximum memory over the rounds."""
    runs: dict[str, list[dict[str, float]]] = {"naive": [], "ours": [], "ours_double": []}
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder) / way for way in ("naive", "ours")}
        for number in range(args.rounds):
            for way in ("ours", "naive"):
                runs[way].append(in_fresh_process(way, args.tokens, args, files[way] if number == 0 else None))
            if number == 0:
                runs["ours_double"].append(in_fresh_process("ours", 2 * args.tokens, args, None))
        differences = largest_difference(files["ours"], files["naive"])
    extra = {way: max(run["extra_bytes"] for run in results) for way, results in runs.items()}
    seconds = {way: min(run["seconds"] for run in results) for way, results in runs.items()}
    cpu_seconds = {way: min(run["cpu_seconds"] for run in results) for way, results in runs.items()}
    return {
        "name": "logprobs_extra_peak_memory",
        "measured": extra["ours"],
        "reference": extra["naive"],
        "ratio": extra["ours"] / extra["naive"],
        "unit": "bytes",
        "growth_at_double_tokens": extra["ours_double"] / extra["ours"],
        "extra_bytes": extra,
        "seconds": seconds,
        "time_ratio": seconds["ours"] / seconds["naive"],
        "cpu_seconds": cpu_seconds,
        "cpu_time_ratio": cpu_seconds["ours"] / cpu_seconds["naive"],
        "max_relative_difference": differences,
        "conditions": {
            "tokens": args.tokens,
            "hidden_size": args.hidden_size,
            "vocab_size": args.vocab_size,
            "dtype": "float32",
            "rounds": args.rounds,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
    }


def main() -> None:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="number of tokens T (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="hidden size H (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=151936, help="vocabulary size V (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each method (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--way", choices=["naive", "ours"], help="internal: measure this method once in this process")
    parser.add_argument("--out", type=Path, help="internal: file for log-probs and gradients")
    args = parser.parse_args()
    if args.way is not None:
        print(json.dumps(measure(args.way, args.tokens, args.hidden_size, args.vocab_size, args.out)))
        return
    result = compare(args)
    if not args.json:
        extra, seconds = result["extra_bytes"], result["seconds"]
        assert isinstance(extra, dict)
        assert isinstance(seconds, dict)
        labels = {"naive": args.tokens, "ours": args.tokens, "ours_double": 2 * args.tokens}
        for way, num_tokens in labels.items():
            print(f"{way:12} T={num_tokens:6} extra {extra[way] / MIB:9.1f} MiB  {seconds[way]:7.2f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
