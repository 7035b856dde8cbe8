import struct
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from npo_cli.report.autonpo_plot import (
    LETTER_WIDTH,
    StepRange,
    iter_cooldowns,
    iter_rollbacks,
    iter_step_labels,
    place_labels,
    plot_autonpo,
)
from tests.report.autonpo_samples import intervention_transitions, make_readings, make_transition


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_autonpo_plot_has_a_band_for_each_sequence(tmp_path):
    bands = [("simulated", intervention_transitions(120, to=40)), ("recorded", [])]
    plot_autonpo(make_readings(300), bands[:1], tmp_path / "one.png", title="a run")
    plot_autonpo(make_readings(300), bands, tmp_path / "two.svg", title="a run")
    # 13 inches by 6 + 0.9 for a band, 150 dots per inch
    assert png_size(tmp_path / "one.png") == (1950, 1035)
    drawn = (tmp_path / "two.svg").read_text(encoding="utf-8")
    for text in ("simulated", "recorded", "120 back to 40", "118", "warning", "trigger", "rollback", "cooldown"):
        assert f"<!-- {text} -->" in drawn, text
    assert "<!-- no lasting replay -->" not in drawn


def test_autonpo_plot_marks_the_window_of_a_rung(tmp_path):
    window = {"rung": "mistakes", "to_step": 120, "until_step": 140}
    refused = make_transition(120, "rung_refused", "FORECAST", before="FORECAST", rung="guide", reason="no")
    moves = [refused, make_transition(120, "rung_applied", "WINDOW", before="APPLY", **window)]
    plot_autonpo(make_readings(300), [("recorded", moves)], tmp_path / "one.svg", title="a run")
    drawn = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert "<!-- window of a rung -->" in drawn
    assert "<!-- 120 mistakes -->" in drawn
    # another rung followed
    assert "refused" not in drawn


def test_autonpo_plot_of_one_step_without_transitions(tmp_path):
    plot_autonpo(make_readings(1), [("simulated", [])], tmp_path / "a.png", title="")
    plot_autonpo(make_readings(3)[2:], [("simulated", [])], tmp_path / "b.png", title="no signal at all")
    assert png_size(tmp_path / "a.png") == png_size(tmp_path / "b.png")


def test_autonpo_plot_finds_cooldowns_and_rollbacks():
    transitions = [
        *intervention_transitions(120, to=40),
        make_transition(200, "probe_rejected", "COOLDOWN", before="PROBE"),
    ]
    assert list(iter_cooldowns(transitions)) == [StepRange(first=120, last=160), StepRange(first=200, last=240)]
    assert list(iter_rollbacks(transitions)) == [(120, StepRange(first=40, last=40))]
    assumed = make_transition(120, "rolled_back", "REPLAY", before="ROLLBACK", to=40, to_steps=[40, 60, 100])
    assert list(iter_rollbacks([assumed])) == [(120, StepRange(first=40, last=100))]


def test_autonpo_plot_labels_each_step_once():
    transitions = [
        *(
            make_transition(31, "warning"),
            make_transition(40, "warning"),
            make_transition(40, "trigger"),
            make_transition(40, "probe_rejected", "COOLDOWN"),
        ),
        *(make_transition(90, "warning"), make_transition(90, "limit_reached")),
    ]
    assert list(iter_step_labels(transitions)) == [(31, "31", 2), (40, "40 rejected", 1), (90, "90 limit", 1)]


def test_autonpo_plot_label_without_room_to_the_left_begins_at_its_step():
    axis = StepRange(first=0, last=1000)
    assert [side for *_, side in place_labels([(5, "5 limit", 1), (500, "500 limit", 1)], axis=axis)] == [
        "left",
        "right",
    ]


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2)), max_size=40))
def test_autonpo_plot_labels_never_overlap(marks):
    labels = [(float(at), f"{at} back to {at}" if rank == 0 else str(at), rank) for at, rank in marks]
    axis = StepRange(first=0, last=300)
    found = list(place_labels(labels, axis=axis))
    spans = []
    for at, height, text, side in found:
        long = LETTER_WIDTH * 300 * (len(text) + 2)
        spans.append((height, at - long, at) if side == "right" else (height, at, at + long))
    for place, (height, left, right) in enumerate(spans):
        assert all(height != other or right <= start or end <= left for other, start, end in spans[place + 1 :])
    assert bool(found) == bool(labels)
    if labels:
        first = min(labels, key=lambda named: named[2])
        assert found[0][0] == first[0] and found[0][2] == first[1]
