"""The configuration of one run: a frozen pydantic model with one section per concern.

The defaults of keys live in the sections; an `algorithm.name` changes some of them (algorithm_presets.py). Unknown keys
are errors (load.py names the nearest key). Rules between keys are in rules.py; docs/reference/config.md is generated
from these classes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.config.data_sections import DataConfig
from grpo_mega.config.guard_section import GuardConfig
from grpo_mega.config.model_sections import ModelConfig
from grpo_mega.config.policy_sections import OptimizerConfig, ParallelConfig, PolicyConfig, PrecisionConfig
from grpo_mega.config.rollout_sections import (
    EngineConfig,
    EnvironmentConfig,
    EvaluationConfig,
    RewardConfig,
    SamplingConfig,
)
from grpo_mega.config.section import Section, off_from_yaml


class RunConfig(Section):
    """Identity and size of the run."""

    dir: str | None = None
    """Run folder. null: `runs/<config name>`."""
    seed: int = Field(0, ge=0)
    """Seed of prompt order, sampling and updates. It does not affect the base model."""
    world_size: int | None = Field(None, ge=1)
    """Number of ranks on all nodes. null: the number that the launcher sets, else the number of GPUs, else 1."""
    deterministic: bool = False
    """Raise an error in operations that have no deterministic implementation. On CPU every operation is
    deterministic."""
    overwrite: bool = False
    """Rename an existing run folder and start from the beginning."""


class TrainConfig(Section):
    """Objective, number and size of the updates."""

    objective: Literal["rl", "sft"] = "rl"
    """`rl`: the objective of the section `algorithm`, on rollouts of the prompts in `data.train`. `sft`: supervised
    fine-tuning, the likelihood of the answers in `data.train` (docs/sft.md)."""
    steps: int = Field(ge=1)
    """Number of steps of the run: rollout batches, or with `objective: sft` batches of examples. If the schedule of
    learning rates ends with the run, another number changes later steps."""
    epochs_per_rollout: int = Field(1, ge=1)
    """Passes over each rollout batch."""
    minibatches_per_epoch: int = Field(1, ge=1)
    """Updates (calls of the optimizer) per pass. A minibatch holds whole groups."""
    max_tokens_per_microbatch: int = Field(8192, ge=1)
    """Capacity of one packed row, in tokens; at least `data.max_prompt_tokens` + `sampling.max_tokens`, or with
    `objective: sft` at least `data.max_example_tokens`."""
    max_staleness: int = Field(0, ge=0)
    """Most updates between the weights that sampled a group's oldest token and those at the start of the step that
    trains on it. Above 0, engine servers sample while the policy trains (docs/asynchrony.md); then at least the number
    of updates of a step. 0: a step samples first and trains then."""
    slice_tokens: int | None = Field(None, ge=1)
    """With `max_staleness`: tokens that each rollout may sample before a server can be paused for a weight sync. null:
    a sixteenth of `sampling.max_tokens`, from 16 to 64."""

    @property
    def updates_per_step(self) -> int:
        """Number of updates of a step."""
        return self.epochs_per_rollout * self.minibatches_per_epoch

    @property
    def num_updates(self) -> int:
        """Number of updates of the run."""
        return self.steps * self.updates_per_step


class WeightSyncConfig(Section):
    """Transfer of the policy's weights to the engines."""

    verify: Annotated[Literal["every", "first", "off"], BeforeValidator(off_from_yaml)] = "every"
    """Syncs after which digests of the engine's weights are compared with the policy's."""
    bucket_bytes: int = Field(256 * 1024 * 1024, ge=1024)
    """Bytes that a rank sends and receives in one round, summed. The sync needs at most twice that as extra memory."""
    fp8_report: bool = False
    """Write the quantization error of each matrix of the policy to fp8_report.json at the start of the run."""
    transport: Literal["auto", "gloo", "nccl", "shared_memory", "cuda_ipc"] = "auto"
    """`auto`: NCCL with CUDA, otherwise shared memory within a machine and gloo between machines. `cuda_ipc`: mapped
    GPU memory within a machine, for processes that share a GPU, and NCCL between machines."""


class CheckpointConfig(Section):
    """Checkpoints of the run and where it resumes."""

    every: int | None = Field(None, ge=1)
    """Steps between checkpoints. null: no such rule. The state after the last step is always saved."""
    every_minutes: float | None = Field(30.0, gt=0)
    """Longest time from one checkpoint to the next, checked after each step. null: no such rule."""
    keep: int = Field(2, ge=1)
    """Number of checkpoints that are kept, the newest ones."""
    asynchronous: bool = False
    """Write a checkpoint while training continues: the loop stops only for digests and a copy of the state to host
    memory, which must have room for it. False: the loop waits until it is written; one tensor at a time is copied."""
    local_every: int | None = Field(None, ge=1)
    """Steps between local checkpoints in `local_dir`, which survive killed processes but not a lost machine. A run
    continues from the newest one if all machines have it whole. null: none."""
    local_dir: str | None = None
    """Folder of the local checkpoints on every machine: a local disk (NVMe), or memory (`/dev/shm/NAME`). It needs room
    for two checkpoints of its machine's ranks."""
    resume: str = "auto"
    """`auto`: continue from the newest complete checkpoint of the run folder. `never`: start from the base model. Or
    the path of a checkpoint."""
    export_hf: bool = True
    """Write the last checkpoint in Hugging Face format as well."""


