"""Config sections of sampling: `engine`, `sampling`, `reward`, `environment` and `evaluation`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from grpo_mega.config.sampling_options import token_ids
from grpo_mega.config.section import Section

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""vLLM samples with 0.01 in place of a lower temperature, and then differs from the policy; it rejects more than 2."""


class EngineConfig(Section):
    """Inference engine that samples the rollouts.

    The number of replicas is world_size / (tp * dp), or the number of `urls`.
    """

    kind: Literal["vllm", "sglang"] = "vllm"
    """`vllm` runs inside the processes of the ranks, `sglang` in processes beside them (launch/setup.sh --with sglang;
    not yet verified on CUDA)."""
    placement: Literal["colocated", "server"] = "colocated"
    """`colocated`: engine and policy share the devices of the ranks and use them in alternation. `server`: engines run
    on other devices, started by launch/serve.sh (docs/servers.md); needs `engine.kind=vllm`."""
    urls: tuple[str, ...] = Field((), strict=False)
    """Addresses `host:port` of the engine servers. Each server serves an equal, contiguous part of the ranks."""
    spare_urls: tuple[str, ...] = Field((), strict=False)
    """Addresses of servers that wait: each takes the place of a server of `urls` that is lost or does not start."""
    tp: int = Field(1, ge=1)
    """Tensor-parallel ranks of the engine. They sample the same rollouts."""
    dp: int = Field(1, ge=1)
    """Copies of the attention layers in one replica. They share the experts and sample different rollouts; for
    mixture-of-experts models with `engine.kind=vllm`."""
    ep: int = Field(1, ge=1)
    """Expert-parallel ranks of the engine: 1 (experts are sharded over tp * dp ranks) or tp * dp (each expert is whole
    on one rank). With `engine.kind=sglang` on CUDA only."""
    fp8: Literal["scales_fp32", "scales_power_of_two"] | None = None
    """Format of the scales when the engine stores its matrices as FP8 values with one scale per 128 x 128 block. The
    policy's ranks quantize at every sync. null: the engine stores `precision.dtype`."""
    max_num_seqs: int = Field(256, ge=1)
    """Most rollouts that a replica, or each of its `dp` copies, decodes at the same time."""
    kv_cache_tokens: int | None = Field(None, ge=16)
    """KV-cache capacity of a replica, or of each of its `dp` copies, in tokens. null: enough for `max_num_seqs`
    rollouts of full length; on CUDA what `memory_share` leaves."""
    memory_share: float = Field(0.85, gt=0, le=1)
    """Fraction of the memory of each GPU for the engine's weights, workspace and KV cache. The policy leaves the GPU
    before the engine uses it. CUDA only, and without `kv_cache_tokens`."""
    args: dict[str, Any] = Field({})
    """Further arguments of the engine, name -> value: fields of vLLM's `EngineArgs` or SGLang's `ServerArgs`, by
    `engine.kind`. Fields that this program sets itself are rejected."""


class PartialConfig(Section):
    """Partial rollouts: more groups are sampled than a step needs, and what is not complete continues in the next step.

    See docs/partial-rollouts.md.
    """

    oversubmit: float = Field(1.5, gt=1, le=8)
    """Groups in progress at the same time, as a multiple of the groups that a prompt shard gives to a step."""
    slice_tokens: int | None = Field(None, ge=1)
    """Tokens that each rollout may sample before the complete groups are counted: less than `sampling.max_tokens`.
    null: a sixteenth of `sampling.max_tokens`, and at least 16."""
    max_staleness: int = Field(ge=1)
    """Most updates between the weights that sampled a group's oldest token and those at the start of a step. An older
    group is dropped, and its prompt is sampled again. At least the number of updates of a step."""


