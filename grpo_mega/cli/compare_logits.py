"""Compare the policy with transformers: largest difference of logits and log-probs on random tokens, in fp32.

    grpo-mega compare logits HF_DIR --layout tp=2,pp=2 [--json]
    python tools/compare_logits.py HF_DIR --layout tp=2,pp=2 [--json]

The layout is a list of keys of `parallel` (and `dp`); its ranks are started on this machine. A model with experts needs
sequence parallelism with tp > 1, so it is switched on unless the layout contains the key. FP8 weights are dequantized.
The sequences have different lengths, and several are packed into a row. Differences are absolute: logits at every
position, log-probs of every token except the first of each sequence.

Exit code 0: compared, and with --tolerance both differences are within it; 1: they are not, or a rank failed; 2: the
input is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from grpo_mega.cli.compare_layouts import measure_on_ranks, parse_layout
from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.load import load_config
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.config.schema import Config
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import UserError

NUM_SEQUENCES, LONGEST = 8, 48


def config_of(folder: Path, spec: ModelSpec, layout: str, work: Path) -> Config:
    """Return a config with this model and layout, after checking the rules of layouts.

    Raises:
        UserError: the layout is not valid for the model.
    """
    from grpo_mega.models.layout_rules import check_layout
    from grpo_mega.parallel.topology import Topology

    file = work / "config.yaml"
    run = {
        "model": {"path": str(folder)},
        "precision": {"dtype": "fp32"},
        "data": {"train": "arithmetic:train"},
        "reward": {"terms": [{"name": "exact"}]},
        "train": {"steps": 1},
    }
    file.write_text(yaml.safe_dump(run))
    try:
        overrides = list(parse_layout(layout).overrides)
        if spec.moe is not None and any(spec.moe.layers) and "sequence_parallel" not in layout:
            config = load_config(file, overrides)
            overrides.append(f"parallel.sequence_parallel={json.dumps(config.parallel.tp > 1)}")
        config = load_config(file, overrides)
    except UserError as error:
        raise UserError(str(error).replace("--layouts", "--layout")) from None
    check_layout(spec, config.parallel, Topology.of(config, config.run.world_size or 1), str(folder))
    return config


def random_sequences(spec: ModelSpec, seed: int) -> list[list[int]]:
    """Return sequences of different lengths; the longest has LONGEST tokens, or as many as the model has positions."""
    rng, longest = random.Random(seed), min(LONGEST, spec.max_positions)
    lengths = [longest, *(rng.randint(2, longest) for _ in range(NUM_SEQUENCES - 1))]
    return [[rng.randrange(spec.vocab_size) for _ in range(length)] for length in lengths]


def dequantized(folder: Path, work: Path) -> Path:
    """Return `folder`, or a copy with FP8 weights in bfloat16, because transformers reads FP8 on a GPU only.

    Raises:
        UserError: a file is missing or damaged.
    """
    raw = json.loads((folder / "config.json").read_text())
    if raw.pop("quantization_config", None) is None:
        return folder
    from safetensors.torch import save_file

    from grpo_mega.formats.safetensors_reader import HfFiles
    from grpo_mega.types import TensorSlice

    copy, files = work / "dequantized", HfFiles(folder)
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(raw))
    slices = [TensorSlice(name, (0,) * len(shape), shape) for name, shape in files.shapes.items()]
    save_file({box.name: files.read(box) for box in slices}, copy / "model.safetensors", metadata={"format": "pt"})
    files.close()
    return copy


def expect(folder: Path, sequences: Sequence[Sequence[int]], file: Path) -> None:
    """Write the logits [T, V] of each sequence, computed by transformers one sequence at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from grpo_mega.observe.log import quiet_libraries

    quiet_libraries()
    model = AutoModelForCausalLM.from_pretrained(
        dequantized(folder, file.parent),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    with torch.no_grad():
        logits = {
            str(i): model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float().contiguous()
            for i, tokens in enumerate(sequences)
        }
    save_file(logits, file)


def run_layout(config: Config, job: dict[str, Any], work: Path) -> dict[str, float]:
    """Start the ranks and return the largest differences of logits and of log-probs.

    Raises:
        RuntimeError: a rank failed; its message is on the screen.
    """
    file, answer = work / "job.json", work / "answer.json"
    file.write_text(json.dumps(job | {"config": config.model_dump(mode="json"), "answer": str(answer)}))
    measure_on_ranks("grpo_mega.cli.compare_logits_worker", file, config.run.world_size or 1)
    found: dict[str, float] = json.loads(answer.read_text())
    return found


def compare_logits(folder: Path, layout: str, seed: int) -> dict[str, Any]:
    """Compare a model folder in a layout; return the object that --json prints.

    Raises:
        UserError: the folder or the layout is not valid.
        RuntimeError: a rank failed; its message is on the screen.
    """
    if not folder.is_dir():
        raise UserError(f"HF_DIR={folder} must be a folder", remedy="give a Hugging Face model folder")
    spec = checkpoint_spec(folder)
    sequences = random_sequences(spec, seed)
    with tempfile.TemporaryDirectory(prefix="compare_logits_") as name:
        work = Path(name)
        config = config_of(folder, spec, layout, work)
        expected = work / "expected.safetensors"
        expect(folder, sequences, expected)
        job = {"model": str(folder.resolve()), "sequences": sequences, "expected": str(expected)}
        return {"family": spec.family, "layout": layout, **run_layout(config, job, work)}


@errors_as_exit_codes(RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="HF_DIR", help="Hugging Face model folder")
    parser.add_argument("--layout", default="", help='keys of `parallel`, for example "tp=2,pp=2" (default: one rank)')
    parser.add_argument("--seed", type=int, default=0, help="seed of the random tokens (default: 0)")
    parser.add_argument("--tolerance", type=float, help="exit with code 1 if a difference is larger than this")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    found = compare_logits(args.folder, args.layout, args.seed)
    largest = max(found["max_abs_logit_diff"], found["max_abs_log_prob_diff"])
    if args.json:
        print(json.dumps(found))
    else:
        print(
            f"{found['family']}, {found['layout'] or 'one rank'}: largest difference of logits "
            f"{found['max_abs_logit_diff']:.2e}, of log-probs {found['max_abs_log_prob_diff']:.2e}"
        )
    return int(args.tolerance is not None and not largest <= args.tolerance)
