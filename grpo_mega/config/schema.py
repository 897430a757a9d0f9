"""The configuration: frozen pydantic models, one section each. Defaults live here and nowhere else.

Unknown keys are errors (`load.py` names the nearest one). `None` means off, or derived where the line says so. Rules
that touch two sections are in `check.py`.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from grpo_mega.config.algorithm_presets import AlgorithmName, with_defaults

RecomputeModule = Literal["core_attn", "mlp", "layernorm", "mla_up_proj", "moe"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class RunConfig(Section):
    dir: str | None = None
    """Run folder; unset: `runs/<config name>`."""
    seed: int = Field(0, ge=0)
    """Moves prompts, sampling and updates; never the base model."""
    world_size: int | None = Field(None, ge=1)
    """All ranks, everywhere; unset: what the launcher says, else the GPUs found, else 1."""
    deterministic: bool = False
    """Refuse operations without a deterministic implementation (the CPU has only deterministic ones)."""
    overwrite: bool = False
    """Move an existing run folder aside and start afresh."""


class ArchitectureConfig(Section):
    """A tiny Qwen3 model. Sizes in elements."""

    num_layers: int = Field(4, ge=1)
    hidden_size: int = Field(128, ge=8)
    ffn_size: int = Field(384, ge=8)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int = Field(2, ge=1)
    head_dim: int = Field(32, ge=4)
    max_positions: int = Field(512, ge=16)
    tie_embeddings: bool = False


class BaseConfig(Section):
    """Recipe of a tiny base model that is taught on worked examples before the run, once, and cached under the digest
    of this recipe."""

    task: Literal["arithmetic", "gsm8k"]
    architecture: ArchitectureConfig = ArchitectureConfig()
    tokenizer: Literal["char", "byte"] = "char"
    examples: str | None = None
    """gsm8k: the JSONL file whose first half is taught; unset: the first set of `data.train`."""
    steps: int = Field(400, ge=1)
    batch_size: int = Field(128, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    flawed_fraction: float = Field(0.5, ge=0, le=1)
    """Share of the worked examples that carry a mistake (arithmetic) or lack the answer format (gsm8k)."""
    tool_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the worked examples that ask the calculator; those of arithmetic carry no mistake."""
    seed: int = Field(0, ge=0)
    cache_dir: str = "runs/bases"


class ModelConfig(Section):
    path: str | None = None
    """Hugging Face folder: config.json, *.safetensors, tokenizer."""
    base: BaseConfig | None = None
    """Or: a tiny base to be taught first. Exactly one of the two."""


class ParallelConfig(Section):
    """Policy layout; dp = world / (tp * cp * pp), and on the grid of the experts edp = world / (etp * ep * pp)."""

    tp: int = Field(1, ge=1)
    pp: int = Field(1, ge=1)
    vpp: int = Field(1, ge=1)
    """Model chunks of each pipeline rank (interleaved schedule)."""
    cp: int = Field(1, ge=1)
    """Ranks that share the tokens of a row."""
    ep: int = Field(1, ge=1)
    """Ranks that share the experts of a layer."""
    etp: int = Field(1, ge=1)
    """Ranks that share one expert."""
    sequence_parallel: bool = False
    num_layers_first_stage: int | None = Field(None, ge=1)
    """Layers of the first pipeline rank; unset: as many as the others."""
    num_layers_last_stage: int | None = Field(None, ge=1)
    pipeline_layout: str | None = None
    """What each stage holds, first to last, as Megatron's pipeline_model_parallel_layout: `Et*3|(t*4|)*2t*3L`."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again: none, those of `recompute_modules`, or of whole layers."""
    recompute_modules: tuple[RecomputeModule, ...] | None = Field(None, strict=False)
    """Unset: core_attn."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass goes on."""


