"""Rows of traces and the prompts that they answer."""

import json
from pathlib import Path

import pytest

from npo_cli.config.recipe import TaskSettings
from npo_cli.tasks.traces import read_traces
from npo_cli.types.rollouts import Message, Prompt

SETTINGS = TaskSettings(source="file", path="x.jsonl", chat=True, system="Be brief.", suffix="Show your work.")
CHAT = Prompt(
    prompt_id="rows/000000",
    answer="2",
    messages=(
        Message(role="system", content="Be brief."),
        Message(role="user", content="1+1?\nShow your work."),
    ),
)
PLAIN = Prompt(prompt_id="rows/000001", answer="4", text="2+2=")


def read(folder: Path, *rows: object, prompts=(CHAT, PLAIN)):
    path = folder / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_traces(path, prompts, SETTINGS)


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt_id": "rows/000000"},
        {"prompt": "1+1?"},  # as the data file has it
        {"prompt": [{"role": "user", "content": "1+1?"}]},
        {"prompt": [{"role": turn.role, "content": turn.content} for turn in CHAT.messages]},  # as the task has it
    ],
)
def test_trace_matches_a_prompt_by_id_text_or_messages(tmp_path, asked):
    found = read(tmp_path, asked | {"response": "two"})
    assert {name: [trace.text for trace in traces] for name, traces in found.by_prompt.items()} == {
        CHAT.prompt_id: ["two"]
    }


@pytest.mark.parametrize("prompt", ["1+1", "1+1? ", "2+2=\n"])
def test_trace_prompt_must_match_exactly(tmp_path, prompt):
    found = read(tmp_path, {"prompt": prompt, "response": "two"})
    assert (found.by_prompt, found.unmatched_rows) == ({}, [f"{tmp_path / 'traces.jsonl'} line 1"])


def test_trace_integer_id_is_read_as_text(tmp_path):
    numbered = Prompt(prompt_id="17", answer="4", text="2+2=")
    found = read(
        tmp_path, {"prompt_id": 17, "response": "four"}, {"prompt_id": True, "response": "4"}, prompts=(numbered,)
    )
    assert list(found.by_prompt) == ["17"]
    assert len(found.invalid_rows) == 1


def test_trace_id_takes_precedence_over_the_text(tmp_path):
    found = read(tmp_path, {"prompt_id": PLAIN.prompt_id, "prompt": "1+1?", "response": "four"})
    assert list(found.by_prompt) == [PLAIN.prompt_id]


def test_trace_of_a_repeated_question_matches_every_prompt(tmp_path):
    again = Prompt(prompt_id="rows/000002", answer="4", text="2+2=")
    found = read(tmp_path, {"prompt": "2+2=", "response": "four"}, prompts=(PLAIN, again))
    assert list(found.by_prompt) == ["rows/000001", "rows/000002"]


def test_trace_token_ids_take_precedence_over_the_text(tmp_path):
    row = {"prompt_id": PLAIN.prompt_id, "response": "four", "response_ids": [4, 15], "logps": [-0.5, 0]}
    (trace,) = read(tmp_path, row).by_prompt[PLAIN.prompt_id]
    assert (trace.text, trace.response_ids, trace.logps) == (None, (4, 15), (-0.5, 0.0))


@pytest.mark.parametrize(
    "row",
    [
        {"response_ids": []},
        {"response_ids": [True]},
        {"response_ids": [1.5]},
        {"response_ids": [-1]},
        {"response_ids": "12"},
        {"response_ids": [1], "logps": ["-1"]},
        {"response_ids": [1], "logps": -1},
        {"response_ids": [1], "logps": [1e400]},
        {"response": ["two"]},
        {"response": None},
    ],
)
def test_trace_invalid_row_is_reported(tmp_path, row):
    text = json.dumps({"prompt_id": PLAIN.prompt_id} | row).replace("Infinity", "1e400")
    (tmp_path / "traces.jsonl").write_text(text + "\n")
    found = read_traces(tmp_path / "traces.jsonl", (CHAT, PLAIN), SETTINGS)
    assert found.by_prompt == {}
    (bad,) = found.invalid_rows
    assert bad.startswith(f"{tmp_path / 'traces.jsonl'} line 1: ")
