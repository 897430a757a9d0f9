"""Convert a Hugging Face folder to a Megatron torch_dist checkpoint, without a GPU.

    grpo-mega convert to-megatron HF_DIR OUT_DIR
    python tools/hf_to_megatron.py HF_DIR OUT_DIR

OUT_DIR appears when it is complete: release/, latest_checkpointed_iteration.txt, digests.json and hf/ with config and
tokenizer. Until then OUT_DIR.partial holds the unfinished result; the same command continues it. Block-scaled FP8
weights become bf16.

Exit code 0: done; 2: the input is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from grpo_mega.cli.convert_options import add_options, finish, parse_bytes
from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.convert.hf_to_megatron import FILE_BYTES, hf_to_megatron


@errors_as_exit_codes(OSError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir", type=Path, help="folder of config.json and safetensors files")
    parser.add_argument("out_dir", type=Path, help="new or empty folder")
    add_options(parser)
    parser.add_argument("--shard-size", default=str(FILE_BYTES), help="largest file, for example 5GB (default: 1 GiB)")
    args = parser.parse_args(argv)
    code: int = finish(
        lambda: hf_to_megatron(
            args.hf_dir,
            args.out_dir,
            dtype=args.dtype,
            file_bytes=parse_bytes(args.shard_size),
            workers=args.workers,
        ),
        args,
    )
    return code
