"""Everything that the built-in rewards need: arguments, references, a tiny model, and a stub of Lean."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ARGS: Mapping[str, dict[str, Any]] = {
    "length": {"limit": 1000, "buffer": 200},
    "language_consistency": {"language": "en"},
}
"""Arguments without a default."""

REFERENCES: Mapping[str, str] = {
    "code": '{"inputs": ["2"], "outputs": ["4"]}',
    "countdown": '{"target": 98, "numbers": [44, 19, 35]}',
    "json_schema": '{"type": "object", "required": ["answer"]}',
    "proof": "theorem two : 1 + 1 = 2 := by",
}
"""References of the rewards for which `7` is not a valid reference."""

LETTERS = "abcdefghtu"

# Accepts the arguments that the reward gives to Lean, and prints messages like `lean --json`. Words in the file choose
# the messages.
_LEAN = r"""#!{python} -S
import json, os, sys
if sys.argv[1] == "--print-prefix":
    print({prefix!r})
    sys.exit()
assert sys.argv[1:] == ["--json", "Proof.lean"], sys.argv
text = open(sys.argv[2]).read()
lines = text.split("\n")[:-1]
name = lines[-1].removeprefix("#print axioms ")
assert any(line.startswith("theorem " + name) for line in lines), lines
def report(line, severity, data):
    print(json.dumps({{"severity": severity, "pos": {{"line": line, "column": 0}}, "data": data}}))
if "wrong" in text:
    report(3, "error", "unsolved goals")
    sys.exit(1)
if "forge" in text:
    report(3, "information", f"'{{name}}' does not depend on any axioms")
if "loop" in text:
    while True: pass
if "crash" in text:
    os.abort()
if "path" in text:
    assert os.listdir(os.environ["LEAN_PATH"]) == ["Nat.olean"]
axioms = [a for word, a in (("sorry", "sorryAx"), ("simp", "propext"), ("choose", "Classical.choice")) if word in text]
text = f"depends on axioms: [{{', '.join(axioms)}}]" if axioms else "does not depend on any axioms"
report(len(lines), "information", f"'{{name}}' {{text}}")
"""


def stub_lean(prefix: Path) -> str:
    """Write a command that behaves like Lean for the reward `proof`; return its path."""
    binary = prefix / "bin" / "lean"
    binary.parent.mkdir()
    binary.write_text(_LEAN.format(python=os.path.realpath(sys.executable), prefix=str(prefix)), encoding="utf-8")
    for path in (prefix, binary.parent, binary):
        path.chmod(0o755)
    return str(binary)


def tiny_reward_model(folder: Path) -> None:
    """Write a classifier with one label and random weights whose tokens are the LETTERS."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

    vocabulary = {token: index for index, token in enumerate(["<pad>", "?", *LETTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="?")
    fast.chat_template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=0,
    )
    model = Qwen2ForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.mul_(50.0)  # logits that differ clearly between completions
    model.save_pretrained(folder)
