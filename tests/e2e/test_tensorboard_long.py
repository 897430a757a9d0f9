"""TensorBoard in a real browser: the dashboard of a quickstart run, started by its script."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from grpo_mega.observe.dashboard import dashboard_charts
from grpo_mega.observe.history import read_lines
from grpo_mega.parallel.ports import free_port
from tests.helpers.browser import Browser, needs_browser
from tests.helpers.finished_runs import Run
from tests.helpers.jobs import REPOSITORY

pytestmark = [pytest.mark.long, needs_browser]


# Titles of the charts that have a curve: a path with more than one point.
_DRAWN = """
const cards = found.filter(e => e.tagName == 'TF-CUSTOM-SCALAR-MULTI-LINE-CHART-CARD');
const shown = cards.map(card => [...elements(card.shadowRoot || card)]);
const has_curve = all => all.some(e => e.matches('path.line') && (e.getAttribute('d') || '').includes('L'));
return shown.filter(has_curve).map(all => all.find(e => e.matches('.heading-label')).textContent.trim());
"""


@contextmanager
def tensorboard(folder: Path, log: Path) -> Iterator[str]:
    """Start launch/tensorboard.sh and yield its address."""
    environment = {**os.environ, "GRPO_MEGA_VENV": sys.prefix}
    command = [str(REPOSITORY / "launch" / "tensorboard.sh"), str(folder), f"--port={free_port()}"]
    with log.open("wb") as output, subprocess.Popen(command, stderr=output, env=environment) as process:
        try:
            end = time.monotonic() + 120
            while not (found := re.search(r"http://[\d.]+:\d+/", log.read_text())):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            yield found[0]
        finally:
            process.terminate()
            process.wait(30)


def test_a_browser_shows_a_curve_in_every_chart_of_the_metrics_of_a_step(quickstart: Run, tmp_path: Path) -> None:
    names = {name for _, line in read_lines(quickstart.folder / "metrics.jsonl") for name in line}
    sections = dashboard_charts(names)
    with tensorboard(quickstart.folder, tmp_path / "log") as address, Browser() as browser:
        browser.open(f"{address}#custom_scalars")
        titles = [title for charts in sections.values() for title in charts]
        drawn = f"const drawn = (() => {{ {_DRAWN} }})();"
        browser.wait_for(f"{drawn} return {json.dumps(titles)}.every(title => drawn.some(t => t.startsWith(title)))")
        page = browser.run("return found.map(e => e.shadowRoot ? e.shadowRoot.textContent : '').join(' ')")
        assert [section for section in sections if section not in page] == []
        assert browser.errors() == []
        browser.screenshot("tensorboard-dashboard.png")
        browser.open(f"{address}#text")
        browser.wait_for("return found.some(e => e.tagName == 'TD' && e.textContent.includes('reward 1'))")
        browser.run("found.find(e => e.tagName == 'TD' && e.textContent.includes('reward 1')).scrollIntoView()")
        browser.screenshot("tensorboard-groups.png")


def test_only_this_machine_can_connect(quickstart: Run, tmp_path: Path) -> None:
    with tensorboard(quickstart.folder, tmp_path / "log") as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
        with pytest.raises(ConnectionRefusedError):  # a server on all addresses answers here as well
            socket.create_connection(("127.0.0.2", port), timeout=10).close()
