"""A plan as text, and its memory per phase as a picture (one HTML file without scripts or external files)."""

from __future__ import annotations

from html import escape

from grpo_mega.planner.plan import ResourcePlan
from grpo_mega.planner.remedies import as_overrides
from grpo_mega.planner.search import FittingLayout

_GIB = 2**30
_COLORS = {
    "weights": "#4e79a7",
    "gradients": "#f28e2b",
    "optimizer": "#e15759",
    "activations": "#76b7b2",
    "logits": "#59a14f",
    "communication": "#edc948",
    "engine weights": "#b07aa1",
    "KV cache": "#ff9da7",
    "engine workspace": "#9c755f",
    "sync buckets": "#86bcb6",
    "engine asleep": "#d4a6c8",
    "policy offloaded": "#a0cbe8",
    "critic": "#8cd17d",
    "orthogonalization": "#d37295",
    "CUDA and NCCL": "#bab0ac",
    "allocator": "#79706e",
}


def plan_text(plan: ResourcePlan, remedy: list[str] | None) -> str:
    """Return the plan as text for a terminal."""
    topology, gpu, cluster = plan.inputs.topology, plan.inputs.gpu, plan.inputs.cluster
    on_servers = f" on {topology.num_server_ranks} more" if topology.engine_servers else ""
    lines = [
        f"{plan.parameters / 1e9:.2f}B parameters on {topology.world_size} x {gpu.name} ({cluster.num_nodes} "
        f"node(s)): tp {topology.tp}, pp {topology.pp}, cp {topology.cp}, dp {topology.dp}, ep {topology.ep}, etp "
        f"{topology.etp}; engine tp {topology.engine_tp}, "
        + (f"dp {topology.engine_dp}, " if topology.engine_dp > 1 else "")
        + f"{topology.num_replicas} replica(s){on_servers}",
        "",
        f"GiB on the fullest rank of each phase, of {gpu.memory / _GIB:.1f}:",
    ]
    for phase in plan.memory.phases:
        rank = plan.memory.fullest(phase)
        items = sorted(rank.phases[phase].items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in items if size >= 0.05 * _GIB)
        place = "" if phase == "server" else f"(pp {rank.pp_rank}) "
        lines.append(f"  {phase:<10} {rank.peak(phase) / _GIB:6.1f}  {place}{listed}")
    host = ", ".join(f"{name} {size / _GIB:.0f}" for name, size in plan.memory.host.items() if size >= _GIB)
    lines += [
        f"  host       {sum(plan.memory.host.values()) / _GIB:6.0f}  per node, of {gpu.host_memory / _GIB:.0f}: {host}",
        _disk_line(plan),
        "",
        "predicted seconds of a step: "
        + ", ".join(f"{name} {seconds:.1f}" for name, seconds in plan.time.phases.items())
        + f"; total {plan.time.seconds:.1f}",
        f"predicted: {plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%}, {plan.days:.2f} days for "
        f"{plan.inputs.config.train.steps} steps",
    ]
    if plan.fits:
        return "\n".join([*lines, "", "fits"])
    lines += ["", "does not fit:", *(f"  {problem}" for problem in plan.problems)]
    lines.append("remedy: " + (" ".join(remedy) if remedy else "none was found, with up to 32 times as many devices"))
    return "\n".join(lines)


def _disk_line(plan: ResourcePlan) -> str:
    """Return the line of the bytes that the run writes to its folder."""
    disk, config = plan.disk, plan.inputs.config
    kept = round(disk.checkpoints / disk.checkpoint)
    parts = [f"{kept} checkpoint(s) of {_size(disk.checkpoint)}"]
    if disk.export:
        parts.append(f"export {_size(disk.export)}")
    if disk.rollouts:
        per_step = _size(disk.rollouts_per_step)
        parts.append(f"rollouts {_size(disk.rollouts)} ({config.train.steps} steps of {per_step}, all are kept)")
    return f"  disk       {disk.run / _GIB:6.0f}  in the run folder: {', '.join(parts)}"


def _size(num_bytes: float) -> str:
    """Return a number of bytes in GiB, or in MiB below one GiB."""
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / 2**20:.1f} MiB"


def search_text(found: list[FittingLayout], num_ranks: int) -> str:
    """Return one line per layout, for a terminal."""
    lines = [f"{num_ranks} devices:"]
    for each in found:
        plan, change = (
            each.plan,
            {key: value for key, value in each.change.items() if _differs_from_default(key, value)},
        )
        peak = max(plan.memory.fullest(phase).peak(phase) for phase in plan.memory.phases)
        lines.append(
            f"  {plan.time.seconds:8.1f} s  {plan.tokens_per_second:10,.0f} tokens/s  MFU {plan.mfu:6.2%}  "
            f"{peak / _GIB:5.1f} GiB  {' '.join(as_overrides(change))}"
        )
    return "\n".join(lines if found else [*lines, "  no layout fits"])


def _differs_from_default(key: str, value: object) -> bool:
    """Return True if the value is not the one that a config has without the key."""
    if key == "run.world_size" or value is None or value is False:
        return False
    return value not in ("none", 0.0) if isinstance(value, (str, float)) else value != 1


def memory_picture(plan: ResourcePlan, title: str) -> str:
    """Return an HTML page with one bar per phase: the items of the fullest rank, against the device's memory."""
    width, left, height, gap = 760.0, 110.0, 34.0, 14.0
    capacity = plan.inputs.gpu.memory
    most = max(capacity, *(plan.memory.fullest(phase).peak(phase) for phase in plan.memory.phases))
    scale = width / most
    bars, used = [], []
    for row, phase in enumerate(plan.memory.phases):
        rank, y, x = plan.memory.fullest(phase), 10 + row * (height + gap), left
        bars.append(f'<text x="4" y="{y + height * 0.65:.0f}">{phase}</text>')
        for name, size in rank.phases[phase].items():
            if size <= 0:
                continue
            used.append(name)
            label = f"{name}: {size / _GIB:.2f} GiB on pipeline rank {rank.pp_rank}"
            bars.append(
                f'<rect x="{x:.1f}" y="{y:.0f}" width="{size * scale:.1f}" height="{height:.0f}" '
                f'fill="{_COLORS[name]}"><title>{escape(label)}</title></rect>'
            )
            x += size * scale
        bars.append(f'<text x="{x + 6:.1f}" y="{y + height * 0.65:.0f}">{rank.peak(phase) / _GIB:.1f} GiB</text>')
    bottom = 10 + len(plan.memory.phases) * (height + gap)
    limit = left + capacity * scale
    legend = "".join(
        f'<span><i style="background:{_COLORS[name]}"></i>{name}</span>' for name in _COLORS if name in used
    )
    verdict = "fits" if plan.fits else "does not fit: " + "; ".join(plan.problems)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>
body {{ font: 14px sans-serif; margin: 24px }} span {{ margin-right: 14px; white-space: nowrap }}
i {{ display: inline-block; width: 12px; height: 12px; margin-right: 4px }}
</style></head><body>
<h1>{escape(title)}</h1>
<p>Memory of the fullest rank in each phase. The line marks the device's {capacity / _GIB:.1f} GiB.
{escape(verdict)}</p>
<svg width="{left + width + 110:.0f}" height="{bottom + 10:.0f}">{"".join(bars)}
<line x1="{limit:.1f}" x2="{limit:.1f}" y1="0" y2="{bottom:.0f}" stroke="black" stroke-dasharray="4 3"/></svg>
<p>{legend}</p></body></html>
"""
