"""`proof` with a stub of Lean in the sandbox: the reported axioms of the theorem decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.rewards.builtin.lean_proof import proof, proof_of
from grpo_mega.sandbox.sandbox import require_isolation
from grpo_mega.types import UserError
from tests.helpers.all_rewards import stub_lean

STATEMENT = "theorem add_zero' (n : Nat) :\n    n + 0 = n := by"


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> str:
    try:
        require_isolation()
    except UserError as error:
        pytest.skip(str(error))
    return stub_lean(tmp_path_factory.mktemp("lean"))


def score(lean: str, completion: str, **args: Any) -> float:
    return proof("", completion, STATEMENT, header="import Nat", lean=lean, **({"seconds": 20.0} | args))


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("rfl", 1.0),
        ("simp", 1.0),
        ("sorry", 0.0),
        ("wrong", 0.0),
        ("crash", 0.0),
        ("sorry -- forge", 0.0),
        ("", 0.0),
        ("rfl\n#exit", 0.0),
        ("exact absurd\naxiom absurd : False", 0.0),
        ('rfl\nmacro "x" : tactic => `(tactic| rfl)', 0.0),
        ("run_tac IO.println 1", 0.0),
        ("native_decide", 0.0),
    ],
)
def test_a_proof_counts_when_lean_accepts_it_on_its_own_axioms(lean: str, body: str, value: float) -> None:
    assert score(lean, f"We compute:\n```lean\n{body}\n```\n") == value


def test_only_the_allowed_axioms_are_accepted(lean: str) -> None:
    assert score(lean, "simp; choose") == 1.0
    assert score(lean, "simp; choose", axioms=["propext"]) == 0.0


def test_a_proof_that_does_not_end_costs_its_limit(lean: str) -> None:
    assert score(lean, "loop", seconds=0.5) == 0.0


def test_the_statement_may_be_repeated_before_the_proof() -> None:
    text = "theorem add_zero' (n : Nat) : n + 0 = n := by\n  rfl"
    assert proof_of(f"```lean4\nimport Nat\n\n{text}\n```", STATEMENT) == "\n  rfl\n"
    assert proof_of("```lean\ntheorem other : True := by\n  rfl\n```", STATEMENT).startswith("\ntheorem other")
    assert proof_of("rfl", STATEMENT) == "rfl"
    assert proof_of("~~~lean title=a\nrfl\n~~~\n```\nno goals\n```", STATEMENT) == "\nrfl\n"


def test_a_proof_in_the_thought_does_not_count(lean: str) -> None:
    assert score(lean, "<think>\n```lean\nrfl\n```\n</think>\nwrong") == 0.0


def test_compiled_modules_are_found_and_can_be_read(lean: str, tmp_path: Path) -> None:
    (tmp_path / "Nat.olean").write_text("", encoding="utf-8")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    assert score(lean, "rfl -- path", lean_path=[str(tmp_path)]) == 1.0


def test_a_reference_without_a_theorem_is_an_error_of_the_data(lean: str) -> None:
    with pytest.raises(ValueError, match="states no theorem"):
        proof("", "rfl", "1 + 1 = 2", lean=lean)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"lean": "no-such-lean"}, "lean='no-such-lean' was not found; install Lean 4"),
        ({"lean": "false"}, "does not print its folder"),
        ({"lean": "echo"}, "contains no bin/lean"),
        ({"lean_path": "/tmp"}, "lean_path='/tmp' must be a list"),
        ({"lean_path": ["/no/such/folder"]}, "'/no/such/folder' is not a folder"),
        ({"seconds": 0}, "seconds=0 must be"),
    ],
)
def test_a_bad_argument_is_rejected_before_the_run(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_rewards([RewardTerm(name="proof", args=args)])
    assert message in str(caught.value)


def test_the_workers_limit_must_be_longer_than_that_of_lean(lean: str) -> None:
    with pytest.raises(UserError, match=r"60 s, must be less than reward.timeout_seconds=5"):
        build_rewards([RewardTerm(name="proof", args={"lean": lean})], 5.0)
