"""Metrics of an update, reduced over ranks together with the check for non-finite losses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.parallel.ranks import Ranks
from grpo_mega.types import Microbatch

_FINITE = 0.0
_WEIGHT = "weight"
_SUMMED = ("loss", "loss_magnitude")


class UpdateReport:
    """Collects per-token metrics of the microbatches on the last pipeline stage.

    `sums["name"]` is the mean of a metric over all tokens, weighted by `token_weights` (0 if all weights are 0).
    `sums["loss"]` is the loss, the weighted sum of the token losses. `sums["loss_magnitude"]` is the weighted sum of
    their absolute values. `maxima["name"]` is the maximum over loss tokens.
    """

    def __init__(self, ranks: Ranks, owner: str = "") -> None:
        """`owner` names the model in messages, such as "critic's "."""
        self._ranks, self._owner = ranks, owner
        self._rows: list[dict[str, Tensor]] = []
        self._maxima: list[dict[str, Tensor]] = []
        self._first_non_finite = -1

    def add(self, microbatch: Microbatch, total: Tensor, token_loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Add one microbatch; `metrics` are [T], detached."""
        if self._first_non_finite < 0 and not bool(torch.isfinite(total)):
            self._first_non_finite = len(self._rows)
        weights, mask = microbatch.token_weights, microbatch.loss_mask
        row = {name: (values * weights).sum() for name, values in metrics.items()}
        row[_WEIGHT] = weights.sum()
        row["loss"] = total.detach()
        row["loss_magnitude"] = (token_loss.detach().abs() * weights).sum()
        self._rows.append(row)
        self._maxima.append({n: v[mask].max() if bool(mask.any()) else v.new_zeros(()) for n, v in metrics.items()})

    def reduce(
        self, dp_group: dist.ProcessGroup, pp_group: dist.ProcessGroup
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return (sums, maxima) over all ranks, the same on every rank.

        Raises:
            RuntimeError: on every rank, if a loss on any rank is not finite.
        """
        names: list[list[str]] = [sorted(self._rows[0]), sorted(self._maxima[0])] if self._rows else [[], []]
        if pp_group.size() > 1:
            dist.broadcast_object_list(names, src=dist.get_global_rank(pp_group, pp_group.size() - 1), group=pp_group)
        device = self._ranks.device
        sums = torch.zeros(len(names[0]), dtype=torch.float64, device=device)
        tops = torch.full((len(names[1]) + 1,), _FINITE, dtype=torch.float64, device=device)
        for row, top in zip(self._rows, self._maxima, strict=True):
            sums += torch.stack([row[n].double() for n in names[0]])
            if names[1]:
                tops[1:] = torch.maximum(tops[1:], torch.stack([top[n].double() for n in names[1]]))
        if self._first_non_finite >= 0:
            tops[0] = 1 + self._first_non_finite + (1 << 20) * self._ranks.rank
        if self._ranks.is_last_stage:
            dist.all_reduce(sums, group=dp_group)
            dist.all_reduce(tops, op=dist.ReduceOp.MAX, group=dp_group)
        if pp_group.size() > 1:
            last = dist.get_global_rank(pp_group, pp_group.size() - 1)
            dist.broadcast(sums, src=last, group=pp_group)
            dist.broadcast(tops, src=last, group=pp_group)
        if tops[0] != _FINITE:
            rank, microbatch = divmod(int(tops[0]) - 1, 1 << 20)
            raise RuntimeError(
                f"the {self._owner}loss of microbatch {microbatch} on rank {rank} is not finite; no update was made"
            )
        found = dict(zip(names[0], sums.tolist(), strict=True))
        weight = found.pop(_WEIGHT)
        means = {n: v if n in _SUMMED else (v / weight if weight else 0.0) for n, v in found.items()}
        return means, dict(zip(names[1], tops[1:].tolist(), strict=True))
