"""Reports: self-contained, escaped, complete when they appear; pictures show what they were given."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from everysat.report import Report, colours, curves_figure, maps_figure, matrix_figure, stretched
from everysat.table import Table

CLASSES = ("farm", "forest", "water")


def full_report():
    table = Table.of(
        "Scores", [{"features": "bands <b>", "f1": 0.41234}, {"features": "ours", "f1": 0.5}], ["F1 & more"]
    )
    labels = np.array([[0, 1], [2, -1]])
    confidence = np.array([[0.5, 1.0], [0.1, np.nan]])
    scene = stretched(np.random.default_rng(0).random((3, 2, 2)))
    panels = [("Scene", scene, {}), ("Labels", labels, {}), ("Confidence", confidence, {"kind": "confidence"})]
    report = Report("Land <use>", "subtitle").add_heading("Scores").add_text("one\n\ntwo").add_table(table, bold=[1])
    report.add_figure(maps_figure(panels, CLASSES), "maps").add_figure(matrix_figure(np.eye(3), CLASSES), 'a "matrix"')
    curve = curves_figure(
        {"ours": ([2, 10], [0.1, 0.2], [0.01, 0.02])}, x="labels", y="F1", log_x=True, ticks={2: "2 %"}
    )
    return report.add_figure(curve, "curve").add_numbers({"F1": "0.5"}).add_facts({"seed": 0})


def test_everything_is_inside_and_nothing_is_fetched(tmp_path):
    text = full_report().save(tmp_path / "report.html").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', text)
    assert len(links) == 3
    for link, _ in links:
        kind, content = link.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content)[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<script" not in text
    assert "http" not in text


def test_tags_are_balanced_and_text_is_escaped():
    text = full_report().html()
    assert "Land &lt;use&gt;" in text
    assert "bands &lt;b&gt;" in text
    assert "F1 &amp; more" in text
    assert 'alt="a &quot;matrix&quot;"' in text
    assert "<p>one</p>" in text
    assert "<p>two</p>" in text
    assert "0.412" in text

    class Balance(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(text)
    assert parser.open == []


def test_stretch_uses_the_whole_range_and_leaves_gaps_white():
    band = np.linspace(100, 300, 50).reshape(5, 10)
    image = np.stack([band, band * 2, np.full((5, 10), np.nan)])
    shown = stretched(image, low=0, high=100, gamma=1)
    assert shown.shape == (5, 10, 3)
    np.testing.assert_allclose(shown[..., 0], (band - 100) / 200, atol=1e-6)
    np.testing.assert_allclose(shown[..., 0], shown[..., 1], atol=1e-6)
    assert (shown[..., 2] == 1).all()


def test_colours_are_distinct_and_natural_where_names_say_so():
    from matplotlib.colors import to_rgb

    names = ("farm", "forest", "grass", "meadow", "residential", "scrub", "water", "wetland")
    assert len(set(colours(names))) == 8
    blue = to_rgb(colours(names)[6])
    assert blue[2] == max(blue)
    assert len(set(colours(["a", "b", "water", "open water"]))) == 4


def test_the_same_report_has_the_same_bytes(tmp_path):
    assert full_report().html() == full_report().html()


def test_a_class_map_shows_the_colour_of_each_class():
    from matplotlib.colors import to_rgb

    fig = maps_figure([("map", np.arange(3).repeat(40).reshape(3, 40).repeat(40, 0), {})], CLASSES, columns=1)
    fig.canvas.draw()
    pixels = np.asarray(fig.canvas.buffer_rgba())[..., :3].reshape(-1, 3) / 255
    for colour in colours(CLASSES):
        assert (np.abs(pixels - to_rgb(colour)).max(1) < 0.01).mean() > 0.05


def test_no_figures_stay_open():
    import matplotlib.pyplot as plt

    for _ in range(30):
        curves_figure({"a": ([0, 1], [0, 1], None)}, x="x", y="y", diagonal=True)
    assert len(plt.get_fignums()) <= 1


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Report("t").save(tmp_path / "nowhere" / "report.html")
