"""Reward `proof`: Lean accepts the completion as a proof of the statement in the reference.

The reference is the statement with its `:=` (or `:= by`) at the end. The proof is the last fenced Lean block of the
completion, else the whole completion, with or without the statement before it. Lean executes code while it checks a
proof, so it runs in the sandbox. A proof counts when Lean exits without an error and reports that the theorem depends
only on `axioms`; Lean reports `sorry` as an axiom. A proof with a keyword that could define commands or execute code
scores 0 without a run.

Asserted by tests/unit/rewards/builtin/test_lean_proof.py with a stub of Lean; docs/measurements/rewards.md has
measurements with Lean itself.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_mega.rewards.base import reward
from grpo_mega.rewards.fenced_blocks import fenced_blocks
from grpo_mega.rewards.thought import answer_part
from grpo_mega.sandbox.sandbox import Limits, Sandbox, check_limits, require_isolation
from grpo_mega.types import UserError

AXIOMS = ("propext", "Classical.choice", "Quot.sound")
"""The axioms of Lean's own logic."""

_FILE = "Proof.lean"
_NAME = re.compile(r"\b(?:theorem|lemma)\s+([^\s:({\[⦃]+)")
_FORBIDDEN = re.compile(
    r"#|\b(?:abbrev|attribute|axiom|builtin_initialize|by_elab|class|constant|declare_syntax_cat|def|elab|elab_rules|end|"
    r"eval|example|export|extern|implemented_by|import|include_str|inductive|infix|infixl|infixr|initialize|instance|IO|"
    r"lemma|macro|macro_rules|mutual|namespace|native_decide|notation|opaque|postfix|prefix|run_cmd|run_elab|run_meta|"
    r"run_tac|section|set_option|structure|syntax|theorem|universe|unsafe|variable)\b"
)
_MAX_PROOF_CHARACTERS = 50_000
_MEGABYTE = 1 << 20


def check_proof_args(
    header: str = "",
    lean: str = "lean",
    lean_path: Sequence[str] = (),
    axioms: Sequence[str] = AXIOMS,
    seconds: float = 60.0,
    memory_mb: int = 8192,
    processes: int = 32,
) -> None:
    """Check the arguments of `proof`, and that this machine has Lean and offers isolation.

    Raises:
        UserError: an argument is wrong, or Lean or the isolation is unavailable.
    """
    if not isinstance(header, str):
        raise UserError(f"header={header!r} must be a string", remedy="write for example 'import Mathlib'")
    check_limits(seconds, 60.0, memory_mb=memory_mb, processes=processes)
    for name, texts in (("lean_path", lean_path), ("axioms", axioms)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{name}={texts!r} must be a list of strings", remedy="write it as a list")
    for folder in lean_path:
        if not os.path.isdir(folder):
            raise UserError(
                f"lean_path: {folder!r} is not a folder", remedy="give folders of compiled modules (.olean)"
            )
    try:
        _toolchain(lean)
    except ValueError as error:
        raise UserError(str(error)) from error
    require_isolation()


def longest_seconds(seconds: float = 60.0, **_: object) -> float:
    """Return the limit in seconds that the reward keeps for one scoring."""
    return seconds


@reward(low=0.0, high=1.0, check_args=check_proof_args, seconds=longest_seconds)
def proof(
    prompt: str,
    completion: str,
    reference: str,
    header: str = "",
    lean: str = "lean",
    lean_path: Sequence[str] = (),
    axioms: Sequence[str] = AXIOMS,
    seconds: float = 60.0,
    memory_mb: int = 8192,
    processes: int = 32,
) -> float:
    """Return 1 when Lean accepts the proof, else 0.

    Args:
        prompt: if it ends with an opened thought, the completion begins inside of it.
        completion: the proof is extracted from it.
        reference: the statement of a theorem with a name.
        header: text before the statement: imports, open namespaces, definitions.
        lean: name or path of the Lean command.
        lean_path: folders of compiled modules that the header imports.
        axioms: axioms that a proof may depend on.
        seconds: wall-clock limit.
        memory_mb: limit of the address space in MiB; Lean maps the modules that it imports.
        processes: limit of threads at the same time.

    Raises:
        ValueError: the reference names no theorem.
        SandboxError: the isolation was lost; Lean did not run.
    """
    name = _NAME.search(reference)
    if name is None:
        raise ValueError(f"the reference {reference[:80]!r} states no theorem; correct the data or its answer_key")
    body = proof_of(answer_part(prompt, completion), reference)
    if not body.strip() or len(body) > _MAX_PROOF_CHARACTERS or _FORBIDDEN.search(body):
        return 0.0
    indented = "\n".join("  " + line for line in body.strip("\n").splitlines())
    before = f"{header}\n{reference.rstrip()}\n{indented}\n"
    prefix = _toolchain(lean)
    limits = Limits(cpu_seconds=math.ceil(seconds) * processes, memory_bytes=memory_mb * _MEGABYTE, processes=processes)
    folders = [os.path.realpath(folder) for folder in lean_path]
    with Sandbox(limits, [prefix, *folders]) as sandbox:
        outcome = sandbox.run(
            [f"{prefix}/bin/lean", "--json", _FILE],
            seconds=seconds,
            files={_FILE: f"{before}#print axioms {name[1]}\n"},
            environment={"LEAN_PATH": os.pathsep.join(folders)},
        )
    line_number = before.count("\n") + 1
    return float(outcome.succeeded and _assumes_only(outcome.stdout, line_number, name[1], frozenset(axioms)))


def proof_of(completion: str, statement: str) -> str:
    """Return the last fenced block of Lean, else the last without a label, without a repeated statement before it.

    A completion without any fence is a proof as a whole.
    """
    blocks = list(fenced_blocks(completion))
    lean = [b.content for b in blocks if b.label in ("lean", "lean4")] or [b.content for b in blocks if not b.label]
    text = f"\n{lean[-1]}" if lean else "" if blocks else completion
    words = r"\s+".join(re.escape(word) for word in statement.split())
    repeated = re.search(words, text)
    return text[repeated.end() :] if repeated is not None else text


def _assumes_only(output: str, line_number: int, name: str, axioms: frozenset[str]) -> bool:
    """Return True when Lean's message for the last line says that the theorem depends only on `axioms`."""
    for line in output.splitlines():
        try:
            message: dict[str, Any] = json.loads(line)
            text = str(message["data"]).strip()
            if message["severity"] == "error":
                return False
            if message["pos"]["line"] != line_number:
                continue
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        if text == f"'{name}' does not depend on any axioms":
            return True
        found = re.fullmatch(re.escape(f"'{name}' depends on axioms:") + r"\s*\[([^\]]*)\]", text)
        if found is not None:
            return {axiom.strip() for axiom in found[1].split(",")} <= axioms
    return False


@functools.cache
def _toolchain(lean: str) -> str:
    """Return the folder of the Lean toolchain that a command belongs to.

    Raises:
        ValueError: the command was not found, or it does not work.
    """
    found = shutil.which(lean) if isinstance(lean, str) else None
    if found is None:
        raise ValueError(f"lean={lean!r} was not found; install Lean 4 (elan), or give the path of `lean`")
    try:
        output = subprocess.run(
            [found, "--print-prefix"], capture_output=True, text=True, timeout=120, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"lean={found!r} does not print its folder ({error}); check that `lean --version` works"
        ) from error
    prefix = os.path.realpath(output.strip())
    if not (Path(prefix) / "bin" / "lean").is_file():
        raise ValueError(
            f"lean={found!r} prints the folder {prefix!r}, which contains no bin/lean; check the toolchain"
        )
    return prefix
