"""Options and report of the two conversion tools."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable

import torch

from grpo_mega.convert.hf_to_megatron import DTYPES, ConversionReport
from grpo_mega.types import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def default_workers() -> int:
    """Return two threads per core, because some wait for the disk; at most 8, because each holds 64 MiB."""
    return min(8, 2 * (os.cpu_count() or 1))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both conversions."""
    parser.add_argument(
        "--dtype", choices=["keep", *DTYPES], default="keep", help="dtype of the result (default: that of the input)"
    )
    parser.add_argument("--workers", type=int, default=default_workers(), help="threads (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON summary as the last line")


def parse_bytes(text: str) -> int:
    """Parse a size such as 5GB or 512MiB, or a number of bytes, and return bytes.

    Raises:
        UserError: `text` is not a size above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    size = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if size < 1:
        raise UserError(f"--shard-size={text} must be a size above 0", remedy="use 5GB, 512MiB or a number of bytes")
    return size


def finish(convert: Callable[[], ConversionReport], args: argparse.Namespace) -> int:
    """Run the conversion, print its report, and return the exit code.

    Raises:
        UserError, OSError: the conversion failed.
    """
    torch.set_num_threads(1)  # the workers are the parallelism
    start = time.monotonic()
    if args.workers < 1:
        raise UserError(f"--workers={args.workers} must be at least 1", remedy="leave it out")
    try:
        report = convert()
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    if args.json:
        summary = {
            "tensors": report.num_tensors,
            "bytes": report.num_bytes,
            "files": report.num_files,
            "files_written": len(report.redone),
            "seconds": round(seconds, 3),
        }
        print(json.dumps(summary))
    else:
        gigabytes = report.num_bytes / 10**9
        print(f"{args.out_dir}: {report.num_tensors} tensors, {gigabytes:.3f} GB in {report.num_files} files")
    return 0
