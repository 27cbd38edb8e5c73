"""The page: self-contained, escaped, accessible, and with the numbers in it."""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fmsuite.core.evaluation.results import Results
from fmsuite.core.reports.page import render
from fmsuite.core.reports.sources import Comparison, Run, read_sources
from fmsuite.errors import UsageError
from tests.core.reports.factory import (
    MINE,
    bench_results,
    blob,
    estimate,
    few_shot_results,
    make_exhibits,
    make_results,
    write_comparison,
    write_run,
)

VOID = {"meta", "link", "img", "br", "input", "hr", "col", "wbr"}


@dataclass
class Parsed(HTMLParser):
    """What a browser would find, as far as these tests ask."""

    source: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attrs}) == len(attrs), f"an attribute of {tag} stands twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def read(folder: Path) -> list[Comparison | Run]:
    return read_sources(folder)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mixed")
    sources = read(write_comparison(folder / "few", few_shot_results()))
    sources += read(write_comparison(folder / "bench", bench_results()))
    sources += read(write_run(folder / "run", collapse=(200,)))
    return render(sources)


def test_the_page_refers_to_nothing_outside_itself(mixed: str) -> None:
    page = Parsed(mixed)

    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), f"{tag} {name}={value}"
    style = re.findall(r"<style>(.*?)</style>", mixed, re.S)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    assert not page.all("script")
    assert not page.all("iframe")
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")


def test_anchors_lead_somewhere_and_ids_are_unique(mixed: str) -> None:
    page = Parsed(mixed)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]

    assert len(set(ids)) == len(ids)
    links = [str(link["href"])[1:] for link in page.all("a")]
    assert len(links) == 3
    assert set(links) <= set(ids)
    for _, attributes in page.tags:
        assert set(str(attributes.get("aria-labelledby") or "").split()) <= set(ids)


def test_every_picture_and_chart_says_what_it_shows(mixed: str) -> None:
    page = Parsed(mixed)

    assert len(page.all("img")) > 30
    assert all(image.get("alt") for image in page.all("img"))
    assert all(
        str(image["src"]).startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for image in page.all("img")
    )
    charts = [chart for chart in page.all("svg") if "chart" in str(chart["class"])]
    assert len(charts) == 12
    assert all(chart["role"] == "img" and chart["aria-labelledby"] for chart in charts)
    assert all(chart.get("aria-hidden") == "true" for chart in page.all("svg") if chart not in charts)
    for drawing in re.findall(r"<svg.*?</svg>", mixed, re.S):
        ElementTree.fromstring(drawing)


def test_headings_leave_no_level_out(mixed: str) -> None:
    levels = [int(tag[1]) for tag, _ in Parsed(mixed).tags if re.fullmatch(r"h\d", tag)]

    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_answers_stand_first(mixed: str) -> None:
    text = Parsed(mixed).text

    first = text.index("Of 2 encoders, uni-mini is best, with a balanced accuracy of 0.908 (0.868–0.948) from 16")
    second = text.index("uni-mini reaches a balanced accuracy of 0.931 (0.919–0.943) with the whole training side")
    third = text.index("run (dinov2, 400 of 400 steps) has finished, with a collapse reported.")
    assert first < second < third < text.index("Scores")


def test_tables_hold_every_number_with_its_interval(tmp_path: Path) -> None:
    results = few_shot_results()
    text = Parsed(render(read(write_comparison(tmp_path, results)))).text

    for e in results.evaluations:
        for estimate_ in e.metrics.values():
            assert estimate_.low is not None
            written = f"{estimate_.mean:.3f}".replace("-", "−")
            assert written in text
    assert "0.687 (0.607–0.767)" in text
    assert "(−0.420 to −0.360)" in text


def test_the_best_of_a_column_is_marked_by_more_than_colour(tmp_path: Path) -> None:
    results = make_results(
        {
            (MINE, "knn", None, False): estimate(0.8),
            ("colour histogram", "knn", None, False): estimate(0.9),
            (MINE, "knn", None, True): estimate(0.9),
        }
    )
    page = render(read(write_comparison(tmp_path, results)))

    found = re.findall(r'<td class="n best">(.*?)</td>', page, re.S)
    # One in the table of balanced accuracy, one in that of AUROC.
    assert len(found) == 2
    assert all("▲" in best and ">best <" in best for best in found)
    assert ">0.900<" in found[0]


def test_a_row_without_rivals_is_not_called_the_best(tmp_path: Path) -> None:
    page = render(read(write_comparison(tmp_path, make_results({(MINE, "knn", None, False): estimate(0.8)}))))

    assert 'class="n best"' not in page


def test_sections_of_equal_titles_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    sources = read(write_comparison(tmp_path / "a", few_shot_results()))
    sources += read(write_comparison(tmp_path / "b", few_shot_results()))
    page = Parsed(render(sources))

    for name in ("a", "b"):
        assert page.text.count(f"Few-shot classification of 72 slides ({tmp_path / name})") == 3


