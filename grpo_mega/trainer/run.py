"""Opens the run folder, builds the training job from a checked config, and runs it from its newest checkpoint."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from grpo_mega.checkpoint.local_copies import copy_newest, leads_machine
from grpo_mega.checkpoint.verification import verify_checkpoints
from grpo_mega.config.load import resolved
from grpo_mega.config.schema import Config
from grpo_mega.data.dataset import PromptDataset
from grpo_mega.data.example_dataset import ExampleDataset
from grpo_mega.engines.server.protocol import configured_servers
from grpo_mega.formats.checkpoint_manifest import describe_model
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.observe.log import configure_logging
from grpo_mega.observe.run_folder import CheckpointsToVerify, RunFolder, RunState, checkpoints_to_verify, open_run
from grpo_mega.observe.run_lock import run_lock
from grpo_mega.observe.summary import render
from grpo_mega.parallel.garbage_collection import end_start
from grpo_mega.parallel.ranks import Ranks, agreed, init_ranks
from grpo_mega.parallel.stop_signal import Stopped, StopRequests
from grpo_mega.parallel.topology import Topology
from grpo_mega.tiny_base.train import model_folder_of
from grpo_mega.trainer.build import BuiltJob, building, log
from grpo_mega.trainer.build_sft import BuiltSft, building_sft
from grpo_mega.trainer.equal_inputs import require_equal_inputs


def run_job(
    config: Config,
    topology: Topology,
    data: PromptDataset | ExampleDataset,
    held_out: PromptDataset | None,
    stops: StopRequests,
) -> None:
    """Run a job to its end. Collective: every rank calls it.

    Args:
        config: the checked config.
        topology: layout of the job's ranks.
        data: training prompts, or the examples of supervised fine-tuning.
        held_out: prompts of the evaluation; None: no evaluation.
        stops: stop requests of this process.

    Raises:
        UserError: the run folder cannot be used, or the ranks have different configs or prompts.
        Stopped: a rank received a stop request; the checkpoint is complete.
    """
    rank = int(os.environ["RANK"])
    coordinates = topology.describe(rank).partition(" | ")[2]
    configure_logging(rank, coordinates)
    folder = model_folder_of(config)
    torch.use_deterministic_algorithms(config.run.deterministic)
    ranks = init_ranks(topology, config.guard.timeout_seconds, peers_elsewhere=_has_remote_servers(config))
    try:
        require_equal_inputs(resolved(config), data, held_out, ranks)
        with ExitStack() as lock:
            wanted = agreed(lambda: _lock_and_list(config, lock), ranks)
            model, local_dir = describe_model(hf_shapes(checkpoint_spec(folder))), config.checkpoint.local_dir
            run_folder = RunFolder(Path(str(config.run.dir)))
            is_copied = (
                local_dir is not None
                and not config.run.overwrite
                and copy_newest(Path(local_dir), run_folder, model, ranks, leads=leads_machine())
            )
            if not is_copied:
                verify_checkpoints(wanted, model, ranks)
            run = agreed(lambda: open_run(**_arguments(config)), ranks)
            if run.status == "finished":
                _print_finished(run, ranks)
                return
            configure_logging(rank, coordinates, run.folder.logs)
            _log_start(run, config.train.steps)
            with _building(config, ranks, run, folder, data, held_out, stops) as built:
                end_start()
                try:
                    built.run()
                except Stopped:
                    dist.barrier()  # no rank exits before the summary of rank 0 is on disk
                    raise
    finally:
        dist.destroy_process_group()


def _log_start(run: RunState, steps: int) -> None:
    """Log from which checkpoint the run starts, what was moved away, and which keys have changed."""
    if run.checkpoint is not None:
        log.info(
            "%s from %s: step %d of %d is complete, %d remain",
            "continuing" if run.status == "continued" else "starting a new run",
            run.checkpoint,
            run.step,
            steps,
            steps - run.step,
        )
    if run.discarded is not None:
        made = run.discarded.steps
        log.info(
            "metrics and rollouts of %d later steps (%d to %d) are in %s: these steps are made again",
            len(made),
            made[0],
            made[-1],
            run.discarded.folder,
        )
    for change in run.changes:
        log.info("from step %d on: %s=%s (%s before)", run.step + 1, change.key, change.now, change.before)


def _has_remote_servers(config: Config) -> bool:
    return any(not server.address.is_loopback for server in configured_servers(config.engine))


def _building(
    config: Config,
    ranks: Ranks,
    run: RunState,
    folder: Path,
    data: PromptDataset | ExampleDataset,
    held_out: PromptDataset | None,
    stops: StopRequests,
) -> AbstractContextManager[BuiltJob | BuiltSft]:
    """Return the objects of the job of `train.objective`, which decides the type of the data."""
    if isinstance(data, ExampleDataset):
        return building_sft(config, ranks, run, folder, data, held_out, stops)
    return building(config, ranks, run, folder, data, held_out, stops)


def _lock_and_list(config: Config, lock: ExitStack) -> CheckpointsToVerify:
    """Lock the run folder on rank 0, and list its checkpoints. No other process can open it until `lock` is closed."""
    lock.enter_context(run_lock(Path(str(config.run.dir))))
    return checkpoints_to_verify(**_arguments(config))


def _arguments(config: Config) -> dict[str, Any]:
    return {
        "path": Path(str(config.run.dir)),
        "resolved": resolved(config),
        "overwrite": config.run.overwrite,
        "train_steps": config.train.steps,
        "resume": config.checkpoint.resume,
    }


def _print_finished(run: RunState, ranks: Ranks) -> None:
    if ranks.is_first and run.previous is not None:
        sys.stdout.write(render(run.previous, run.folder.path) + "\n")
        sys.stdout.write(
            f"{run.folder.path} is finished; run.overwrite=true moves this folder aside and starts again, a higher "
            "train.steps continues the run\n"
        )
