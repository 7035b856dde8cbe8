"""The page as a browser's parser finds it, above all with text that would like to be more than text."""

import re
from dataclasses import replace

import pytest
from jinja2 import UndefinedError

from npo_cli.report.html import TEMPLATE, PromptSample, Section, Subsection, SummaryLine, list_plots, render_page
from npo_cli.report.score_plots import make_score_plots
from npo_cli.report.table import Table
from npo_cli.report.text_sanitizer import MAX_TEXT_CHARS
from tests.report.html_parsing import ParsedPage
from tests.report.prompt_visits import GUIDED, STORY, VISITS
from tests.report.samples import FAR_SCORE, SCORE

HOSTILE = (
    "</pre></style></script><script>alert(1)</script><img src=http://127.0.0.1/x onerror=alert(2)>"
    "\" onload='alert(3)' {{ 7*7 }} {% raw %} <!-- &lt;b&gt; \x1b[2J\x1b]0;owned\x07\u202e\u2066\x00\r\ud800 -->"
)


def section_of(text: str) -> Section:
    """One in which everything that can come from a model or a file says `text`."""
    rollouts = tuple(replace(one, text=text) for one in GUIDED.group.rollouts)
    shown = replace(GUIDED, branch=text, group=replace(GUIDED.group, rollouts=rollouts))
    story = replace(STORY, prompt_id=text, branch=text, prompt_text=text, reference_answer=text)
    table = Table(title=text, header=(text, "n"), rows=((text, "1"),), notes=(text,))
    (picture, *_) = make_score_plots([SCORE, FAR_SCORE], prefix="")
    part = Subsection(
        title=text,
        text=text,
        plots=(replace(picture, alt_text=text),),
        tables=(table,),
        samples=(
            PromptSample(
                history=story,
                turns=(("", text), (text, text)),
                explanation=text,
                visits=(VISITS[0], shown),
                shown_visit=shown,
            ),
        ),
        collapsed_tables=(table,),
        listing=text,
    )
    words = (SummaryLine(label=text, text=text),)
    return Section(title=text, words=words, commands=(text, text), summary=((text, text),), subsections=(part,))


def page_of(text: str) -> str:
    return render_page(text, [section_of(text), section_of(text)])


def test_hostile_text_adds_no_element_and_no_attribute():
    calm, hostile = ParsedPage(page_of("calm".ljust(len(HOSTILE), "."))), ParsedPage(page_of(HOSTILE))
    assert hostile.elements == calm.elements
    assert [(tag, name) for tag, name, _ in hostile.attributes] == [(tag, name) for tag, name, _ in calm.attributes]
    assert calm.problems == hostile.problems == []
    assert not calm.elements.keys() & {"script", "iframe", "link", "object", "form", "base", "svg"}
    assert not [name for _, name, _ in calm.attributes if name.startswith("on")]


def test_hostile_text_is_there_to_be_read():
    text = ParsedPage(page_of(HOSTILE)).text
    assert "</pre></style></script><script>alert(1)</script><img src=http://127.0.0.1/x onerror=alert(2)>" in text
    # The template's own language means nothing in data, and what was escaped before is not read twice.
    assert "{{ 7*7 }} {% raw %} <!-- &lt;b&gt; " in text
    assert "\\x1b[2J\\x1b]0;owned\\x07\\u202e\\u2066\\x00\\r\\ud800" in text


def test_no_character_of_the_page_is_hidden():
    page = page_of(HOSTILE)
    page.encode("utf-8")
    assert not set(page) & set("\x00\x07\x1b\r\u202e\u2066\ud800")


def test_nothing_is_fetched_and_nothing_runs():
    found = ParsedPage(page_of("calm"))
    policy = next(value for tag, name, value in found.attributes if tag == "meta" and value.startswith("default-src"))
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    addresses = [value for _, name, value in found.attributes if name in ("src", "href", "srcset", "action", "data")]
    # links to the two sections, and in each one to its subsection, and a picture
    links = [value for value in addresses if value.startswith("#")]
    assert links == ["#section-1", "#section-2", "#section-1-1", "#section-2-1"]
    assert [value[:26] for value in addresses if value not in links] == ["data:image/svg+xml;base64,"] * 2
    assert "url(" not in TEMPLATE.read_text()
    assert "@import" not in TEMPLATE.read_text()


def test_a_line_of_a_megabyte_is_cut_with_a_note():
    page = page_of("z" * 1_000_000)
    assert f"[... {1_000_000 - MAX_TEXT_CHARS:,} characters left out ...]" in page
    # 45 places in each of two sections, of some 4,030 letters
    assert len(page) < 500_000


def test_the_same_records_give_the_same_page():
    assert page_of("calm") == page_of("calm")


def test_html_figures_have_alt_texts():
    found = ParsedPage(page_of("calm"))
    assert [value for tag, name, value in found.attributes if (tag, name) == ("img", "alt")] == ["calm", "calm"]
    assert [picture.name for picture in list_plots([section_of("calm")])] == ["quality-net"]


def test_html_sample_shows_policy_and_guide_side_by_side():
    text = ParsedPage(render_page("t", [section_of("calm")])).text
    (own,) = re.findall(r"Step 30 of calm, on-policy: \d of \d correct", text)
    assert own.endswith("1 of 3 correct")
    # The rollouts of step 30 are sampled by the policy of step 29: 40 - 29 = 11.
    assert "guide, step 40: 11 steps ahead of the policy" in text
    assert "log-ratio policy / guide -0.375 nats" in text
    assert re.search(r"8: 0/2\s+30: 1/3 G", text)


def test_numbers_stand_to_the_right():
    table = Table(title="t", header=("name", "a", "b"), rows=(("x", "1.5 [1, 2]", "-"), ("y", "-0.2", "3 MB")))
    part = Subsection(title="p", tables=(table,))
    found = ParsedPage(render_page("t", [Section(title="c", summary=(), subsections=(part,))]))
    # a heading and two cells of each of the two columns
    assert [value for tag, name, value in found.attributes if value == "n"] == ["n"] * 6


def test_a_name_that_the_template_lacks_is_an_error():
    with pytest.raises(UndefinedError):
        render_page("t", [Subsection(title="no section")])