def test_controls_stand_apart(tmp_path: Path) -> None:
    page = render(read(write_comparison(tmp_path, few_shot_results())))
    table = re.findall(r'<table class="scores.*?</table>', page, re.S)[0]
    bodies = re.findall(r"<tbody(.*?)>(.*?)</tbody>", table, re.S)

    assert [("control" in attributes, MINE in body) for attributes, body in bodies] == [
        (False, True),
        (True, True),
        (True, True),
    ]
    assert "Controls with shuffled labels" in bodies[2][1]


def test_confusion_matrices_hold_counts_and_shares_of_the_row(tmp_path: Path) -> None:
    results = make_results({(MINE, "knn", None, False): estimate(0.8)})
    results.evaluations[0].confusion = [[3, 1, 0], [0, 1234, 0], [0, 0, 0]]
    page = render(read(write_comparison(tmp_path, results)))
    matrix = re.findall(r'<table class="matrix">.*?</table>', page, re.S)[0]
    assert "Predictions of kNN, with the whole training side." in page

    cells = re.findall(r'<td style="--s:([\d.]+)">([\d,]+)<span>(.*?)</span>', matrix)
    assert cells == [
        ("0.750", "3", "75%"),
        ("0.250", "1", "25%"),
        ("0.000", "0", "0%"),
        ("0.000", "0", "0%"),
        ("1.000", "1,234", "100%"),
        ("0.000", "0", "0%"),
        *[("0.000", "0", "–")] * 3,
    ]


def test_items_that_are_often_wrong_are_named(tmp_path: Path) -> None:
    results = make_results({(MINE, "knn", None, False): estimate(0.8)})
    for number, episode in enumerate(results.evaluations[0].episodes):
        episode.predictions = [item.label for item in results.items]
        episode.predictions[5] = 0
        episode.predictions[7] = 2 if number == 0 else -1
        episode.predictions[8] = 1 if number == 0 else results.items[8].label
    page = render(read(write_comparison(tmp_path, results)))
    table = page[page.index("Where it errs") :]
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", table[: table.index("</table>")], re.S)

    named = [re.findall(r"slide-\d+", row)[0] for row in rows]
    assert named == ["slide-05", "slide-07", "slide-08"]
    assert re.findall(r'class="n">(\d+)<', rows[0]) == ["4", "4"]
    assert re.findall(r'class="n">(\d+)<', rows[1]) == ["1", "1"]
    assert re.findall(r'class="n">(\d+)<', rows[2]) == ["1", "4"]


HOSTILE = "</style><script>alert(1)</script>\"' onload=x {{ 7*7 }} \x00\x1b\u202e\udc80 ünï" + "x" * 300


def test_hostile_strings_are_text(tmp_path: Path) -> None:
    hostile = HOSTILE.replace("\udc80", "")
    plain = few_shot_results()
    renamed = json.loads(plain.model_dump_json().replace(f'"{MINE}"', json.dumps(hostile)))
    renamed["items"][0]["id"] = hostile
    renamed["classes"][0] = hostile
    renamed["title"] = renamed["unit"] = renamed["interval"] = renamed["split"] = hostile
    renamed["notes"] = [hostile]
    renamed["facts"]["command"] = ["fmsuite", hostile]
    renamed["facts"]["inputs"] = {hostile: hostile}
    renamed["encoders"][0]["provenance"] = {hostile: hostile}
    renamed["methods"] = {hostile: hostile}
    for evaluation in renamed["evaluations"]:
        evaluation["method"] = hostile if evaluation["method"] == "knn" else evaluation["method"]
        evaluation["notes"] = [hostile]
    results = Results.model_validate(renamed)
    exhibits = make_exhibits(results)
    exhibits.notes.append(hostile)
    for picture in exhibits.pictures():
        picture.alt = picture.caption = hostile
    exhibits.evidence[0].item = exhibits.maps[0].method = hostile
    source = read(write_comparison(tmp_path / "few", results, exhibits))[0]
    assert isinstance(source, Comparison)
    run = read(write_run(tmp_path / "run"))[0]
    assert isinstance(run, Run)
    run.config["objective"] = {"name": HOSTILE}
    run.config_text = run.facts["index_hash"] = source.folder = HOSTILE
    text = render([source, run], title=HOSTILE)

    page = Parsed(text)
    assert not page.all("script")
    assert not any("onload" in attributes for _, attributes in page.tags)
    assert "{{ 7*7 }}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", text)
    text.encode("utf-8")
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(drawing)


def test_long_words_can_break_and_tables_scroll_by_themselves(mixed: str) -> None:
    style = re.findall(r"<style>(.*?)</style>", mixed, re.S)[0]

    assert re.search(r"body \{[^}]*overflow-wrap: anywhere", style)
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", style)
    assert re.search(r"pre \{[^}]*white-space: pre-wrap", style)
    for before in re.findall(r"(<[^<>]*>)\s*<table", mixed):
        assert 'class="scroll"' in before
        assert 'tabindex="0"' in before