class EngineConfig(Section):
    kind: Literal["vllm", "sglang"] = "vllm"
    """vllm: in the processes of the ranks; sglang: beside them (launch/setup.sh --with sglang; on CUDA unproven)."""
    placement: Literal["colocated", "server"] = "colocated"
    """colocated: on the devices of the ranks, in turn with the policy; server: on others, started by launch/serve.sh;
    engine.kind=vllm."""
    urls: tuple[str, ...] = Field((), strict=False)
    """server: host:port of each; one after the other they serve equal parts of the ranks."""
    tp: int = Field(1, ge=1)
    """Ranks over which one copy of the attention is cut; they sample the same rollouts."""
    dp: int = Field(1, ge=1)
    """Copies of the attention in one replica, which share its experts and sample rollouts of their own; for models with
    experts, engine.kind=vllm. Replicas = world / (tp x dp), or the number of servers."""
    ep: int = Field(1, ge=1)
    """Ranks that share the experts, each of them whole on one rank: 1 (experts are cut over tp x dp) or tp x dp; with
    engine.kind=sglang on CUDA only."""
    fp8: Literal["scales_fp32", "scales_power_of_two", "own_loader"] | None = None
    """The engine holds its matrices as FP8 codes with a scale for each 128 x 128 block, made anew at every sync by the
    policy's ranks; own_loader: by the engine, of whole bf16 tensors (vllm, on GPUs that have FP8; unproven). Unset: in
    `precision.dtype`."""
    max_num_seqs: int = Field(256, ge=1)
    """Rollouts that one replica, or each of its dp copies, samples at the same time."""
    kv_cache_tokens: int | None = Field(None, ge=16)
    """Capacity of the KV cache of a replica, or of each of its dp copies; unset: what max_num_seqs full-length rollouts
    need (on CUDA: what is left)."""

    @property
    def fp8_weights(self) -> Literal["codes", "own_loader"] | None:
        """What a sync brings for an engine in FP8: codes and scales, or what its own loader makes them of."""
        return self.fp8 if self.fp8 in (None, "own_loader") else "codes"


class SamplingConfig(Section):
    group_size: int = Field(8)
    temperature: float = Field(1.0, gt=0)
    max_tokens: int = Field(256, ge=1)
    prompts_per_wave: int | None = Field(None, ge=1)
    """Prompts that enter the engines together; unset: all of the step."""


class RowFilter(Section):
    """Keeps the rows whose value of `key` (a level, a pass rate) is within the bounds, or is one of `any_of`.

    `a.b` is key b of the object a."""

    key: str
    min: float | None = None
    max: float | None = None
    any_of: tuple[str | int | float, ...] | None = Field(None, strict=False)


class DataSource(Section):
    """One set of prompts. What it does not say, the section `data` says for all sets."""

    path: str
    """JSONL or Parquet file, folder written by `datasets`, or `arithmetic:train`, `arithmetic:heldout`."""
    name: str | None = None
    """In metrics and messages; unset: the name of file or folder without its ending."""
    weight: float = Field(1.0, gt=0)
    """Share of the training prompts, relative to the other sets; every set is shuffled and repeated by itself."""
    split: str | None = None
    """Of a folder that holds several."""
    prompt_key: str | None = None
    answer_key: str | None = None
    min_prompt_tokens: int | None = Field(None, ge=1)
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Prompts outside are left out; `data.overlong` speaks of those beyond `data.max_prompt_tokens`."""
    filters: tuple[RowFilter, ...] = Field((), strict=False)
    """A row must pass all of them."""

    @property
    def label(self) -> str:
        """`name`, or what stands for it."""
        return self.name or re.sub(r"[^A-Za-z0-9_.-]", "_", PurePath(self.path).stem)


DataSets = Annotated[
    Annotated[str, Tag("(path)")] | Annotated[tuple[DataSource, ...], Field(strict=False), Tag("(list)")],
    Discriminator(lambda value: "(list)" if isinstance(value, list | tuple) else "(path)"),
]
"""A path, or a list of sets. The tags stand in pydantic's error messages, and load.py takes them out."""


