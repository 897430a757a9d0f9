"""One rank of `grpo-mega evaluate`: loads the weights of a checkpoint into an engine and runs the evaluation."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from grpo_mega.config.schema import Config
from grpo_mega.convert.compare import HfTensors, open_checkpoint
from grpo_mega.data.chat import load_tokenizer
from grpo_mega.data.dataset import load_held_out
from grpo_mega.engines.factory import make_engine
from grpo_mega.interfaces import WeightSink
from grpo_mega.observe.log import configure_logging, quiet_libraries
from grpo_mega.observe.summary import Evaluation
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.error_report import report_error
from grpo_mega.parallel.ranks import Ranks, init_ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.rewards.base import build_rewards, full_marks, needs_fields
from grpo_mega.rollout.evaluator import Evaluator
from grpo_mega.trainer.build_rollout import make_dialogue, make_sampler, start_workers
from grpo_mega.types import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_weights(sink: WeightSink, checkpoint: HfTensors, dtype: torch.dtype) -> None:
    """Read every slice that this engine rank holds from the checkpoint's files, and write it to the engine."""
    sink.begin_update()
    for region in sink.layout():
        hf = region.placement.hf
        values = torch.empty(hf.shape, dtype=checkpoint.dtype(hf.name))
        checkpoint.read_into(hf, values)
        sink.write(hf, values.to(dtype))
    sink.end_update(0)


def measure(job: dict[str, Any], config: Config, ranks: Ranks) -> Evaluation:
    """Evaluate the checkpoint of the job. Collective."""
    folder = Path(job["model"])
    rewards = build_rewards(config.reward.terms)
    held_out = load_held_out(config.data, load_tokenizer(folder), with_fields=needs_fields(rewards))
    assert held_out is not None, "tools/evaluate.py sets data.eval"
    with ExitStack() as stack:
        workers = start_workers(config, ranks, stack)
        engine = make_engine(config, folder)
        stack.callback(engine.close)
        quiet_libraries()
        load_weights(engine.sink, open_checkpoint(Path(job["weights"]), folder, folder), DTYPES[config.precision.dtype])
        collectives = ArrayCollectives(ranks)
        dialogue = make_dialogue(config, engine, workers, ranks, folder)
        sampler = make_sampler(config, engine, workers, collectives, PhaseTimer(), folder, dialogue)
        limits = config.evaluation
        max_tokens = limits.max_tokens or config.sampling.max_tokens
        evaluator = Evaluator(
            sampler, held_out.sets, limits, max_tokens, config.run.seed, full_marks(rewards), collectives.sum
        )
        return evaluator.evaluate()


def main() -> int:
    """Run the worker; return exit code 2 if its input is invalid."""
    job = json.loads(Path(sys.argv[1]).read_text())
    config = Config.model_validate_json(json.dumps(job["config"]))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    topology = Topology.of(config, int(os.environ["WORLD_SIZE"]))
    configure_logging(int(os.environ["RANK"]), "")
    ranks = init_ranks(topology, config.guard.timeout_seconds)
    try:
        found = measure(job, config, ranks)
    except UserError as error:
        report_error(error)
        return 2
    if ranks.is_first:
        Path(job["answer"]).write_text(json.dumps(asdict(found)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
