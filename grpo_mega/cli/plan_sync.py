"""Computes the reshard plan of a run on any machine: which rank sends which slice of the weights to which engine rank.

    grpo-mega plan-sync CONFIG [section.key=value ...] [--out plan.json] [--against plan.json] [--json]
    python tools/plan_sync.py CONFIG [section.key=value ...] [--out plan.json] [--against plan.json] [--json]

It needs the model's config.json, but no weights, no GPU and no other process. The policy's shards are computed, and the
engine's layout is recorded from its own weight loader. `run.world_size` is the number of ranks. If `model.path` is not
a folder on this machine, configs/models/<its name> is used, else the config.json of the model of this name on the hub.
The predicted seconds are those of the busiest link at the given speeds, without latency and verification. Changes of
bucket, transport and engine.tp that make the sync faster are listed with their predicted effect; `--search` plans other
engine.tp also for large models.

Exit code 0: planned; 2: invalid input; 1: an internal failure.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.cli.output_files import check_output_file
from grpo_mega.cli.plan_file import difference, read_plan, write_plan
from grpo_mega.cli.sync_remedies import MOST_TRANSFERS_REPEATED, SyncRemedy, remedies
from grpo_mega.config.load import load_config
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.config.schema import Config
from grpo_mega.data.hub.model_config import planned_model_folder
from grpo_mega.engines.engine_rules import check_engine_fp8
from grpo_mega.engines.vllm.arguments import checkpoint_tensors
from grpo_mega.engines.vllm.layout_extrapolation import NoRuleError, layouts_of_all, sampled_ranks
from grpo_mega.engines.vllm.offline import record_ranks
from grpo_mega.engines.vllm.tp_rules import check_tp
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.models.layout_rules import check_layout
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.models.rank_slices import policy_slices
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Topology
from grpo_mega.quantization.fp8_checkpoint import SCALE_SUFFIX, scale_slices
from grpo_mega.tiny_base.train import base_config, base_tokenizer
from grpo_mega.types import TensorSlice, UserError
from grpo_mega.weight_sync.plan import ReshardPlan, plan_reshard
from grpo_mega.weight_sync.slice_table import (
    RankSliceTable,
    SentTensor,
    concatenate,
    table_from_columns,
    table_of_rank,
    tensor_numbers,
)

MEASURED = ("seconds", "cpu_seconds", "peak_memory_bytes")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", type=Path, help="write the plan to this file, one line per slice")
    parser.add_argument("--against", type=Path, help="print the differences to a plan written earlier")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="ranks of a node (default: 8)")
    parser.add_argument(
        "--node-gb-per-second", type=float, default=450.0, help="speed of a rank, each way, inside a node"
    )
    parser.add_argument(
        "--network-gb-per-second", type=float, default=50.0, help="speed of a rank, each way, between nodes"
    )
    parser.add_argument("--search", action="store_true", help="plan other engine.tp also if a plan takes long")
    parser.add_argument("--cpu", action="store_true", help="plan for machines without GPUs, which use other modules")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_intermixed_args(argv)
    check_output_file("--out", args.out)
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Compute, print and write the plan, and return the exit code.

    Raises:
        UserError: the input is invalid.
    """
    start = time.monotonic()
    config = load_config(args.config, args.overrides)
    if config.run.world_size is None:
        raise UserError(
            "run.world_size=null: the number of ranks must be set, because the GPUs of this machine are not counted",
            remedy="set run.world_size=N",
        )
    if config.engine.kind != "vllm":
        raise UserError(
            f"engine.kind={config.engine.kind} is not supported: a plan needs vLLM's weight loader",
            remedy="use engine.kind=vllm",
        )
    for name in ("gpus_per_node", "node_gb_per_second", "network_gb_per_second"):
        if not getattr(args, name) > 0:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option}={getattr(args, name)} must be more than 0",
                remedy=f"leave {option} out, or use a larger value",
            )
    with tempfile.TemporaryDirectory() as work:
        folder, spec = model_of(config, Path(work))
        local = args.cpu or config.policy.modules == "local"

        def planned(changed: Config) -> ReshardPlan:
            return plan_of(changed, spec, folder, args.gpus_per_node, local_modules=local)

        def replan(changed: Config) -> dict[str, Any]:
            return summarize(planned(changed), args.node_gb_per_second, args.network_gb_per_second)

        plan = planned(config)
        summary = summarize(plan, args.node_gb_per_second, args.network_gb_per_second)
        found = remedies(config, summary, replan, on_cpu=args.cpu, search=args.search)
    summary["remedies"] = [each.as_json() for each in found]
    summary["seconds"] = round(time.monotonic() - start, 1)
    summary["cpu_seconds"] = round(time.process_time(), 1)
    summary["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(summary_text(summary, config, args))
    print(remedies_text(found))
    if summary["transfers"] > MOST_TRANSFERS_REPEATED and not args.search:
        print("other values of engine.tp were not planned; --search plans them")
    if args.against is not None:
        changed = difference(read_plan(args.against), plan)
        print("\n".join(changed[:20]) or f"equal to {args.against}")
        summary["differences"] = len(changed)
    if args.out is not None:
        write_plan(plan, args.out, {k: v for k, v in summary.items() if k not in MEASURED})
        print(f"written to {args.out}")
    if args.json:
        print(json.dumps(summary))
    return 0


def model_of(config: Config, work: Path) -> tuple[Path, ModelSpec]:
    """Return the folder with the model's config.json, and its spec.

    `work` is an empty folder for the config of a base model.

    Raises:
        UserError: the folder was not found.
    """
    if config.model.base is not None:
        base_config(config.model.base, base_tokenizer(config.model.base)).save_pretrained(work)
        return work, checkpoint_spec(work)
    folder = planned_model_folder(config)
    return folder, checkpoint_spec(folder)


def plan_of(config: Config, spec: ModelSpec, folder: Path, gpus_per_node: int, *, local_modules: bool) -> ReshardPlan:
    """Return the plan between the policy's and the engines' layouts on all ranks.

    Args:
        config: of the run.
        spec: of the model.
        folder: with the model's config.json.
        gpus_per_node: ranks of a node.
        local_modules: the policy uses local modules instead of Transformer Engine's.

    Raises:
        UserError: a layout does not divide the model.
    """
    assert config.run.world_size is not None, "checked by run()"
    topology = Topology.of(config, config.run.world_size)
    check_layout(spec, config.parallel, topology, str(folder))
    check_tp(spec, config.engine.tp)
    check_engine_fp8(spec, config, str(folder), latent_split=local_modules)
    shapes = checkpoint_tensors(spec, DTYPES[config.precision.dtype], fp8=config.engine.fp8 is not None)
    tensors = {name: SentTensor(shape, dtype.itemsize) for name, (shape, dtype) in shapes.items()}
    held = policy_slice_table(config, spec, topology, tensors, local_modules=local_modules)
    wanted = engine_slice_table(config, folder, topology, tensors, shapes)
    nodes = [rank // gpus_per_node for rank in range(topology.world_size)]
    if topology.engine_servers:  # servers use nodes of their own, numbered after those of the job
        nodes += [nodes[-1] + 1 + rank // gpus_per_node for rank in range(topology.num_server_ranks)]
    return plan_reshard(tensors, held, wanted, nodes, config.weight_sync.bucket_bytes)


def policy_slice_table(
    config: Config, spec: ModelSpec, topology: Topology, tensors: dict[str, SentTensor], *, local_modules: bool
) -> RankSliceTable:
    """Return the policy's slices on all ranks; ranks with equal slices are computed once."""
    numbers, parts = tensor_numbers(tensors), []
    same_slices: dict[tuple[int, ...], list[int]] = {}
    for rank in range(topology.world_size):
        at = topology.coordinates(rank)
        same_slices.setdefault((at.pp_rank, at.tp_rank, at.ep_rank, at.etp_rank), []).append(rank)
    for ranks in same_slices.values():
        at = topology.coordinates(ranks[0])
        slices = policy_slices(spec, config.parallel, topology, at, latent_split=local_modules)
        if config.engine.fp8 is not None:
            slices += [hf for _, hf in scale_slices(hf_shapes(spec), slices)]
        parts.append(table_of_rank(tensors, slices, ranks[0], numbers).placed_on(ranks))
    return concatenate(parts)


def engine_slice_table(
    config: Config, folder: Path, topology: Topology, tensors: dict[str, SentTensor], shapes: dict[str, Any]
) -> RankSliceTable:
    """Return the engines' slices on all ranks. The loader of one replica is recorded; all replicas are equal."""
    tp, num_ranks = config.engine.tp, topology.engine_ranks
    plain = {name: tensor.shape for name, tensor in tensors.items()}

    def record(ranks: list[int]) -> dict[int, list[TensorSlice]]:
        records = record_ranks(
            folder,
            shapes,
            dtype=config.precision.dtype,
            tp=tp,
            ranks=ranks,
            dp=config.engine.dp,
            experts_spread=config.engine.ep > 1,
            fp8=config.engine.fp8 is not None,
        )
        return {rank: [copy.hf for copy in found.copies] for rank, found in zip(ranks, records, strict=True)}

    recorded = record(sampled_ranks(num_ranks, tp))
    try:
        layouts = layouts_of_all(recorded, plain, num_ranks, tp)
    except NoRuleError as error:
        print(f"recording every rank of the engine: {error}", file=sys.stderr)
        layouts = layouts_of_all(
            recorded | record([r for r in range(num_ranks) if r not in recorded]), plain, num_ranks, tp
        )
    numbers, parts = tensor_numbers(tensors), []
    for rank, layout in enumerate(layouts):
        first = topology.world_size if topology.engine_servers else 0
        end = first + (topology.num_server_ranks or topology.world_size)
        ranks = tuple(range(first + rank, end, num_ranks))
        columns = np.asarray([numbers[name] for name in layout.names], np.int64)
        parts.append(table_from_columns(columns, layout.starts, layout.ends, ranks))
    return concatenate(parts)


def summarize(plan: ReshardPlan, node_speed: float, network_speed: float) -> dict[str, Any]:
    """Return the object that --json prints. Speeds are in GB/s per rank and direction."""
    busiest, by_link = plan.traffic.busiest(), plan.traffic.bytes_by_link()
    seconds = {
        "same_node": busiest["same_node"] / node_speed / 1e9,
        "across_nodes": busiest["across_nodes"] / network_speed / 1e9,
    }
    slowest = max(seconds, key=lambda link: seconds[link])
    received = plan.traffic.received_bytes()
    return {
        "hash": plan.hash,
        "transfers": plan.num_transfers,
        "transfer_groups": len(plan.group),
        "bytes": sum(by_link.values()),
        "bytes_by_link": by_link,
        "lower_bound_bytes": plan.bounds[slowest],  # type: ignore[index]
        "lower_bound_bytes_by_link": plan.bounds,
        "busiest_link_bytes": busiest,
        "busiest_link_ratio": plan.traffic.busiest_link_ratio(),
        "received_bytes_per_rank": {"least": int(received.min()), "most": int(received.max())},
        "buckets": plan.num_buckets,
        "peak_buffer_bytes": plan.traffic.peak_buffer_bytes(),
        "predicted_seconds": max(seconds.values()),
        "predicted_seconds_by_link": seconds,
        "speeds_gb_per_second": {"same_node": node_speed, "across_nodes": network_speed},
        "ranks": len(plan.nodes),
        "parameters": sum(
            int(torch.Size(t.shape).numel()) for name, t in plan.tensors.items() if not name.endswith(SCALE_SUFFIX)
        ),
    }


def summary_text(summary: dict[str, Any], config: Config, args: argparse.Namespace) -> str:
    """Return the summary as text."""
    links, gb = summary["bytes_by_link"], 1e9
    return (
        f"plan {summary['hash']}: {summary['transfers']:,} transfers in {summary['buckets']} buckets of "
        f"{config.weight_sync.bucket_bytes:,} bytes, {summary['ranks']} ranks\n"
        f"in the same process {links['same_process'] / gb:.1f} GB, inside nodes {links['same_node'] / gb:.1f} GB, "
        f"between nodes {links['across_nodes'] / gb:.1f} GB\n"
        f"busiest link {summary['busiest_link_ratio']:.3f} times the lower bound; buffers "
        f"{summary['peak_buffer_bytes'] / 1e6:.0f} MB; {summary['predicted_seconds']:.3f} s predicted at "
        f"{args.node_gb_per_second:g} and {args.network_gb_per_second:g} GB/s\n"
        f"planned in {summary['seconds']:.0f} s, {summary['cpu_seconds']:.0f} s of CPU time, with "
        f"{summary['peak_memory_bytes'] / 1e9:.1f} GB"
    )


def remedies_text(found: list[SyncRemedy]) -> str:
    """Return the changes that make the sync faster, as text."""
    if not found:
        return "no change of buckets, transport or engine.tp makes it 10% faster"
    return "\n".join(["faster with (predicted, with 2 ms per round):", *(f"  {each.text}" for each in found)])


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.exit(main())
