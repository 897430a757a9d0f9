"""Reports the quantization error of a model's weights in FP8, layer by layer, before a run uses FP8 engines.

    grpo-mega fp8-report HF_DIR|CONFIG [section.key=value ...] [--scales fp32|power_of_two] [--json]
    python tools/fp8_report.py HF_DIR|CONFIG [section.key=value ...] [--scales fp32|power_of_two] [--json]

Reads the safetensors of a Hugging Face folder, or of a config's `model.path`, matrix by matrix; needs no GPU. `median`
and `worst` are those of |W - q(W)| / |W| (Frobenius norm) over the matrices of a layer. `largest` is the largest
|w - q(w)| of an element. A run with `weight_sync.fp8_report` writes the same report of its policy to fp8_report.json.

Exit code 0: done; 2: invalid input; 1: an internal failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.load import load_config
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.data.hub.fetch import with_hub_inputs
from grpo_mega.formats.safetensors_reader import HfFiles
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.interfaces import HeldSlice
from grpo_mega.models.fp8_tensors import is_quantized
from grpo_mega.models.parameter_tables import hf_shapes, hf_shapes_aside
from grpo_mega.types import TensorSlice, UserError, WeightMismatchError
from grpo_mega.weight_sync.fp8_report import Report, by_layer, fp8_report, table_lines

SCALES = ("fp32", "power_of_two")


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="HF_DIR|CONFIG", help="a folder with weights, or a run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of CONFIG")
    parser.add_argument("--scales", choices=SCALES, help="default: as in the config's engine.fp8, or fp32")
    parser.add_argument("--json", action="store_true", help="print every matrix as one JSON object on the last line")
    args = parser.parse_intermixed_args(argv)
    try:
        return run(args)
    except WeightMismatchError as error:
        raise UserError(str(error)) from error


def run(args: argparse.Namespace) -> int:
    """Print the report and return the exit code.

    Raises:
        UserError: the input is invalid.
        WeightMismatchError: a weight is not finite.
    """
    folder, scales = folder_of(args)
    scales = args.scales or scales
    report = report_of(folder, power_of_two=scales == "power_of_two")
    print(f"{folder}: e4m3 values, {scales} scales of 128 x 128 blocks")
    print("\n".join(table_lines(report)))
    if args.json:
        layers = [dataclasses.asdict(layer) for layer in by_layer(report)]
        print(json.dumps({"model": str(folder), "scales": scales, "layers": layers, "tensors": report}))
    return 0


def folder_of(args: argparse.Namespace) -> tuple[Path, str]:
    """Return the model's folder, and the kind of scales that the config uses.

    Raises:
        UserError: the config's model does not exist yet, or there are overrides without a config.
    """
    if args.model.suffix not in (".yaml", ".yml"):
        if args.overrides:
            raise UserError(
                f"{args.overrides[0]} overrides a config key, but {args.model} is not a config",
                remedy="remove the override, or give a config",
            )
        return args.model, "fp32"
    config = load_config(args.model, args.overrides)
    if config.model.path is None:
        raise UserError(
            f"{args.model} has a model.base, which is pre-trained when the run starts",
            remedy="give the folder of its weights",
        )
    folder = with_hub_inputs(config, with_data=False).model.folder
    return folder, "power_of_two" if config.engine.fp8 == "scales_power_of_two" else "fp32"


def report_of(folder: Path, *, power_of_two: bool) -> Report:
    """Return the report of a checkpoint; one matrix is in memory at a time.

    Raises:
        UserError: the checkpoint is incomplete, or has no matrix that an FP8 engine quantizes.
        WeightMismatchError: a weight is not finite.
    """
    spec = checkpoint_spec(folder)
    shapes = hf_shapes(spec)
    report: Report = {}
    with closing(HfFiles(folder)) as files:
        files.check(shapes, hf_shapes_aside(spec))
        for name, shape in shapes.items():
            if is_quantized(name, shape):
                whole = TensorSlice(name, (0, 0), shape)
                report |= fp8_report(OneTensor(whole, files.read(whole)), None, power_of_two=power_of_two)
    if not report:
        raise UserError(f"{folder} has no matrices that an FP8 engine quantizes", remedy="give another model")
    return report


class OneTensor:
    """`WeightSource` of a single tensor."""

    def __init__(self, hf: TensorSlice, values: Tensor) -> None:
        self._held = HeldSlice(hf, hf.shape, values)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of the tensor."""
        return {self._held.hf.name: self._held.hf.shape}

    def shards(self) -> list[HeldSlice]:
        """Return the whole tensor."""
        return [self._held]
