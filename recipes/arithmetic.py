"""Short arithmetic for a small pretrained model, half of it beyond that model: two files for `smollm2-arithmetic`.

    python recipes/arithmetic.py arithmetic

Four kinds in equal parts after two worked lines: sums up to 20 + 20 and products up to 9 * 12, of which the model
knows many, and two-digit differences and remainders, of which it knows next to none. What GRPO makes of it rises to the
first half and stays there.

With `task.source=custom` and `task.function=recipes/arithmetic.py:draw_task` the problems are drawn with the run's
seed, in the numbers that `task.function_args` names.
"""

import argparse
import json
import operator
import random
from collections.abc import Callable, Mapping
from pathlib import Path

SHOTS = "3 * 8 = 24<|im_end|>\n30 - 14 = 16<|im_end|>\n"
"""The end token after each answer tells the model where an answer ends."""
KINDS: dict[str, tuple[Callable[[int, int], int], range, range]] = {
    "+": (operator.add, range(1, 21), range(1, 21)),
    "*": (operator.mul, range(2, 10), range(2, 13)),
    "-": (operator.sub, range(30, 100), range(11, 30)),
    "mod": (operator.mod, range(20, 100), range(3, 10)),
}
NUM_TRAIN = {"+": 60, "*": 60, "-": 60, "mod": 60}
HELD_OUT_SHARE = 4 / 15
"""Held-out problems per training problem."""


def draw_task(seed: int, *, num_train: Mapping[str, int] = NUM_TRAIN) -> dict[str, list[dict[str, str]]]:
    """Distinct problems of each kind: `rows` to train on, and `heldout`."""
    rng = random.Random(seed)
    drawn: dict[str, list[dict[str, str]]] = {"rows": [], "heldout": []}
    for sign, count in num_train.items():
        solve, left, right = KINDS[sign]
        pairs = rng.sample([(a, b) for a in left for b in right], count + round(count * HELD_OUT_SHARE))
        for index, (a, b) in enumerate(pairs):
            row = {"id": f"{a} {sign} {b}", "prompt": f"{SHOTS}{a} {sign} {b} =", "answer": str(solve(a, b))}
            drawn["rows" if index < count else "heldout"].append(row)
    return drawn


def main() -> None:
    """Write train.jsonl and heldout.jsonl into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_task(7)
    for name, rows in (("train", drawn["rows"]), ("heldout", drawn["heldout"])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
