"""Count how wrong input is answered: mutated configs, data files, model folders, command lines, checkpoints.

    python tools/measure_wrong_input.py [--only configs ...] [--number N] [--seed 0] [--checkpoint DIR] [--json]

Each kind starts from valid input and changes one thing at random. An input is `rejected` (the program's own error, of
one kind, which names a remedy), `accepted` (it is still valid), `crashed` (another exception: a user would see a
traceback) or `slow` (more than 10 s of CPU time, or 60 s). --checkpoint is a folder `step_NNNNNN` of a run: one bit of
one file of a copy is changed, and `accepted` means that the damage was not found.

Exit code 0: nothing crashed or was slow, and no damage of a checkpoint was accepted; 1: something did; 2: wrong input.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from grpo_mega.config.load import load_config
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.types import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
SLOW_CPU_SECONDS, SLOW_SECONDS = 10.0, 60.0
NUMBERS = {"configs": 2000, "data": 500, "models": 300, "commands": 200, "checkpoints": 60}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**30, 0.5, -0.0, 1e300, float("inf"), float("nan"), "", "x", "auto", "nan",
    "1e400", "\x00", "a" * 5000, "\ud800", "../..", "/", "/dev/null", "${HOME}", "!!python/object/apply:os.system", [],
    [1], [[]], {}, {"a": 1}, {"name": "exact"}, [{"name": "exact"}], {"x": {"y": {"z": []}}},
)  # fmt: skip
Case = tuple[str, Callable[[], object]]


class SlowError(Exception):
    """An input took longer than SLOW_SECONDS."""


@dataclass
class Counts:
    """Answers to the inputs of one kind; `crashes` has a line for each input that crashed or was slow."""

    answers: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0


def answer_of(action: Callable[[], object]) -> str:
    """Run `action` and return rejected, accepted, crashed or slow, for the last two with the reason."""

    def on_alarm(_number: int, _frame: FrameType | None) -> None:
        raise SlowError

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, SLOW_SECONDS)
    try:
        action()
    except UserError as error:
        return "rejected" if str(error).strip() else "crashed: an empty message"
    except SlowError:
        return "slow"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"crashed: {type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    else:
        return "accepted"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def count(cases: Iterator[Case], number: int) -> Counts:
    """Return the answers to the first `number` cases."""
    found = Counts()
    for _ in range(number):
        name, action = next(cases)
        begin = time.process_time()
        answer = answer_of(action)
        seconds = time.process_time() - begin
        found.slowest_seconds = max(found.slowest_seconds, seconds)
        if seconds > SLOW_CPU_SECONDS and not answer.startswith("crashed"):
            answer = "slow"
        kind, _, reason = answer.partition(": ")
        found.answers[kind] += 1
        if kind in ("crashed", "slow"):
            found.crashes.append(f"{name}: {kind} {reason}"[:400])
    return found


def config_cases(rng: random.Random, work: Path) -> Iterator[Case]:
    """Yield shipped configs with one changed value, key or character, and check them with the rules of the model."""
    paths = sorted(CONFIGS.glob("*.yaml"))
    target = work / "config.yaml"
    while True:
        path = rng.choice(paths)
        text, name = _mutated_config(rng, path.read_text(encoding="utf-8"))

        def check(text: str = text) -> None:
            target.write_text(text, encoding="utf-8", errors="surrogatepass")
            config = load_config(target)
            if config.model.base is not None:  # the others need a folder that is not here
                from grpo_mega.doctor.model_rules import check_model
                from grpo_mega.parallel.topology import Topology

                check_model(config, Topology.of(config, config.run.world_size or 1))

        yield f"{path.name} {name}", check


def _mutated_config(rng: random.Random, text: str) -> tuple[str, str]:
    if rng.random() < 0.3:
        return _mutated_text(rng, text)
    values = yaml.safe_load(text)
    place = values
    keys = [rng.choice(list(values))]
    while isinstance(place[keys[-1]], dict) and place[keys[-1]] and rng.random() < 0.85:
        place = place[keys[-1]]
        keys.append(rng.choice(list(place)))
    key, name = keys[-1], ".".join(map(str, keys))
    match rng.randrange(5):
        case 0:
            del place[key]
            name += " removed"
        case 1:
            place[f"{key}s"] = place.pop(key)
            name += " renamed"
        case _:
            place[key] = rng.choice(VALUES)
            name += f"={str(place[key])[:40]!r}"
    try:
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True), name
    except (yaml.YAMLError, UnicodeError):
        return f"{text}\nx: [", name


def _mutated_text(rng: random.Random, text: str) -> tuple[str, str]:
    at = rng.randrange(len(text) + 1)
    new = rng.choice(("", "\t", "\x00", ":", "[", "{", "- ", "&a *a", "!!binary x", "\n", "'", "%", "9" * 400))
    return text[:at] + new + text[at + rng.randrange(1, 9) :], f"text at {at}: {new[:10]!r}"


def data_cases(rng: random.Random, work: Path) -> Iterator[Case]:
    """Yield JSONL and Parquet files with one changed row or byte, and load them as training prompts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from grpo_mega.config.data_sections import DataConfig
    from grpo_mega.data.dataset import load_train
    from grpo_mega.data.prompt_rows import check_rows
    from grpo_mega.data.tokenizers import byte_tokenizer

    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(20)]
    jsonl = "".join(json.dumps(row) + "\n" for row in rows).encode()
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    parquet, tokenizer = buffer.getvalue(), byte_tokenizer()
    while True:
        suffix, whole = rng.choice((("jsonl", jsonl), ("jsonl", jsonl), ("parquet", parquet)))
        if suffix == "jsonl" and rng.random() < 0.5:
            changed = [dict[str, Any](row) for row in rows]
            key = rng.choice(("prompt", "answer", "messages", "data_source"))
            changed[rng.randrange(20)][key] = rng.choice(VALUES)
            data, name = "".join(json.dumps(row) + "\n" for row in changed).encode(), f"value of {key}"
        else:
            data, name = _mutated_bytes(rng, whole)
        target = work / f"rows.{suffix}"

        def check(data: bytes = data, target: Path = target) -> None:
            target.write_bytes(data)
            values = {"train": str(target), "eval": None, "prompts_per_step": 4, "template": "plain"}
            config = DataConfig.model_validate(values)
            check_rows(config)
            load_train(config, tokenizer)

        yield f"{suffix} {name}", check


