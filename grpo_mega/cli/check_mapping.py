"""Check that the ranks of a layout hold every tensor of a checkpoint exactly once; only headers are read.

    grpo-mega compare mapping HF_DIR --layout tp=8,pp=16,ep=32,sequence_parallel=true
    python tools/check_mapping.py HF_DIR --layout tp=8,pp=16,ep=32,sequence_parallel=true

HF_DIR holds config.json and safetensors files. The modules of the ranks of one model copy are Megatron's own, built
without memory for weights. The tool also checks that the files have the tensors of the config's model, with block
scales for FP8 weights, and that a converted checkpoint would hold each tensor once.

Exit code 0: every element is held exactly once; 1: it is not, and the faults are listed; 2: the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_mega.cli.compare_logits import config_of
from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.formats.megatron_keys import megatron_tensors
from grpo_mega.formats.safetensors_reader import HfFiles
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.models.parameter_tables import hf_shapes, hf_shapes_aside
from grpo_mega.models.spec import ModelSpec


def faults_of_conversion(spec: ModelSpec, files: HfFiles) -> list[str]:
    """Return the tensors that a Megatron checkpoint of the folder would not hold exactly once."""
    covered: Counter[str] = Counter()
    for tensor in megatron_tensors(spec):
        for placed in tensor.placements:
            if placed.hf.name in files.shapes:
                covered[placed.hf.name] += math.prod(placed.hf.shape)
    return [
        f"{name} of shape {shape}: {covered[name]} of {math.prod(shape)} elements are converted"
        for name, shape in files.shapes.items()
        if covered[name] != math.prod(shape)
    ]


def check(folder: Path, layout: str) -> dict[str, Any]:
    """Return the summary; its `faults` are empty if the layout is right."""
    warnings.filterwarnings("ignore", module="megatron")  # about deprecated fields and about Transformer Engine
    from grpo_mega.parallel.topology import Topology
    from grpo_mega.policy.inspect.slice_mapping import faults_of_mapping, held_by_ranks
    from grpo_mega.policy.module_choice import choose_modules
    from grpo_mega.policy.weight_source import weight_copies

    start = time.monotonic()
    spec = checkpoint_spec(folder)
    shapes = hf_shapes(spec)
    files = HfFiles(folder, "HF_DIR", shapes)
    files.check(shapes, hf_shapes_aside(spec))
    with tempfile.TemporaryDirectory() as work:
        config = config_of(folder, spec, layout, Path(work))
    topology = Topology.of(config, config.run.world_size or 1)
    held = list(held_by_ranks(spec, config.parallel, topology, choose_modules(config)))
    aside = {name: shape for name, shape in hf_shapes_aside(spec).items() if name in files.shapes}
    return {
        "layout": layout,
        "ranks": len(weight_copies(topology)[0]),
        "tensors": len(shapes),
        "slices": len(held),
        "parameters": sum(each.view.numel() for _, each in held),
        "tensors_aside": len(aside),
        "parameters_aside": sum(map(math.prod, aside.values())),
        "scales": len(files.scale_names),
        "faults": [*faults_of_mapping(shapes, held), *faults_of_conversion(spec, files)],
        "seconds": round(time.monotonic() - start, 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


@errors_as_exit_codes(OSError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir", type=Path, help="folder of config.json and safetensors files")
    parser.add_argument("--layout", default="", help="keys of `parallel`, for example tp=2,pp=2 (default: one rank)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    found = check(args.hf_dir, args.layout)
    for fault in found["faults"][:20]:
        print(fault)
    if args.json:
        print(json.dumps(found))
    else:
        print(
            f"{args.layout}: {found['parameters']} parameters of {found['tensors']} tensors on {found['ranks']} ranks,"
            f" {found['tensors_aside']} tensors that are not trained, {found['scales']} block scales:"
            f" {len(found['faults'])} faults,"
            f" {found['seconds']} s, {found['peak_bytes'] / 2**30:.2f} GiB"
        )
    return 1 if found["faults"] else 0
