"""Predict the memory and time of a run before it starts, on any machine: no GPU, no weights.

    grpo-mega plan CONFIG [section.key=value ...] [--gpu h100-80g] [--nodes N] [--search] [--html FILE] [--json]
    grpo-mega plan CONFIG --lengths FILE|lognormal:MU,SIGMA
    python tools/plan.py CONFIG [section.key=value ...] [--gpu h100-80g] [--nodes N] [--search] [--html FILE] [--json]

The model's folder needs only its config.json. If `model.path` is not a folder on this machine, the shipped
configs/models/<its name> is used, else the config.json of the model of this name on the hub. The number of devices
comes from `--nodes` and `--gpus-per-node`. Without them, `run.world_size` is used, and without all, one node. If the
layout of the config does not divide the devices of these options, the layouts that fit on them are searched, as with
`--search`. `--assume NAME=VALUE` replaces an assumption, for example `mean_length=0.2`; `--json` lists all of them.

`--lengths` simulates steps with answers of these lengths, and compares synchronous steps, partial rollouts and
asynchronous engine servers (docs/layouts.md). It takes a text file with one length in tokens per line, the folder of a
run or of one step's rollouts, or `lognormal:MU,SIGMA` in natural logarithms of tokens.

Exit code 0: the run fits (with --search: a layout fits); 2: it does not fit, or the input is wrong; 1: a failure of
the tool itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.cli.output_files import check_output_file
from grpo_mega.cli.simulate_steps import read_lengths, simulated_steps
from grpo_mega.config.load import load_config
from grpo_mega.config.nearest_name import nearest_name
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.config.schema import Config
from grpo_mega.data.hub.model_config import planned_model_folder
from grpo_mega.models.kv_cache_memory import KvCacheSize
from grpo_mega.models.module_sizes import ModuleCounter
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.hardware import GPUS, Assumptions, Gpu, cluster_of, gpu_named
from grpo_mega.planner.plan import ResourcePlan, plan_resources
from grpo_mega.planner.remedies import as_overrides, remedy
from grpo_mega.planner.report import memory_picture, plan_text, search_text
from grpo_mega.planner.search import FittingLayout, search
from grpo_mega.planner.simulation.lengths import AnswerLengths
from grpo_mega.types import UserError

NODES_SEARCHED = (1, 2, 4, 8, 16, 32, 64)
LAYOUTS_LISTED = 5  # for each number of devices


@dataclass(frozen=True)
class PlannedModel:
    """The model of a config and the sizes of its modules, which are counted once for all plans."""

    spec: ModelSpec
    gpu: Gpu
    where: str
    count: ModuleCounter
    assumed: Mapping[str, float] = field(default_factory=dict)
    """Assumptions that replace the planner's."""

    def plan(self, config: Config) -> ResourcePlan:
        """Return the plan of a config.

        Raises:
            UserError: the layout does not divide the model or the ranks.
        """
        from grpo_mega.engines.engine_rules import check_engine_fp8
        from grpo_mega.models.layout_rules import check_layout

        ranks = config.run.world_size or self.gpu.per_node
        check_layout(self.spec, config.parallel, Topology.of(config, ranks), self.where)
        check_engine_fp8(self.spec, config, self.where)
        return plan_resources(config, self.spec, self.count, cluster_of(self.gpu, ranks, self.assumed), self.where)


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpu", default="h100-80g", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--nodes", type=int, help="nodes of the GPU's usual size; overrides run.world_size")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs of a node (default: the usual number, 8)")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="replace an assumption")
    parser.add_argument("--search", action="store_true", help="list the layouts that fit, the fastest first")
    parser.add_argument("--lengths", metavar="SOURCE", help="simulate steps with answers of these lengths")
    parser.add_argument("--html", type=Path, help="write a picture of the memory per phase to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_intermixed_args(argv)
    check_output_file("--html", args.html)
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Plan or search, print the result, and return the exit code.

    Raises:
        UserError: the input is wrong.
    """
    gpu, assumed = gpu_of(args), assumptions_of(args.assume)
    if args.search and args.lengths is not None:
        raise UserError(
            f"--lengths={args.lengths} is not supported with --search, which changes the layout",
            remedy="leave one of them out, and simulate a layout that was found",
        )
    if args.search:  # the search chooses the number of devices and the layout
        config = load_config(args.config, args.overrides)
        if config.has_engine:
            KvCacheSize.from_config(config).check()  # the same for every layout
        return run_search(args, config, model_of(config, gpu, assumed))
    planned = planned_config(args, gpu)
    if planned is None:
        return search_instead(args, gpu, assumed)
    config = planned
    lengths = lengths_of(args.lengths, config)
    model = model_of(config, gpu, assumed)
    plan = model.plan(config)
    change = None if plan.fits else remedy(plan, model.plan, model.spec.num_layers)
    overrides_to_fit = as_overrides(change) if change is not None else None
    if args.html is not None:
        args.html.write_text(
            memory_picture(plan, f"{args.config.name} on {plan.inputs.topology.world_size} x {gpu.name}")
        )
    print(plan_text(plan, overrides_to_fit))
    simulation = {} if lengths is None or not plan.fits else _print_simulation(args, plan, lengths, model)
    if args.json:
        print(json.dumps(plan.as_json(overrides_to_fit) | simulation))
    if not plan.fits:
        change_text = " ".join(overrides_to_fit or ["none was found"])
        print(f"error: {args.config} does not fit: {plan.problems[0]}; remedy: {change_text}", file=sys.stderr)
    return 0 if plan.fits else 2


def lengths_of(given: str | None, config: Config) -> AnswerLengths | None:
    """Return the lengths of `--lengths`; None without the option.

    Raises:
        UserError: the value is wrong, or the run samples nothing.
    """
    if given is None:
        return None
    if not config.has_engine:
        raise UserError(
            f"--lengths={given} needs a run that samples, and supervised fine-tuning does not", remedy="leave it out"
        )
    return read_lengths(given, config.sampling.max_tokens)


def _print_simulation(
    args: argparse.Namespace, plan: ResourcePlan, lengths: AnswerLengths, model: PlannedModel
) -> dict[str, Any]:
    """Print the simulated steps and return their part of `--json`."""
    simulation = simulated_steps(plan, lengths, args.config, args.overrides, model.plan)
    print(f"\n{simulation.text()}")
    return {"simulation": simulation.as_json()}


def gpu_of(args: argparse.Namespace) -> Gpu:
    """Return the device of `--gpu`, in nodes of `--gpus-per-node` with that part of the usual node's host memory.

    Raises:
        UserError: an option has a value that is not possible.
    """
    gpu = gpu_named(args.gpu)
    for option, value in (("--nodes", args.nodes), ("--gpus-per-node", args.gpus_per_node)):
        if value is not None and value < 1:
            raise UserError(f"{option}={value} must be at least 1", remedy=f"use {option}=1 or more, or leave it out")
    if args.gpus_per_node is None:
        return gpu
    host_memory = gpu.host_memory * args.gpus_per_node / gpu.per_node
    return replace(gpu, per_node=args.gpus_per_node, host_memory=host_memory)


def assumptions_of(texts: Sequence[str]) -> dict[str, float]:
    """Return name -> value of the options `--assume NAME=VALUE`.

    Raises:
        UserError: a name is unknown, or a value is not a positive number.
    """
    assumed, names = {}, Assumptions.names()
    for text in texts:
        name, _, value = text.partition("=")
        if name not in names:
            near = nearest_name(name, names)
            known = f"did you mean {near}?" if near else f"use one of {', '.join(names)}"
            raise UserError(f"--assume={text} is not an assumption of the planner", remedy=known)
        try:
            assumed[name] = float(value)
        except ValueError:
            assumed[name] = math.nan
        most = 1.0 if name == "mean_length" else math.inf
        if not 0 < assumed[name] <= most or math.isinf(assumed[name]):
            allowed = "a number above 0" + (", at most 1" if name == "mean_length" else "")
            raise UserError(f"--assume={text} must be {allowed}", remedy=f"use --assume {name}=NUMBER")
    return assumed


def planned_config(args: argparse.Namespace, gpu: Gpu) -> Config | None:
    """Return the config on the devices of the options, or None if its layout does not divide them.

    Raises:
        UserError: the config is wrong on any number of devices.
    """
    if args.nodes is None and args.gpus_per_node is None:
        config = load_config(args.config, args.overrides)
        if config.run.world_size is not None:
            return config
        return load_config(args.config, [*args.overrides, f"run.world_size={gpu.per_node}"])
    ranks = (args.nodes or 1) * gpu.per_node
    if args.nodes is None:
        ranks = load_config(args.config, args.overrides).run.world_size or ranks
    config = load_config(args.config, [*args.overrides, "run.world_size=null"])
    try:
        Topology.of(config, ranks)
    except UserError as error:
        print(f"the layout of {args.config} does not divide {ranks} devices: {error.message}")
        return None
    return load_config(args.config, [*args.overrides, f"run.world_size={ranks}"])


def search_instead(args: argparse.Namespace, gpu: Gpu, assumed: Mapping[str, float]) -> int:
    """Search the layouts that fit on the devices of the options, and return the exit code."""
    config = load_config(args.config, [*args.overrides, "run.world_size=null"])
    if config.has_engine:
        KvCacheSize.from_config(config).check()
    if args.lengths is not None:
        raise UserError(
            f"--lengths={args.lengths} needs one layout, and that of the config does not divide the devices",
            remedy="leave it out, and use it with the overrides of a layout that is found",
        )
    if args.html is not None:
        raise UserError(
            f"--html={args.html} needs one layout, and that of the config does not divide the devices",
            remedy="leave it out, and use it with the overrides of a layout that is found",
        )
    print("the layouts that fit, the fastest step first:")
    return run_search(args, config, model_of(config, gpu, assumed))


def run_search(args: argparse.Namespace, config: Config, model: PlannedModel) -> int:
    """Search on the given number of nodes, or on 1 to 64 nodes, and return the exit code."""
    nodes = NODES_SEARCHED if args.nodes is None else (args.nodes,)
    results: dict[int, list[FittingLayout]] = {}
    for num_nodes in nodes:
        ranks = num_nodes * model.gpu.per_node
        results[ranks] = search(config, model.spec, model.plan, ranks, model.gpu.per_node, LAYOUTS_LISTED)
        print(search_text(results[ranks], ranks), flush=True)
    if args.json:
        rows = [{"overrides": as_overrides(f.change)} | f.plan.as_json() for found in results.values() for f in found]
        print(json.dumps({"layouts": rows}))
    if not any(results.values()):
        print(f"error: no layout fits on {', '.join(map(str, results))} x {model.gpu.name}", file=sys.stderr)
        return 2
    return 0


def model_of(config: Config, gpu: Gpu, assumed: Mapping[str, float] = MappingProxyType({})) -> PlannedModel:
    """Read the model of a config; no weights are read.

    Raises:
        UserError: config.json was not found, the model family is not supported, or `engine.args` is wrong.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.simplefilter("ignore")  # libraries warn about missing optional features
    from grpo_mega.engines.pass_through import check_engine_args
    from grpo_mega.formats.stored_head import checkpoint_spec
    from grpo_mega.models.tiny_recipe import recipe_spec
    from grpo_mega.policy.inspect.module_sizes import module_counter

    check_engine_args(config, on_cuda=gpu.name != "cpu")
    if config.model.base is not None:
        from grpo_mega.tiny_base.train import base_tokenizer

        vocab_size = len(base_tokenizer(config.model.base))
        spec, where = recipe_spec(config.model.base.architecture, vocab_size), "model.base.architecture"
    else:
        folder = planned_model_folder(config)
        spec, where = checkpoint_spec(folder), str(folder)
    return PlannedModel(spec, gpu, where, module_counter(spec, config.parallel.megatron), assumed)
