"""Data types shared by all packages. All but `FileSink` are frozen dataclasses; none depends on a backend.

Shapes: P prompts, G group, B rows or sequences, T packed tokens, V vocabulary, H hidden.
Log-probabilities are in nats, of `softmax(logits / temperature)` over the un-padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # config and the launcher import UserError and must start without torch and numpy
    import numpy as np
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

StopReason = Literal["eos", "length", "stop"]
"""Reason why sampling stopped: `eos` is an end-of-sequence token, `length` the token limit, `stop` a stop string at
which the environment takes its turn."""


class UserError(ValueError):
    """Invalid user input. A program ends with exit code 2 and prints this text without a traceback.

    Args:
        message: the key and the value it got, then the rule that the value breaks.
        remedy: what the user should do. It is printed after the message; the doctor shows it on a line of its own.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message, self.remedy = message, remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class CheckpointWriteError(RuntimeError):
    """A checkpoint cannot be written, for example to a full disk. The text says what to do.

    A program ends with exit code 1 and prints this text; the traceback is in the log of the rank.
    """


class WeightMismatchError(RuntimeError):
    """The weights of an engine differ from the policy's. Names tensor, rank and slice.

    Raised on every rank, before a token is sampled.
    """


@dataclass(frozen=True)
class TensorRecord:
    """Shape without padding, dtype and digest (models/digest.py, sixteen hexadecimal digits) of a whole tensor."""

    shape: tuple[int, ...]
    dtype: str
    digest: str


StateRecords = Mapping[str, Mapping[str, TensorRecord]]
"""Folder in a checkpoint (`.` for its own) -> Megatron's name of a tensor -> record, the same on every rank."""


