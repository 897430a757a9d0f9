"""The form of a row of the table of metrics (metric_table.py), and the sections of the dashboard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ALWAYS = "every step"

Section = Literal[
    "learning",
    "policy health",
    "rollouts",
    "mismatch and staleness",
    "time",
    "throughput",
    "memory",
    "hardware",
    "data sources",
]
LEARNING: Section = "learning"
POLICY: Section = "policy health"
ROLLOUTS: Section = "rollouts"
MISMATCH: Section = "mismatch and staleness"
TIME: Section = "time"
THROUGHPUT: Section = "throughput"
MEMORY: Section = "memory"
HARDWARE: Section = "hardware"
DATA: Section = "data sources"
SECTIONS: tuple[Section, ...] = (LEARNING, POLICY, ROLLOUTS, MISMATCH, TIME, THROUGHPUT, MEMORY, HARDWARE, DATA)
"""Sections in the order of the dashboard and of the reference."""


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
        section: section of the dashboard and of the reference.
        chart: title of its chart in the dashboard; metrics of a section with the same chart share it and its unit.
        unit: unit of the value; "fraction" is 0 to 1.
        meaning: what the value is.
        when: when the metric exists.
    """

    section: Section
    chart: str
    unit: str
    meaning: str
    when: str = ALWAYS
