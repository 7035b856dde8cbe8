"""Short arithmetic for a small pretrained model, half of it beyond that model: two files for `smollm2-arithmetic`.

    python recipes/arithmetic.py arithmetic

Four kinds in equal parts after two worked lines: sums up to 20 + 20 and products up to 9 * 12, of which the model
knows many, and two-digit differences and remainders, of which it knows next to none. What GRPO makes of it rises to the
first half and stays there.
"""

import argparse
import json
import operator
import random
from collections.abc import Callable
from pathlib import Path

SHOTS = "3 * 8 = 24<|im_end|>\n30 - 14 = 16<|im_end|>\n"
"""The end token after each answer tells the model where an answer ends."""
KINDS: tuple[tuple[str, Callable[[int, int], int], range, range], ...] = (
    ("+", operator.add, range(1, 21), range(1, 21)),
    ("*", operator.mul, range(2, 10), range(2, 13)),
    ("-", operator.sub, range(30, 100), range(11, 30)),
    ("mod", operator.mod, range(20, 100), range(3, 10)),
)
NUM_TRAIN, NUM_HELD_OUT = 60, 16
"""Of each kind."""


def problems(rng: random.Random) -> list[list[dict[str, str]]]:
    """Distinct problems of each kind."""
    drawn = []
    for sign, solve, left, right in KINDS:
        pairs = rng.sample([(a, b) for a in left for b in right], NUM_TRAIN + NUM_HELD_OUT)
        drawn.append(
            [
                {"id": f"{a} {sign} {b}", "prompt": f"{SHOTS}{a} {sign} {b} =", "answer": str(solve(a, b))}
                for a, b in pairs
            ]
        )
    return drawn


def main() -> None:
    """Write train.jsonl and heldout.jsonl into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    drawn = problems(random.Random(7))
    for name, part in (("train", slice(NUM_TRAIN)), ("heldout", slice(NUM_TRAIN, None))):
        lines = [json.dumps(row) + "\n" for kind in drawn for row in kind[part]]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
