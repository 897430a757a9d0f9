"""Compare loss and gradient of one batch in several layouts of the policy with those of a single rank.

    grpo-mega compare layouts CONFIG --layouts "tp=2;pp=2,cp=2;pp=2,vpp=2,dp=2" [section.key=value ...]
    python tools/compare_layouts.py CONFIG --layouts "tp=2;pp=2,cp=2;pp=2,vpp=2,dp=2" [section.key=value ...]

A layout is a comma-separated list of keys of `parallel`, optionally with `dp`; layouts are separated by `;`. The ranks
of each layout are started on this machine. The batch is a file of a run (`--rollouts
runs/NAME/rollouts/step_000001`); without it, the batch has the config's prompts and random answers. The command
prints the loss and the gradient norm of each layout. It also prints the first tensor, in checkpoint order, whose
gradient differs from the single rank's gradient by more than the tolerance.

Exit code 0: all layouts agree; 1: a layout differs or failed; 2: the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.load import load_config
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.config.schema import Config
from grpo_mega.data.hub.fetch import pinned_overrides, with_hub_inputs
from grpo_mega.launch.node import Node
from grpo_mega.launch.supervisor import run_ranks
from grpo_mega.types import UserError

# Limit of |g - g_one| / |g_one| of one tensor: more than the rounding error of a trained model, less than any defect.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True)
class Layout:
    """One entry of --layouts."""

    text: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class LayoutResult:
    """Loss, gradient norm and largest gradient differences of one layout, compared with a single rank."""

    layout: str
    world_size: int
    loss: float
    grad_norm: float
    first_difference: str | None
    largest_difference: float
    largest_difference_of: str


def parse_layout(text: str) -> Layout:
    """Parse a layout such as `pp=2,cp=2,dp=1` into overrides of a config.

    Raises:
        UserError: an entry is not valid; the message names it.
    """
    keys: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        known = sorted({*ParallelConfig.model_fields, "dp"})
        if not equals or key not in known:
            raise UserError(
                f"--layouts: {part!r} in {text!r} must be KEY=VALUE with a key of {', '.join(known)}",
                remedy="write for example tp=2",
            )
        try:
            keys[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            keys[key] = value  # a pipeline_layout
    dp = keys.pop("dp", None)
    if dp is not None and not (isinstance(dp, int) and dp >= 1):
        raise UserError(f"--layouts: dp={dp} in {text!r} must be a whole number of 1 or more")
    tp, cp, pp, ep, etp = (keys.get(axis, 1) for axis in ("tp", "cp", "pp", "ep", "etp"))
    for axis, size in (("tp", tp), ("cp", cp), ("pp", pp), ("ep", ep), ("etp", etp)):
        if not (isinstance(size, int) and size >= 1):
            raise UserError(f"--layouts: {axis}={size} in {text!r} must be a whole number of 1 or more")
    world = tp * cp * pp * dp if dp is not None else math.lcm(tp * cp * pp, etp * ep * pp)
    overrides = [f"parallel.{key}={json.dumps(value)}" for key, value in keys.items()]
    return Layout(text.strip(), (*overrides, f"run.world_size={world}"))


def config_of(args: argparse.Namespace, layout: Layout) -> Config:
    """Return the run's config in this layout, after checking every rule. The unused engine has one rank."""
    from grpo_mega.doctor.model_rules import check_model
    from grpo_mega.parallel.topology import Topology

    base = with_hub_inputs(load_config(args.config, args.overrides), with_data=False)
    one = base.model_copy(update={"parallel": ParallelConfig()})
    plain = [f"parallel.{key}={json.dumps(value)}" for key, value in one.parallel.model_dump().items()]
    try:
        config = load_config(
            args.config, [*args.overrides, *pinned_overrides(base), *plain, "engine.tp=1", *layout.overrides]
        )
        check_model(config, Topology.of(config, config.run.world_size or 1), with_engine=False)
    except UserError as error:
        raise UserError(f"--layouts: {layout.text or 'one rank'}: {error}") from None
    return config


def measure_on_ranks(worker: str, job: Path, world: int) -> None:
    """Start `world` ranks of this machine, each of which calls `measure` of the module `worker`, and wait for them.

    Raises:
        RuntimeError: a rank failed; its message is on the screen.
    """
    # libraries warn about missing optional features, once per rank
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONWARNINGS": "ignore"}
    ranks = Node.of_whole_job(world).environments({**os.environ, **threads})
    command = [sys.executable, "-m", "grpo_mega.cli.layout_worker", worker, str(job)]
    if run_ranks(command, ranks) != 0:
        raise RuntimeError(f"a rank failed in a layout of {world} rank(s); its message is above")


