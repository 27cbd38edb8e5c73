"""The page in a browser: it may say nothing on the console, and never scroll sideways."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fmsuite.core.evaluation.results import Results
from fmsuite.core.reports.page import render
from fmsuite.core.reports.sources import read_sources
from tests.core.reports.factory import bench_results, few_shot_results, write_comparison, write_run
from tests.core.reports.tuned_factory import write_finetune

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the path")

WIDTHS = (360, 1280)
FRAMES = """<!DOCTYPE html><title>waiting</title>
%s
<script>
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument.documentElement;
    const text = frame.contentDocument.querySelector(".headline");
    return [page.clientWidth, page.scrollWidth, text ? text.getBoundingClientRect().height : 0];
  });
  document.title = JSON.stringify(seen);
});
</script>
"""
"""Windows of browsers have a least width; frames have none."""


def opened(page: Path, profile: Path) -> tuple[list[list[float]], list[str]]:
    """(width, width of what scrolls, height of the first sentence) at each of ``WIDTHS``, and the console's lines."""
    frames = "".join(
        f'<iframe src="{page.name}" style="width: {w}px; height: 800px; border: 0"></iframe>' for w in WIDTHS
    )
    around = page.with_name("frames.html")
    around.write_text(FRAMES % frames, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    options += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}", "--dump-dom"]
    command = [str(BROWSER), *options, around.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr
    assert title[1].startswith("["), done.stderr
    return json.loads(title[1]), [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def long_names(results: Results) -> Results:
    """As cohorts have them: no space to break at."""
    for item in results.items[::3]:
        item.id = "TCGA-" + "-".join(["0123456789ABCDEF"] * 6) + ".svs"
    return results


def test_a_page_is_silent_and_never_wider_than_the_screen(tmp_path: Path) -> None:
    few = write_comparison(tmp_path / "few", long_names(few_shot_results()))
    bench = write_comparison(tmp_path / "bench", bench_results())
    run = write_run(tmp_path / "run", 200, collapse=[100])
    tuned = write_finetune(tmp_path / "tuned")
    page = tmp_path / "report.html"
    page.write_text(render([source for folder in (few, bench, run, tuned) for source in read_sources(folder)]), "utf-8")

    seen, console = opened(page, tmp_path / "profile")

    assert console == []
    assert [width for width, *_ in seen] == list(WIDTHS)
    for width, scrolled, headline in seen:
        assert scrolled == width
        assert headline > 20


def test_the_check_sees_what_it_looks_for(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<p class="headline" style="width: 900px">wide</p><script>console.error("a complaint")</script>', "utf-8"
    )

    seen, console = opened(page, tmp_path / "profile")

    assert seen[0][:2] == [360, 908]
    assert any("a complaint" in line for line in console)