@dataclass(frozen=True)
class Prompt:
    """A question, tokenized for the engine.

    `index` is the row among all rows of the run's training (or held-out) data sets. `text` is the tokenized text, after
    the chat template. `data_set` is the name of the data set. `messages` are the prompt before the template, with
    `role` and `content`. `fields` are the other columns of the row, loaded if a reward reads them.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    answer: str
    data_set: str = ""
    messages: tuple[Mapping[str, str], ...] = field(default=(), hash=False)
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, eq=False, init=False)
class Completion:
    """One sampled answer as the engine returns it.

    With an environment, it holds all answers of a rollout and the environment's results between them.

    The fields per token accept any sequence and are arrays afterwards. `token_ids` [N] int32 ends with EOS when
    `stop_reason == "eos"`. `sampler_log_probs` [N] float32 has one entry per token of `token_ids`, in nats.
    `policy_version` is the number of updates behind the weights that sampled the answer, and of its last token where
    several weights sampled it. Then `policy_versions` [N] int32 has the number of each token; None means that all have
    `policy_version`. `loss_mask` [N] bool is False on the tokens of environment results, whose sampler log-probs are 0
    and whose version means nothing; None means that the policy sampled all tokens.
    `failure` describes how the environment failed. `expert_choices` is present when the request asks for it: the
    experts of the first M tokens of prompt and completion in each layer, [M, L, K] small integers as in
    data/expert_records.py. Two completions are equal if all fields but `expert_choices` are.

    Raises:
        ValueError: the arrays per token differ in length.
    """

    token_ids: NDArray[np.int32]
    sampler_log_probs: NDArray[np.float32]
    stop_reason: StopReason
    policy_version: int
    text: str
    expert_choices: Tensor | None
    loss_mask: NDArray[np.bool_] | None
    num_turns: int
    failure: str | None
    policy_versions: NDArray[np.int32] | None

    def __init__(
        self,
        token_ids: ArrayLike,
        sampler_log_probs: ArrayLike,
        stop_reason: StopReason,
        policy_version: int,
        text: str,
        expert_choices: Tensor | None = None,
        loss_mask: ArrayLike | None = None,
        num_turns: int = 1,
        failure: str | None = None,
        policy_versions: ArrayLike | None = None,
    ) -> None:
        tokens, log_probs = _array(token_ids, "int32"), _array(sampler_log_probs, "float32")
        mask = None if loss_mask is None else _array(loss_mask, "bool")
        if len(tokens) != len(log_probs):
            raise ValueError(f"a completion has {len(tokens)} tokens and {len(log_probs)} sampler_log_probs")
        versions = None if policy_versions is None else _array(policy_versions, "int32")
        for name, column in (("loss_mask", mask), ("policy_versions", versions)):
            if column is not None and len(column) != len(tokens):
                raise ValueError(f"a completion has {len(tokens)} tokens and a {name} of {len(column)}")
        fields = (
            tokens, log_probs, stop_reason, policy_version, text, expert_choices, mask, num_turns, failure, versions,
        )  # fmt: skip
        for name, value in zip(type(self).__dataclass_fields__, fields, strict=True):
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Completion):
            return NotImplemented
        return self._compared() == other._compared()

    __hash__ = None  # type: ignore[assignment]

    def _compared(self) -> tuple[object, ...]:
        mask = None if self.loss_mask is None else self.loss_mask.tobytes()
        versions = None if self.policy_versions is None else self.policy_versions.tobytes()
        arrays = self.token_ids.tobytes(), self.sampler_log_probs.tobytes(), mask, versions
        return *arrays, self.stop_reason, self.policy_version, self.text, self.num_turns, self.failure

    @property
    def num_loss_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return len(self.token_ids) if self.loss_mask is None else int(self.loss_mask.sum())

    @property
    def loss_log_probs(self) -> NDArray[np.float32]:
        """Sampler log-probs, in nats, of the tokens that the policy sampled."""
        return self.sampler_log_probs if self.loss_mask is None else self.sampler_log_probs[self.loss_mask]


def _array(values: ArrayLike, dtype: str) -> NDArray[Any]:
    import numpy as np

    return np.ascontiguousarray(values, dtype=dtype)


@dataclass(frozen=True)
class TokenValues:
    """One number per loss token of several rollouts; loss tokens are those that the policy sampled.

    The numbers of rollout `ids[i]` (a row of the step's table) are `values[offsets[i] : offsets[i + 1]]`. The ids [N]
    ascend, `offsets` [N + 1] starts with 0.
    """

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    values: NDArray[Any]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Loss tokens of each rollout, [N]."""
        return self.offsets[1:] - self.offsets[:-1]

    def with_values(self, values: NDArray[Any]) -> TokenValues:
        """Return other numbers for the same tokens."""
        assert len(values) == len(self.values), f"{len(values)} numbers for {len(self.values)} loss tokens"
        return TokenValues(self.ids, self.offsets, values)

    def by_rollout(self) -> dict[int, list[float]]:
        """Return {rollout: its numbers}; for reports and tests, not for whole steps."""
        bounds = zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)
        return {i: self.values[a:b].tolist() for i, (a, b) in zip(self.ids.tolist(), bounds, strict=True)}


@dataclass(frozen=True)
class Reward:
    """The reward of one rollout: the weighted sum in `value`, and each component before its weight.

    `value` is None for a rollout that could not be scored and is left out (`reward.on_failure=drop`): it has no
    advantage, and nothing of it is trained on. `components` has the terms that apply to the rollout's data set and
    have a value.

    `steps` is present if a component scored steps: pairs (end, weighted value), where `end` is the position of the
    step's last character in the text. The value of a component with steps is their mean. A component without steps
    counts as one step that ends with the completion.

    `failures` names the components that timed out, crashed or returned a non-number, and so scored their floor or
    none.
    """

    value: float | None
    components: dict[str, float] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    steps: tuple[tuple[int, float], ...] | None = None


@dataclass(frozen=True)
class Rollout:
    """One answer to one prompt with its reward, on the ranks that sampled it. The G rollouts of a prompt form a group.

    All later parts of a step read the columns that are built from it: data/rollout_table.py and data/rollout_tokens.py.
    """

    prompt: Prompt
    completion: Completion
    reward: Reward
    replica: int
    steps: tuple[tuple[int, float], ...] | None = None
    """(end_token, value) of every step that a process reward scored; `end_token` is a position in the completion."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens of prompt and completion together."""
        return len(self.prompt.token_ids) + len(self.completion.token_ids)


@dataclass(frozen=True)
class SamplingOptions:
    """Changes of the distribution that an engine samples from, besides its temperature (evaluation only).

    `logit_bias` has pairs of token id and bias. `bad_words` are texts that must not be sampled.
    """

    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()


