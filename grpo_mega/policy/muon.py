"""Muon: matrices move along their orthogonalized momentum; everything else is updated by AdamW.

The optimizer runs inside Megatron's distributed optimizer, whose ranks hold ranges of elements, like AdamW does: master
weights, checkpoints, offloading and gathering of parameters stay the same. A matrix that the ranges of several ranks
share is assembled on them for its orthogonalization; others need no message between data-parallel ranks. Matrices that
tensor-parallel ranks share are always assembled, so the update is the same in every layout.
A matrix here is a matrix of the Hugging Face checkpoint: q, k, v, gate and up are separate although Megatron joins
them. Embedding, output layer, value head, vectors and matrices of one row or column belong to AdamW.
Megatron-Core's own Muon is not used: it needs the package emerging-optimizers, which needs Python 3.12, and its
checkpoints load only with the same number of data-parallel ranks (layer_wise_optimizer.py:783).
Asserted by tests/unit/policy/test_muon.py and tests/parallel/test_muon.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of an iteration X <- a X + (b A + c A A) X with A = X X^T."""
ITERATIONS = 5
SCALE = 0.2
"""Root mean square of an update for a learning rate of 1, about that of AdamW's updates."""


def newton_schulz(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix with the singular vectors of `matrix` and singular values near 1, [R, C] float32.

    Args:
        matrix: [R, C] float32. Zeros stay zeros.
        dtype: of the products.

    Source: Muon, https://kellerjordan.github.io/posts/muon/ (five iterations and their coefficients).
    """
    a, b, c = COEFFICIENTS
    x = (matrix / matrix.norm().clamp_min(1e-7)).to(dtype)
    is_tall = x.size(0) > x.size(1)
    x = x.mT if is_tall else x
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    found: Tensor = x.mT if is_tall else x
    return found.float()


@dataclass(frozen=True)
class MatrixShard:
    """The elements [start, end) of a parameter that this rank updates, and the groups that share the parameter.

    `split_rows` splits the rows of the parameter, as this tensor-parallel rank holds it, into the matrices of a
    checkpoint, and `join_rows` is its inverse. `master` is None on a data-parallel rank that holds no element.
    """

    shape: tuple[int, int]
    master: Tensor | None
    start: int
    end: int
    dtype: torch.dtype
    """Of the products of the orthogonalization."""
    device: torch.device
    data_group: Any
    """Data-parallel group of the parameter, if several of its ranks hold elements; else None."""
    tensor_group: Any
    """Tensor-parallel group of the parameter, if its ranks hold parts of the matrices; else None."""
    partition_dim: int
    split_rows: Callable[[Tensor], Sequence[Tensor]]
    join_rows: Callable[[Sequence[Tensor]], Tensor]

    def assembled(self, direction: Tensor | None) -> Tensor | None:
        """Return the whole parameter's values [R, C] from the parts of all ranks; None if this rank holds none."""
        if self.data_group is None:
            return None if direction is None else direction.view(self.shape)
        whole = torch.zeros(math.prod(self.shape), device=self.device)
        if direction is not None:
            whole[self.start : self.end] = direction.view(-1)
        dist.all_reduce(whole, group=self.data_group)  # the parts of the other ranks are zeros: the sum is exact
        return None if direction is None else whole.view(self.shape)

    def orthogonalized(self, values: Tensor) -> Tensor:
        """Return the update [R, C] of the parameter for a learning rate of 1."""
        return self.join_rows([self._update(part.contiguous()) for part in self.split_rows(values)])

    def _update(self, part: Tensor) -> Tensor:
        """Return SCALE * sqrt(max(R, C)) * orthogonalized matrix, of which this rank holds `part`.

        Source: Muon is Scalable for LLM Training, arXiv:2502.16982, equation 4.
        """
        if self.tensor_group is None:
            return _scaled(part, self.dtype)
        size, rank = dist.get_world_size(self.tensor_group), dist.get_rank(self.tensor_group)
        parts = [torch.empty_like(part) for _ in range(size)]
        dist.all_gather(parts, part, group=self.tensor_group)
        whole = _scaled(torch.cat(parts, self.partition_dim), self.dtype)
        return whole.chunk(size, self.partition_dim)[rank]


def _scaled(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return SCALE * math.sqrt(max(matrix.shape)) * newton_schulz(matrix, dtype)


class Muon(torch.optim.AdamW):
    """Torch optimizer of one rank: Muon for `matrices`, AdamW for all other parameters.

    A matrix has one moment, `exp_avg`: m <- momentum * m + (1 - momentum) * g. Its update is the orthogonalized
    momentum * m + (1 - momentum) * g (Nesterov), after the decoupled weight decay.
    """

    def __init__(self, groups: list[dict[str, Any]], matrices: Sequence[MatrixShard], momentum: float) -> None:
        """Take over the groups of parameters of an AdamW that has made no step, with their rates and decays."""
        # torch accepts only leaf tensors here; Megatron's shards of float32 weights are views of its buffers
        super().__init__([torch.zeros(0, device="cpu")])
        for group in groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self.param_groups = groups
        self._matrices, self._momentum = matrices, momentum
        self._masters = {shard.master for shard in matrices if shard.master is not None}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step. Collective over the groups of `matrices`."""
        assert closure is None, "a closure is not supported"
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        gradients = {master: master.grad for master in self._masters}
        for master in gradients:
            master.grad = None  # AdamW leaves it out
        super().step()
        for shard in self._matrices:
            self._step_matrix(shard, gradients, groups)
        for master, gradient in gradients.items():
            master.grad = gradient
        for group in self.param_groups:  # Transformer Engine's environment: Megatron saves the step of a group
            steps = [self.state[p]["step"] for p in group["params"] if p in self.state]
            group["step"] = max((int(step) for step in steps), default=group.get("step", 0))

    def _step_matrix(
        self, shard: MatrixShard, gradients: dict[Tensor, Tensor | None], groups: dict[Tensor, dict[str, Any]]
    ) -> None:
        direction = None
        if (master := shard.master) is not None:
            gradient, state = gradients[master], self.state[master]
            assert gradient is not None, f"a matrix of shape {shard.shape} has no gradient"
            if not state:
                state["step"] = torch.tensor(0.0, device="cpu")
                state["exp_avg"] = torch.zeros_like(master)
            state["step"] += 1
            state["exp_avg"].lerp_(gradient, 1 - self._momentum)
            direction = gradient.lerp(state["exp_avg"], self._momentum)
        values = shard.assembled(direction)
        if master is None or values is None:
            return
        update = shard.orthogonalized(values).reshape(-1)[shard.start : shard.end]
        group = groups[master]
        master.mul_(1 - group["lr"] * group["weight_decay"])
        master.add_(update.view_as(master), alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. Megatron allocates the moments of AdamW for every parameter; a matrix keeps only its own.

        In an environment with Transformer Engine, the states have no step, and the groups of parameters have it.
        """
        steps = {index: group.get("step", 0) for group in state_dict["param_groups"] for index in group["params"]}
        states = {
            index: {"step": torch.tensor(float(steps.get(index, 0)), device="cpu"), **state}
            for index, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": states})
        for master in self._masters & self.state.keys():
            self.state[master].pop("exp_avg_sq", None)

    def moments_of(self, parameter: Tensor) -> tuple[str, ...]:
        """Return the names of the moments of a master weight."""
        return ("exp_avg",) if parameter in self._masters else ("exp_avg", "exp_avg_sq")


def use_muon(optimizer: Any, models: Sequence[torch.nn.Module], momentum: float) -> None:
    """Replace the AdamW in each of Megatron's distributed optimizers, which have made no step, by `Muon`."""
    names: dict[Tensor, str] = {parameter: name for model in models for name, parameter in model.named_parameters()}
    config = models[0].config
    for inner in optimizer.chained_optimizers:
        if not inner.is_stub_optimizer:
            inner.optimizer = Muon(inner.optimizer.param_groups, list(_shards(inner, names, config)), momentum)


def _shards(inner: Any, names: dict[Tensor, str], config: Any) -> Iterator[MatrixShard]:
    """Yield the matrices of a distributed optimizer in the order of its buffers, which all its ranks share."""
    for buffer in inner.buffers:
        ranks = buffer.data_parallel_group.size()
        for bucket in buffer.buckets:
            per_rank = bucket.grad_data.numel() // ranks
            for parameter in bucket.params_list:
                group = _tensor_group(parameter)
                if not _is_matrix(parameter, group):
                    continue
                begin, end, _ = buffer.param_index_map[parameter]
                owners = {(place - bucket.offset) // per_rank for place in (begin, end - 1)}
                master, held = None, (0, 0)
                if parameter in inner.model_param_group_index_map:
                    index, order = inner.model_param_group_index_map[parameter]
                    master = inner.optimizer.param_groups[index]["params"][order]
                    part = inner._get_model_param_range_map(parameter)["param"]
                    held = (part.start, part.end)
                split, join = _rows(names[parameter], config)
                yield MatrixShard(
                    shape=(parameter.size(0), parameter.size(1)),
                    master=master,
                    start=held[0],
                    end=held[1],
                    dtype=parameter.dtype,
                    device=parameter.device,
                    data_group=buffer.data_parallel_group if len(owners) > 1 else None,
                    tensor_group=group,
                    partition_dim=getattr(parameter, "partition_dim", -1),
                    split_rows=split,
                    join_rows=join,
                )


def _tensor_group(parameter: Tensor) -> Any:
    """Return the tensor-parallel group over which the parameter is split; None if it is not."""
    from megatron.core import parallel_state

    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    is_expert = not getattr(parameter, "allreduce", True)
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if is_expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    return group if group.size() > 1 else None


def _is_matrix(parameter: Tensor, tensor_group: Any) -> bool:
    """Return True for a parameter that Muon updates."""
    if parameter.dim() != 2 or getattr(parameter, "is_embedding_or_output_parameter", False):
        return False
    shape = list(parameter.shape)
    if tensor_group is not None:
        shape[parameter.partition_dim] *= tensor_group.size()  # type: ignore[attr-defined]
    return min(shape) > 1


def _rows(name: str, config: Any) -> tuple[Callable[[Tensor], Sequence[Tensor]], Callable[[Sequence[Tensor]], Tensor]]:
    """Return the split of a parameter's rows into matrices of the checkpoint, and its inverse."""
    if "linear_qkv.weight" in name:
        return qkv_rows(config.num_attention_heads // config.num_query_groups, config.kv_channels)
    if "linear_fc1.weight" in name and config.gated_linear_unit:
        return (lambda values: values.chunk(2)), (lambda parts: torch.cat([*parts]))
    return (lambda values: [values]), (lambda parts: parts[0])


def qkv_rows(
    queries: int, head_dim: int
) -> tuple[Callable[[Tensor], Sequence[Tensor]], Callable[[Sequence[Tensor]], Tensor]]:
    """Return the split of Megatron's joint rows into q, k and v, and its inverse.

    Args:
        queries: query heads per key-value head. The rows are, for each key-value head: its queries, key and value.
        head_dim: rows of a head.
    """
    widths = [queries * head_dim, head_dim, head_dim]

    def split(values: Tensor) -> Sequence[Tensor]:
        by_head = values.view(-1, sum(widths), values.size(-1)).split(widths, dim=1)
        return [part.reshape(-1, values.size(-1)) for part in by_head]

    def join(parts: Sequence[Tensor]) -> Tensor:
        columns = parts[0].size(-1)
        by_head = [part.view(-1, width, columns) for part, width in zip(parts, widths, strict=True)]
        return torch.cat(by_head, 1).reshape(-1, columns)

    return split, join