def _mutated_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at = rng.randrange(len(data))
    match rng.randrange(5):
        case 0:
            return data[:at], f"cut at {at}"
        case 1:
            return b"", "empty"
        case 2:
            return data[:at] + rng.randbytes(8) + data[at + 8 :], f"random bytes at {at}"
        case 3:
            return data[:at] + data[at + rng.randrange(1, 99) :], f"bytes removed at {at}"
        case _:
            changed = bytearray(data)
            changed[at] ^= 1 << rng.randrange(8)
            return bytes(changed), f"bit of byte {at}"


def model_cases(rng: random.Random, work: Path) -> Iterator[Case]:
    """Yield folders of the shipped models whose config.json has one changed value, key or byte."""
    from grpo_mega.formats.stored_head import checkpoint_spec

    paths = sorted((CONFIGS / "models").glob("*/config.json"))
    folder = work / "model"
    folder.mkdir()
    while True:
        path = rng.choice(paths)
        text = path.read_text(encoding="utf-8")
        if rng.random() < 0.3:
            data, name = _mutated_bytes(rng, text.encode())
        else:
            values = json.loads(text)
            key = rng.choice(list(values))
            if rng.random() < 0.2:
                del values[key]
                name = f"{key} removed"
            else:
                values[key] = rng.choice(VALUES)
                name = f"{key}={str(values[key])[:40]!r}"
            data = json.dumps(values).encode()

        def check(data: bytes = data) -> None:
            (folder / "config.json").write_bytes(data)
            checkpoint_spec(folder)

        yield f"{path.parent.name} {name}", check


COMMAND_LINES = (
    "plan configs/quickstart.yaml --gpus-per-node 8",
    "plan-sync configs/quickstart.yaml train.steps=4",
    "configs quickstart",
    "rollouts runs/none --step 3 --jsonl",
    "replay runs/none --step 3 --layout tp=2",
    "report runs/none --out report.html",
    "evaluate runs/none --k 1 4",
    "score answers.jsonl --reward gsm8k",
    "convert to-hf runs/none out",
    "compare checkpoints runs/a runs/b",
    "compare layouts configs/quickstart.yaml --layouts tp=2",
    "fp8-report runs/none",
    "watch runs/none --once",
    "chaos --number 0",
)
WORDS = ("", "--", "-x", "--nothing", "--step", "-1", "nan", "1e9", "\x01", "runs/none", "a=b", "train.steps=x", "=",
         "*", "parallel.tp=", "run.dir=/dev/null", "é", "a" * 3000, "@file", "--help=1", "[", "{}")  # fmt: skip


