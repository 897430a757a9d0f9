"""tools/bench_report.py: its run folder has all that a report shows, and a browser opens the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from grpo_mega.cli.report import main
from tests.helpers.browser import needs_browser
from tools.bench_report import make_run, open_page


def test_the_page_of_the_run_has_every_chart_and_a_mismatch_for_each_token(tmp_path: Path) -> None:
    make_run(tmp_path, steps=2, groups=3, members=4, tokens=5)
    assert main([str(tmp_path)]) == 0
    text = re.search(r'id="data">(.*?)</script>', (tmp_path / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert text is not None
    (run,) = json.loads(text[1])["runs"]
    assert run["problems"] == ["summary.json is missing: the run has not started to train, or was ended before it"]
    assert len(run["curves"]) > 80
    assert len(run["timeline"][0]["ranks"]) == 16
    groups = run["rollouts"]["groups"]
    assert [(group["step"], len(group["answers"])) for group in groups] == [(1, 4)] * 3 + [(2, 4)] * 3
    answers = [answer for group in groups for answer in group["answers"]]
    assert {(len(answer["pieces"]), len(answer["mismatch"])) for answer in answers} == {(5, 5)}
    assert ["".join(answer["pieces"]) for answer in answers] == [answer["text"] for answer in answers]


@needs_browser
def test_a_page_whose_scripts_fail_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<body><script>document.body.dataset.milliseconds = "7"</script></body>', encoding="utf-8")
    assert open_page(page) == 0.007
    page.write_text('<body><script>undefined.x; document.body.dataset.milliseconds = "7"</script></body>')
    with pytest.raises(RuntimeError, match="did not run to their end"):
        open_page(page)
