"""The page of a study: well-formed, self-contained, every method in its tables, and no name taken for markup."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import aniso_ext as aniso
from aniso_ext import diagnostics
from aniso_ext.diagnostics import Origin, Study, StudyOptions
from aniso_ext.diagnostics.intervals import Interval
from aniso_ext.diagnostics.metrics import GAP_METRICS, METHOD_METRICS, Metric

pytestmark = pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")
WIDTH, ROWS = 24, 90
OPTIONS = StudyOptions(k=5, bootstrap=0, oracle_pairs=40, row_pairs=60)
HOSTILE = (
    "<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "{{ 7 * 7 }}{% raw %}", "emoji 🙂 $x_1$ & co",
    "long" * 15, "</style></title>",
)  # fmt: skip
VOID = {"meta", "link", "img", "source", "br", "hr", "input"}


class Page(HTMLParser):
    """A tree walker that refuses what HTML5 refuses of such pages, and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.headings: list[int] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data
        if any(tag in ("td", "th") for tag in self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.tags if found == tag]


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    return aniso.worlds.simulate_gap(ROWS, world=aniso.worlds.GapWorld.small(WIDTH), seed=2)


@pytest.fixture(scope="module")
def study(pairs: tuple[np.ndarray, np.ndarray]) -> Study:
    y, x = pairs
    aligner = aniso.AnisoAlign(rank=8, refine=False).fit(y, x)
    methods = {name: y + 0.01 * place for place, name in enumerate(HOSTILE, 1)}
    names = Origin(HOSTILE[0], HOSTILE[1], f"aniso diagnose --source '{HOSTILE[0]}' ```", {HOSTILE[0]: HOSTILE[5]})
    return diagnostics.study(y, x, methods=methods, frame=aligner.frame_, options=OPTIONS, origin=names)


@pytest.fixture(scope="module")
def html(study: Study) -> str:
    pytest.importorskip("matplotlib", reason="figures need the extra plots")
    return study.to_html()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_it_is_a_document_with_an_outline(html: str, page: Page) -> None:
    assert html.startswith("<!DOCTYPE html>\n<html lang=")
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in zip(page.headings, page.headings[1:], strict=False))
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    anchors = [one["href"][1:] for one in page.all("a")]
    assert set(anchors) <= set(identifiers) and len(anchors) >= 7
    assert {one["aria-labelledby"] for one in page.all("section")} <= set(identifiers)
    assert len(page.all("main")) == len(page.all("h1")) == 1