class DataConfig(Section):
    train: DataSets
    """JSONL or Parquet file, folder written by `datasets`, `arithmetic:train`; or a list of sets."""
    eval: DataSets | None = None
    """The same, held out; unset: no evaluation."""
    prompts_per_step: int = Field(32, ge=1)
    prompt_key: str | None = None
    """Unset: `prompt`, else `question`. `a.b` is key b of the object a."""
    answer_key: str | None = None
    """Unset: `answer`."""
    template: Literal["chat", "plain"] = "chat"
    system_prompt: str | None = None
    max_prompt_tokens: int = Field(1024, ge=1)
    overlong: Literal["error", "skip"] = "error"
    """Prompts longer than the limit: stop, or leave out and count."""

    @property
    def train_sets(self) -> tuple[DataSource, ...]:
        """`train` as a list."""
        return (DataSource(path=self.train),) if isinstance(self.train, str) else self.train

    @property
    def eval_sets(self) -> tuple[DataSource, ...]:
        """`eval` as a list; empty: none."""
        return (DataSource(path=self.eval),) if isinstance(self.eval, str) else self.eval or ()


class RewardTerm(Section):
    name: str
    """One of those in docs/rewards.md, or a dotted path to a function."""
    weight: float = 1.0
    args: dict[str, Any] = {}


class RewardConfig(Section):
    terms: tuple[RewardTerm, ...] = Field(strict=False)
    workers: int = Field(1, ge=1)
    """Reward processes per engine replica, or per copy in it (engine.dp)."""
    timeout_seconds: float = Field(5.0, gt=0)
    """Wall-clock limit of one scoring; batched rewards (docs/rewards.md) keep limits of their own."""
    shuffle: bool = False
    """Permute the rewards over the step's rollouts: a control experiment that must not learn."""


class EnvironmentConfig(Section):
    """What answers the policy in rollouts of several turns."""

    name: str
    """`calculator`, or a dotted path to a function."""
    args: dict[str, Any] = {}
    max_turns: int = Field(4, ge=2)
    """Most answers of the policy in a rollout."""
    stop: tuple[str, ...] | None = Field(None, strict=False)
    """Texts that end an answer, besides EOS; unset: those that the environment declares."""
    before: str = ""
    after: str = ""
    """What a chat template puts around a result, special tokens included."""
    workers: int = Field(1, ge=1)
    """Environment processes per engine replica, or per copy in it (engine.dp)."""
    timeout_seconds: float = Field(5.0, gt=0)
    """Wall-clock limit of one reply."""


