"""Measure the conversion of a 2 GB checkpoint in both directions, in bytes per second, next to `cp` and transformers.

    python tools/bench_convert.py

Every measurement is a new process, and imports are not timed. The page cache contains the source, outputs are on disk
when a measurement ends (fsync), and digests are computed. The methods run alternately, and the minimum of the rounds
counts:

- cp: `cp -r`, then fsync of its files;
- transformers: from_pretrained, save_pretrained and fsync;
- disk: writes as many bytes as the checkpoint has from one memory buffer, past the page cache (O_DIRECT), and fsync. No
  other method can write them to this disk much faster;
- to_megatron and to_hf: the two conversions.

Peak memory is VmHWM of the process, which includes the libraries and, for transformers, mapped pages of the source.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grpo_mega.cli.convert_options import default_workers
from grpo_mega.convert.hf_to_megatron import hf_to_megatron
from grpo_mega.convert.megatron_to_hf import megatron_to_hf
from grpo_mega.formats.stored_head import checkpoint_spec

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 8192, 15, 16, 8, 128, 32000
SHARD_BYTES = 10**9
WAYS = ("disk", "cp", "transformers", "to_megatron", "to_hf")
BARS = {"against_cp": 0.5, "against_transformers": 2.0}


def make_checkpoint(folder: Path, layers: int) -> None:
    """Write a random bf16 Llama checkpoint in shards of 1 GB, with the package's table of tensors."""
    from safetensors.torch import save_file

    from grpo_mega.models.parameter_tables import hf_shapes

    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    groups: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in hf_shapes(checkpoint_spec(folder)).items():
        if sum(t.nbytes for t in groups[-1].values()) > SHARD_BYTES:
            save_file(groups[-1], folder / f"{len(groups)}.safetensors", metadata={"format": "pt"})
            groups[-1] = dict.fromkeys(groups[-1], torch.empty(0))
            groups.append({})
        bits = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
        groups[-1][name] = (bits & ~0x4000).view(torch.bfloat16)  # finite
    save_file(groups[-1], folder / f"{len(groups)}.safetensors", metadata={"format": "pt"})
    placed = {name: f"{i}.safetensors" for i, group in enumerate(groups, start=1) for name in group}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def weight_bytes(folder: Path) -> int:
    """Return the bytes of all weight files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in (".safetensors", ".distcp"))


def fsync_files(folder: Path) -> None:
    """Flush all files of a folder to disk, as the conversion does with its own files."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def write_to_disk(path: Path, size: int) -> None:
    """Write `size` bytes, rounded up to a multiple of the buffer, which is written repeatedly."""
    with mmap.mmap(-1, 2**24) as piece:  # O_DIRECT needs a buffer that is aligned to a block of the disk
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        for position in range(0, size, len(piece)):
            os.pwrite(descriptor, piece, position)
        os.fsync(descriptor)
        os.close(descriptor)


def measure(way: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    """Run one method in this process; return its seconds and the peak of resident memory."""
    run: Callable[[], Any]
    if way == "disk":

        def run() -> None:
            write_to_disk(out, weight_bytes(source))

    elif way == "cp":

        def run() -> None:
            subprocess.run(["cp", "-r", str(source), str(out)], check=True)
            fsync_files(out)

    elif way == "transformers":
        from transformers import AutoModelForCausalLM

        def run() -> None:
            model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
            model.save_pretrained(out, max_shard_size=f"{SHARD_BYTES // 10**9}GB")
            fsync_files(out)

    elif way == "to_megatron":

        def run() -> None:
            hf_to_megatron(source, out, workers=workers)

    else:

        def run() -> None:
            megatron_to_hf(source, out, shard_bytes=SHARD_BYTES, workers=workers)

    start = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Return the peak of resident memory of this process.

    Raises:
        RuntimeError: the system is not Linux.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status does not contain VmHWM; this benchmark needs Linux")


def run_fresh(way: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    """Run `measure` in a new process, with the source in the page cache and no pending writes."""
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    os.sync()
    for path in sorted(source.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass
    command = [sys.executable, __file__, "--measure", way, str(source), str(out), "--workers", str(workers)]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Run all methods alternately and return the JSON object of the last line."""
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        root = Path(scratch)
        source, megatron = root / "hf", root / "megatron"
        make_checkpoint(source, args.layers)
        hf_to_megatron(source, megatron)
        size = weight_bytes(source)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(args.rounds):
            for way in WAYS:
                result = run_fresh(way, megatron if way == "to_hf" else source, root / "out", args.workers)
                found[way].append(result)
                print(f"round {number + 1} {way}: {result['seconds']:.2f} s, {result['peak_bytes'] / 2**20:.0f} MiB")
        least = {way: min(r["seconds"] for r in runs) for way, runs in found.items()}
    rates = {way: size / seconds for way, seconds in least.items()}
    slower = min(rates["to_megatron"], rates["to_hf"])
    return {
        "name": "convert",
        "measured": round(slower),
        "reference": round(rates["cp"]),
        "ratio": round(slower / rates["cp"], 3),
        "unit": "bytes/s, the slower direction against cp",
        "bars": BARS,
        "against_cp": {way: round(rates[way] / rates["cp"], 3) for way in ("to_megatron", "to_hf")},
        "against_transformers": {way: round(rates[way] / rates["transformers"], 3) for way in ("to_megatron", "to_hf")},
        "disk_against_transformers": round(rates["disk"] / rates["transformers"], 3),
        "seconds": {way: [round(r["seconds"], 3) for r in runs] for way, runs in found.items()},
        "peak_bytes": {way: max(int(r["peak_bytes"]) for r in runs) for way, runs in found.items()},
        "conditions": {
            "bytes": size,
            "largest_tensor_bytes": VOCAB * HIDDEN * 2,
            "rounds": args.rounds,
            "workers": args.workers,
            "page_cache": "warm",
            "fsync": True,
            "digests": True,
            "torch": torch.__version__,
            "machine": f"{os.cpu_count()}-core {platform.machine()}",
        },
    }


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each method (default: %(default)s)")
    parser.add_argument(
        "--layers", type=int, default=LAYERS, help="layers of 126 MB (default: %(default)s, a model of 2.1 GB)"
    )
    parser.add_argument("--workers", type=int, default=default_workers(), help="threads of the conversion")
    parser.add_argument("--dir", type=Path, help="working folder with 7 GB of space (default: the temporary folder)")
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="no effect: the last line is always JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        way, source, out = args.measure
        print(json.dumps(measure(way, Path(source), Path(out), args.workers)))
    else:
        print(json.dumps(bench(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
