"""The worker: one rank of a run. `python -m grpo_mega.train CONFIG [key=value ...]`, started by launch/train.sh,
torchrun or srun; `--for-launcher` prints what the launcher has to know of the config.

Exit code 0: done. 2: the input is wrong, one message. 1: a failure of ours or of the machine. 130: stopped by SIGUSR1
after a step, with its checkpoint.
What the user can have got wrong is checked in `prepare`, before the heavy imports and the first process group.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from grpo_mega.config.load import load_config, resolved
from grpo_mega.config.schema import Config
from grpo_mega.launch.slurm import in_step, positive_int, slurm_step
from grpo_mega.parallel.devices import num_visible_gpus
from grpo_mega.parallel.stop_signal import EXIT_CODE as STOPPED
from grpo_mega.parallel.stop_signal import Stopped, expect_stop
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import UserError

if TYPE_CHECKING:
    from grpo_mega.data.dataset import PromptDataset

log = logging.getLogger("grpo_mega.train")

_FIRST_RANK_SPEAKS_SECONDS = 2.0


@dataclass(frozen=True)
class Prepared:
    """The user's input, found to be right."""

    config: Config
    topology: Topology
    train_prompts: PromptDataset
    eval_prompts: PromptDataset | None


def main() -> None:
    """Entry point of a rank."""
    parser = argparse.ArgumentParser(prog="grpo_mega.train", description="One rank of a GRPO run.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--for-launcher", action="store_true", help="print the number of ranks as JSON and leave")
    arguments = parser.parse_args()
    expect_stop()
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.for_launcher:
            sys.stdout.write(f"{json.dumps(for_launcher(config))}\n")
            return
        prepared = prepare(config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    run_worker(prepared)


def for_launcher(config: Config) -> dict[str, object]:
    """What grpo_mega/launch/main.py has to know; it reads no config itself."""
    return {
        "world_size": wanted_world_size(config),
        "configured": config.run.world_size is not None,
        "timeout_seconds": config.guard.timeout_seconds,
    }


def wanted_world_size(config: Config) -> int:
    """`run.world_size`, else what the launcher says, else the GPUs of this machine times the nodes, else 1."""
    env = os.environ
    launched = env.get("WORLD_SIZE")
    if config.run.world_size is not None:
        if launched is not None and int(launched) != config.run.world_size:
            raise UserError(
                f"run.world_size={config.run.world_size}, but the launcher started {launched} ranks",
                remedy="leave run.world_size out, or start as many",
            )
        return config.run.world_size
    if launched is not None:
        return int(launched)
    num_nodes = positive_int(env, "NNODES", 1)
    if in_step(env):
        step = slurm_step(env)
        if not step.one_task_per_node:
            return step.num_tasks
        num_nodes = step.num_nodes
    return max(1, num_visible_gpus(env)) * num_nodes


def prepare(config: Config) -> Prepared:
    """Check everything that can be wrong in the input; starts nothing and writes nothing.

    Raises:
        UserError: the first thing that is wrong.
    """
    from grpo_mega.data.chat import load_tokenizer
    from grpo_mega.data.dataset import load_held_out, load_train
    from grpo_mega.data.rows import check_rows
    from grpo_mega.doctor.examine import examine_start
    from grpo_mega.doctor.finding import require
    from grpo_mega.doctor.model_rules import check_model
    from grpo_mega.environments.base import build_environment
    from grpo_mega.observe.run_folder import check_run
    from grpo_mega.rewards.base import build_rewards

    topology = Topology.of(config, wanted_world_size(config))
    check_model(config, topology)
    build_rewards(config.reward.terms, config.reward.timeout_seconds)
    if config.environment is not None:
        build_environment(config.environment)
    check_run(Path(str(config.run.dir)), resolved(config), overwrite=config.run.overwrite)
    base, data = config.model.base, config.data
    check_rows(data)
    # from here on with torch and transformers, which take seconds to load
    if base is not None:
        from grpo_mega.tiny_base.train import base_tokenizer

        tokenizer = base_tokenizer(base)
    else:
        tokenizer = load_tokenizer(str(config.model.path))
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on every machine
        require(examine_start(config, topology))
    return Prepared(config, topology, load_train(data, tokenizer), load_held_out(data, tokenizer))


def run_worker(prepared: Prepared) -> None:
    """Join the job and run it to its end. A failing rank leaves at once, so that whoever started it ends the others."""
    from grpo_mega.trainer.run import run_job

    try:
        run_job(prepared.config, prepared.topology, prepared.train_prompts, prepared.eval_prompts)
    except Stopped as stopped:
        _leave(STOPPED, f"{stopped}\n" if os.environ["RANK"] == "0" else "")
    except UserError as error:  # a port in use, a run folder with another config, a damaged checkpoint
        if os.environ["RANK"] != "0":
            time.sleep(_FIRST_RANK_SPEAKS_SECONDS)  # most input is wrong on every rank: one message is enough
        _leave(2, f"error: {error}\n")
    except Exception:  # whatever it is, this rank's account of it must reach the screen and its log
        log.exception("this rank failed")
        _leave(1)


def _leave(code: int, message: str = "") -> NoReturn:
    """Without Python's own unwinding, where threads and process groups may wait for ranks that are gone."""
    sys.stderr.write(message)
    sys.stderr.flush()
    sys.stdout.flush()
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
