"""Curves of braille dots: where the dots are, and what stands beside them."""

import math

from npo_cli.report.terminal_plot import LABEL_WIDTH, Curve, Line, draw_curves


def text_of(line: Line) -> str:
    return "".join(text for text, _ in line)


def dots_of(line: Line) -> str:
    return text_of(line)[LABEL_WIDTH + 1 :]


def test_a_line_from_corner_to_corner_fills_the_diagonal():
    """Two columns and two lines of characters are 4 x 8 dots: each column of dots has two dots of the line."""
    curve = Curve(name="main", points=[(0, 0.0), (1, 1.0)])
    heading, top, bottom, _ = draw_curves("reward", [curve], width=LABEL_WIDTH + 3, height=2, across=(0, 1))
    assert text_of(heading) == "reward"  # no room for the value
    assert (dots_of(top)[0], dots_of(bottom)[1]) == (" ", " ")
    assert bin(ord(dots_of(bottom)[0]) - 0x2800).count("1") == 4
    assert bin(ord(dots_of(top)[1]) - 0x2800).count("1") == 4
    assert text_of(top).startswith("  1.000 ")
    assert text_of(bottom).startswith("  0.000 ")


def test_every_line_fits_the_width_and_every_curve_has_its_number():
    curves = [Curve(name=name, points=[(x, x * slope) for x in range(50)]) for name, slope in (("a", 1.0), ("b", -1.0))]
    lines = draw_curves("reward", curves, width=80, height=5, across=(0, 49))
    assert len(lines) == 1 + 5 + 1
    assert all(len(text_of(line)) <= 80 for line in lines)
    assert text_of(lines[0]) == "reward  a 49.000  b -49.000"
    assert {owner for line in lines for _, owner in line} == {None, 0, 1}
    assert text_of(lines[-1]).split() == ["step", "0", "49"]


def test_no_point_one_point_and_numbers_that_are_not_finite():
    empty = draw_curves("reward", [Curve(name="a", points=[(0, math.nan)])], width=40, height=3, across=(0, 0))
    assert text_of(empty[0]) == "reward  nothing yet"
    assert len(empty) == 1 + 3 + 1
    one = draw_curves("r", [Curve(name="a", points=[(3, 0.5), (4, math.inf)])], width=40, height=3, across=(3, 3))
    assert text_of(one[0]) == "r  a 0.500"
    assert sum(any(char > "\u2800" for char in dots_of(line)) for line in one) == 1