class AlgorithmConfig(Section):
    """Defaults are those of `grpo`; another name changes some of them (config/algorithm_presets.py)."""

    name: AlgorithmName = "grpo"
    surrogate: Literal[
        "clipped_ratio",
        "clipped_sequence_ratio",
        "geometric_mean",
        "clipped_weight",
        "soft_gate",
        "policy_gradient",
    ] = "clipped_ratio"
    """What is maximised per token (algorithm/surrogate.py)."""
    clip_low: float | None = Field(0.2, gt=0, lt=1)
    clip_high: float | None = Field(0.2, gt=0)
    """The ratio is clamped to [1 - clip_low, 1 + clip_high]; geometric_mean: its log to [-clip_low, clip_high]."""
    dual_clip: float | None = Field(None, gt=1)
    """Largest ratio that counts where the advantage is negative; unset: none."""
    gate_positive: float | None = Field(None, gt=0)
    gate_negative: float | None = Field(None, gt=0)
    """soft_gate: tau of tokens with a positive and with a negative advantage."""
    advantage: Literal["group_std", "process", "group_mean", "leave_one_out", "batch", "group_batch", "gae"] = (
        "group_std"
    )
    """Reward minus the group's mean, over its std; the same of every step of a process reward, added up from a token
    on; without the std; minus the mean of the others; whitened over the step's tokens; minus the group's mean, then
    whitened; over a critic's values (generalised advantage estimation), then whitened."""
    gamma: float | None = Field(None, gt=0, le=1)
    """gae: discount per token."""
    gae_lambda: float | None = Field(None, ge=0, le=1)
    """gae: 0: one step of the critic's values; 1: the return minus the value."""
    value_clip: float | None = Field(None, gt=0)
    """gae: by how much a value may move from the one before the update; unset: not bounded."""
    critic_lr_factor: float = Field(1.0, gt=0)
    """gae: the critic's learning rate over the policy's, with the same warm-up and decay."""
    aggregation: Literal["rollout_mean", "token_mean", "rollout_sum", "group_token_mean"] = "rollout_mean"
    aggregation_length: float | None = Field(None, gt=0)
    """rollout_sum: the constant, in tokens, that a rollout's sum is divided by; unset: `sampling.max_tokens`."""
    kl_coef: float = Field(0.04, ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    kl_target: float | None = Field(None, gt=0)
    """Nats per token that kl_coef is moved towards, from step to step; unset: kl_coef stays."""
    ref_update_every: int = Field(0, ge=0)
    """Steps after which the policy becomes the reference; 0: the reference is frozen."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    correction: Literal["token_truncated", "sequence_truncated", "token_masked"] | None = None
    """Of the mismatch between policy and engine (algorithm/correction.py); unset: none."""
    correction_low: float | None = Field(None, gt=0, lt=1)
    correction_high: float | None = Field(None, ge=1)
    """Bounds of the probability ratio policy / engine; unset: those of the form."""
    correction_veto: float | None = Field(None, gt=0, lt=1)
    """Rollouts with a token whose ratio policy / engine is below are not trained on; unset: all are."""
    routing_replay: bool = False
    """Models with experts: every token is sent to the experts that the engine chose for it; `observe` keeps them beside
    the rollouts."""
    overlong_filter: bool = False
    """Do not train on truncated rollouts."""
    overlong_buffer_fraction: float | None = Field(None, gt=0, le=1)
    """Last part of `sampling.max_tokens` in which the reward falls linearly; unset: no penalty."""
    overlong_penalty: float = Field(1.0, gt=0)
    """By how much it has fallen at `sampling.max_tokens`."""
    degenerate: Literal["keep", "drop", "refill"] = "keep"
    """Groups whose rewards are all equal: train on them; leave them out of the denominators too; or, besides, sample
    other prompts in their place."""
    refill_rounds: int | None = Field(None, ge=1)
    """refill: most times that a step samples again; unset: 8."""

    @property
    def needs_reference(self) -> bool:
        """True if the loss or the reward has a KL penalty against a reference model."""
        return self.kl_coef > 0

    @property
    def needs_critic(self) -> bool:
        """True if advantages are computed from the values of a critic (`advantage: gae`)."""
        return self.advantage == "gae"

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        return with_defaults(values) if isinstance(values, dict) else values


class OptimizerConfig(Section):
    """Adam with decoupled weight decay."""

    lr: float = Field(1e-6, gt=0)
    warmup_updates: int = Field(0, ge=0)
    """Updates over which the rate rises linearly to lr."""
    decay_updates: int | None = Field(None, ge=1)
    """Updates, warm-up included, after which it has fallen linearly to min_lr, where it stays; unset: constant."""
    min_lr: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled (AdamW); of matrices only: norms and biases do not decay."""
    clip_grad: float = Field(1.0, gt=0)
    host_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the master weights and moments that stay on the host and are updated there (CUDA only)."""


class TrainConfig(Section):
    steps: int = Field(ge=1)
    """Rollout batches in all."""
    epochs_per_rollout: int = Field(1, ge=1)
    minibatches_per_epoch: int = Field(1, ge=1)
    max_tokens_per_microbatch: int = Field(8192, ge=1)
    """Tokens of one packed row; at least the longest prompt plus max_tokens."""


class EvaluationConfig(Section):
    every: int | None = Field(None, ge=1)
    """Steps between evaluations; both ends are always evaluated when there is `data.eval`."""
    temperature: float = Field(1.0, gt=0)
    k: int = Field(4, ge=1)
    """Samples per prompt."""
    report_k: tuple[int, ...] | None = Field(None, strict=False)
    """The k of pass@k and maj@k, each at most `k`; unset: `k`."""
    max_tokens: int | None = Field(None, ge=1)
    """Unset: `sampling.max_tokens`."""
    max_prompts: int | None = Field(None, ge=1)
    """Of each held-out set; unset: all."""


class Fp8Config(Section):
    """Matrix products of the policy in FP8, by Transformer Engine, on GPUs that have them; unproven."""

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
    """How numbers get their scales: grpo_mega/config/fp8_rules.py."""
    format: Literal["e4m3", "hybrid"] | None = None
    """hybrid: gradients in e5m2. Unset: hybrid where a tensor has one scale, e4m3 where a block has."""
    params: bool = False
    """Hold weights in FP8, and gather them so after an update."""
    first_layers_bf16: int = Field(0, ge=0)
    """Layers at the start that stay in bf16."""
    last_layers_bf16: int = Field(0, ge=0)
    amax_history: int | None = Field(None, ge=1)
    """delayed: steps that a scale looks back at; unset: 1024."""


class PrecisionConfig(Section):
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Parameters and compute, policy and engine; master weights, main gradients and moments are always fp32."""
    fp8: Fp8Config | None = None
    """Unset: none."""


class WeightSyncConfig(Section):
    verify: Literal["every", "first", "off"] = "every"
    """At which syncs the engines' weights are proven to be the policy's."""
    bucket_bytes: int = Field(256 * 1024 * 1024, ge=1024)
    """What a rank sends and receives at a time; twice that is its extra memory."""
    fp8_report: bool = False
    """Write into fp8_report.json, at the start of a run, how far FP8 codes move each matrix of the policy."""
    transport: Literal["auto", "gloo", "nccl", "shared_memory", "cuda_ipc"] = "auto"
    """auto: NCCL with CUDA; without it shared memory inside a machine, gloo between machines. cuda_ipc: mapped
    memory of GPUs inside a machine, for processes that share one; NCCL between machines."""


class CheckpointConfig(Section):
    every: int | None = Field(None, ge=1)
    """Steps between checkpoints; unset: only the last one."""
    keep: int = Field(2, ge=1)
    resume: str = "auto"
    """`auto`, `never`, or the path of a checkpoint."""
    export_hf: bool = True
    """Write the last checkpoint in Hugging Face format too."""


class ObserveConfig(Section):
    tensorboard: bool = True
    memory_peaks: bool = False
    """Measure the most memory that the first rank holds in each phase. Without CUDA this costs time: what is free is
    given back to the system at every turn."""
    rollouts_shown: int = Field(3, ge=0)
    """Rollouts rendered as text in TensorBoard per step."""


class GuardConfig(Section):
    timeout_seconds: float = Field(600.0, gt=0)
    """Limit of every wait between ranks."""


class Config(Section):
    """One run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig()
    data: DataConfig
    reward: RewardConfig
    environment: EnvironmentConfig | None = None
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    precision: PrecisionConfig = PrecisionConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()
    guard: GuardConfig = GuardConfig()

    @property
    def longest_training_rollout(self) -> int:
        """Most tokens of a prompt and its completion in a training batch: a microbatch row must hold them."""
        return self.data.max_prompt_tokens + self.sampling.max_tokens

    @property
    def longest_rollout(self) -> int:
        """Most tokens of a prompt and its completion, training and evaluation: the engine must hold them."""
        return self.data.max_prompt_tokens + max(self.sampling.max_tokens, self.evaluation.max_tokens or 0)
