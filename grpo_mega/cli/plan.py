"""Memory and time of a run before it starts, on any machine: no GPU, no weights.

    python tools/plan.py CONFIG [section.key=value ...] [--gpu h100-80g] [--nodes N] [--search] [--html FILE] [--json]

The model's folder needs its config.json alone; where `model.path` is no folder here, configs/models/<its name> is
taken. The number of devices is `--nodes` times those of a node, else `run.world_size`, else one node.

Exit code 0: it fits (or, with --search, a layout does); 2: it does not, or the input is wrong; 1: a failure of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mega.config.load import load_config
from grpo_mega.config.schema import Config
from grpo_mega.config.shipped import shipped_model_folder
from grpo_mega.models.kv_cache import KvCacheSize
from grpo_mega.models.spec import ModelSpec
from grpo_mega.planner.hardware import GPUS, Gpu, cluster_of, gpu_named
from grpo_mega.planner.plan import ResourcePlan, plan_resources
from grpo_mega.planner.remedies import as_overrides, remedy
from grpo_mega.planner.report import in_words, picture, search_in_words
from grpo_mega.planner.search import Found, search
from grpo_mega.types import UserError

NODES_SEARCHED = (1, 2, 4, 8, 16, 32, 64)
KEPT = 5  # layouts of each number of devices


@dataclass(frozen=True)
class Model:
    """Of one config: what is counted once for all its plans."""

    spec: ModelSpec
    gpu: Gpu
    where: str
    count: Any

    def plan(self, config: Config) -> ResourcePlan:
        """Raises UserError: the layout does not divide the model or the ranks."""
        from grpo_mega.engines.engine_rules import check_engine_fp8
        from grpo_mega.models.layout_rules import check_layout
        from grpo_mega.parallel.topology import Topology

        ranks = config.run.world_size or self.gpu.per_node
        check_layout(self.spec, config.parallel, Topology.of(config, ranks), self.where)
        check_engine_fp8(self.spec, config, self.where)
        return plan_resources(config, self.spec, self.count, cluster_of(self.gpu, ranks), self.where)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpu", default="h100-80g", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--nodes", type=int, help="of the GPU's usual size; overrides run.world_size")
    parser.add_argument("--search", action="store_true", help="layouts that fit, fastest first")
    parser.add_argument("--html", type=Path, help="write a picture of the memory per phase")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    args = parser.parse_intermixed_args(argv)
    try:
        return run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Raises UserError: the input is wrong."""
    gpu = gpu_named(args.gpu)
    if args.nodes is not None and args.nodes < 1:
        raise UserError(f"--nodes={args.nodes}: a job has 1 node or more")
    if args.search:  # which tries numbers of devices, and layouts, of its own
        config = load_config(args.config, args.overrides)
        KvCacheSize.from_config(config).check()  # no layout changes it
        return run_search(args, config, model_of(config, gpu))
    overrides = list(args.overrides)
    if args.nodes is not None:
        overrides.append(f"run.world_size={args.nodes * gpu.per_node}")
    config = load_config(args.config, overrides)
    if config.run.world_size is None:
        config = load_config(args.config, [*overrides, f"run.world_size={gpu.per_node}"])
    model = model_of(config, gpu)
    plan = model.plan(config)
    change = None if plan.fits else remedy(plan, model.plan, model.spec.num_layers)
    told = as_overrides(change) if change is not None else None
    if args.html is not None:
        args.html.write_text(picture(plan, f"{args.config.name} on {plan.topology.world_size} x {gpu.name}"))
    print(in_words(plan, told))
    if args.json:
        print(json.dumps(plan.as_json(told)))
    if not plan.fits:
        why = plan.problems[0]
        print(f"error: {args.config} does not fit: {why}; remedy: {' '.join(told or ['none found'])}", file=sys.stderr)
    return 0 if plan.fits else 2


def run_search(args: argparse.Namespace, config: Config, model: Model) -> int:
    """Over one number of nodes, or over 1 to 64."""
    nodes = NODES_SEARCHED if args.nodes is None else (args.nodes,)
    results: dict[int, list[Found]] = {}
    for each in nodes:
        ranks = each * model.gpu.per_node
        results[ranks] = search(config, model.spec, model.plan, ranks, model.gpu.per_node, KEPT)
        print(search_in_words(results[ranks], ranks), flush=True)
    if args.json:
        rows = [{"overrides": as_overrides(f.change)} | f.plan.as_json() for found in results.values() for f in found]
        print(json.dumps({"layouts": rows}))
    if not any(results.values()):
        print(f"error: no layout fits on {', '.join(map(str, results))} x {model.gpu.name}", file=sys.stderr)
        return 2
    return 0


def model_of(config: Config, gpu: Gpu) -> Model:
    """Raises UserError: no config.json, or a model without a table."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.simplefilter("ignore")  # libraries warn of what this machine lacks
    from grpo_mega.models.config_readers import read_spec
    from grpo_mega.models.tiny_recipe import recipe_spec
    from grpo_mega.policy.inspect.module_sizes import module_counter

    if config.model.base is not None:
        from grpo_mega.tiny_base.train import base_tokenizer

        vocab_size = len(base_tokenizer(config.model.base))
        spec, where = recipe_spec(config.model.base.architecture, vocab_size), "model.base.architecture"
    else:
        folder = shipped_model_folder(Path(str(config.model.path)))
        spec, where = read_spec(folder), str(folder)
    return Model(spec, gpu, where, module_counter(spec, config.parallel.megatron))