class SampledRollouts(Section):
    """A number of groups per step whose rollouts are written."""

    sample: int = Field(ge=1)
    """Groups per step. The choice is a function of `run.seed`, the step and the position of the group."""


class ObserveConfig(Section):
    """Metrics and records of the run."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(("tensorboard",), strict=False)
    """Systems that show the metrics: TensorBoard, with dashboard, histograms and texts; Weights & Biases, offline
    unless WANDB_MODE says otherwise; MLflow, in a database of the run folder unless MLFLOW_TRACKING_URI names a server.
    The last two show curves and need the extras `wandb` and `mlflow`. An empty list: none."""
    memory_peaks: bool = False
    """Measure the peak memory of the first rank in each phase. Without CUDA this slows the run: free memory is returned
    to the system before every phase."""
    rollouts: Annotated[
        Annotated[Literal["all", "none"], Tag("(all)")] | Annotated[SampledRollouts, Tag("(sample)")],
        Discriminator(lambda value: "(sample)" if isinstance(value, dict | SampledRollouts) else "(all)"),
    ] = "all"
    """Rollouts that are written to `rollouts/` of the run folder (docs/reference/rollouts.md): `all`, `none`, or
    `{sample: N}` for all rollouts of N groups of each step."""
    groups_shown: int = Field(3, ge=0)
    """Groups of each step that TensorBoard shows as text, with prompt and answers side by side."""
    alarms: bool = True
    """Compare the metrics of each step with the limits of docs/alarms.md, and report what exceeds them."""
    alarm_command: str | None = None
    """Shell command that is started for each alarm, on the machine of the first rank, with the alarm as one line of
    JSON on its standard input. It has 60 seconds."""
    trace: bool = False
    """Record phases, collectives and sampling of each rank in `trace/`, at most 64 MiB per rank, and write them at the
    end as one file for ui.perfetto.dev, `trace.json.gz`."""
    profile_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((), strict=False)
    """Steps of which each rank writes a torch profile to `profile/`, on CUDA also a snapshot of the memory."""


class Config(Section):
    """The configuration of one run."""

    run: RunConfig = RunConfig()
    """Identity and size of the run."""
    model: ModelConfig
    """Base model of the policy."""
    policy: PolicyConfig = PolicyConfig()
    """Implementation of the policy."""
    parallel: ParallelConfig = ParallelConfig()
    """Parallel layout of the policy."""
    engine: EngineConfig = EngineConfig()
    """Inference engine that samples the rollouts."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling of training rollouts."""
    data: DataConfig
    """Prompts of training and evaluation."""
    reward: RewardConfig = RewardConfig(terms=())
    """Rewards and the processes that compute them."""
    environment: EnvironmentConfig | None = None
    """Environment of multi-turn rollouts. null: single-turn rollouts."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Objective of the policy."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer of the policy."""
    train: TrainConfig
    """Number and size of the updates."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation on held-out prompts."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats of policy and engine."""
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    """Transfer of the policy's weights to the engines."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints of the run."""
    observe: ObserveConfig = ObserveConfig()
    """Metrics and records of the run."""
    guard: GuardConfig = GuardConfig()
    """Limits of waiting and of the difference between policy and engine, and rules on each step."""

    @property
    def is_sft(self) -> bool:
        """True for supervised fine-tuning (`train.objective=sft`): the training data are examples, not prompts."""
        return self.train.objective == "sft"

    @property
    def is_asynchronous(self) -> bool:
        """True if engine servers sample while the policy trains."""
        return self.train.max_staleness > 0

    @property
    def background_slice_tokens(self) -> int:
        """Tokens of a slice when engine servers sample while the policy trains."""
        return self.train.slice_tokens or min(64, max(16, self.sampling.max_tokens // 16))

    @property
    def carries_rollouts(self) -> bool:
        """True if rollouts are carried from one step to the next, and are part of a checkpoint."""
        return self.sampling.partial is not None or self.is_asynchronous

    @property
    def has_engine(self) -> bool:
        """True if an engine samples: in every run but supervised fine-tuning without an evaluation."""
        return not self.is_sft or bool(self.data.eval_sets)

    @property
    def needs_reference(self) -> bool:
        """True if the loss or the reward has a KL penalty against a reference model."""
        return not self.is_sft and self.algorithm.needs_reference

    @property
    def longest_training_rollout(self) -> int:
        """Most tokens of a rollout or an example in a training batch: a microbatch row must hold them."""
        return self.data.max_example_tokens if self.is_sft else self.data.max_prompt_tokens + self.sampling.max_tokens

    @property
    def longest_rollout(self) -> int:
        """Most tokens of a prompt and its completion, training and evaluation: the engine must hold them."""
        return self.data.max_prompt_tokens + max(self.sampling.max_tokens, self.evaluation.max_tokens or 0)