@dataclass(frozen=True)
class SamplingRequest:
    """Sampling parameters of one engine call. `seed` seeds the generators and is equal on all ranks of an engine.

    `stop` lists texts that end an answer, besides EOS; the token that completes such a text belongs to the answer.
    `max_tokens_each` gives a limit for each prompt, in place of `max_tokens`. `continues` states that the prompts
    extend the answers of the previous call, so the engine may reuse its prefix cache. `expert_choices` asks for the
    experts of every token (`Completion.expert_choices`). `options` change the distribution; with them, the log-probs of
    a completion are not those of the policy.
    """

    group_size: int
    temperature: float
    max_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    max_tokens_each: tuple[int, ...] | None = None
    continues: bool = False
    expert_choices: bool = False
    options: SamplingOptions = SamplingOptions()

    def max_tokens_of(self, position: int) -> int:
        """Return the token limit of the prompt at `position`."""
        return self.max_tokens if self.max_tokens_each is None else self.max_tokens_each[position]


@dataclass(frozen=True)
class TensorSlice:
    """A rectangular slice of a named tensor: `offsets[i] <= index[i] < offsets[i] + shape[i]` in every dimension."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def index(self) -> tuple[slice, ...]:
        """Index expression of this slice: `tensor[s.index]`."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.shape, strict=True))

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(f'{o}:{o + n}' for o, n in zip(self.offsets, self.shape, strict=True))}]"


@dataclass(frozen=True)
class Placement:
    """A correspondence between the slice `hf` of a Hugging Face tensor and the region `local` of a parameter.

    Both have the same number of elements in the same order. `local.name` is the parameter on this rank.
    """

    hf: TensorSlice
    local: TensorSlice


@dataclass(frozen=True)
class Microbatch:
    """Several rollouts packed into one row of T tokens, for one forward and backward pass.

    Padding belongs to the last segment and has `loss_mask` False. `labels[t]` is the token that position t predicts. It
    is shifted before the row is split over ranks; log-probs and advantages are aligned to it. `token_weights[t]` is the
    factor of the token's loss. It includes the global denominators, so losses add up over microbatches and ranks.
    """

    rollout_ids: tuple[int, ...]  # rows of the step's table, in the order of the segments
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
    returns: Tensor | None = None  # [T] float32, the critic's targets
    expert_choices: Tensor | None = None  # [T, L, K] small integers: the engine's experts; -1: not recorded
    token_mask: Tensor | None = None  # [T] bool, False for padding; None: not known

    @property
    def num_loss_tokens(self) -> int:
        """Number of tokens of this row that are trained on."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class UpdateStats:
    """Statistics of one optimizer step, the same on every rank but for `non_finite_rows`.

    `sums` are global, over microbatches and ranks: `loss` is the sum of the tokens' weighted losses; each other
    quantity is its mean over tokens, weighted with `token_weights`. `maxima` are global maxima.

    `fault` says that loss or gradient is not finite; then sums and norm may not be finite either. `is_made` is False if
    the optimizer step was not made. `non_finite_rows` are the microbatches of this rank whose loss is not finite.
    `ratio_counts` are the loss tokens in each bin of observe/ratio_bins.py; empty for a loss without ratios.
    """

    grad_norm: float
    learning_rate: float
    sums: dict[str, float]
    maxima: dict[str, float]
    fault: str | None = None
    is_made: bool = True
    non_finite_rows: tuple[int, ...] = ()
    ratio_counts: tuple[float, ...] = ()


AllowsUpdate = Callable[[UpdateStats], bool]
"""Function that returns False for the statistics of an update whose optimizer step must not be made."""


class FileSink(Protocol):
    """Receives the content of the files of a save on this rank. Whoever has made it calls `flush` or `abandon`."""

    def add_file(self, path: Path, parts: Sequence[bytes | Tensor]) -> None:
        """Take a file that consists of `parts`, bytes and tensors of any shape; when this returns, they may change.

        Raises:
            OSError: the file is written at once, and cannot be written.
        """
        ...

    def flush(self, flushed: Callable[[], None] = ...) -> None:
        """Wait until all files that are written are on the disk. `flushed` is called after each of them.

        Raises:
            OSError: a file cannot be flushed.
        """
        ...

    def abandon(self) -> None:
        """Close all files: the save has failed on another rank."""
        ...