def run_layout(config: Config, folder: Path, work: Path, rollouts: Path | None) -> tuple[dict[str, Any], Path]:
    """Start the ranks of one layout; return the loss and gradient norm of rank 0, and the file of gradients.

    Raises:
        RuntimeError: a rank failed; its message is on the screen.
    """
    world = config.run.world_size or 1
    number = len(list(work.glob("job_*.json")))
    job, answer, gradients = (work / f"{name}_{number}" for name in ("job", "answer", "gradients"))
    job = job.with_suffix(".json")
    settings = {"config": config.model_dump(mode="json"), "model": str(folder), "rollouts": str(rollouts or "")}
    job.write_text(json.dumps(settings | {"answer": str(answer), "gradients": str(gradients), "work": str(work)}))
    measure_on_ranks("grpo_mega.cli.compare_layouts_worker", job, world)
    return json.loads(answer.read_text()), gradients


def compare(found: Path, wanted: Path, tolerance: float) -> tuple[str | None, float, str]:
    """Compare two files of gradients.

    Returns:
        The first tensor that differs by more than the tolerance, the largest relative difference, and its tensor.
    """
    from safetensors import safe_open

    first, largest, largest_of = None, 0.0, ""
    order = json.loads(wanted.with_suffix(".json").read_text())
    with safe_open(str(found), framework="pt") as ours, safe_open(str(wanted), framework="pt") as theirs:
        for name in order:
            one = theirs.get_tensor(name).double()
            difference = float((ours.get_tensor(name).double() - one).norm() / one.norm().clamp_min(1e-30))
            if difference > largest:
                largest, largest_of = difference, name
            if first is None and not difference <= tolerance:
                first = name
    return first, largest, largest_of


def compare_layouts(args: argparse.Namespace) -> list[LayoutResult]:
    """Run the batch on one rank, then in each layout, and return all results.

    Raises:
        UserError: a layout or the file of rollouts is not valid.
        RuntimeError: a rank failed; its message is on the screen.
    """
    from grpo_mega.tiny_base.train import model_folder_of

    layouts = [parse_layout(""), *(parse_layout(text) for text in args.layouts.split(";") if text.strip())]
    if len(layouts) == 1:
        raise UserError(
            f"--layouts={args.layouts!r} must contain a layout", remedy="write for example 'tp=2;pp=2,cp=2'"
        )
    configs = [config_of(args, layout) for layout in layouts]
    if args.rollouts is not None and not args.rollouts.exists():
        raise UserError(f"--rollouts={args.rollouts} was not found", remedy="a run writes rollouts/step_000001/")
    one = configs[0]
    folder = model_folder_of(one)
    tolerance = args.tolerance if args.tolerance is not None else TOLERANCE[one.precision.dtype]
    results = []
    with tempfile.TemporaryDirectory(prefix="compare_layouts_") as work:
        reference: Path | None = None
        for layout, config in zip(layouts, configs, strict=True):
            answer, gradients = run_layout(config, folder, Path(work), args.rollouts)
            reference = reference or gradients
            first, largest, largest_of = compare(gradients, reference, tolerance)
            text, world = layout.text or "one rank", config.run.world_size or 1
            results.append(LayoutResult(text, world, answer["loss"], answer["grad_norm"], first, largest, largest_of))
            if not args.json:
                print(line_of(results[-1]), flush=True)
            if gradients != reference:
                gradients.unlink()
    return results


def line_of(result: LayoutResult) -> str:
    """Return the result as one line of text."""
    verdict = "same" if result.first_difference is None else f"differs first at {result.first_difference}"
    if result.layout != "one rank":
        verdict += f" (largest relative difference {result.largest_difference:.1e}, {result.largest_difference_of})"
    return f"{result.layout:<32} loss {result.loss:+.8f}  gradient norm {result.grad_norm:.8f}  {verdict}"


@errors_as_exit_codes(RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--layouts", required=True, help='layouts to compare, for example "tp=2;pp=2,cp=2"')
    parser.add_argument(
        "--rollouts", type=Path, help="file of a run's rollouts (default: the config's prompts with random answers)"
    )
    parser.add_argument(
        "--tolerance", type=float, help="largest relative difference of a gradient (default: fp32 1e-4, bf16 5e-2)"
    )
    parser.add_argument("--json", action="store_true", help="print the list of results as JSON on the last line")
    args = parser.parse_intermixed_args(argv)
    results = compare_layouts(args)
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
    return int(any(result.first_difference is not None for result in results))
