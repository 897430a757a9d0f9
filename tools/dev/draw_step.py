"""Draws docs/assets/step.svg: the phases of a step, and which of them holds the device.

    python tools/dev/draw_step.py [--check]

`--check` writes nothing and exits with code 1 if the committed file differs. Asserted by
tests/unit/docs/test_assets.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "assets" / "step.svg"

# Title, what happens, and which part computes.
_PHASES = (
    ("rollout", "G answers per prompt", "engine"),
    ("reward", "while sampling", "host"),
    ("log-probs", "old, and reference", "policy"),
    ("train", "clipped updates", "policy"),
    ("sync", "slices, then digests", "both"),
)
# Part of the state, and where it is in each phase: True on the device, False on the host or released.
_STATE = (
    ("engine weights", (True, True, False, False, True)),
    ("engine KV cache", (True, True, False, False, False)),
    ("policy weights", (False, False, True, True, True)),
    ("gradients, optimizer", (False, False, True, True, False)),
)
_COLORS = {"engine": "#2a9d8f", "host": "#8d99ae", "policy": "#e07a3f", "both": "#6d597a"}
_LEFT, _WIDTH, _GAP, _TOP, _ROW = 170, 128, 10, 46, 26


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {style}>{text}</text>'


def picture() -> str:
    """Return the picture as SVG."""
    end = _LEFT + len(_PHASES) * (_WIDTH + _GAP)
    height = _TOP + 64 + 44 + len(_STATE) * _ROW + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {end + 10} {height}" width="{end + 10}" '
        f'height="{height}" font-family="sans-serif" font-size="13" role="img" aria-label="A step on one GPU">',
        f'<rect width="{end + 10}" height="{height}" fill="#ffffff"/>',
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0,0 L6,3 L0,6 z" fill="#444"/></marker></defs>',
        _text(12, 24, "A step on one GPU (every rank runs the same program)", 'font-size="15" font-weight="bold"'),
        _text(12, _TOP + 28, "prompts", 'font-weight="bold"'),
        f'<path d="M84,{_TOP + 24} H{_LEFT - 6}" stroke="#444" fill="none" marker-end="url(#head)"/>',
    ]
    for column, (title, what, owner) in enumerate(_PHASES):
        x = _LEFT + column * (_WIDTH + _GAP)
        parts += [
            f'<rect x="{x}" y="{_TOP}" width="{_WIDTH}" height="50" rx="6" fill="{_COLORS[owner]}"/>',
            _text(x + _WIDTH / 2, _TOP + 21, title, 'fill="#fff" font-weight="bold" text-anchor="middle"'),
            _text(x + _WIDTH / 2, _TOP + 39, what, 'fill="#fff" font-size="11" text-anchor="middle"'),
        ]
    back = _TOP + 70
    parts += [
        f'<path d="M{end - _WIDTH / 2 - _GAP:g},{_TOP + 50} V{back} H{_LEFT + _WIDTH / 2:g} V{_TOP + 56}" '
        'stroke="#444" fill="none" marker-end="url(#head)"/>',
        _text((_LEFT + end) / 2, back - 5, "new weights, next step", 'font-size="11" text-anchor="middle"'),
    ]
    first = back + 24
    parts.append(_text(12, first - 6, "On the device:", 'font-weight="bold"'))
    for row, (name, present) in enumerate(_STATE):
        y = first + row * _ROW
        parts.append(_text(12, y + 17, name))
        for column, on_device in enumerate(present):
            x = _LEFT + column * (_WIDTH + _GAP)
            fill = "#444" if on_device else "#eee"
            parts.append(f'<rect x="{x}" y="{y + 3}" width="{_WIDTH}" height="18" rx="3" fill="{fill}"/>')
    y = first + len(_STATE) * _ROW + 20
    x = 12
    for label, owner in (("engine", "engine"), ("CPU", "host"), ("Megatron-Core policy", "policy"), ("both", "both")):
        parts.append(f'<rect x="{x}" y="{y - 11}" width="12" height="12" fill="{_COLORS[owner]}"/>')
        parts.append(_text(x + 18, y, label, 'font-size="12"'))
        x += 40 + 8 * len(label)
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed file")
    if parser.parse_args().check:
        return int(PICTURE.read_text(encoding="utf-8") != picture())
    PICTURE.write_text(picture(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
