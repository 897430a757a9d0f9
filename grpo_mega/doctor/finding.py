"""Results of the checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from grpo_mega.types import UserError

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check; `remedy` is empty if the status is pass."""

    check: str
    status: Status
    message: str
    remedy: str = ""

    def as_json(self) -> dict[str, str]:
        """Return the keys `check`, `status`, `message` and `remedy`."""
        return asdict(self)


def passed(check: str, message: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(check, "pass", message)


def tried(check: str, action: Callable[[], str]) -> Finding:
    """Return a pass with the text that `action` returns, or a failure with the message and remedy of its UserError."""
    try:
        return passed(check, action())
    except UserError as error:
        return Finding(check, "fail", error.message, error.remedy or "change it")


def require(findings: Sequence[Finding]) -> None:
    """Raise UserError with all failed checks, if there is one."""
    failed = [f"{f.check}: {f.message}; {f.remedy}" for f in findings if f.status == "fail"]
    if failed:
        raise UserError("\n".join(failed))


def in_words(findings: Sequence[Finding]) -> str:
    """Return one line per finding, with the remedy on a line of its own."""
    lines = []
    for finding in findings:
        message = finding.message.replace("\n", f"\n{'':<25}")
        lines.append(f"{finding.status:<4}  {finding.check:<18} {message}")
        if finding.remedy:
            lines.append(f"{'':<25}-> {finding.remedy}")
    return "\n".join(lines)