def test_dark_pages_have_every_colour_that_light_ones_have(mixed: str) -> None:
    style = re.findall(r"<style>(.*?)</style>", mixed, re.S)[0]
    light, dark = (set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S))

    assert light == dark
    assert set(re.findall(r"var\((--[\w-]+)\)", style)) <= light | {"--c", "--s", "--l"}
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


def test_pictures_that_are_missing_are_named(tmp_path: Path) -> None:
    results = few_shot_results()
    exhibits = make_exhibits(results)
    write_comparison(tmp_path, results, exhibits)
    gone = exhibits.neighbours[0].query
    (tmp_path / gone.file).unlink()
    other = exhibits.evidence[0].heatmap
    assert other is not None
    (tmp_path / other.file).write_bytes(b"<svg onload='alert(1)'>")
    text = Parsed(render(read(tmp_path))).text

    assert f"A picture is missing ({gone.alt}): {tmp_path / gone.file}" in text
    assert f"Missing: {gone.alt}" in text
    assert f"The picture {other.file} ({other.alt}) is neither PNG nor JPEG and is not shown." in text


def test_results_without_exhibits_make_a_page(tmp_path: Path) -> None:
    few_shot_results().write(tmp_path)
    text = Parsed(render(read(tmp_path))).text

    assert "There is no exhibits.json" in text
    assert "Nothing was recorded as skipped." in text


def test_what_was_skipped_is_counted_and_shown(tmp_path: Path) -> None:
    text = " ".join(render(read(write_comparison(tmp_path, few_shot_results()))).split())

    assert "15 skipped: 11 at open, 4 at read. The first 12; all are in <code>skipped.csv</code>." in text
    assert "slides/broken-11.svs" in text
    assert "slides/broken-12.svs" not in text


def test_the_page_says_how_to_repeat_it(tmp_path: Path) -> None:
    text = Parsed(render(read(write_comparison(tmp_path, few_shot_results())))).text

    assert "fmsuite fewshot --features 'my store.zarr' --out few" in text
    for fact in ("3612555595138faf", "seed 7", "torch 2.15.0", "1 min 23 s", "a0b1c2d3"):
        assert fact in text


def test_the_same_note_of_many_evaluations_stands_once(tmp_path: Path) -> None:
    results = few_shot_results()
    for evaluation in results.evaluations:
        evaluation.notes = ["K was lowered."]
    results.evaluations[0].notes.append("Only this one.")
    text = Parsed(render(read(write_comparison(tmp_path, results)))).text

    assert text.count("K was lowered.") == 1
    assert f"K was lowered. ({len(results.evaluations)} evaluations)" in text
    assert "Only this one. (uni-mini, MI-SimpleShot, shots 1)" in text


def test_a_run_alone_makes_a_page(tmp_path: Path) -> None:
    page = Parsed(render(read(write_run(tmp_path / "run", finished=False))))

    assert "run (dinov2, 400 of 400 steps) has NOT finished." in page.text
    assert "RankMe went from 3.2 to 17.2." in page.text
    assert "The kNN probe rose from 0.500 at the first look to 0.800 at the last (highest 0.800)." in page.text
    assert "No collapse was reported." in page.text
    assert "Each point is the mean of 2 logged values." in page.text
    assert len([chart for chart in page.all("svg") if "chart" in str(chart["class"])]) == 5


def test_a_run_without_measurements_or_pictures_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "views.png").unlink()
    text = Parsed(render(read(run))).text

    assert "holds no measurements, so there are no training curves." in text
    assert f"The picture {run / 'views.png'} is missing." in text


def test_losses_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 401, "loss": NaN}\n{"step": 402, "lo')

    assert "Some losses are not finite." in Parsed(render(read(run))).text


def test_the_same_sources_make_the_same_page(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path, few_shot_results())

    assert render(read(folder)) == render(read(folder))


def test_more_classes_than_colours_stay_distinct(tmp_path: Path) -> None:
    classes = [f"class {number}" for number in range(20)]
    results = make_results({(MINE, "knn", None, False): estimate(0.8)}, classes=classes)
    exhibits = make_exhibits(results)
    exhibits.evidence.clear()
    exhibits.maps[0].labels[0] = -1
    page = render(read(write_comparison(tmp_path, results, exhibits)))
    legend = re.findall(r'<ul class="legend">(.*?)</ul>', page, re.S)[0]
    marks = re.findall(r'class="(solid c\d)" d="(.*?)"', legend)

    assert len(set(marks)) == len(marks) == 21
    assert "no label (1)" in legend


def test_nothing_to_report_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to report"):
        render([])


def test_without_jinja2_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = read(write_run(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "jinja2", None)

    with pytest.raises(UsageError, match=re.escape("pip install 'fmsuite[reports]'")):
        render(sources)


def test_the_picture_of_the_views_is_in_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    blob(9, 50, 70).save(run / "views.png")
    page = Parsed(render(read(run)))

    (image,) = page.all("img")
    assert str(image["src"]).startswith("data:image/png;base64,")
