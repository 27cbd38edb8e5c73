from __future__ import annotations

import base64
import gzip
import io
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.svg import SvgDomain
from fmsuite.domains.svg.render import colour
from fmsuite.domains.svg.safety import Limits, Refused, check, load
from fmsuite.domains.svg.worker import RenderWorker
from fmsuite.errors import ReadFailure, UsageError

NS = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
GOOD = f'<svg {NS} viewBox="0 0 10 10"><circle cx="5" cy="5" r="4"/></svg>'


def svg(body: str, attributes: str = 'viewBox="0 0 10 10"') -> str:
    return f"<svg {NS} {attributes}>{body}</svg>"


def use_bomb(levels: int, href: str = "href") -> str:
    parts = ['<g id="l0"><rect width="1" height="1"/></g>']
    for level in range(1, levels + 1):
        uses = f'<use {href}="#l{level - 1}"/>' * 10
        parts.append(f'<g id="l{level}">{uses}</g>')
    return svg(f"<defs>{''.join(parts)}</defs><use {href}='#l{levels}'/>")


def pattern_bomb(levels: int) -> str:
    parts = ['<pattern id="p0" width="1" height="1"><rect width="1" height="1"/></pattern>']
    for level in range(1, levels + 1):
        rects = f'<rect width="1" height="1" style="fill: url(#p{level - 1})"/>' * 10
        parts.append(f'<pattern id="p{level}" width="1" height="1">{rects}</pattern>')
    return svg(f"<defs>{''.join(parts)}</defs><rect width='9' height='9' fill='url(#p{levels})'/>")


def picture(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


BILLION_LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {chr(98 + k)} "{f"&{chr(97 + k)};" * 10}">' for k in range(9))
    + f"]>{svg('<text>&j;</text>')}"
)

HOSTILE: dict[str, tuple[bytes | str, str]] = {
    "text.svg": ("only words", "not well-formed XML"),
    "html.svg": ("<html><body/></html>", "root element is <html>"),
    "truncated.svg": (GOOD[:-12], "not well-formed XML"),
    "empty.svg": ("", "empty"),
    "laughs.svg": (BILLION_LAUGHS, "declares the entity"),
    "external_entity.svg": (
        f'<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>{svg("<text>&x;</text>")}',
        "declares the entity",
    ),
    "use_bomb.svg": (use_bomb(9), "elements would be drawn"),
    "xlink_bomb.svg": (use_bomb(9, "xlink:href"), "elements would be drawn"),
    "pattern_bomb.svg": (pattern_bomb(8), "elements would be drawn"),
    "use_cycle.svg": (svg('<g id="a"><use href="#b"/></g><g id="b"><use href="#a"/></g>'), "refers to itself"),
    "pattern_cycle.svg": (
        svg(
            '<pattern id="p" width="2" height="2"><rect width="2" height="2" fill="url(#p)"/></pattern>'
            '<rect width="9" height="9" fill="url(#p)"/>'
        ),
        "refers to itself",
    ),
    "deep.svg": (svg("<g>" * 5000 + "</g>" * 5000), "nested more than"),
    "use_chain.svg": (
        svg("".join(f'<g id="c{k}"><use href="#c{k + 1}"/></g>' for k in range(2000)) + '<g id="c2000"/>'),
        "nested more than",
    ),
    "many.svg": (svg("<g/>" * 30_000), "more than 20000 elements"),
    "http_image.svg": (svg('<image href="http://example.org/x.png" width="5" height="5"/>'), "outside the file"),
    "file_image.svg": (svg('<image xlink:href="file:///etc/passwd" width="5" height="5"/>'), "outside the file"),
    "relative_use.svg": (svg('<use href="other.svg#a"/>'), "outside the file"),
    "css_url.svg": (svg("<style>rect{fill:url(http://example.org/#a)}</style><rect/>"), "outside the file"),
    "css_import.svg": (svg("<style>@import 'http://example.org/a.css';</style><rect/>"), "imports another"),
    "huge.svg": (svg("<rect/>", 'viewBox="0 0 1e9 1e9"'), "canvas reaches"),
    "zero.svg": (svg("<rect/>", 'viewBox="0 0 0 10"'), "no area"),
    "zero_width.svg": (svg("<rect/>", 'width="0" height="5"'), "nothing to draw on"),
    "big_image.svg": (svg(f'<image href="{picture(6000, 6000)}" width="5" height="5"/>'), "embedded image measures"),
    "bad_image.svg": (svg('<image href="data:image/png;base64,AAAA" width="5" height="5"/>'), "embedded image"),
    "nested_bomb.svg": (
        svg(
            f'<image href="data:image/svg+xml;base64,{base64.b64encode(use_bomb(9).encode()).decode()}" '
            'width="5" height="5"/>'
        ),
        "elements would be drawn",
    ),
    "bomb.svgz": (gzip.compress(b" " * 50_000_000), "unpacks to more than"),
    "damaged.svgz": (gzip.compress(GOOD.encode())[:-20], "compressed data are damaged"),
    "large.svg": (GOOD + " " * 2_000_001, "larger than"),
    "blank.svg": (svg(""), "single colour"),
    "white.svg": (svg('<rect width="5" height="5" fill="white"/>'), "single colour"),
    "bad_path.svg": (svg('<rect width="5" height="5" opacity="much"/>'), "CairoSVG cannot render it"),
}


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_hostile_file_is_skipped_with_its_reason_in_bounded_time(tmp_path: Path) -> None:
    write(tmp_path, "good.svg", GOOD)
    write(tmp_path, "good.svgz", gzip.compress(GOOD.encode()))
    for name, (content, _) in HOSTILE.items():
        write(tmp_path, name, content)
    skipped = SkippedLog(tmp_path / "out" / "skipped.csv")
    started = time.monotonic()
    index = build_index(SvgDomain(SvgDomain.Options(timeout_s=20)), [tmp_path], skipped)
    assert time.monotonic() - started < 60
    assert sorted(Path(source).name for source in index.sources) == ["good.svg", "good.svgz"]
    found = {Path(entry.path).name: entry.reason for entry in skipped.entries}
    assert found.keys() == HOSTILE.keys()
    for name, (_, reason) in HOSTILE.items():
        assert reason in found[name], (name, found[name])
    assert all(Path(entry.path).is_absolute() for entry in skipped.entries)


