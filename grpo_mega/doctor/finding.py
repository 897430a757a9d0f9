"""What a check found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from grpo_mega.types import UserError

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """`remedy` is empty where the status is pass."""

    check: str
    status: Status
    message: str
    remedy: str = ""

    def as_json(self) -> dict[str, str]:
        """`check status message remedy`."""
        return asdict(self)


def passed(check: str, message: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "pass", message)


def tried(check: str, action: Callable[[], str]) -> Finding:
    """`action` returns what it saw; the message of its UserError is a failure, whose remedy is its last part."""
    try:
        return passed(check, action())
    except UserError as error:
        return Finding(check, "fail", error.message, error.remedy or "change it")


def require(findings: Sequence[Finding]) -> None:
    """Raises UserError: a check failed; with all that failed."""
    failed = [f"{f.check}: {f.message}; {f.remedy}" for f in findings if f.status == "fail"]
    if failed:
        raise UserError("\n".join(failed))


def in_words(findings: Sequence[Finding]) -> str:
    """A line a finding, remedies below."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<4}  {finding.check:<18} {finding.message}")
        if finding.remedy:
            lines.append(f"{'':<25}-> {finding.remedy}")
    return "\n".join(lines)