class SamplingConfig(Section):
    """Sampling of training rollouts."""

    group_size: int = Field(8)
    """Rollouts per prompt: at least 2, or at least 1 for advantages that are not relative to the group."""
    temperature: float = Field(1.0, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)
    """Softmax temperature of the engine. The policy computes its log-probabilities at the same temperature."""
    max_tokens: int = Field(256, ge=1)
    """Most tokens of a completion; longer completions are truncated."""
    prompts_per_wave: int | None = Field(None, ge=1)
    """Prompts that are submitted to the engines together. null: all prompts of the step."""
    partial: PartialConfig | None = None
    """Partial rollouts. null: a step waits for all of its rollouts."""

    @property
    def slice_tokens(self) -> int:
        """Tokens of a slice with partial rollouts."""
        given = None if self.partial is None else self.partial.slice_tokens
        return max(16, self.max_tokens // 16) if given is None else given


class RewardTerm(Section):
    """One reward function. The reward of a rollout is the weighted sum of its terms."""

    name: str
    """Name of a built-in reward (docs/rewards.md), `./file.py:function` or `package.module:function`."""
    weight: float = Field(1.0, ge=-1e6, le=1e6)
    """Factor of this term in the sum."""
    args: dict[str, Any] = Field({})
    """Keyword arguments of the reward."""
    datasets: tuple[str, ...] | None = Field(None, strict=False)
    """Names of the sets in `data.train` and `data.eval` whose rows this term scores. null: all sets."""


class RewardConfig(Section):
    """Rewards and the processes that compute them."""

    terms: tuple[RewardTerm, ...] = Field(strict=False)
    """Reward functions, at least one. The first that applies to a row decides whether its answer is right."""
    workers: int = Field(1, ge=1)
    """Reward processes per engine replica, or per attention copy in it (engine.dp)."""
    timeout_seconds: float = Field(5.0, gt=0)
    """Wall-clock limit for scoring one rollout, in seconds. Batched rewards have their own limits (docs/rewards.md)."""
    on_failure: Literal["floor", "drop"] | None = None
    """Effect of a scoring that fails (time-out, exception, no number in the range). `floor`: the term scores the lowest
    value of its range. `drop`: the rollout has no reward and is left out of the mean of its group and of the loss.
    null: `drop` for `remote`, `judge`, `reward_model` and other batched rewards, `floor` for functions."""
    shuffle: bool = False
    """Permute the rewards over the rollouts of a step: a control experiment in which nothing can be learned."""


class EnvironmentConfig(Section):
    """Environment that replies to the policy in multi-turn rollouts (docs/environments.md)."""

    name: str
    """`calculator`, `./file.py:function` or `package.module:function`."""
    args: dict[str, Any] = Field({})
    """Keyword arguments of the environment."""
    max_turns: int = Field(4, ge=2)
    """Most turns of the policy in one rollout."""
    stop: tuple[str, ...] | None = Field(None, strict=False)
    """Texts that end a turn of the policy, besides EOS. null: the stop texts that the environment declares."""
    before: str = ""
    """Text of the chat template before a reply of the environment, special tokens included."""
    after: str = ""
    """Text of the chat template after a reply of the environment, special tokens included."""
    workers: int = Field(1, ge=1)
    """Environment processes per engine replica, or per attention copy in it (engine.dp)."""
    timeout_seconds: float = Field(5.0, gt=0)
    """Wall-clock limit of one reply, in seconds."""


class EvaluationConfig(Section):
    """Evaluation on `data.eval`, before the first step and after the last one, and every `every` steps."""

    every: int | None = Field(None, ge=1)
    """Steps between evaluations. null: only before the first step and after the last one."""
    temperature: float = Field(1.0, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)
    """Softmax temperature of the samples. The greedy accuracy is reported as well."""
    k: int = Field(4, ge=1)
    """Samples per prompt. Accuracy is pass@1, the mean over the samples."""
    report_k: tuple[int, ...] | None = Field(None, strict=False)
    """Values of k for which pass@k and maj@k are reported, each at most `evaluation.k`. null: `evaluation.k` alone."""
    max_tokens: int | None = Field(None, ge=1)
    """Most tokens of a completion. null: `sampling.max_tokens`."""
    max_prompts: int | None = Field(None, ge=1)
    """Prompts of each held-out set, from its start. null: all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most probable tokens whose probabilities add up to `top_p`. 1: from all. Like `top_k` and
    `min_p` it does not change the greedy answers. Training has no such key (docs/algorithms.md)."""
    top_k: int | None = Field(None, ge=1)
    """Sample from the `top_k` most probable tokens. null: from all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Sample from the tokens with at least `min_p` times the probability of the most probable one. 0: from all."""
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    """Divide positive logits, and multiply negative ones, of the tokens of prompt and completion. 1: no change. Like
    the keys below it also changes the greedy answers. Needs `engine.kind=vllm`."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtract it from the logits of the tokens of the completion."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtract it, times the number of occurrences in the completion, from the logits of the completion's tokens."""
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(token_ids)] = Field({})
    """Token id -> number that is added to its logit, from -100 to 100."""
    bad_words: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), strict=False)
    """Texts that must not be sampled, also after a space. A text of several tokens is barred at its last token. Needs
    `engine.kind=vllm`."""

    def is_due(self, step: int, num_steps: int) -> bool:
        """Return True if the loop evaluates after a step; the first and the last evaluation are outside of the loop.

        Args:
            step: number of the step, from 1.
            num_steps: steps of the run.
        """
        return self.every is not None and step % self.every == 0 and step < num_steps
