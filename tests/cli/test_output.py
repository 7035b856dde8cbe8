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
def test_control_and_direction_characters_are_escaped(text, shown):
    assert escape_for_terminal(text) == shown


def test_json_of_a_step_has_metrics_and_timings_beside_branch_and_step():
    report = StepReport(branch="main", step=3, metrics={"reward": 0.5}, timings={"seconds": 1.5})
    assert json.loads(to_json_line(report)) == {
        "record": "step_report", "branch": "main", "step": 3, "reward": 0.5, "seconds": 1.5
    }  # fmt: skip


def test_json_of_a_score_has_every_field():
    line = json.loads(to_json_line(SCORE))
    wanted = "step distance quality quality_low quality_high variance variance_kind signal signal_low signal_high"
    assert {*wanted.split(), "p_best", "num_prompts", "num_samples", "is_selected"} <= set(line)
    assert (line["step"], line["signal"], line["is_selected"], line["variances"]["seq2"]) == (100, 0.125, True, 30.0)


def test_json_has_null_for_nan_and_infinity():
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


def test_json_is_on_stdout_and_status_on_stderr(capsys):
    print_records(stream(), as_json=True)
    out, err = capsys.readouterr()
    assert [json.loads(line)["step"] for line in out.splitlines()] == [100, 140]
    assert err == "hello\nwork 1/2\nwarning: careful\n"


def test_without_json_stdout_has_only_tables(capsys):
    print_records(stream(), as_json=False)
    out, err = capsys.readouterr()
    assert out.startswith("Guide candidates\n ")
    assert "hello" not in out
    assert "candidate" not in err


def test_json_lines_are_printed_as_records_arrive(capsys):
    def watched() -> Iterator[object]:
        yield SCORE
        assert len(capsys.readouterr().out.splitlines()) == 1
        yield FAR_SCORE

    print_records(watched(), as_json=True)


def test_closed_pipe_closes_the_generator(monkeypatch):
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


def test_recorded_steps_show_no_progress(capsys):
    print_records([StepReport(branch="main", step=1, metrics={"reward": 1.0}, timings={})], as_json=False)
    out, err = capsys.readouterr()
    assert "main" in out
    assert err == ""


def test_model_output_is_escaped_on_the_terminal(capsys):
    nasty = rollout(0, reward=0.0, text="\x1b]0;title\x07[bold]x[/bold]\nnext")
    print_records(
        [RolloutView(branch="main", step=1, prompt_text="q", reference_answer="a", rollout=nasty)],
        as_json=False,
        full=True,
    )
    out = capsys.readouterr().out
    assert "\\x1b]0;title\\x07[bold]x[/bold]\\nnext" in out
    assert "\x1b" not in out


def test_json_has_null_for_a_threshold_never_reached():
    line = to_json_line(CostToThreshold(name="GRPO", threshold=0.9, step=None, total_steps=None, total_tokens=None))
    assert line == (
        '{"record": "cost_to_threshold", "name": "GRPO", "threshold": 0.9, "is_best_held": false, "step": null, '
        '"total_steps": null, "total_tokens": null, "total_seconds": null, "total_forwards": null, '
        '"total_teacher_tokens": null}'
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
def test_color_only_on_a_color_terminal(monkeypatch, environment, shown):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    print_status("error", style="31")
    assert terminal.getvalue() == shown
