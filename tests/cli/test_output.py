import io
import json
import math
from collections.abc import Iterator

import pytest

from npo_cli.cli.output import print_records, to_json_line
from npo_cli.cli.terminal import escape_for_terminal, print_status
from npo_cli.types.costs import CostToThreshold
from npo_cli.types.rollouts import Notice, Progress, StepReport
from npo_cli.types.views import RolloutView
from tests.report.samples import FAR_SCORE, SCORE, rollout


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain 文字 é", "plain 文字 é"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\x9b2J\x07\x00\x7f", "\\x9b2J\\x07\\x00\\x7f"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("\u2028\ud800", "\\u2028\\ud800"),
        ("[red]markup[/red] :smile:", "[red]markup[/red] :smile:"),
    ],
)
def test_control_and_direction_characters_are_spelled_out(text, shown):
    assert escape_for_terminal(text) == shown


def test_a_steps_metrics_and_timings_stand_beside_its_place():
    report = StepReport(branch="main", step=3, metrics={"reward": 0.5}, timings={"seconds": 1.5})
    assert json.loads(to_json_line(report)) == {
        "record": "step_report", "branch": "main", "step": 3, "reward": 0.5, "seconds": 1.5
    }  # fmt: skip


def test_a_score_prints_every_field_under_its_own_name():
    line = json.loads(to_json_line(SCORE))
    wanted = "step distance quality quality_low quality_high variance variance_kind signal signal_low signal_high"
    assert {*wanted.split(), "p_best", "num_prompts", "num_samples", "is_selected"} <= set(line)
    assert (line["step"], line["signal"], line["is_selected"], line["variances"]["seq2"]) == (100, 0.125, True, 30.0)


def test_what_json_cannot_say_becomes_null():
    report = StepReport(branch="main", step=1, metrics={"a": math.nan, "b": math.inf}, timings={})
    assert json.loads(to_json_line(report)) == {
        "record": "step_report",
        "branch": "main",
        "step": 1,
        "a": None,
        "b": None,
    }


def stream() -> Iterator[object]:
    yield Notice(message="hello")
    yield Progress(description="work", done=1, total=2)
    yield SCORE
    yield Notice(message="careful", level="warning")
    yield FAR_SCORE


def test_json_is_one_object_a_line_on_stdout_and_talk_is_on_stderr(capsys):
    print_records(stream(), as_json=True)
    out, err = capsys.readouterr()
    assert [json.loads(line)["step"] for line in out.splitlines()] == [100, 140]
    assert err == "hello\nwork 1/2\nwarning: careful\n"


def test_without_json_stdout_holds_the_tables_and_nothing_else(capsys):
    print_records(stream(), as_json=False)
    out, err = capsys.readouterr()
    assert out.startswith("Candidate guides\nstep  distance")
    assert "hello" not in out
    assert "Candidate" not in err


def test_json_lines_come_as_the_records_do(capsys):
    def watched() -> Iterator[object]:
        yield SCORE
        assert len(capsys.readouterr().out.splitlines()) == 1
        yield FAR_SCORE

    print_records(watched(), as_json=True)


def test_a_reader_that_leaves_lets_the_stage_clean_up(monkeypatch):
    closed = []

    def stage() -> Iterator[object]:
        try:
            yield SCORE
            yield FAR_SCORE
        finally:
            closed.append(True)

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone())
    with pytest.raises(BrokenPipeError):
        print_records(stage(), as_json=True)
    assert closed == [True]


def test_steps_read_from_a_file_move_no_bar(capsys):
    print_records([StepReport(branch="main", step=1, metrics={"reward": 1.0}, timings={})], as_json=False)
    out, err = capsys.readouterr()
    assert "main" in out
    assert err == ""


def test_model_output_reaches_the_screen_without_its_escapes_or_markup(capsys):
    nasty = rollout(0, reward=0.0, text="\x1b]0;title\x07[bold]x[/bold]\nnext")
    print_records(
        [RolloutView(branch="main", step=1, prompt_text="q", reference_answer="a", rollout=nasty)], as_json=False
    )
    out = capsys.readouterr().out
    assert "\\x1b]0;title\\x07[bold]x[/bold]\\nnext" in out
    assert "\x1b" not in out


def test_a_threshold_never_reached_is_null_in_json():
    line = to_json_line(CostToThreshold(name="GRPO", threshold=0.9, step=None, total_steps=None, total_tokens=None))
    assert line == (
        '{"record": "cost_to_threshold", "name": "GRPO", "threshold": 0.9, "step": null, "total_steps": null, '
        '"total_tokens": null, "total_seconds": null, "total_forwards": null}'
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"TERM": "xterm"}, "\x1b[31merror\x1b[0m\n"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, "error\n"),
        ({"TERM": "dumb"}, "error\n"),
    ],
)
def test_colour_only_on_a_terminal_that_wants_it(monkeypatch, environment, shown):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    print_status("error", style="31")
    assert terminal.getvalue() == shown
