"""The pages, as files and in a real browser. ``pytest tests/report/test_page.py``."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from machine import data, settings, stopped_after

import edgetrain
from edgetrain import __version__
from edgetrain.errors import InputError
from edgetrain.record import KINDS
from edgetrain.report import page as pages
from edgetrain.report.page import write_profile, write_report
from edgetrain.report.profile import Varied, points, slopes, timelines_of
from edgetrain.training.fit import fit

ROWS = data("pixels").set


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("mf", "lbp-ae", "bp"):
        fit(settings(name, net="mlp:24x3", max_gpu_mb=4.0), folder / name, data=ROWS)
    stopped_after(25, settings("mf", net="mlp:24x2"), folder / "stopped", ROWS)
    return {path.name: path for path in folder.iterdir()}


class Outline(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, text: str) -> None:
        self.text += text


def outline(path: Path) -> Outline:
    return Outline(path.read_text(encoding="utf-8"))


# -- as files ------------------------------------------------------------------------------------------


def test_a_report_lies_in_the_run_and_holds_what_the_record_says(runs: dict[str, Path]) -> None:
    run = edgetrain.open_run(runs["mf"])
    assert run.report() == runs["mf"] / "report.html"
    shown, record = outline(runs["mf"] / "report.html"), run.record
    assert record.test_accuracy is not None
    for text in (
        f"{100 * record.test_accuracy:.2f}%",
        "Cells stream one at a time",
        record.citations[0],
        'method = "mf"',
        "linear 21-24",
        f"edgetrain {__version__}",
        "no sensor told it" if record.energy_j is None else f"{record.energy_source}",
    ):
        assert text in shown.text
    names = {path.stem for path in (runs["mf"] / "figures").glob("*.png")}
    assert names == {"budget", "cells", "timeline", "losses", "accuracies", "votes", "time"}
    assert sum(tag == "svg" for tag, _ in shown.tags) == len(names)


def test_a_page_asks_for_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    page, _, _ = write_report(list(runs.values()), tmp_path)
    shown = outline(page)
    for tag, attributes in shown.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("href", "src", "xlink:href", "srcset", "action") or (value or "").startswith("#")
    policy = [a["content"] for tag, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_runs_stand_side_by_side(runs: dict[str, Path], tmp_path: Path) -> None:
    page, figures, problems = write_report([runs["mf"], runs["lbp-ae"], runs["bp"]], tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    assert problems == []
    assert {"timeline-1", "timeline-2", "timeline-3"} <= {path.stem for path in figures}
    headings = re.findall(r"<th>(mf|lbp-ae|bp)</th>", page.read_text())
    assert headings == ["mf", "lbp-ae", "bp"]


def test_runs_of_the_same_name_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["mf"], tmp_path / "elsewhere" / "mf")
    page, _, _ = write_report([runs["mf"], tmp_path / "elsewhere" / "mf"], tmp_path / "out")
    assert re.findall(r"<th>(\d: mf)</th>", page.read_text()) == ["1: mf", "2: mf"]
    assert f'<td class="words">{tmp_path}/elsewhere/mf</td>' in page.read_text()
    assert re.findall(r"<h2>(\d: mf)</h2>", page.read_text()) == ["1: mf", "2: mf"]


def test_long_names_are_cut_where_they_are_least_telling(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["mf"], tmp_path / ("long" * 40))
    page, _, _ = write_report([tmp_path / ("long" * 40), runs["mf"]], tmp_path / "out")
    assert f"<th>…{('long' * 40)[-23:]}</th>" in page.read_text()


def test_what_a_stranger_wrote_is_text(runs: dict[str, Path], tmp_path: Path) -> None:
    """A record without a journal is shown unverified; nothing in it is markup."""
    record = json.loads((runs["mf"] / "record.json").read_text())
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    record["method"] = record["cells"][0]["name"] = record["plan"][0] = attack
    folder = tmp_path / "unknown"
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "config.toml").write_text(f"method = '{attack}'</pre>")
    page, _, problems = write_report([folder], tmp_path / "out")
    shown = outline(page)
    assert all(tag not in ("script", "img") for tag, _ in shown.tags)
    assert shown.text.count("<script>alert(1)</script>") >= 3
    assert "{{ 7 * 7 }}" in shown.text  # not worked out
    assert any("cannot be verified" in problem for problem in problems)


@pytest.mark.parametrize(
    "change",
    [
        {"budget_mb": 10**400},
        {"seconds": float("inf")},
        {"method": "\ud800"},
        {"plan": ["\ud800"]},
        {"memory": [{"name": "a", "count": 1, "peak_mb": 1.0, "peak_at": "x", "mb": [[1.0] * 5]}]},
        {"memory": [{"name": "a", "count": 1, "peak_mb": 1.0, "peak_at": "x", "mb": []}]},
        {"cells": [{"name": "a", "params": 10**30}]},
    ],
)
def test_what_cannot_be_shown_is_no_record(change: dict[str, Any], runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "unknown"
    folder.mkdir()
    known = json.loads((runs["mf"] / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**known, **change}))
    page, figures, problems = write_report([folder], tmp_path / "out")
    assert figures == []
    assert any("is not a record of edgetrain" in problem for problem in problems)
    assert page.exists()


def test_folders_that_are_no_utf_8_are_shown(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff"))
    shutil.copytree(runs["mf"], folder)
    page, figures, problems = write_report([folder], tmp_path / "out")
    assert "bad\ufffd" in page.read_text()
    assert (len(figures), problems) == (7, [])


def test_names_with_a_line_below_stand_in_legends(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["mf"], tmp_path / "_under")
    page, _, _ = write_report([tmp_path / "_under", runs["bp"]], tmp_path / "out")
    assert "<th> _under</th>" in page.read_text()


@pytest.mark.slow
def test_pictures_of_an_earlier_report_go_and_those_of_others_stay(runs: dict[str, Path], tmp_path: Path) -> None:
    write_report([runs["mf"], runs["bp"]], tmp_path)
    (tmp_path / "figures" / "mine.png").write_bytes(b"")
    write_report([runs["mf"]], tmp_path)
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {"budget", "cells", "timeline", "losses", "accuracies", "votes", "time", "mine"}


def test_a_report_that_cannot_be_written_leaves_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(InputError, match=r"report.html: is a folder"):
        write_report([runs["mf"]], tmp_path)
    with pytest.raises(InputError, match="no run to report"):
        edgetrain.report_runs()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.slow
def test_only_a_configuration_that_gives_the_same_run_is_said_to(tmp_path: Path) -> None:
    said = "gives the same run"
    arrays = edgetrain.fit(
        "mlp:8x1", (data("pixels").raw, data("pixels").labels), epochs=1, run_dir=tmp_path / "arrays"
    )
    assert said not in arrays.report().read_text()
    run = edgetrain.fit("mlp:8x1", "digits", epochs=1, run_dir=tmp_path / "spec")
    assert said in run.report().read_text()
    longer = edgetrain.append_cells(run, "mlp:8x2", epochs=1)
    assert said not in longer.report().read_text()


def test_without_the_packages_the_extra_is_named(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"edgetrain\[report\]"):
        write_report([runs["mf"]])


def profiled(tmp_path: Path) -> Path:
    given = replace(settings("mf"), micro_batch=None, lr=None), Varied(["mf", "bp"], "mlp", [1, 2, 4], [24], [16])
    found = list(points(*given, dry=False, data=ROWS))
    lived = timelines_of(*given, data=ROWS)
    write_profile(tmp_path / "profile.html", tmp_path / "pictures", found, slopes(found), lived)
    return tmp_path / "profile.html"


def test_a_profile_s_page_has_points_slopes_and_figures(tmp_path: Path) -> None:
    shown = outline(profiled(tmp_path))
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == {"peaks", "seconds", "timeline"}
    assert sum(tag == "svg" for tag, _ in shown.tags) == 3
    assert sum(tag == "tr" for tag, _ in shown.tags) == (1 + 2) + (1 + 6)
    assert "Slopes of peak memory over depth" in shown.text


# -- in a browser --------------------------------------------------------------------------------------


PHONE, DESK = (360, 780), (1280, 900)
PROBE = """
const figures = [...document.querySelectorAll('figure svg')].map(each => {
  const box = each.getBoundingClientRect();
  return {width: box.width, height: box.height, shapes: each.querySelectorAll('path').length};
});
const outside = [...document.querySelectorAll('body *')].filter(each => {
  if (each.closest('.wide, pre, svg')) return false;
  return each.getBoundingClientRect().right > window.innerWidth + 1;
}).map(each => each.tagName + ' ' + each.className);
return {figures, outside, scroll: document.documentElement.scrollWidth, width: window.innerWidth,
        paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
        fonts: document.fonts ? document.fonts.size : 0};
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium with a log of its console and of what it asks for."""
    selenium = pytest.importorskip("selenium.webdriver")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with its driver on this machine")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield running
    running.quit()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """Serves the test's folder, so that a request for anything else would be seen."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def seen(browser: Any, address: str, size: tuple[int, int], dark: bool) -> dict[str, Any]:
    """What a page looks like; its console must be silent, and it must ask for nothing but itself."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(address)
    found: dict[str, Any] = browser.execute_script(PROBE)
    console = [line["message"] for line in browser.get_log("browser") if "favicon.ico" not in line["message"]]
    assert console == []
    events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.endswith("favicon.ico")} == {address}
    return found


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("which", ["one", "several", "unfinished", "profile"])
def test_a_page_in_a_browser(
    which: str, dark: bool, size: tuple[int, int], browser: Any, site: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    if which == "profile":
        name = profiled(tmp_path).name
    else:
        chosen = {"one": ["mf"], "several": ["mf", "lbp-ae", "bp"], "unfinished": ["stopped"]}[which]
        write_report([runs[each] for each in chosen], tmp_path)
        name = "report.html"
    found = seen(browser, f"{site}/{name}", size, dark)
    assert found["outside"] == []
    assert found["scroll"] <= found["width"] == size[0]
    assert len(found["figures"]) >= 3
    for figure in found["figures"]:
        assert figure["width"] >= (0.75 * size[0] if size == PHONE else 300)
        assert figure["height"] > 80
        assert figure["shapes"] > 10
    brightness = [sum(map(int, re.findall(r"\d+", found[part])[:3])) for part in ("paper", "ink")]
    assert (brightness[0] < brightness[1]) == dark
    assert abs(brightness[0] - brightness[1]) > 400


def test_the_order_of_kinds_in_records_that_are_written_stays(runs: dict[str, Path]) -> None:
    assert KINDS == ("weights", "optimizer state", "gradients", "activations", "latents", "workspace")
    assert [len(visit.mb[0]) for visit in edgetrain.open_run(runs["mf"]).record.memory] == [6, 6, 6]
