"""The nouns that cross module borders. Every one is frozen, and none knows about a backend.

Shapes: P prompts, G group, B rows or sequences, T packed tokens, V vocabulary, H hidden.
Log-probabilities are in nats, of `softmax(logits / temperature)` over the un-padded vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # config and the launcher need UserError, and start without torch
    from torch import Tensor

StopReason = Literal["eos", "length", "stop"]
"""A token that ends the answer; the limit of tokens; a text at which the policy hands over to its environment."""


class UserError(ValueError):
    """The user's input is wrong. Ends the program with exit code 2 and this text alone, without a traceback.

    Args:
        message: what is wrong, beginning with the key and the value it got, then the rule that it breaks.
        remedy: what to do about it; printed after the message, and shown on a line of its own by the doctor.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message, self.remedy = message, remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class WeightMismatchError(RuntimeError):
    """An engine does not hold the policy's weights; names tensor, rank and slice. Raised before a token is sampled."""


@dataclass(frozen=True)
class Prompt:
    """A question, already turned into the tokens that the engine gets.

    `index` is the row among all rows of the run's training (or held-out) sets. `text` is what was tokenised (after the
    chat template). `data_set` is the name of its set.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    answer: str
    data_set: str = ""


@dataclass(frozen=True)
class Completion:
    """One sampled answer, as the engine returns it; with an environment, all answers of a rollout and the results that
    stand between them.

    `token_ids` ends with EOS when `stop_reason == "eos"`; `sampler_log_probs` has one entry per token of `token_ids`.
    `policy_version` is the number of updates behind the weights that sampled it. `loss_mask` is False on the tokens of
    results, whose sampler log-probs are 0; None: all tokens are the policy's. `failure`: how the environment failed.
    `expert_choices`, where the request asks for them, are the experts of the first N tokens of prompt and completion in
    each layer: [N, L, K] small integers as in data/expert_records.py.
    """

    token_ids: tuple[int, ...]
    sampler_log_probs: tuple[float, ...]
    stop_reason: StopReason
    policy_version: int
    text: str
    expert_choices: Tensor | None = field(default=None, compare=False)
    loss_mask: tuple[bool, ...] | None = None
    num_turns: int = 1
    failure: str | None = None

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that the policy sampled."""
        return len(self.token_ids) if self.loss_mask is None else sum(self.loss_mask)

    @property
    def loss_log_probs(self) -> tuple[float, ...]:
        """`sampler_log_probs` of the tokens that the policy sampled."""
        return tuple(itertools.compress(self.sampler_log_probs, self.loss_mask or (True,) * len(self.token_ids)))


@dataclass(frozen=True)
class Reward:
    """What one rollout earned: the weighted sum, and each component before its weight.

    `steps` are there if a component judged steps: (end, value), value weighted, `end` the position in the text of the
    step's last character. A component with steps is their mean; one without is a step that ends with the completion.

    `failures` names the components that timed out, crashed or returned a non-number (and scored their floor).
    """

    value: float
    components: dict[str, float] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    steps: tuple[tuple[int, float], ...] | None = None


@dataclass(frozen=True)
class Rollout:
    """One answer to one prompt with its reward: a row of `rollouts/*.jsonl`. The G rollouts of a prompt are a group."""

    prompt: Prompt
    completion: Completion
    reward: Reward
    replica: int
    steps: tuple[tuple[int, float], ...] | None = None
    """(end_token, value) of every step that a process reward found: positions in the completion's tokens."""

    @property
    def num_tokens(self) -> int:
        """Prompt plus completion."""
        return len(self.prompt.token_ids) + len(self.completion.token_ids)


@dataclass(frozen=True)
class SamplingRequest:
    """How an engine samples: `seed` feeds its generators, equal on all ranks of an engine.

    `stop` are texts that end an answer, besides EOS; the token that completes one belongs to the answer.
    `max_tokens_each` has a limit for each prompt, in place of `max_tokens`. `continues`: the prompts go on where the
    last call's answers ended, so what the engine computed for those may be used again. `expert_choices`: tell the
    experts of every token (`Completion.expert_choices`).
    """

    group_size: int
    temperature: float
    max_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    max_tokens_each: tuple[int, ...] | None = None
    continues: bool = False
    expert_choices: bool = False

    def max_tokens_of(self, position: int) -> int:
        """Of the prompt at this position."""
        return self.max_tokens if self.max_tokens_each is None else self.max_tokens_each[position]


@dataclass(frozen=True)
class TensorSlice:
    """A box of a named tensor: `offsets[i] <= index[i] < offsets[i] + shape[i]` in every dimension."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def index(self) -> tuple[slice, ...]:
        """For `tensor[s.index]`."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.shape, strict=True))

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(f'{o}:{o + n}' for o, n in zip(self.offsets, self.shape, strict=True))}]"


@dataclass(frozen=True)
class Placement:
    """One rectangular correspondence: the slice `hf` of a Hugging Face tensor is the region `local` of a parameter.

    Both boxes hold the same number of elements in the same order; `local.name` is the parameter on this rank.
    """

    hf: TensorSlice
    local: TensorSlice


@dataclass(frozen=True)
class Microbatch:
    """Several rollouts packed into one row of T tokens, cut for one forward and backward pass.

    Positions of padding belong to the last segment and have `loss_mask` False. `labels[t]` is the token that position
    t predicts (shifted before anything is cut); log-probs and advantages are aligned to it. `token_weights[t]` is what
    the token's loss is multiplied with: it already holds the global denominators, so losses add up over
    microbatches and ranks.
    """

    rollout_ids: tuple[int, ...]  # positions in the step's list of rollouts, in the order of the segments
    token_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, restarts at 0 in every segment
    labels: Tensor  # [T] int64
    loss_mask: Tensor  # [T] bool
    cu_seqlens: Tensor  # [B + 1] int32, B segments; the last may be padding
    advantages: Tensor  # [T] float32
    token_weights: Tensor  # [T] float32, 0 where loss_mask is False
    sampler_log_probs: Tensor  # [T] float32, 0 where loss_mask is False
    old_log_probs: Tensor | None = None  # [T] float32
    ref_log_probs: Tensor | None = None  # [T] float32
    old_values: Tensor | None = None  # [T] float32, the critic's, before the update
    returns: Tensor | None = None  # [T] float32, what the critic should have said
    expert_choices: Tensor | None = None  # [T, L, K] small integers: the engine's experts; -1: no record

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class UpdateStats:
    """What one optimizer step reports, the same on every rank.

    `sums` are global (over microbatches and ranks): `loss` the sum of what tokens contribute, each other quantity its
    mean over tokens weighted with `token_weights`; `maxima` are global maxima.
    """

    grad_norm: float
    learning_rate: float
    sums: dict[str, float]
    maxima: dict[str, float]