def command_cases(rng: random.Random, _work: Path) -> Iterator[Case]:
    """Yield command lines with one changed, missing or additional word. Their inputs do not exist."""
    from grpo_mega.cli.main import main as run_command

    while True:
        words = rng.choice(COMMAND_LINES).split()
        at = rng.randrange(len(words))
        match rng.randrange(4):
            case 0:
                del words[at]
            case 1:
                words.insert(at, rng.choice(WORDS))
            case 2:
                words[at] += rng.choice(WORDS)
            case _:
                words[at] = rng.choice(WORDS)

        def check(words: list[str] = words) -> None:
            errors = io.StringIO()
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                try:
                    code: object = run_command(words)
                except SystemExit as ended:
                    code = ended.code
            text = errors.getvalue()
            if "Traceback" in text or code not in (0, 1, 2):
                raise RuntimeError(f"exit code {code}: {text[-300:]}")
            if code == 2:
                raise UserError(text)

        yield " ".join(words)[:100], check


def checkpoint_cases(rng: random.Random, work: Path, checkpoint: Path) -> Iterator[Case]:
    """Yield copies of a checkpoint with one changed bit."""
    from grpo_mega.formats.checkpoint_manifest import require_undamaged

    copy = work / checkpoint.name
    shutil.copytree(checkpoint, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    while True:
        path = rng.choice(files)
        at, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)

        def check(path: Path = path, at: int = at, bit: int = bit) -> None:
            _flip(path, at, bit)
            try:
                require_undamaged(copy)
            finally:
                _flip(path, at, bit)

        yield f"{path.relative_to(copy)} byte {at}", check


def _flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ bit]))


def measure(kinds: Sequence[str], number: int | None, seed: int, checkpoint: Path | None) -> dict[str, Counts]:
    """Return the counts of each kind."""
    makers: dict[str, Callable[[random.Random, Path], Iterator[Case]]] = {
        "configs": config_cases,
        "data": data_cases,
        "models": model_cases,
        "commands": command_cases,
    }
    if checkpoint is not None:
        makers["checkpoints"] = lambda rng, work: checkpoint_cases(rng, work, checkpoint)
    logging.disable(logging.CRITICAL)
    found = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="wrong_input_") as work:
            cases = makers[kind](random.Random(f"{kind} {seed}"), Path(work))
            found[kind] = count(cases, NUMBERS[kind] if number is None else number)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(NUMBERS), help="kinds of input (default: all)")
    parser.add_argument("--number", type=int, help=f"inputs of each kind (default: {NUMBERS})")
    parser.add_argument("--seed", type=int, default=0, help="determines all inputs (default: 0)")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of a run, step_NNNNNN; without it none is damaged")
    parser.add_argument("--json", action="store_true", help="print the counts as one JSON object on the last line")
    args = parser.parse_args(argv)
    kinds = list(args.only or [kind for kind in NUMBERS if kind != "checkpoints" or args.checkpoint is not None])
    if "checkpoints" in kinds and (args.checkpoint is None or not (args.checkpoint / "complete").is_file()):
        print(f"error: --checkpoint={args.checkpoint} is no checkpoint of a run; name a step_NNNNNN", file=sys.stderr)
        return 2
    found = measure(kinds, args.number, args.seed, args.checkpoint)
    print(f"{'kind':<12} {'inputs':>7} {'rejected':>9} {'accepted':>9} {'crashed':>8} {'slow':>5}  slowest")
    for kind, counts in found.items():
        numbers = [counts.answers[name] for name in ("rejected", "accepted", "crashed", "slow")]
        columns = "{:>9} {:>9} {:>8} {:>5}".format(*numbers)
        print(f"{kind:<12} {sum(numbers):>7} {columns}  {counts.slowest_seconds:.1f} s")
    for counts in found.values():
        for line in counts.crashes:
            print(f"  {line}", file=sys.stderr)
    if args.json:
        print(json.dumps({kind: dict(counts.answers) for kind, counts in found.items()}))
    silent = found["checkpoints"].answers["accepted"] if "checkpoints" in found else 0
    return int(silent > 0 or any(counts.crashes for counts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
