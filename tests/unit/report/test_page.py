from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from raysemi.errors import CheckpointError
from raysemi.report.page import build_report


class Outline(HTMLParser):
    """Ids, links, tags left open, and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.ids, self.outside, self.open, self.text = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset") and not value.startswith(("#", "data:image/")):
                self.outside.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def set_result(folder, **fields):
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def sections(page):
    return re.findall(r'<section id="([^"]+)"', page)


def test_one_run_has_every_section_and_needs_nothing_from_outside(make_run, tmp_path):
    path = build_report([make_run("a", "derprop")], tmp_path / "out" / "report.html")
    page = path.read_text()
    assert sections(page) == [
        *("summary", "validation", "classes", "confusion", "pictures"),
        *("pseudo-labels", "pseudo-classes", "method", "losses", "progress", "settings"),
    ]
    outline = Outline(page)
    assert outline.open == []
    assert outline.outside == []
    assert len(outline.ids) == len(set(outline.ids))
    assert "://" not in page  # not even a namespace
    assert not re.search(r"@import|url\((?!#)", page)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(outline.ids)
    assert page.count("data:image/png;base64,") == 2 * 6 + 2 * 3
    assert sorted(file.name for file in path.parent.iterdir()) == [
        *("report-table.csv", "report-table.tex", "report.html")
    ]


def test_what_a_run_did_not_write_is_left_out(make_run, tmp_path):
    page = build_report([make_run("a", "supervised")], tmp_path / "r.html").read_text()
    assert "pseudo" not in page.lower()
    assert "method" not in sections(page)
    bare = make_run("b", "derprop", pictures=False, confusion=False, metrics=False)
    assert sections(build_report([bare], tmp_path / "r.html").read_text()) == ["summary", "classes", "settings"]
    running = make_run("c", "derprop", pictures=False, confusion=False, result=False)
    page = build_report([running], tmp_path / "r.html").read_text()
    assert "Not evaluated yet." in page
    assert "classes" not in sections(page)
    assert "losses" in sections(page)


def test_measured_gradients_have_curves_and_distributions(make_run, tmp_path):
    """The distributions are over single steps of all seeds; a norm of 0 has no place on a logarithmic axis."""
    runs = [make_run("a", rule="pareto", pictures=False), make_run("b", seed=1, rule="pareto", pictures=False)]
    runs.append(make_run("u", rule="uniform", pictures=False))
    page = build_report(runs, tmp_path / "r.html").read_text()
    assert "gradients" in sections(page)
    part = page[page.index('<section id="gradients">') :]
    part = part[: part.index("</section>")]
    captions = re.findall(r"<figcaption>([^<]*)(?: <span>([^<]*)</span>)?</figcaption>", part)
    assert [title for title, note in captions if note == "distribution"] == [
        *("Norm of both gradients", "Cosine of the two gradients", "Least cosine of the step")
    ]
    assert len(captions) == 10
    assert "derprop gradients=pareto" in page
    assert "derprop gradients=uniform" in page


def test_runs_that_differ_in_seed_alone_are_one_row(make_run, tmp_path):
    runs = [make_run(f"d{seed}", "derprop", seed, pictures=False) for seed in (2, 0, 1)]
    for folder, miou in zip(runs, (40.0, 43.0, 46.0), strict=True):
        set_result(folder, miou=miou)
    other = make_run("s", "supervised", 0, pictures=False)
    set_result(other, miou=37.0)
    path = build_report([*runs, other], tmp_path)
    assert path == tmp_path / "report.html"
    page = path.read_text()
    assert "43.0 ± 3.0" in page  # sample standard deviation of 40, 43, 46
    assert "6.0 points above supervised (standard deviation over seeds: at most 3.0)" in page
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report-table.csv").read_text())))
    assert [(row["name"], row["runs"], row["seeds"]) for row in rows] == [
        ("derprop", "3", "0 1 2"),
        ("supervised", "1", "0"),
    ]
    assert float(rows[0]["miou"]) == pytest.approx(43.0)
    assert float(rows[0]["miou_std"]) == pytest.approx(3.0)
    assert rows[1]["miou_std"] == ""
    assert "iou/star" in rows[0]


def test_groups_of_one_method_are_named_by_their_difference(make_run, tmp_path):
    runs = [
        make_run("a", "derprop", 0, pictures=False),
        make_run("b", "derprop", 0, pictures=False, config={"order": 2}),
        make_run("c", "derprop", 1, pictures=False, config={"order": 2}),
    ]
    page = build_report(runs, tmp_path).read_text()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report-table.csv").read_text())))
    assert [row["name"] for row in rows] == ["derprop order=1", "derprop order=2"]
    assert "<code>method.order</code></th><td>1</td><td>2</td>" in page
    assert "<code>run</code>" not in page


def test_pictures_that_all_runs_share_stand_once(make_run, tmp_path):
    runs = [make_run(method, method) for method in ("supervised", "fixmatch", "derprop")]
    page = build_report(runs, tmp_path).read_text()
    # two val images: image and truth once, three predictions; two unlabeled ones: image and truth once,
    # fixmatch adds pseudo-label, kept and prediction, derprop also the propagated label
    assert page.count("data:image/png;base64,") == 2 * (2 + 3) + 2 * (2 + 3 + 4)


def test_an_unfinished_run_is_marked(make_run, tmp_path):
    page = build_report([make_run("a", steps=600, done=300, pictures=False)], tmp_path).read_text()
    assert "1 of 1 unfinished" in page
    page = build_report([make_run("b", steps=600, pictures=False)], tmp_path).read_text()
    assert "of 1 unfinished" not in page


def test_names_are_escaped(make_run, tmp_path):
    folder = make_run("a", "derprop", pictures=False, config={"note": "<script>alert(1)</script>"})
    result = json.loads((folder / "result.json").read_text())
    set_result(folder, iou=result["iou"] | {"<b>50%_&</b>": 12.0})
    page = build_report([folder], tmp_path).read_text()
    assert "<script" not in page
    assert "<b>50%" not in page
    assert r"<b>50\%\_\&</b> & 12.0 \\" in (tmp_path / "report-table.tex").read_text()


def test_the_best_of_several_is_bold_in_latex(make_run, tmp_path):
    runs = [make_run(method, method, pictures=False) for method in ("supervised", "fixmatch")]
    set_result(runs[0], miou=31.04)
    set_result(runs[1], miou=36.06)
    build_report(runs, tmp_path / "compare.html")
    table = (tmp_path / "compare-table.tex").read_text()
    assert "supervised & 1 & 31.0 & " in table
    assert r"fixmatch & 1 & \textbf{36.1} & " in table
    assert table.count("\\begin{tabular}") == table.count("\\bottomrule") == 2


def test_many_classes_become_a_picture_of_the_matrix(make_run, tmp_path):
    folder = make_run("a", pictures=False)
    matrix = np.eye(40, dtype=int) * 9
    matrix[3, 17] = 4
    confusion = {"classes": [f"c{k}" for k in range(40)], "palette": [[k, 0, 0] for k in range(40)]}
    (folder / "evaluation" / "confusion.json").write_text(json.dumps(confusion | {"matrix": matrix.tolist()}))
    page = build_report([folder], tmp_path).read_text()
    assert "<td title=" not in page
    assert "predicted class, by number" in page
    assert "<b>c3</b> taken for <b>c17</b>: 30.8 %" in page


def test_a_folder_may_be_a_url(make_run, tmp_path):
    folder = make_run("a", pictures=True)
    assert "pictures" in sections(build_report([f"file://{folder}"], tmp_path).read_text())


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda folder: (folder / "config.yaml").unlink(), r"run must be a run folder with a config\.yaml; got "),
        (lambda folder: (folder / "config.yaml").write_text("a: [1"), r"config\.yaml must be as .* writes it; got "),
        (lambda folder: (folder / "config.yaml").write_text("- a"), r"config\.yaml must be .*; got a list at its top"),
        (lambda folder: (folder / "metrics.parquet").write_bytes(b"PAR1"), r"metrics\.parquet must be as "),
        (lambda folder: (folder / "result.json").write_text("{"), r"result\.json must be as "),
        (lambda folder: (folder / "evaluation/confusion.json").write_text('{"classes": []}'), r"confusion\.json must"),
        (lambda folder: (folder / "pictures/00-image.png").unlink(), r"pictures/00-image\.png must be a readable file"),
        (
            lambda folder: (folder / "pictures/pictures.json").write_text(
                '[{"kind": "val", "key": "k", "panels": [{"title": "t", "file": "../config.yaml"}]}]'
            ),
            r"got the file name '\.\./config\.yaml', which leads out of the folder",
        ),
    ],
)
def test_a_folder_that_is_no_run_is_refused_by_name(make_run, tmp_path, break_it, text):
    good, bad = make_run("good", pictures=False), make_run("bad", seed=1)
    break_it(bad)
    with pytest.raises(CheckpointError, match=text) as caught:
        build_report([good, bad], tmp_path)
    assert str(bad) in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_other_mistakes_are_refused(make_run, tmp_path):
    folder = make_run("a", pictures=False)
    with pytest.raises(CheckpointError, match="runs must hold at least one run folder"):
        build_report([], tmp_path)
    with pytest.raises(CheckpointError, match="runs must name each run once"):
        build_report([folder, folder], tmp_path)
    with pytest.raises(CheckpointError, match="run must be a folder that exists; got"):
        build_report([tmp_path / "none"], tmp_path)
    empty = make_run("b", pictures=False, confusion=False, metrics=False, result=False)
    with pytest.raises(CheckpointError, match=r"with neither\. Train it first"):
        build_report([empty], tmp_path)
    with pytest.raises(CheckpointError, match="the report must be writable"):
        build_report([folder], folder / "result.json" / "report.html")
