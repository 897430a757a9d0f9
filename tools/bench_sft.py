"""Measure tokens per second of supervised fine-tuning and of the train phase of RL, on the same rows in one process.

    python tools/bench_sft.py [--examples 64] [--rounds 3] [--json]

One rank trains a random Qwen3 model in float32. Both sides run the same policy on the same packed rows with one update
of Adam. RL runs GRPO's loss with old and reference log-probs, as its phase `train` does. Supervised fine-tuning also
builds its rows from the examples, which its step does. The sides alternate: RL, SFT, RL, SFT, ...; each round is their
ratio, and the result is the median of the rounds after one round that warms up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from array import array
from dataclasses import replace
from pathlib import Path

import torch

from grpo_mega.algorithm.likelihood import LikelihoodLoss
from grpo_mega.config.load import config_from_values
from grpo_mega.config.schema import Config
from grpo_mega.data.example_dataset import Example
from grpo_mega.data.row_plan import RowShape
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.parallel.ports import free_port
from grpo_mega.parallel.ranks import Ranks, init_ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.trainer.batch import TrainBatch
from grpo_mega.trainer.example_batch import build_example_batch
from grpo_mega.trainer.objective import Objective

RATE = 1e-6


def random_examples(count: int, vocab_size: int) -> list[Example]:
    """Return examples of 32 to 256 random tokens, of which all after the first quarter are trained."""
    rng = random.Random(0)
    examples = []
    for index in range(count):
        size = rng.randint(32, 256)
        tokens = array("i", [rng.randrange(2, vocab_size) for _ in range(size)])
        examples.append(Example(index, tokens, bytes([0] * (size // 4) + [1] * (size - size // 4))))
    return examples


def config_of(model: Path, row_tokens: int) -> Config:
    """Return the config of both sides; the objective of RL is that of its defaults."""
    values = {
        "model": {"path": str(model)},
        "data": {"train": "unused", "max_example_tokens": 256},
        "train": {"objective": "sft", "steps": 1, "max_tokens_per_microbatch": row_tokens},
        "optimizer": {"lr": RATE},
        "precision": {"dtype": "fp32"},
    }
    return config_from_values(values, [], [Path.cwd()])


def rows_of(examples: list[Example], config: Config) -> TrainBatch:
    """Return the packed rows of all examples as one update."""
    return build_example_batch(examples, config.train, dp=1, dp_rank=0, shape=RowShape())


def measure(policy: MegatronPolicy, config: Config, examples: list[Example], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round of both sides, after one round that is not counted."""
    rows = rows_of(examples, config)
    with torch.no_grad():
        old = policy.log_probs(rows.microbatches)
    assert old is not None, "one rank is the last stage"
    filled = rows.with_log_probs(old=old, ref=old).microbatches
    rl = [replace(m, advantages=m.loss_mask.float(), sampler_log_probs=m.old_log_probs) for m in filled]  # type: ignore[arg-type]
    grpo, likelihood = Objective(config.algorithm, 256).loss(), LikelihoodLoss()
    seconds: dict[str, list[float]] = {"rl": [], "sft": []}
    for number in range(rounds + 1):
        begin = time.perf_counter()
        policy.update(rl, grpo, RATE)
        middle = time.perf_counter()
        policy.update(rows_of(examples, config).microbatches, likelihood, RATE)
        end = time.perf_counter()
        if number:
            seconds["rl"].append(middle - begin)
            seconds["sft"].append(end - middle)
    return seconds


def compare(num_examples: int, rounds: int, row_tokens: int) -> dict[str, object]:
    """Return the object that is printed."""
    sys.path.insert(0, str(Path(__file__).parent / "step_sides"))
    from model_folder import Architecture, make_model

    shape, load = Architecture(), os.getloadavg()[0]
    examples = random_examples(num_examples, shape.vocab_size)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with tempfile.TemporaryDirectory(prefix="bench_sft_") as folder:
        model = Path(folder) / "model"
        parameters = make_model(model, shape, None)
        config = config_of(model, row_tokens)
        ranks: Ranks = init_ranks(Topology(1), 600.0)
        policy = MegatronPolicy(config, checkpoint_spec(model), model, ranks, with_reference=False)
        seconds = measure(policy, config, examples, rounds)
        torch.distributed.destroy_process_group()
    tokens = sum(len(example.token_ids) for example in examples)
    speeds = {side: [tokens / each for each in values] for side, values in seconds.items()}
    ratios = [sft / rl for sft, rl in zip(speeds["sft"], speeds["rl"], strict=True)]
    return {
        "name": "sft_tokens_per_second",
        "measured": statistics.median(speeds["sft"]),
        "reference": statistics.median(speeds["rl"]),
        "ratio": statistics.median(ratios),
        "unit": "tokens / s",
        "ratios": ratios,
        "conditions": {
            "examples": num_examples,
            "tokens": tokens,
            "row_tokens": row_tokens,
            "parameters": parameters,
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load_at_start": load,
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
    }


def main() -> None:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=64, help="examples of an update (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side (default: %(default)s)")
    parser.add_argument("--row-tokens", type=int, default=2048, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    found = compare(args.examples, args.rounds, args.row_tokens)
    if not args.json:
        print(f"SFT {found['measured']:.0f}, RL {found['reference']:.0f} tokens per second: ratio {found['ratio']:.2f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
