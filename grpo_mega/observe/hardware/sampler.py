"""Samples a node's GPUs and host in a background thread, and combines the samples of each step.

One rank per node has a sampler. A failure of the sampler is logged with its traceback and ends
the sampling, not the run.
Asserted by tests/unit/observe/hardware/test_sampler.py.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from grpo_mega.observe.hardware.gpu import QUANTITIES, XID, Combination, GpuReader
from grpo_mega.observe.hardware.host import NodeReader

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 2.0


@dataclass(frozen=True)
class NodeReading:
    """The samples of one step on one node, combined.

    Attributes:
        host: name -> value.
        gpu_indices: NVML's index of each GPU.
        gpus: name -> value of each GPU, None where it is not known.
    """

    hostname: str
    host: dict[str, float] = field(default_factory=dict)
    gpu_indices: tuple[int, ...] = ()
    gpus: dict[str, list[float | None]] = field(default_factory=dict)


class NodeSampler:
    """Background thread that samples one node.

    Args:
        gpus: reader of the GPUs, or None without GPUs.
        node: reader of the host.
        interval_seconds: time between two samples.
    """

    def __init__(self, gpus: GpuReader | None, node: NodeReader, interval_seconds: float = INTERVAL_SECONDS) -> None:
        self._gpus, self._node, self._interval = gpus, node, interval_seconds
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._gpu_samples: list[dict[str, list[float | None]]] = []
        self._host_samples: list[dict[str, float]] = []
        self._xids: list[tuple[int, int]] | None = []
        self._failed = False
        self._sample()
        self._thread = threading.Thread(target=self._run, name="hardware sampler", daemon=True)
        self._thread.start()

    def take(self) -> NodeReading | None:
        """Return the combined samples since the last call, with one taken now; None after a failure."""
        self._sample()
        with self._lock:
            if self._failed:
                return None
            gpu_samples, self._gpu_samples = self._gpu_samples, self._gpu_samples[-1:]  # counters count from there
            host_samples, self._host_samples = self._host_samples, []
            xids, self._xids = self._xids, None if self._xids is None else []
        indices = () if self._gpus is None else self._gpus.indices
        gpus = {name: _combine_gpus(name, gpu_samples) for name in gpu_samples[-1]} if gpu_samples else {}
        if indices and xids is not None:
            gpus[XID] = [float(sum(gpu == index for gpu, _ in xids)) for index in indices]
        host = {name: _mean([s[name] for s in host_samples if name in s]) for name in host_samples[-1]}
        return NodeReading(socket.gethostname(), host, indices, gpus)

    def close(self) -> None:
        """Stop the thread and release NVML."""
        self._stop.set()
        self._thread.join()
        if self._gpus is not None:
            self._gpus.close()

    def _run(self) -> None:
        while not self._failed and not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            if self._failed:
                return
            try:
                if self._gpus is not None:
                    self._gpu_samples.append(self._gpus.read())
                    self._add_xids(self._gpus.xid_events())
                self._host_samples.append(self._node.read())
            except Exception:
                self._failed = True
                log.exception("the metrics gpu/* and host/* of this node end here: a sample failed")

    def _add_xids(self, events: list[tuple[int, int]] | None) -> None:
        for gpu, xid in events or ():
            log.warning("GPU %d reports Xid error %d; NVIDIA's Xid catalog says what it means", gpu, xid)
        self._xids = None if events is None or self._xids is None else [*self._xids, *events]


def _combine_gpus(name: str, samples: Sequence[Mapping[str, list[float | None]]]) -> list[float | None]:
    """Return one value per GPU from the samples of a step, the first of which ended the step before."""
    how = QUANTITIES[name].over_step
    known = [sample[name] for sample in samples if name in sample]
    columns = [[v for v in column if v is not None] for column in zip(*known, strict=True)]
    return [_combine(how, column) for column in columns]


def _combine(how: Combination, values: Sequence[float]) -> float | None:
    if how == "increase":  # a counter that a reset of the driver set back has no increase
        return values[-1] - values[0] if len(values) > 1 and values[-1] >= values[0] else None
    of_step = values[1:] or values
    if not of_step:
        return None
    return max(of_step) if how == "max" else _mean(of_step)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
