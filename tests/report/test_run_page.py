"""`npo report` on real runs: what is in the page, what is refused, and that a run is only read."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from npo_cli.errors import NpoError, RunFailed
from npo_cli.report.build import write_report
from npo_cli.report.prompt_history import (
    NUM_SAMPLES,
    GroupOutcome,
    pick_evenly_spaced,
    prompt_outcomes_table,
    select_prompts,
)
from npo_cli.report.run_page import build_curves, collect_branch_spans
from npo_cli.report.run_summary import describe_worth, list_commands, summarize_in_words
from npo_cli.storage.bench_dir import save_bench_index
from npo_cli.storage.layout import create_run, head_path, open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.rollouts import Group
from tests.helpers.runs import copy_run, file_digests, resume, score, train
from tests.report.html_parsing import ParsedPage
from tests.report.test_html import HOSTILE


@pytest.fixture(scope="module")
def guided(scout, tmp_path_factory) -> Path:
    """4 steps on main, evaluated; a scoring; steps 3 and 4 again as `near` with a guide in every group it can."""
    root = copy_run(scout, tmp_path_factory.mktemp("guided") / "a run é")
    resume(root, "guide.inject.max_accuracy=1.0", "eval.every=1", at=2, guide="near")
    score(root, "scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=50", "guide.inject.max_accuracy=1.0", at=2)
    return root


def reported(*roots: Path, out: Path, pictures: Path | None = None) -> ParsedPage:
    list(write_report(roots, out, plots_folder=pictures))
    return ParsedPage(out.read_text(encoding="utf-8"))


def chapters(found: ParsedPage) -> list[str]:
    """Links to whole runs, without those to their parts."""
    links = [value for _, name, value in found.attributes if name == "href"]
    assert set(links) <= {f"#{value}" for _, name, value in found.attributes if name == "id"}
    return [link for link in links if link.count("-") == 1]


def captions(found: ParsedPage) -> list[str]:
    return [line for line in found.texts if line.strip()]


def test_report_page_shows_all_parts_of_a_run(guided, tmp_path):
    found = reported(guided, out=tmp_path / "new" / "r.html")
    assert found.problems == []
    page_captions = captions(found)
    for title in (
        *("npo report: a run é", "Held-out accuracy", "Training", "Lineage", "Candidate guides for step 2 of main"),
        *("Costs", "Everything executed", "Prompts and responses", "Recipe in full"),
    ):
        assert title in page_captions, title
    assert "num_steps: 4" in found.text
    # 4 curves, reward and entropy and two of the guide's, the tree, Q and V and S
    assert found.elements["img"] == 4 + 4 + 1 + 3
    assert 0 < found.elements["article"] <= NUM_SAMPLES
    assert "AutoNPO" not in page_captions


def test_report_page_shows_autonpo_decisions(watched, tmp_path):
    page_captions = captions(reported(watched, out=tmp_path / "r.html"))
    assert "What AutoNPO did" in page_captions
    assert {"Probe at step 6: probe accepted", "Probe at step 8: probe accepted"} <= set(page_captions)


@pytest.mark.slow
def test_several_runs_begin_with_an_overview(guided, watched, tmp_path):
    found = reported(guided, watched, out=tmp_path / "r.html", pictures=tmp_path / "p")
    page_captions = captions(found)
    assert page_captions.index("Overview") < page_captions.index("Side by side") < page_captions.index("Costs")
    assert chapters(found) == [f"#section-{n}" for n in (1, 2, 3)]
    saved = {path.name for path in (tmp_path / "p").iterdir()}
    assert {"overview-accuracy-by-step.svg", "run-1-lineage.png", "run-2-lineage.svg"} <= saved
    # every picture of the page, once of each kind and under a name of its own
    assert len(saved) == 2 * found.elements["img"]


def test_report_of_a_bench_folder_shows_its_runs(guided, watched, tmp_path):
    home = tmp_path / "bench"
    for name, run in (("grpo", guided), ("auto", watched)):
        copy_run(run, home / name)
    save_bench_index(home, [(name, home / name) for name in ("grpo", "auto")])
    found = reported(home, out=tmp_path / "r.html")
    assert chapters(found) == [f"#section-{n}" for n in (1, 2, 3)]


@pytest.mark.slow
def test_report_is_deterministic_and_changes_no_run(guided, tmp_path):
    before = file_digests(guided)
    for name in ("a.html", "b.html", "a.html"):
        reported(guided, out=tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert file_digests(guided) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_report_curve_of_a_branch_starts_at_its_first_evaluation(guided):
    run = open_run(guided)
    (near,) = [curve for curve in build_curves(run) if curve.points[0].name == "near"]
    # Step 2 was not evaluated, so its first point is step 3: no diamond without a measurement.
    assert [point.step for point in near.points] == [3, 4]
    assert (near.is_fork, near.guide_until) == (False, 4)
    # 4 steps of main, guide and scoring paid, and one of its own
    assert near.points[0].total_steps == 5


def test_limbs_tell_what_is_kept(guided):
    main, near = collect_branch_spans(open_run(guided), "near")
    assert (main.fork_step, main.last_step, main.lineage_until) == (0, 4, 2)
    assert (near.fork_step, near.last_step, near.lineage_until) == (2, 4, 4)
    assert (near.parent, near.guide_cache, near.guide_step, near.guide_until) == ("main", "near", 4, 4)
    main, near = collect_branch_spans(open_run(guided), "main")
    assert (main.lineage_until, near.lineage_until) == (4, None)


def test_hostile_rollouts_of_a_real_run_are_text(guided, tmp_path):
    root = copy_run(guided, tmp_path / "run")
    log_path = open_run(root).rollouts_path("near")
    steps = {step: RolloutLog(log_path).read_step(step) for step in (3, 4)}
    log_path.unlink()
    head_path(log_path).unlink()
    for step, groups in steps.items():
        RolloutLog(log_path).write_step(step, [hostile(group) for group in groups])
    calm = reported(guided, out=tmp_path / "calm.html")
    found = reported(root, out=tmp_path / "hostile.html")
    # Answers are no longer told apart, so there are fewer boxes; but no element of a new kind.
    assert found.elements.keys() == calm.elements.keys()
    assert found.problems == []
    assert "<script>alert(1)</script>" in found.text
    assert "\\x1b[2J\\x1b]0;owned\\x07\\u202e" in found.text
    assert not set((tmp_path / "hostile.html").read_text()) & set("\x1b\x07\u202e\x00")


def hostile(group: Group) -> Group:
    return replace(group, rollouts=tuple(replace(rollout, text=HOSTILE) for rollout in group.rollouts))


def test_report_of_a_run_without_steps_has_a_page(tmp_path):
    root = tmp_path / "run"
    train(root, until=0)
    page_captions = captions(reported(root, out=tmp_path / "r.html"))
    assert "No checkpoint has been evaluated: run npo eval RUN --all." in page_captions
    assert "Training" not in page_captions


def fake_browser(tmp_path_factory, script: str = "exit 3") -> Path:
    """A folder for PATH with a `chromium` that does what the script says."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "chromium").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "chromium").chmod(0o755)
    return folder


