"""The worker: one rank of a training run, started by launch/train.sh, torchrun or srun.

    python -m grpo_mega.train CONFIG [section.key=value ...]

Exit code 0: done. 2: the user's input is wrong; one message on stderr. 1: a failure of the program or of the machine.
130 (SIGINT, SIGUSR1) or 143 (SIGTERM): stopped, with a checkpoint of the last complete step. `prepare` checks the input
before the heavy imports and before the first process group. `--for-launcher` prints the values of the config that the
launcher needs.
Asserted by tests/unit/test_train.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from grpo_mega.config.load import known_keys, load_config, precedence_notes, resolved
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.config.schema import Config
from grpo_mega.data.hub.fetch import pinned_overrides, with_hub_inputs
from grpo_mega.launch.slurm_variables import in_step, positive_int, slurm_step
from grpo_mega.parallel.device_queues import set_device_queues
from grpo_mega.parallel.devices import num_driver_gpus, num_visible_gpus
from grpo_mega.parallel.error_report import report_error
from grpo_mega.parallel.garbage_collection import collect_rarely
from grpo_mega.parallel.heartbeat import write_stacks_on_signal
from grpo_mega.parallel.stop_signal import Interrupted, Stopped, StopRequests
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import CheckpointWriteError, UserError, WeightMismatchError

if TYPE_CHECKING:
    from grpo_mega.data.dataset import PromptDataset
    from grpo_mega.data.example_dataset import ExampleDataset

log = logging.getLogger("grpo_mega.train")


@dataclass(frozen=True)
class Prepared:
    """The checked input of the user."""

    config: Config
    topology: Topology
    train_data: PromptDataset | ExampleDataset
    eval_prompts: PromptDataset | None

    @property
    def train_prompts(self) -> PromptDataset:
        """The training data of a run with `train.objective=rl`."""
        from grpo_mega.data.dataset import PromptDataset

        assert isinstance(self.train_data, PromptDataset), "the run trains on examples"
        return self.train_data


def main() -> None:
    """Entry point of a rank."""
    parser = OptionParser(prog="grpo_mega.train", description="Run one rank of a training run.")
    parser.config_keys = known_keys()
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of a config key")
    parser.add_argument("--for-launcher", action="store_true", help=argparse.SUPPRESS)  # prints what it needs as JSON
    arguments = parser.parse_args()
    stops = None if arguments.for_launcher else StopRequests()
    write_stacks_on_signal()
    collect_rarely()
    try:
        config = with_hub_inputs(load_config(arguments.config, arguments.overrides))
        if stops is None:
            sys.stdout.write(f"{json.dumps(for_launcher(config))}\n")
            return
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all inputs are local now: no library of this rank asks a hub
        limit_device_queues(config)
        if os.environ.get("RANK", "0") == "0":
            for note in precedence_notes(arguments.config, arguments.overrides):
                sys.stderr.write(f"note: {note}\n")
        prepared = prepare(config)
    except UserError as error:
        report_error(error)
        sys.exit(2)
    except Interrupted as interrupted:
        _exit_interrupted(interrupted)
    run_worker(prepared, stops)


def for_launcher(config: Config) -> dict[str, object]:
    """Return the values that the launcher needs, which does not read the config itself."""
    return {
        "world_size": wanted_world_size(config),
        "configured": config.run.world_size is not None,
        "timeout_seconds": config.guard.timeout_seconds,
        "phase_limits": config.guard.phase_limits,
        "resume": str(config.checkpoint.resume),
        "overrides": pinned_overrides(config),  # all ranks use the commits that were found once
    }


def wanted_world_size(config: Config) -> int:
    """Return the number of ranks: `run.world_size`, else of the launcher, else GPUs per machine times nodes, else 1.

    Raises:
        UserError: `run.world_size` differs from the number of ranks that the launcher started.
    """
    env = os.environ
    launched = env.get("WORLD_SIZE")
    if config.run.world_size is not None:
        if launched is not None and int(launched) != config.run.world_size:
            raise UserError(
                f"run.world_size={config.run.world_size}, but the launcher started {launched} ranks",
                remedy="leave run.world_size out, or start that many ranks",
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


def limit_device_queues(config: Config) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS for the layout, and warn if the user has set a value that conflicts with it.

    Nothing has imported torch yet: CUDA reads the variable only once.

    Raises:
        UserError: the layout does not divide the ranks.
    """
    if not num_driver_gpus():
        return
    from grpo_mega.doctor.gpus import compute_capability

    topology = Topology.of(config, wanted_world_size(config))
    conflict = set_device_queues(topology, os.environ, compute_capability())
    if conflict is not None and os.environ.get("RANK", "0") == "0":
        log.warning("%s; unset it, and the program sets it", conflict)


