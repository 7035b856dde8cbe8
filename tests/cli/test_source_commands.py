"""Outside sources from the command line: inert text, a kill in the middle, two at once, slips."""

import json
import time
from pathlib import Path

import pytest

from npo_cli.storage.guide_cache import read_guide_prompts
from tests.helpers.cli_errors import SMALL, assert_refused, copy_run, json_rows, npo
from tests.helpers.runs import open_session_at
from tests.helpers.teachers import correct_response, correct_rows, write_traces
from tests.helpers.warm_process import ForkServer, start_fork_server, wait_until
from tests.inference.openai_server import run_server

QUICK = ("scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=20", "guide.inject.max_accuracy=1")
HOSTILE = "\x1b[31mtr\u202eaces"


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("short_run") / "run"
    assert npo("train", "micro", root, *SMALL).code == 0
    return root


@pytest.fixture(scope="module")
def warm():
    with start_fork_server() as process:
        yield process


def test_trace_file_with_control_characters_is_shown_as_text(short_run, tmp_path):
    run = copy_run(short_run, tmp_path)
    prompts = open_session_at(run, 0).task.train
    rows = correct_rows(prompts)
    rows[0]["response"] = f"\x1b[2J</s>{rows[0]['response']}"
    rows += [{"prompt_id": f"x{HOSTILE}", "response": "1"}, {"prompt_id": prompts[0].prompt_id, "response": 1}]
    path = write_traces(tmp_path / f"{HOSTILE}.jsonl", rows)
    result = npo("sample-guide", run, "--source", f"file:{path}", "--at", "0", "--name", "given")
    assert result.code == 0
    shown = npo("show", run, "guides", "--full")
    for text in (result.out, result.err, shown.out):
        assert "\x1b" not in text and "\u202e" not in text
    assert "\\x1b[31mtr\\u202eaces.jsonl" in shown.out
    assert "rows cannot be used" in result.err
    replayed = npo(
        "resume", run, "--at", "0", "--guide", "given", "guide.inject.ratio=unit", "guide.inject.max_accuracy=1"
    )
    assert replayed.code == 0
    rollouts = npo("show", run, "rollouts", "--branch", "given", "--step", "1").out
    assert "teacher" in rollouts and "\x1b" not in rollouts


def test_guide_sources_are_shown_with_their_origin(short_run, tmp_path):
    run = copy_run(short_run, tmp_path)
    path = write_traces(tmp_path / "traces.jsonl", correct_rows(open_session_at(run, 0).task.train))
    arguments = ("sample-guide", run, "--at", "0", "--steps", "2")
    assert npo(*arguments, "--source", f"file:{path}").code == 0
    assert npo(*arguments, "--source", "model:micro-base", "--json").code == 0
    guides = json_rows(npo("show", run, "guides", "--json").out)
    assert [(each["name"], each["source"]["text"]) for each in guides] == [
        ("main-0-by-file", f"file:{path}"),
        ("main-0-by-model", "model:micro-base"),
    ]


def test_score_checkpoints_of_sources_as_tables_and_as_json(short_run, tmp_path):
    run = copy_run(short_run, tmp_path)
    options = ("--at", "0", "--candidates", "2,4", "--source", "self")
    table = npo("score-checkpoints", run, *QUICK, *options, "--figure", tmp_path / "s.svg")
    assert (table.code, table.out.splitlines().count("Guide candidates")) == (0, 1)
    assert (tmp_path / "s.svg").exists()
    lines = json_rows(npo("score-checkpoints", run, *QUICK, *options, "--json").out)
    *scores, choice = lines
    assert [(line["record"], line["candidate"], line["step"], line["distance"]) for line in scores] == [
        ("candidate_score", "self", 0, 0),
        ("candidate_score", "checkpoint:2", 2, 2),
        ("candidate_score", "checkpoint:4", 4, 4),
        ("candidate_score", "none", None, 0),
    ]
    assert {"quality", "quality_net_low", "variance", "signal", "price", "value"} <= scores[0].keys()
    (selected,) = [line["candidate"] for line in scores if line["is_selected"]]
    assert choice["record"] == "guide_choice"
    assert choice["chosen"] == (None if selected == "none" else selected)


