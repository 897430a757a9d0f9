"""Builds what every training job has on this rank: display, timers, policy, phases, checkpoints and save points."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from grpo_mega.checkpoint.background import BackgroundSaves
from grpo_mega.checkpoint.manager import CheckpointManager, LoopState
from grpo_mega.checkpoint.schedule import CheckpointSchedule
from grpo_mega.config.schema import Config
from grpo_mega.formats.checkpoint_manifest import describe_model
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.interfaces import Critic
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.memory import PhasePeaks, device_peak
from grpo_mega.observe.progress import Progress
from grpo_mega.observe.run_folder import RunState
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.heartbeat import heartbeat_of_this_rank
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.stop_signal import StopRequests
from grpo_mega.policy.critic import MegatronCritic
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.trainer.phases import Phases
from grpo_mega.trainer.save_points import SavePoints


@dataclass(frozen=True)
class Instruments:
    """The objects that show and measure the phases of a run. `progress` is the display, on rank 0 only."""

    progress: Progress | None
    peaks: PhasePeaks
    timers: PhaseTimer
    writer: BackgroundWriter
    """Writes rollouts and metrics of this rank, which are on disk before a checkpoint is visible."""

    def note(self, text: str) -> None:
        """Show a permanent line, on rank 0."""
        if self.progress is not None:
            self.progress.note(text)


@dataclass(frozen=True)
class PolicySide:
    """The policy of this rank, and what moves and saves its state. `state` is the state in which the run starts."""

    spec: ModelSpec
    policy: MegatronPolicy
    critic: MegatronCritic | None
    phases: Phases
    checkpoints: CheckpointManager
    state: LoopState


def make_instruments(config: Config, ranks: Ranks, run: RunState, stack: ExitStack) -> Instruments:
    """Return display, memory peaks, timers and writer; `stack` closes display and writer.

    Args:
        config: sections train and observe.
        ranks: coordinates of this rank.
        run: gives the first step.
        stack: closes display and writer.
    """
    progress = stack.enter_context(Progress(config.train.steps, run.step + 1)) if ranks.is_first else None
    writer = stack.enter_context(BackgroundWriter())
    peaks = PhasePeaks(device_peak(ranks.device.type) if ranks.is_first and config.observe.memory_peaks else None)
    return Instruments(
        progress, peaks, PhaseTimer(phase_listener(peaks, progress), heartbeat=heartbeat_of_this_rank()), writer
    )


def build_policy_side(
    config: Config,
    ranks: Ranks,
    run: RunState,
    model_folder: Path,
    data_digest: str,
    stack: ExitStack,
    *,
    engine_elsewhere: bool,
) -> PolicySide:
    """Build the policy, and the critic if the algorithm has one, and load the checkpoint of the run. Collective.

    Args:
        config: the checked config.
        ranks: coordinates and device of this rank.
        run: the open run folder, and the checkpoint to continue from.
        model_folder: Hugging Face folder of the base model.
        data_digest: digest of the training data, which a continued run must have too.
        stack: ends background saves.
        engine_elsewhere: no engine shares the devices with the policy.

    Raises:
        UserError, RuntimeError: see `MegatronPolicy` and `CheckpointManager.load`.
    """
    spec = checkpoint_spec(model_folder)
    policy = MegatronPolicy(config, spec, model_folder, ranks, with_reference=config.needs_reference)
    phases = Phases(policy, engine_elsewhere=engine_elsewhere)
    critic = None
    if config.algorithm.needs_critic:
        critic = phases.build_critic(lambda: MegatronCritic(config, spec, model_folder, ranks))
    checkpoints = make_checkpoints(config, spec, run.folder.checkpoints, phases, critic, ranks)
    stack.callback(checkpoints.close)
    state = LoopState() if run.checkpoint is None else checkpoints.load(policy, run.checkpoint)
    state = state.over(data_digest, same_run=run.status == "continued")
    return PolicySide(spec, policy, critic, phases, checkpoints, state)


def make_saves(
    config: Config, ranks: Ranks, checkpoints: CheckpointManager, stops: StopRequests, instruments: Instruments
) -> SavePoints:
    """Return the points at which the run saves or stops, and tell the user when it saves.

    Args:
        config: gives the schedule of the checkpoints.
        ranks: coordinates of this rank.
        checkpoints: writes them.
        stops: stop requests of this process.
        instruments: the timer of the phase `checkpoint`, the display and the writer.
    """
    schedule = CheckpointSchedule(config.checkpoint.every, config.checkpoint.every_minutes, config.train.steps)
    instruments.note(str(schedule))
    return SavePoints(ranks, checkpoints, schedule, stops, instruments.timers, config.train.steps, instruments.writer)


def make_checkpoints(
    config: Config, spec: ModelSpec, folder: Path, phases: Phases, critic: Critic | None, ranks: Ranks
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
    """
    keys = config.parallel.model_dump(exclude_defaults=True)
    layout = " ".join([f"world_size={ranks.topology.world_size}", *(f"{key}={value}" for key, value in keys.items())])
    return CheckpointManager(
        folder,
        config.checkpoint.keep,
        phases.checkpointing,
        is_first=ranks.is_first,
        critic=critic,
        model=describe_model(hf_shapes(spec)),
        layout=layout,
        background=BackgroundSaves(config.guard.timeout_seconds) if config.checkpoint.asynchronous else None,
    )


def phase_listener(peaks: PhasePeaks, progress: Progress | None) -> Callable[[str], None]:
    """Return the function that is called at the start of each phase.

    Args:
        peaks: measures the memory of the phase.
        progress: display, if this rank has one.
    """

    def on_phase(name: str) -> None:
        peaks.phase(name)
        if progress is not None:
            progress.phase(name)

    return on_phase