def prepare(config: Config) -> Prepared:
    """Check the user's input and load the prompts. Starts no process and writes no file.

    Raises:
        UserError: for the first error in the input.
    """
    from grpo_mega.data.chat import load_tokenizer
    from grpo_mega.data.dataset import load_held_out, load_train
    from grpo_mega.data.example_dataset import load_examples
    from grpo_mega.data.example_rows import check_example_rows
    from grpo_mega.data.prompt_rows import check_rows
    from grpo_mega.doctor.examine import examine_start
    from grpo_mega.doctor.finding import require
    from grpo_mega.doctor.model_rules import check_model
    from grpo_mega.environments.base import build_environment
    from grpo_mega.observe.run_folder import check_run
    from grpo_mega.observe.trackers.tracker import check_trackers
    from grpo_mega.rewards.base import build_rewards, needs_fields

    topology = Topology.of(config, wanted_world_size(config))
    check_model(config, topology, with_engine=config.has_engine)
    rewards = build_rewards(config.reward.terms, config.reward.timeout_seconds)
    if config.environment is not None:
        build_environment(config.environment)
    check_trackers(config.observe.trackers)
    check_run(Path(str(config.run.dir)), resolved(config), overwrite=config.run.overwrite)
    base, data = config.model.base, config.data
    check_rows(data, held_out_only=config.is_sft)
    if config.is_sft:
        check_example_rows(data)
    # the checks below import torch and transformers, which takes seconds
    if base is not None:
        from grpo_mega.tiny_base.train import base_tokenizer

        tokenizer = base_tokenizer(base)
    else:
        tokenizer = load_tokenizer(config.model.folder)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine
        require(examine_start(config, topology))
    fields = needs_fields(rewards)
    train = load_examples(data, tokenizer) if config.is_sft else load_train(data, tokenizer, with_fields=fields)
    return Prepared(config, topology, train, load_held_out(data, tokenizer, with_fields=fields))


def run_worker(prepared: Prepared, stops: StopRequests) -> None:
    """Run the job to its end. A failing rank exits at once, so that its launcher ends the other ranks."""
    try:
        _run_worker(prepared, stops)
    except Interrupted as interrupted:  # also while an error is reported
        _exit_interrupted(interrupted)


def _run_worker(prepared: Prepared, stops: StopRequests) -> None:
    from grpo_mega.observe.log import FILE_ONLY
    from grpo_mega.trainer.run import run_job
    from grpo_mega.trainer.run_guard import GuardStopError

    try:
        run_job(prepared.config, prepared.topology, prepared.train_data, prepared.eval_prompts, stops)
    except Stopped as stopped:
        again = f"{stopped}; this command continues the run: launch/train.sh {_arguments()}\n"
        _exit(stopped.code, again if os.environ["RANK"] == "0" else "")
    except UserError as error:  # for example a port in use, a run folder with another config, or a damaged checkpoint
        report_error(error)
        _exit(2)
    except GuardStopError as stop:
        log.error("%s", stop, extra=FILE_ONLY)
        report_error(stop, f"this command continues past it: launch/train.sh {_arguments(stop.continue_with)}")
        _exit(1)
    except (CheckpointWriteError, WeightMismatchError) as error:
        log.error("%s", error, exc_info=error, extra=FILE_ONLY)
        report_error(error, f"this command continues the run: launch/train.sh {_arguments()}")
        _exit(1)
    except Exception:  # every failure of this rank must reach the screen and its log
        log.exception("this rank failed")
        _exit(1, f"once the cause is removed, this command continues the run: launch/train.sh {_arguments()}\n")


def _arguments(*overrides: str) -> str:
    """Return the arguments of this command with more overrides."""
    return shlex.join([*sys.argv[1:], *overrides])


def _exit_interrupted(interrupted: Interrupted) -> NoReturn:
    _exit(interrupted.code, f"{interrupted}\n" if os.environ.get("RANK", "0") == "0" else "")


def _exit(code: int, message: str = "") -> NoReturn:
    """Exit without Python's cleanup, in which threads and process groups could wait for ranks that have exited."""
    sys.stderr.write(message)
    sys.stderr.flush()
    sys.stdout.flush()
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