def test_no_guide_wins_and_sample_guide_refuses_to_choose_one(short_run, tmp_path):
    """The only candidate is the learner itself, which adds nothing to its own second try."""
    run = copy_run(short_run, tmp_path)
    command = ("score-checkpoints", run, "--at", "0", "--source", "self", *QUICK)
    why = "no candidate is shown to solve more than the learner's own second try (the best, self: +0.000 ["
    table = npo(*command).out
    sentence = " ".join(table.partition("\n\n")[0].splitlines())
    assert sentence.startswith(f"no guide is worth it here, for step 0 of main: {why}")
    assert sum(line.startswith("* none ") for line in table.splitlines()) == 1
    assert (
        sum(line.startswith("none ") and "<- selected" in line for line in npo(*command, "--full").out.splitlines())
        == 1
    )
    choice = json_rows(npo(*command, "--json").out)[-1]
    assert (choice["record"], choice["chosen"], choice["reason"].startswith(why)) == ("guide_choice", None, True)
    refused = assert_refused("sample-guide", run, "--at", "0", beside=tmp_path)
    assert refused.message.startswith(f"the newest scoring of step 0 selects no guide: {why}")
    assert refused.hint.startswith("name one with --source SPEC")
    assert npo("sample-guide", run, "--at", "0", "--source", "self", "--steps", "2").code == 0


def test_sample_guide_without_a_source_takes_the_choice_of_the_newest_scoring(short_run, tmp_path):
    run = copy_run(short_run, tmp_path)
    assert npo("score-checkpoints", run, "--at", "0", "--candidates", "2,4", *QUICK).code == 0
    (path,) = run.glob("scores/*/scores.json")
    saved = json.loads(path.read_text())
    for entry in saved["scores"]:
        entry["is_selected"] = entry["candidate"] == "checkpoint:4"
    path.write_text(json.dumps(saved))
    (info,) = json_rows(npo("sample-guide", run, "--at", "0", "--json").out)
    assert info["source"]["text"] == "checkpoint:4"


def slow_teacher(prompts):
    by_text = {prompt.text: prompt for prompt in prompts}

    def say(body: dict) -> dict:
        time.sleep(0.02)
        return {"text": correct_response(by_text[body["prompt"]]), "finish_reason": "stop"}

    return say


@pytest.mark.slow
def test_killed_endpoint_sampling_resumes_to_the_same_bytes(short_run, tmp_path, warm: ForkServer):
    straight, broken = (copy_run(short_run, tmp_path / name) for name in ("straight", "broken"))
    with run_server(slow_teacher(open_session_at(short_run, 0).task.train)) as served:
        options = ("--source", f"endpoint:{served.url}#teacher", "--at", "0", "--name", "given")
        options += ("guide.cache.prompts=all", "guide.cache.select=shortest")  # 8 requests per prompt
        assert npo("sample-guide", straight, *options).code == 0
        child = warm.npo("sample-guide", str(broken), *options, err=tmp_path / "err")
        before = len(served.bodies)
        wait_until(lambda: len(served.bodies) > before + 4)
        second = npo("sample-guide", broken, *options)
        assert (second.code, f"in use by process {child.pid}" in second.message) == (2, True)
        child.kill()
        assert child.wait() == -9
        assert len(read_guide_prompts(broken / "guides" / "given")) < 16
        assert npo("sample-guide", broken, *options).code == 0
    one, other = ((root / "guides/given/rollouts.jsonl").read_bytes() for root in (straight, broken))
    assert one == other


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("endpoint:localhost:8000#m", "localhost:8000 is not a URL"),
        ("endpoint:http://127.0.0.1:8000/v1", "source 'endpoint' needs model"),
        ("file:nowhere.jsonl", "there is no file of traces nowhere.jsonl"),
        ("self:2", "source 'self' takes no argument, got '2'"),
        ("past", "the learner at step 0 has no earlier rollouts"),
        ("run:nowhere", "there is no run directory nowhere"),
        ("model:./nowhere", "--source model:./nowhere cannot be loaded: "),
    ],
)
def test_bad_source_is_refused(short_run, tmp_path, source, message):
    run = copy_run(short_run, tmp_path)
    result = assert_refused("sample-guide", run, "--at", "0", "--source", source, beside=tmp_path)
    assert result.message.startswith(message)
    assert result.hint