def test_expansion_is_counted_in_closed_form() -> None:
    # root, defs, the outer use, and 11 elements a level of which 10 repeat: c(0) = 2, c(n) = 1 + 10 (1 + c(n-1)).
    cost = 2
    for _ in range(3):
        cost = 1 + 10 * (1 + cost)
    definitions = sum([2, *(_level(n) for n in range(1, 4))])
    assert check(use_bomb(3).encode(), Limits()).drawn == 1 + (1 + definitions) + (1 + cost)


def _level(n: int) -> int:
    return 2 if n == 0 else 1 + 10 * (1 + _level(n - 1))


def test_common_harmless_things_pass() -> None:
    doctype = '<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">'
    body = (
        '<a href="http://example.org"><rect width="5" height="5"/></a><script>alert(1)</script>'
        f'<image href="{picture(4, 4)}" width="5" height="5"/><rect fill="url(#nowhere)" width="1" height="1"/>'
    )
    document = check((doctype + svg(body)).encode(), Limits())
    assert document.not_drawn == {"script": 1}


def test_a_limit_can_be_raised() -> None:
    source = svg("<g/>" * 50).encode()
    with pytest.raises(Refused, match="more than 20 elements"):
        check(source, Limits(max_elements=20))
    assert check(source, Limits(max_elements=51)).drawn == 51


def test_a_file_that_cannot_be_read_is_a_read_failure(tmp_path: Path) -> None:
    with pytest.raises(ReadFailure, match="cannot be read"):
        load(str(tmp_path / "absent.svg"), Limits())


def hanging() -> str:
    """Passes every bound, and keeps the renderer busy for hours: nested patterns that a style sheet refers to."""
    rules, patterns = [], []
    for level in range(9):
        rules.append(f".c{level + 1} {{ fill: url(#p{level}) }}")
        rects = f'<rect class="c{level}" width="1" height="1"/>' * 10
        patterns.append(f'<pattern id="p{level}" width="1" height="1">{rects}</pattern>')
    return svg(f"<style>{' '.join(rules)}</style>{''.join(patterns)}<rect class='c9' width='9' height='9'/>")


def test_a_file_that_hangs_the_renderer_is_stopped_and_its_process_is_dead(tmp_path: Path) -> None:
    slow = write(tmp_path, "slow.svg", hanging())
    good = write(tmp_path, "good.svg", GOOD)
    with RenderWorker(32, colour("white"), Limits(), timeout=1.0) as worker:
        worker.try_file(str(good))
        assert worker.process is not None
        first = worker.process.pid
        started = time.monotonic()
        with pytest.raises(ReadFailure, match="more than 1 s"):
            worker.try_file(str(slow))
        assert time.monotonic() - started < 5
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
        drawn = worker.try_file(str(good))
        assert worker.process.pid != first
        last = worker.process.pid
    # The circle of radius 4 in a square of 10 covers pi 16 / 100, its edge pixels included.
    assert 0.49 < drawn.content < 0.60
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


def test_a_killed_renderer_costs_one_file(tmp_path: Path) -> None:
    good = write(tmp_path, "good.svg", GOOD)
    with RenderWorker(32, colour("white"), Limits(), timeout=10.0) as worker:
        worker.try_file(str(good))
        assert worker.process is not None
        worker.process.kill()
        worker.process.wait()
        assert worker.try_file(str(good)).content > 0


def test_a_folder_without_drawings_and_a_missing_path_are_wrong_use(tmp_path: Path) -> None:
    domain = SvgDomain(SvgDomain.Options())
    with pytest.raises(UsageError, match="holds no SVG drawings"):
        build_index(domain, [tmp_path], SkippedLog())
    with pytest.raises(UsageError, match="no such file"):
        build_index(domain, [tmp_path / "absent"], SkippedLog())