def test_it_asks_nobody_for_anything(html: str, page: Page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href", "action", "poster", "data", "background"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:")), f"<{tag} {name}={value[:80]}>"
    assert not re.search(r"url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket|import\(", html)
    (policy,) = (one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_every_picture_is_embedded_in_both_themes_and_says_what_it_shows(page: Page) -> None:
    pictures = page.all("img")
    assert len(pictures) == len(page.all("figure")) == len(page.all("figcaption")) == 15
    dark = [one for one in page.all("source") if "prefers-color-scheme: dark" in one["media"]]
    assert len(dark) >= len(pictures)
    for one in pictures:
        assert len(one["alt"].split()) >= 5 and re.search(r"\d|identity", one["alt"])
        assert int(one["width"]) > 0 and int(one["height"]) > 0
        kind, data = one["src"].split(";base64,")
        start = base64.b64decode(data)[:200]
        assert b"<?xml" in start if kind == "data:image/svg+xml" else start.startswith(b"\x89PNG")
    for source in page.all("source"):
        assert " " not in source["srcset"]


def test_svg_pictures_hold_no_script_and_no_address(page: Page) -> None:
    sources = [one["src"] for one in page.all("img")] + [one["srcset"] for one in page.all("source")]
    drawn = [base64.b64decode(one.split(";base64,")[1]).decode() for one in sources if "svg+xml" in one]
    assert drawn
    for text in drawn:
        without_names = re.sub(r'(xmlns(:\w+)?|PUBLIC|rdf:resource)\s*=?\s*"[^"]*"|"http://www.w3.org/[^"]*"', "", text)
        assert "<script" not in text and not re.search(r'(href|src)="(?!#)', without_names)


def test_tables_have_every_method_and_every_number(study: Study, page: Page) -> None:
    names = ["identity", *HOSTILE]
    (methods,) = (table for table in page.tables if table[0][0] == "method" and "R@1" in table[0])
    assert [row[0] for row in methods[1:]] == names
    assert len(methods[0]) == len(METHOD_METRICS) + 2
    for row, report in zip(methods[1:], study.methods.values(), strict=True):
        for text, metric in zip(row[2:], METHOD_METRICS, strict=True):
            assert text == f"{getattr(report, metric.field):.{metric.digits}f}"
    (gap,) = (table for table in page.tables if table[0][0] == "number")
    assert len(gap) == len(GAP_METRICS) + 1
    for row, metric in zip(gap[1:], GAP_METRICS, strict=True):
        assert row[1] == f"{getattr(study.gap, metric.field):.{metric.digits}f}"
    for table in page.tables:
        assert len({len(row) for row in table}) == 1


@pytest.mark.parametrize("metric", [*GAP_METRICS, *METHOD_METRICS], ids=lambda metric: metric.field)
def test_every_metric_is_one_sentence_with_good_and_bad(page: Page, metric: Metric) -> None:
    assert metric.meaning.endswith(".") and metric.meaning.count(". ") == 0
    assert metric.meaning in page.text
    assert metric.good != metric.bad and metric.good and metric.bad


def test_findings_stand_with_their_rules(study: Study, page: Page) -> None:
    plain = "".join(page.text.split()).replace("_", "").lower()
    for finding in study.verdict.findings:
        for text in (finding.sentence, finding.rule):
            for symbol, shown in (("lambda", "λ"), ("eta_U", "ηU"), ("Delta_mu", "Δμ"), ("G_mu", "Gμ")):
                text = text.replace(symbol, shown)
            assert "".join(text.split()).replace("_", "").lower() in plain, finding.topic


def test_names_are_texts_and_never_markup(html: str, page: Page) -> None:
    assert html.count("<script") == 1 and "<img src=x" not in html and "</style></title>" not in html
    assert "{{ 7 * 7 }}{% raw %}" in page.text and "emoji 🙂 $x_1$ & co" in page.text
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert page.all("img") and all(one["src"] != "x" for one in page.all("img"))


def test_markdown_and_notebook_escape_names_too(study: Study) -> None:
    text = study.to_markdown()
    assert "<script>" not in text.split("## To repeat")[0]
    assert study.origin.command in text and "````" in text.split("## To repeat")[1]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(HOSTILE) and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "<script" not in study._repr_html_()


def test_without_figures_there_are_none(study: Study) -> None:
    bare = Page(study.to_html(figures=False))
    assert bare.all("img") == [] and bare.all("picture") == [] and len(bare.tables) >= 6


def test_intervals_are_shown_beside_their_numbers(study: Study) -> None:
    from dataclasses import replace

    gap = replace(study.gap, intervals={"g_mu": Interval(0.123, 0.456)})
    method = replace(study.methods["identity"], intervals={"psi": Interval(0.78, 1.0)})
    text = Page(replace(study, gap=gap, methods={"identity": method}).to_html(figures=False)).text
    assert "0.123 to 0.456" in text and "0.780 to 1.000" in text


def test_warnings_stand_in_the_section_of_their_numbers(study: Study) -> None:
    html = study.to_html(figures=False)
    assert study.gap.warnings and study.methods[HOSTILE[2]].warnings
    section = html.split('<section id="gap"')[1].split("</section>")[0]
    assert "few for width 24" in section and "not unit vectors" not in section
    assert "not unit vectors" in html.split('<section id="stand-ins"')[1].split("</section>")[0]


def test_a_comparison_sets_studies_side_by_side(
    study: Study, pairs: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra plots")
    other = diagnostics.study(pairs[1], pairs[0], options=StudyOptions(k=5, bootstrap=0, oracle=False, rows=False))
    text = diagnostics.compare({HOSTILE[0]: study, "other": other}).to_html()
    page = Page(text)
    assert text.count("<script") == 1 and len(page.all("img")) == 4
    outcomes, _, gaps, methods, _ = page.tables
    assert outcomes[0] == [*gaps[0][:0], "topic", HOSTILE[0], "other"]
    shown = {row[0]: row[1:] for row in outcomes[1:]}
    assert shown["premise"] == [study.verdict["premise"].outcome, other.verdict["premise"].outcome]
    assert shown["headroom"][1] == "–"
    (g_mu,) = (row for row in gaps if row[0] == "Gμ")
    assert g_mu[1:] == [f"{study.gap.g_mu:.3f}", f"{other.gap.g_mu:.3f}"]
    assert len(methods) == 1 + len(study.methods) + len(other.methods)


def test_the_files_of_the_page_are_installed_with_the_package() -> None:
    text = (Path(aniso.__file__).parents[1] / "pyproject.toml").read_text()
    suffixes = {path.suffix for path in Path(aniso.__file__).parent.glob("diagnostics/html/*") if path.is_file()} - {
        ".py"
    }
    assert all(f'"*{suffix}"' in text for suffix in suffixes)
