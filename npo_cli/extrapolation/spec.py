"""`SPACE:K:A` on a command line: how the learner is to be pushed along its own motion; a comma makes a grid of it."""

from itertools import product
from typing import get_args, get_type_hints

from npo_cli.errors import NpoError
from npo_cli.types.guides import ExtrapolationSpec

EXAMPLE = "logits:20:1"
SPACES = get_args(get_type_hints(ExtrapolationSpec)["space"])


def parse_extrapolation_grid(text: str) -> list[ExtrapolationSpec]:
    """`logits:20,40:1,2` is four: every k with every a, in the order given."""
    parts = text.split(":")
    if len(parts) != 3 or parts[0] not in SPACES:
        raise NpoError(f"{text!r} is no SPACE:K:A, with a space of {' or '.join(SPACES)}", f"such as {EXAMPLE}")
    space, ks, strengths = parts
    try:
        grid = [(int(k), float(a)) for k, a in product(ks.split(","), strengths.split(","))]
    except ValueError as error:
        raise NpoError(f"{text!r}: k must be a whole number and a a number", f"such as {EXAMPLE}") from error
    for k, a in grid:
        if k < 1 or not 0 < a < float("inf"):
            raise NpoError(f"{text!r}: k must be at least 1 and a above 0", f"such as {EXAMPLE}")
    return list(dict.fromkeys(ExtrapolationSpec(space=space, k=k, a=a) for k, a in grid))


def parse_extrapolation(text: str) -> ExtrapolationSpec:
    """Exactly one."""
    found = parse_extrapolation_grid(text)
    if len(found) > 1:
        raise NpoError(f"{text!r} is a grid of {len(found)}: a guide is one of them", f"such as {found[0].name}")
    return found[0]
