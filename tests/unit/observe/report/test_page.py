"""grpo_mega.observe.report.page: one inert, complete HTML page. tests/e2e/test_report_page_long.py opens it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from grpo_mega.observe.report.page import json_text, report_page
from grpo_mega.observe.report.rollout_sample import sample_rollouts
from grpo_mega.observe.report.run_data import read_run
from tests.helpers.reported_runs import HOSTILE, write_run


class Outline(HTMLParser):
    """Elements of a page, and the text of each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data


def page_of(*folders: Path) -> str:
    return report_page([(run, sample_rollouts(run.path / "rollouts", {}, [], None)) for run in map(read_run, folders)])


def data_of(page: str) -> Any:
    return json.loads(Outline(page).scripts[0])


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    outline = Outline(page_of(write_run(tmp_path / "run")))
    attributes = [(tag, name) for tag, found in outline.elements for name in found]
    assert not {("script", "src"), ("link", "href"), ("img", "src"), ("a", "href")} & set(attributes)
    policy = next(a["content"] for tag, a in outline.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert len(outline.scripts) == 3
    assert "uPlot" in outline.scripts[1]


def test_a_hostile_completion_stays_inside_the_data(tmp_path: Path) -> None:
    harmless, hostile = write_run(tmp_path / "a"), write_run(tmp_path / "b", text=HOSTILE)
    (hostile / "config.yaml").write_text("run: {dir: '</script><img src=x onerror=1>'}\n")
    page = page_of(hostile)
    assert [tag for tag, _ in Outline(page).elements] == [tag for tag, _ in Outline(page_of(harmless)).elements]
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff\u2028\u202e]", page)
    text = data_of(page)["runs"][0]["rollouts"]["groups"][0]["answers"][0]["text"]
    assert text.startswith("</script><script>window.attacked")
    page.encode("utf-8")


def test_json_has_no_markup_and_no_numbers_that_javascript_cannot_read() -> None:
    found = json_text({"a<b": ["</script>", float("nan"), float("inf"), "\ud800", "\u2028", 1, True, None]})
    assert not set("<>&") & set(found)
    assert json.loads(found) == {"a<b": ["</script>", None, None, r"\ud800", r"\u2028", 1, True, None]}


def test_two_runs_are_compared_by_the_differences_of_their_configs(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first", members=4), write_run(tmp_path / "second", members=8)
    data = data_of(page_of(first, second))
    assert data["differences"] == [["sampling.group_size", "4", "8"]]
    assert [run["path"] for run in data["runs"]] == [str(first), str(second)]
    assert data_of(page_of(first))["differences"] == []


def test_the_advice_on_speed_is_that_of_the_summary(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_text(json.dumps({"status": "done", "steps": 6, "tuning": ["set parallel.vpp"]}))
    assert data_of(page_of(run))["runs"][0]["summary"]["tuning"] == ["set parallel.vpp"]


def test_the_config_shows_what_differs_from_the_defaults(tmp_path: Path) -> None:
    (run,) = data_of(page_of(write_run(tmp_path / "run")))["runs"]
    assert ["sampling.group_size", "4", "8"] in run["config"] or any(
        k == "sampling.group_size" for k, *_ in run["config"]
    )
    assert not any(key == "sampling.temperature" for key, *_ in run["config"])
    assert run["num_defaults"] >= 1
