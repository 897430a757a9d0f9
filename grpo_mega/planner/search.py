"""Search over the reasonable layouts of a model on a number of devices; those that fit, fastest step first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from grpo_mega.config.schema import Config
from grpo_mega.models.spec import ModelSpec
from grpo_mega.planner.plan import ResourcePlan
from grpo_mega.planner.remedies import Change, Planner, changed, even_layout
from grpo_mega.types import UserError

_ENGINE_CHOICES = 2  # engine layouts that are combined with each policy layout
_MOST_STAGES = 64
_SAVINGS: tuple[Change, ...] = tuple(
    {"parallel.recompute": recompute, "parallel.recompute_modules": None, "optimizer.host_fraction": on_host}
    for on_host in (0.0, 1.0)
    for recompute in ("none", "selective", "full")
)


@dataclass(frozen=True)
class FittingLayout:
    """A layout that fits."""

    change: Change
    plan: ResourcePlan


def search(
    config: Config, spec: ModelSpec, planner: Planner, num_ranks: int, per_node: int, keep: int
) -> list[FittingLayout]:
    """Return at most `keep` layouts of `num_ranks` devices that fit, the fastest step first.

    Args:
        config: the run; its layout, recomputation and optimizer placement are replaced.
        spec: its model.
        planner: plans a changed config.
        num_ranks: devices of the policy.
        per_node: devices of a node, the largest tp.
        keep: number of layouts.
    """
    found: list[FittingLayout] = []
    for engine in _engine_layouts(config, planner, num_ranks):
        for layout in _layouts(spec, num_ranks, per_node):
            for saving in _SAVINGS:  # the savings after the first that fits are slower
                whole = {"run.world_size": num_ranks} | engine | layout | saving
                try:
                    plan = planner(changed(config, whole))
                except UserError:
                    break
                if plan.fits:
                    found.append(FittingLayout(whole, plan))
                    break
    return heapq.nsmallest(keep, found, key=lambda f: (f.plan.time.seconds, str(f.change)))


def _engine_layouts(config: Config, planner: Planner, num_ranks: int) -> list[Change]:
    """Return the engine layouts that fit in the rollout phase, the fastest first. Without an engine: no change."""
    if not config.has_engine:
        return [{}]
    timed = []
    tp = 1
    while tp <= min(num_ranks, 64):
        change: Change = {"engine.tp": tp}
        if config.engine.ep > 1:
            change["engine.ep"] = tp * config.engine.dp
        try:
            plan = planner(changed(config, _trivial_layout(num_ranks) | change))
        except UserError:
            pass
        else:
            phase = "server" if plan.inputs.uses_servers else "rollout"
            if plan.memory.fullest(phase).peak(phase) <= plan.inputs.gpu.memory:
                timed.append((plan.time.phases.get("rollout", 0.0), tp, change))
        tp *= 2
    return [change for _, _, change in sorted(timed, key=lambda each: each[:2])[:_ENGINE_CHOICES]]


def _trivial_layout(num_ranks: int) -> Change:
    """Return the layout without any division of the policy, whose memory does not matter here."""
    return {"run.world_size": num_ranks} | _layout(1, 1, 1, None)


def _layouts(spec: ModelSpec, num_ranks: int, per_node: int) -> Iterator[Change]:
    """Yield the layouts of the policy: powers of two of tp and ep, and every pp that divides the devices."""
    experts = spec.moe.num_experts if spec.moe is not None else 1
    for tp in (1, 2, 4, 8):
        if tp > per_node or num_ranks % tp:
            continue
        for pp in range(1, min(spec.num_layers, num_ranks // tp, _MOST_STAGES) + 1):
            if num_ranks // tp % pp:
                continue
            ep = 1
            while ep <= min(experts, num_ranks // pp):
                pipeline_layout = even_layout(spec.num_layers, pp) if spec.num_layers % pp else None
                yield _layout(tp, pp, ep, pipeline_layout)
                ep *= 2


def _layout(tp: int, pp: int, ep: int, pipeline_layout: str | None) -> Change:
    return {
        "parallel.tp": tp,
        "parallel.pp": pp,
        "parallel.ep": ep,
        "parallel.etp": 1,
        "parallel.cp": 1,
        "parallel.vpp": 1,
        "parallel.sequence_parallel": tp > 1,
        "parallel.pipeline_layout": pipeline_layout,
        "parallel.num_layers_first_stage": None,
        "parallel.num_layers_last_stage": None,
    }
