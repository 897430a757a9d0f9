"""Loss and gradient of one recorded batch in several layouts of the policy, against one rank.

    python tools/compare_layouts.py CONFIG --layouts "tp=2;pp=2,cp=2;pp=2,vpp=2,dp=2" [section.key=value ...]

A layout is a list of keys of `parallel` and, where wanted, `dp`; `;` stands between layouts. Each runs in ranks of its
own, on this machine. The batch is a file of a run (`--rollouts runs/NAME/rollouts/step_000001.jsonl`) or else made of
the config's prompts and random answers. Says of each layout the loss, the gradient norm and the first tensor, in the
order of the checkpoint, whose gradient differs from that of one rank by more than the tolerance.

Exit code 0: all layouts agree; 1: one differs, or failed; 2: the input is wrong.
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

from grpo_mega.config.load import load_config
from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.config.schema import Config
from grpo_mega.launch.supervisor import run_ranks
from grpo_mega.parallel.ports import free_port
from grpo_mega.types import UserError

# |g - g_one| / |g_one| of one tensor: above what rounding makes of a model that was trained, far below any fault
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True)
class Layout:
    """One entry of --layouts."""

    text: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class LayoutResult:
    """What one layout gave; the differences are to one rank."""

    layout: str
    world_size: int
    loss: float
    grad_norm: float
    first_difference: str | None
    largest_difference: float
    largest_difference_of: str


def parse_layout(text: str) -> Layout:
    """`pp=2,cp=2,dp=1` as overrides of a config.

    Raises:
        UserError: names the entry and what is wrong with it.
    """
    keys: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        known = sorted({*ParallelConfig.model_fields, "dp"})
        if not equals or key not in known:
            raise UserError(
                f"--layouts: {part!r} in {text!r} is not one of {', '.join(known)} with a value", remedy="write tp=2"
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
    """The run's config in this layout, with every rule checked. The engine, which is not used, has one rank."""
    from grpo_mega.doctor.model_rules import check_model
    from grpo_mega.parallel.topology import Topology

    base = load_config(args.config, args.overrides)
    one = base.model_copy(update={"parallel": ParallelConfig()})
    plain = [f"parallel.{key}={json.dumps(value)}" for key, value in one.parallel.model_dump().items()]
    try:
        config = load_config(args.config, [*args.overrides, *plain, "engine.tp=1", *layout.overrides])
        check_model(config, Topology.of(config, config.run.world_size or 1), with_engine=False)
    except UserError as error:
        raise UserError(f"--layouts: {layout.text or 'one rank'}: {error}") from None
    return config


def measure_on_ranks(worker: str, job: Path, world: int) -> None:
    """Start `world` ranks of this machine, each of which calls `measure` of the module `worker`, and wait for them.

    Raises:
        RuntimeError: a rank failed; its message is on the screen.
    """
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    # libraries warn of what this machine lacks, once a rank
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONWARNINGS": "ignore"}
    ranks = [{**os.environ, **threads, **common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]
    command = [sys.executable, "-m", "grpo_mega.cli.rank", worker, str(job)]
    if run_ranks(command, ranks) != 0:
        raise RuntimeError(f"a rank failed in a layout of {world} rank(s); its message is above")


def run_layout(config: Config, folder: Path, work: Path, rollouts: Path | None) -> tuple[dict[str, Any], Path]:
    """Start the ranks of one layout; returns what rank 0 wrote: loss and norm, and the file of gradients.

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
    """(first tensor that differs by more than the tolerance, largest relative difference, whose it is)."""
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
    """One rank first, then each layout."""
    from grpo_mega.tiny_base.train import model_folder_of

    layouts = [parse_layout(""), *(parse_layout(text) for text in args.layouts.split(";") if text.strip())]
    if len(layouts) == 1:
        raise UserError(f"--layouts={args.layouts!r} names no layout", remedy="write for example 'tp=2;pp=2,cp=2'")
    configs = [config_of(args, layout) for layout in layouts]
    if args.rollouts is not None and not args.rollouts.is_file():
        raise UserError(f"--rollouts={args.rollouts}: no such file", remedy="a run writes rollouts/step_000001.jsonl")
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
    """For a terminal."""
    verdict = "same" if result.first_difference is None else f"differs first at {result.first_difference}"
    if result.layout != "one rank":
        verdict += f" (largest relative difference {result.largest_difference:.1e}, {result.largest_difference_of})"
    return f"{result.layout:<32} loss {result.loss:+.8f}  gradient norm {result.grad_norm:.8f}  {verdict}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--layouts", required=True, help='for example "tp=2;pp=2,cp=2"')
    parser.add_argument("--rollouts", type=Path, help="rows of a run (default: the config's prompts, random answers)")
    parser.add_argument("--tolerance", type=float, help="of a tensor's gradient, relative (fp32: 1e-4, bf16: 5e-2)")
    parser.add_argument("--json", action="store_true", help="the list of results as the last line")
    args = parser.parse_intermixed_args(argv)
    try:
        results = compare_layouts(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
    return int(any(result.first_difference is not None for result in results))