def test_pdf_without_a_browser_is_refused_before_anything_is_read(guided, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NpoError, match="a PDF needs Chromium or Chrome") as refused:
        list(write_report([guided], tmp_path / "r.pdf", plots_folder=None))
    assert "r.html" in refused.value.hint
    assert not list(tmp_path.iterdir())


def test_pdf_of_a_browser_that_fails_is_an_error(guided, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PATH", str(fake_browser(tmp_path_factory, "echo no display >&2; exit 3")))
    with pytest.raises(RunFailed, match="printed no PDF: no display"):
        list(write_report([guided], tmp_path / "r.pdf", plots_folder=None))
    assert not list(tmp_path.iterdir())


def test_summary_says_what_each_branch_brought_and_how_to_make_it_again(guided):
    run = open_run(guided)
    lines = {line.label: line.text for line in summarize_in_words(run, "near")}
    assert list(lines) == ["Trained", "Best checkpoint", "Branch main", "Branch near", "Worth it?"]
    assert "2 branches, 6 updates" in lines["Trained"]
    (folder,) = re.findall(r"in '?([^']*step_\d{6})", lines["Best checkpoint"])
    assert Path(folder).is_dir()
    assert "forked from main at step 2 with guide near (checkpoint:4) until step 4" in lines["Branch near"]
    # The leading branch has no guide: the other one is judged all the same.
    assert "near" in describe_worth(run, "main")
    train_again, *_, resume_again = list_commands(run)
    assert train_again.startswith("npo train '") and train_again.endswith("-again'")
    assert "--at 2 --guide near --new-branch near" in resume_again
    assert "guide.inject.max_accuracy=1.0" in resume_again
    assert any("npo sample-guide" in command and "--source checkpoint:4" in command for command in list_commands(run))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("r.txt", "a report ends in .html or .pdf"),
        ("mine.pdf", "exists and is not a report of npo"),
        ("folder.html", "folder.html is a folder"),
        ("mine.html", "exists and is not a report of npo"),
    ],
)
def test_report_does_not_overwrite_other_files(guided, tmp_path, tmp_path_factory, monkeypatch, out, message):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "mine.html").write_text("<p>my own page</p>")
    (tmp_path / "mine.pdf").write_text("my own PDF")
    monkeypatch.setenv("PATH", str(fake_browser(tmp_path_factory)))
    with pytest.raises(NpoError, match=re.escape(message)):
        list(write_report([guided], tmp_path / out, plots_folder=None))
    assert (tmp_path / "mine.html").read_text() == "<p>my own page</p>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "mine.html", "mine.pdf"]


