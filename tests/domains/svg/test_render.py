from __future__ import annotations

import io

import cairosvg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmsuite.domains.svg.render import Canvas, colour, fetch_embedded, read_canvas, render_region

NS = b'xmlns="http://www.w3.org/2000/svg"'
WHITE = (1.0, 1.0, 1.0, 1.0)
SCENE = b"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 5 80 60">
<defs><linearGradient id="g"><stop offset="0" stop-color="blue"/><stop offset="1" stop-color="lime"/></linearGradient>
<pattern id="p" width="6" height="6" patternUnits="userSpaceOnUse"><circle cx="3" cy="3" r="2" fill="red"/></pattern>
<clipPath id="c"><circle cx="50" cy="45" r="15"/></clipPath></defs>
<g transform="rotate(12 30 30)"><rect x="10%" y="20%" width="30%" height="25" fill="url(#g)"/></g>
<rect x="35" y="30" width="30" height="30" fill="orange" clip-path="url(#c)"/>
<rect x="-5" y="45" width="24" height="15" fill="url(#p)" stroke="black" stroke-width="1.5"/>
</svg>"""


def whole(source: bytes, canvas: Canvas, size: int, **options: object) -> np.ndarray:
    return render_region(source, canvas, canvas.corner, (canvas.side, canvas.side), (size, size), **options)


def test_a_rectangle_fills_its_pixels_and_no_other() -> None:
    source = b"<svg " + NS + b' viewBox="0 0 10 10"><rect x="2" y="3" width="5" height="4" fill="#f00"/></svg>'
    pixels = whole(source, read_canvas(None, None, "0 0 10 10"), 20)
    expected = np.full((20, 20, 3), 255, np.uint8)
    expected[6:14, 4:14] = (255, 0, 0)
    np.testing.assert_array_equal(pixels, expected)


def test_a_wide_drawing_is_letterboxed_in_the_middle() -> None:
    source = b"<svg " + NS + b' width="100" height="50"><rect width="100%" height="100%" fill="#00f"/></svg>'
    pixels = whole(source, read_canvas("100", "50", None), 40)
    expected = np.full((40, 40, 3), 255, np.uint8)
    expected[10:30] = (0, 0, 255)
    np.testing.assert_array_equal(pixels, expected)


def test_the_drawing_agrees_with_cairosvg_through_png() -> None:
    png = cairosvg.svg2png(SCENE, output_width=160, output_height=120, background_color="white")
    expected = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    pixels = whole(SCENE, read_canvas(None, None, "-10 5 80 60"), 160).astype(int)
    assert (pixels[:20] == 255).all()
    assert (pixels[140:] == 255).all()
    assert (np.abs(pixels[20:140] - expected) > 2).mean() < 0.002


@settings(max_examples=15, deadline=None)
@given(row=st.integers(0, 60), column=st.integers(0, 60), height=st.integers(10, 100), width=st.integers(10, 100))
def test_a_region_equals_the_same_part_of_a_large_render(row: int, column: int, height: int, width: int) -> None:
    canvas = read_canvas(None, None, "-10 5 80 60")
    large = whole(SCENE, canvas, 160).astype(int)
    unit = canvas.side / 160
    top, left = canvas.corner
    part = render_region(
        SCENE, canvas, (top + row * unit, left + column * unit), (height * unit, width * unit), (height, width)
    ).astype(int)
    difference = np.abs(part - large[row : row + height, column : column + width])
    assert (difference > 24).mean() < 0.01


def test_a_crop_shows_detail_that_the_large_picture_lacks() -> None:
    stripes = "".join(f'<rect x="{0.1 * k:.1f}" y="0" width="0.05" height="10"/>' for k in range(100))
    source = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10">{stripes}</svg>'.encode()
    canvas = read_canvas(None, None, "0 0 10 10")
    crop = render_region(source, canvas, (0.0, 0.0), (0.4, 0.4), (32, 32))
    row = (crop[5, :, 0] < 128).astype(int)
    assert np.abs(np.diff(row)).sum() == 7  # four black stripes, the last followed by white


def test_a_region_beyond_the_canvas_shows_the_background() -> None:
    canvas = read_canvas(None, None, "0 0 10 10")
    source = b"<svg " + NS + b' viewBox="0 0 10 10"><rect width="10" height="10"/></svg>'
    pixels = render_region(source, canvas, (-10.0, 0.0), (20.0, 10.0), (20, 10), colour("#102030"))
    assert (pixels[:10] == (0x10, 0x20, 0x30)).all()
    assert (pixels[10:] == 0).all()


def test_without_a_background_colours_are_not_multiplied_by_alpha() -> None:
    source = b"<svg " + NS + b' viewBox="0 0 4 4"><rect width="2" height="4" fill="#ff8000" fill-opacity="0.5"/></svg>'
    pixels = whole(source, read_canvas(None, None, "0 0 4 4"), 4, background=None)
    assert pixels.shape == (4, 4, 4)
    assert (pixels[:, 2:] == 0).all()
    np.testing.assert_allclose(pixels[0, 0], (255, 128, 0, 128), atol=1)


@pytest.mark.parametrize(
    ("attributes", "canvas"),
    [
        ((None, None, None), (0, 0, 300, 150)),
        (("40", None, None), (0, 0, 40, 150)),
        (("100%", "100%", "0 0 24 12"), (0, 0, 24, 12)),
        (("1in", "48px", None), (0, 0, 96, 48)),
        (("20", "10", "0 0 100 100"), (-50, 0, 200, 100)),
        (("48", None, "1,2,24,24"), (1, 2, 24, 24)),
    ],
)
def test_canvas_of_root_attributes(attributes: tuple, canvas: tuple) -> None:
    assert read_canvas(*attributes) == Canvas(*canvas)


@pytest.mark.parametrize("view_box", ["0 0 0 10", "0 0 -1 5", "0 0 10", "a b c d", "0 0 nan 10", "0 0 inf 10"])
def test_a_view_box_without_an_area_is_refused(view_box: str) -> None:
    with pytest.raises(ValueError, match="viewBox"):
        read_canvas(None, None, view_box)


def test_only_data_urls_are_fetched() -> None:
    assert fetch_embedded("data:text/plain;base64,aGk=", "image/*") == b"hi"
    assert fetch_embedded("data:,a%20b", "image/*") == b"a b"
    for url in ("http://example.org/a.png", "file:///etc/passwd", "/etc/passwd"):
        with pytest.raises(ValueError, match="outside the file"):
            fetch_embedded(url, "image/*")


def test_an_unknown_colour_is_refused_and_black_is_not() -> None:
    assert colour("black") == (0, 0, 0, 1)
    assert colour("white") == WHITE
    with pytest.raises(ValueError, match="not a colour"):
        colour("whit")
