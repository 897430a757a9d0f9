"""The report in a real browser: no error, filters, an opened group, hostile texts, and its size and speed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from grpo_mega.cli.report import main
from tests.helpers.browser import Browser, needs_browser
from tests.helpers.finished_runs import Run
from tests.helpers.reported_runs import HOSTILE, write_run

pytestmark = [pytest.mark.long, needs_browser]
_SELECT = """
const field = document.querySelector('select[aria-label="%s"]');
field.value = '%s';
field.dispatchEvent(new Event('input'));
return document.getElementById('count').textContent;
"""


def open_report(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    browser.wait_for("return document.body.dataset.ready === 'yes'")


def test_the_page_opens_filters_work_and_a_click_opens_a_group(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=6, groups=4, members=4)
    assert main([str(run)]) == 0
    with Browser() as browser:
        open_report(browser, run / "report.html")
        assert browser.run("return document.querySelectorAll('.chart canvas').length") >= 3
        assert browser.run("return document.getElementById('count').textContent") == "24 of 24 groups"
        assert browser.run(_SELECT % ("step", "3")) == "4 of 24 groups"
        assert browser.run(_SELECT % ("data source", "easy")) == "2 of 24 groups"
        assert browser.run(_SELECT % ("data source", "")) == "4 of 24 groups"
        script = "const f = document.querySelector('input[type=search]'); f.value = 'PROMPT 2 of'; "
        script += "f.dispatchEvent(new Event('input')); return document.getElementById('count').textContent"
        assert browser.run(script) == "1 of 24 groups"
        browser.run("document.querySelector('tr.group').click()")
        assert browser.run("return document.querySelectorAll('.opened .answer').length") == 4
        assert "prompt 2 of step 3" in browser.run("return document.querySelector('.opened').textContent")
        browser.run("document.querySelector('tr.group').click()")
        assert browser.run("return document.querySelectorAll('.opened').length") == 0
        assert browser.errors() == []


def test_the_report_of_a_quickstart_run_is_kept_as_screenshots(quickstart: Run, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main([str(quickstart.folder), "--out", str(page)]) == 0
    with Browser() as browser:
        open_report(browser, page)
        browser.screenshot("report-curves.png")
        browser.run("document.querySelector('tr.group').click()")
        assert browser.run("return document.querySelectorAll('.opened .answer pre span').length") > 20
        # eight answers side by side scroll in their group, and do not make the page wider than the window
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
        browser.run("document.getElementById('rollouts').scrollIntoView()")
        browser.screenshot("report-group.png")
        browser.run("document.getElementById('timeline').scrollIntoView()")
        browser.screenshot("report-phases.png")
        assert browser.errors() == []


def test_hostile_texts_are_shown_and_run_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", text=HOSTILE)
    assert main([str(run)]) == 0
    with Browser() as browser:
        open_report(browser, run / "report.html")
        browser.run("document.querySelector('tr.group').click()")
        assert browser.run("return window.attacked === undefined")
        assert "</script><script>window.attacked = 1" in browser.run(
            "return document.querySelector('.answer').textContent"
        )
        assert browser.errors() == []


def test_two_runs_share_their_charts(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", members=8)
    assert main([str(first), str(second)]) == 0
    with Browser() as browser:
        open_report(browser, first / "report.html")
        assert "sampling.group_size" in browser.run("return document.getElementById('differences').textContent")
        legends = browser.run("return document.querySelector('.chart .u-legend').textContent")
        assert "first" in legends
        assert "second" in legends
        assert browser.errors() == []
        browser.screenshot("report-comparison.png")


def test_a_report_of_1000_steps_and_64000_rollouts_is_fast_and_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1000, groups=8, members=8, text="word " * 300, num_tokens=300)
    start = time.monotonic()
    assert main([str(run)]) == 0
    made = time.monotonic() - start
    assert (run / "report.html").stat().st_size <= 30e6
    assert made <= 60
    with Browser() as browser:
        start = time.monotonic()
        open_report(browser, run / "report.html")
        assert time.monotonic() - start <= 3