def test_report_of_unreadable_runs_is_refused_before_writing(guided, tmp_path):
    empty = create_run(tmp_path / "empty", recipe={"name": "x"}, npo_version="0").root
    for roots, message in (
        ([guided, guided / "." / ""], "was given twice"),
        ([guided, tmp_path / "nowhere"], "there is no run directory"),
        ([empty], "nothing was trained in"),
    ):
        with pytest.raises(NpoError, match=message):
            list(write_report(roots, tmp_path / "r.html", plots_folder=None))
    damaged = copy_run(guided, tmp_path / "damaged")
    with (damaged / "evals.jsonl").open("a") as file:  # a killed command's line
        file.write(json.dumps({"branch": "main"}) + "\n")
    with pytest.raises(NpoError, match=r"evals\.jsonl, line \d+ is damaged"):
        list(write_report([damaged], tmp_path / "r.html", plots_folder=None))
    assert not (tmp_path / "r.html").exists()


# Which prompts are shown


def mark(step: int, *, right: int = 0, injected: bool = False) -> GroupOutcome:
    return GroupOutcome(prompt_id="", step=step, num_rollouts=8, num_correct=right, has_guide=injected)


def test_report_samples_are_spread_over_steps_with_injection():
    marks = {f"p{step}": [mark(step, injected=step > 3)] for step in range(1, 14)}
    # Ten were guided, from step 4 to 13: places 0, 3, 6 and 9 of them.
    assert select_prompts(marks) == ["p4", "p7", "p10", "p13"]
    # Without any guide: those of the newest step.
    plain = {"old": [mark(1)], "new": [mark(1), mark(9)], "newer": [mark(9)]}
    assert select_prompts(plain) == ["new", "newer"]
    assert (select_prompts({}), pick_evenly_spaced([1, 2, 3])) == ([], [1, 2, 3])


def test_fates_tell_what_followed_a_guide():
    marks = {
        "taught": [mark(1), mark(5, injected=True), mark(9, right=2)],
        "knew": [mark(1, right=1), mark(5, injected=True)],
        "never": [mark(1), mark(5, injected=True), mark(9)],
        "alone": [mark(1, right=1)],
        "lost": [mark(1, right=8), mark(5, right=8), mark(9, right=7), mark(12, right=6)],
    }
    table = prompt_outcomes_table("late", marks)
    # Of the two visits after an all-correct one the second was not all correct.
    assert [number for _, number in table.rows] == ["5", "4", "2", "1", "3", "2", "2", "1"]
