"""Metrics of an update, reduced over ranks together with the check for non-finite losses.

Asserted by tests/parallel/test_update.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.observe.ratio_bins import RATIO_LIMITS
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.types import Microbatch

_FINITE = 0.0
_WEIGHT = "weight"
_SUMMED = ("loss", "loss_magnitude")
_LOWEST, _BINS_PER_DECADE, _BINS = 1e-6, 16, 118  # entropies in nats, up to 20


class UpdateReport:
    """Collects per-token metrics of the microbatches on the last pipeline stage.

    `sums["name"]` is the mean of a metric over all tokens, weighted by `token_weights` (0 if all weights are 0).
    `sums["loss"]` is the loss, the weighted sum of the token losses. `sums["loss_magnitude"]` is the weighted sum of
    their absolute values. `sums["entropy_p10"]` is the entropy below which 10 % of the weight of the tokens lies, from
    a histogram with 16 bins per decade. `maxima["name"]` is the maximum over loss tokens. `ratio_counts` are the loss
    tokens in the bins of observe/ratio_bins.py, known after `reduce`; empty without the metric `ratio`.
    """

    def __init__(self, ranks: Ranks, owner: str = "") -> None:
        """`owner` names the model in messages, such as "critic's "."""
        self._ranks, self._owner = ranks, owner
        self._rows: list[dict[str, Tensor]] = []
        self._maxima: list[dict[str, Tensor]] = []
        self._bins = torch.zeros(_BINS + len(RATIO_LIMITS), dtype=torch.float64, device=ranks.device)
        self._inner_limits = torch.tensor(RATIO_LIMITS[:-1], device=ranks.device)
        self.ratio_counts: tuple[float, ...] = ()
        self.non_finite_rows: list[int] = []
        """Microbatches of this rank whose loss is not finite."""

    def add(self, microbatch: Microbatch, total: Tensor, token_loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Add one microbatch; `metrics` are [T], detached."""
        if not bool(torch.isfinite(total)):
            self.non_finite_rows.append(len(self._rows))
        weights, mask = microbatch.token_weights, microbatch.loss_mask
        row = {name: (values * weights).sum() for name, values in metrics.items()}
        row[_WEIGHT] = weights.sum()
        row["loss"] = total.detach()
        row["loss_magnitude"] = (token_loss.detach().abs() * weights).sum()
        self._rows.append(row)
        if "entropy" in metrics:
            self._bins[:_BINS] += weight_bins(metrics["entropy"], weights)
        if "ratio" in metrics:
            places = torch.bucketize(metrics["ratio"][mask], self._inner_limits)
            self._bins[_BINS:] += torch.bincount(places, minlength=len(RATIO_LIMITS))
        self._maxima.append({n: v[mask].max() if bool(mask.any()) else v.new_zeros(()) for n, v in metrics.items()})

    def reduce(
        self, dp_group: dist.ProcessGroup, pp_group: dist.ProcessGroup
    ) -> tuple[dict[str, float], dict[str, float], str | None]:
        """Return (sums, maxima, fault) over all ranks, the same on every rank.

        The fault names a microbatch whose loss is not finite, on any rank; None: every loss is finite.
        """
        names: list[list[str]] = [sorted(self._rows[0]), sorted(self._maxima[0])] if self._rows else [[], []]
        if pp_group.size() > 1:
            dist.broadcast_object_list(names, src=dist.get_global_rank(pp_group, pp_group.size() - 1), group=pp_group)
        device = self._ranks.device
        sums = torch.zeros(len(names[0]), dtype=torch.float64, device=device)
        bins = self._bins
        tops = torch.full((len(names[1]) + 1,), _FINITE, dtype=torch.float64, device=device)
        for row, top in zip(self._rows, self._maxima, strict=True):
            sums += torch.stack([row[n].double() for n in names[0]])
            if names[1]:
                tops[1:] = torch.maximum(tops[1:], torch.stack([top[n].double() for n in names[1]]))
        if self.non_finite_rows:
            tops[0] = 1 + self.non_finite_rows[0] + (1 << 20) * self._ranks.rank
        if self._ranks.is_last_stage:
            dist.all_reduce(sums, group=dp_group)
            dist.all_reduce(bins, group=dp_group)
            dist.all_reduce(tops, op=dist.ReduceOp.MAX, group=dp_group)
        if pp_group.size() > 1:
            last = dist.get_global_rank(pp_group, pp_group.size() - 1)
            dist.broadcast(sums, src=last, group=pp_group)
            dist.broadcast(bins, src=last, group=pp_group)
            dist.broadcast(tops, src=last, group=pp_group)
        fault = None
        if tops[0] != _FINITE:
            rank, microbatch = divmod(int(tops[0]) - 1, 1 << 20)
            fault = f"the {self._owner}loss of microbatch {microbatch} on rank {rank} is not finite"
        found = dict(zip(names[0], sums.tolist(), strict=True))
        weight = found.pop(_WEIGHT)
        means = {n: v if n in _SUMMED else (v / weight if weight else 0.0) for n, v in found.items()}
        if "entropy" in means:
            means["entropy_p10"] = quantile_of_bins(bins[:_BINS], 0.1)
        if "ratio" in means:
            self.ratio_counts = tuple(bins[_BINS:].tolist())
        return means, dict(zip(names[1], tops[1:].tolist(), strict=True)), fault


def weight_bins(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weights of the values by the logarithm of the values, [bins] float64.

    A weight is divided between the two bins beside its value, so that the result is a continuous function of the values
    and is the same for every layout up to rounding. Values below 1e-6 are in bin 0.

    Args:
        values: [T], not negative.
        weights: [T].
    """
    place = (values.double().clamp(min=_LOWEST) / _LOWEST).log10() * _BINS_PER_DECADE
    place = place.clamp(max=_BINS - 1.001)
    below, part = place.floor().long(), place.frac()
    weight = weights.double()
    found = torch.bincount(below, weight * (1 - part), minlength=_BINS)
    return found + torch.bincount(below + 1, weight * part, minlength=_BINS)


def quantile_of_bins(bins: Tensor, fraction: float) -> float:
    """Return the value below which `fraction` of the weight in bins of `weight_bins` lies, to half a bin (8 %).

    The value is 0 in bin 0, and if all weights are 0.
    """
    cumulative = bins.cumsum(0)
    target = fraction * float(cumulative[-1])
    at = int(torch.searchsorted(cumulative, target))
    if at == 0 or target == 0:
        return 0.0
    share = (target - float(cumulative[at - 1])) / float(bins[at])
    return float(_LOWEST * 10 ** ((at - 1 + share) / _BINS_PER_DECADE))
