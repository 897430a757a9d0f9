"""Convert a Megatron torch_dist checkpoint of any layout to a Hugging Face folder, without a GPU.

    grpo-mega convert to-hf CKPT_DIR OUT_DIR
    python tools/megatron_to_hf.py CKPT_DIR OUT_DIR

CKPT_DIR is the result of tools/hf_to_megatron.py, a checkpoint of a run (RUN/checkpoints/step_000020), or a checkpoint
of Megatron-LM; the last needs --base, the Hugging Face folder of its config and tokenizer. OUT_DIR appears when it is
complete. Until then OUT_DIR.partial holds the unfinished result, and the same command continues it.

Exit code 0: done; 2: the input is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from grpo_mega.cli.convert_options import add_options, finish, parse_bytes
from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.convert.megatron_to_hf import SHARD_BYTES, megatron_to_hf


@errors_as_exit_codes(OSError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt_dir", type=Path, help="folder with .metadata or latest_checkpointed_iteration.txt")
    parser.add_argument("out_dir", type=Path, help="new or empty folder")
    add_options(parser)
    parser.add_argument("--shard-size", default=str(SHARD_BYTES), help="largest file, for example 5GB (default: 5 GB)")
    parser.add_argument("--base", type=Path, help="folder of config.json and tokenizer (default: found if possible)")
    parser.add_argument("--fp8", action="store_true", help="write linear weights as float8_e4m3fn in 128 x 128 blocks")
    args = parser.parse_args(argv)
    code: int = finish(
        lambda: megatron_to_hf(
            args.ckpt_dir,
            args.out_dir,
            base=args.base,
            dtype=args.dtype,
            to_fp8=args.fp8,
            shard_bytes=parse_bytes(args.shard_size),
            workers=args.workers,
        ),
        args,
    )
    return code
