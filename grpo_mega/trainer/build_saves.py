"""Builds the objects that save the state of a run: checkpoints in the run folder, local ones, and their schedule."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from grpo_mega.checkpoint.background import BackgroundSaves
from grpo_mega.checkpoint.local_copies import LocalSaves, leads_machine, open_local_folder
from grpo_mega.checkpoint.manager import CheckpointManager
from grpo_mega.checkpoint.schedule import CheckpointSchedule
from grpo_mega.config.schema import Config
from grpo_mega.data.dataset import PromptDataset
from grpo_mega.formats.checkpoint_manifest import describe_model
from grpo_mega.interfaces import Critic
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.progress import Progress
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.stop_signal import StopRequests
from grpo_mega.trainer.build_rollout import carried_parts
from grpo_mega.trainer.phases import Phases
from grpo_mega.trainer.save_points import SavePoints


def make_saves(
    config: Config,
    ranks: Ranks,
    checkpoints: CheckpointManager,
    stops: StopRequests,
    timers: PhaseTimer,
    progress: Progress | None,
    writer: BackgroundWriter,
    local: LocalSaves | None,
) -> SavePoints:
    """Return the points at which the run saves or stops, and show the schedule of the saves to the user.

    Args:
        config: gives the schedule of the checkpoints.
        ranks: coordinates of this rank.
        checkpoints: writes the checkpoints of the run folder.
        stops: stop requests of this process.
        timers: measures the time of the phase `checkpoint`.
        progress: display, on rank 0.
        writer: writes rollouts and metrics of this rank, which are on disk before a checkpoint is visible.
        local: local checkpoints; None: there are none.
    """
    schedule = CheckpointSchedule(config.checkpoint.every, config.checkpoint.every_minutes, config.train.steps)
    if progress is not None:
        progress.note(str(schedule))
    return SavePoints(ranks, checkpoints, schedule, stops, timers, config.train.steps, writer, local)


def make_managers(
    config: Config,
    spec: ModelSpec,
    run: RunFolder,
    phases: Phases,
    critic: Critic | None,
    ranks: Ranks,
    stack: ExitStack,
    prompts: PromptDataset | None = None,
) -> tuple[CheckpointManager, LocalSaves | None]:
    """Return the manager of the run folder's checkpoints, and the local checkpoints or None. Collective.

    Args:
        config: sections checkpoint and parallel.
        spec: the model.
        run: the open run folder.
        phases: moves policy and critic to the device while they are saved.
        critic: critic of this rank, if any.
        ranks: coordinates of this rank.
        stack: closes both managers.
        prompts: see `make_checkpoints`.
    """
    manager = make_checkpoints(config, spec, run.checkpoints, phases, critic, ranks, prompts)
    stack.callback(manager.close)
    every, local_dir = config.checkpoint.local_every, config.checkpoint.local_dir
    if every is None or local_dir is None:
        return manager, None
    leads = leads_machine()
    folder = open_local_folder(Path(local_dir), run, ranks, leads=leads)
    local = make_checkpoints(config, spec, folder, phases, critic, ranks, prompts, leads=leads)
    stack.callback(local.close)
    return manager, LocalSaves(local, every)


def make_checkpoints(
    config: Config,
    spec: ModelSpec,
    folder: Path,
    phases: Phases,
    critic: Critic | None,
    ranks: Ranks,
    prompts: PromptDataset | None = None,
    *,
    leads: bool | None = None,
) -> CheckpointManager:
    """Return the manager of the checkpoints in `folder`.

    The layout in their manifests is the number of ranks and the keys of `parallel` that differ from their defaults.

    Args:
        config: sections checkpoint and parallel.
        spec: the model.
        folder: `checkpoints/` of the run.
        phases: moves policy and critic to the device while they are saved.
        critic: critic of this rank, if any.
        ranks: coordinates of this rank.
        prompts: training prompts, of which rollouts may be carried from step to step; None: there are none.
        leads: for a folder of each machine: True on the rank that creates and deletes it. Its saves are not
            asynchronous, and the newest one is kept. None: a folder of the whole job.
    """
    keys = config.parallel.model_dump(exclude_defaults=True)
    layout = " ".join([f"world_size={ranks.topology.world_size}", *(f"{key}={value}" for key, value in keys.items())])
    return CheckpointManager(
        folder,
        config.checkpoint.keep if leads is None else 1,
        phases.checkpointing,
        is_first=ranks.is_first if leads is None else leads,
        critic=critic,
        model=describe_model(hf_shapes(spec)),
        layout=layout,
        background=BackgroundSaves(config.guard.timeout_seconds)
        if config.checkpoint.asynchronous and leads is None
        else None,
        carried=None if prompts is None else carried_parts(config, prompts, ranks),
        each_machine=leads is not None,
    )
