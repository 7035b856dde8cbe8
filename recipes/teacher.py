"""A strong and far teacher for the micro tasks: the exact calculation of every prompt, as a file of traces.

    python recipes/teacher.py micro-bench traces-0.jsonl train.seed=0

The base writes its digits with noise and with fixed misconceptions; this writes none, as nobody in the run ever would.
"""

import argparse
import json
import random
from pathlib import Path

from npo_cli.config.loading import load_recipe
from npo_cli.session.session import open_task
from npo_cli.tasks.micro import Noise, noisy_response
from npo_cli.types.rollouts import Prompt

EXACT = Noise(digit=0.0, carry=0.0, misconception=0.0)


def trace(prompt: Prompt) -> str:
    """The right scratchpad of a prompt, whose id is `KIND/A+B`."""
    a, b = map(int, prompt.prompt_id.split("/")[1].split("+"))
    return noisy_response(a, b, len(str(a)), noise=EXACT, wrong={}, rng=random.Random(0))


def main() -> None:
    """One line a training prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    task = open_task(load_recipe(args.recipe, args.overrides))
    try:
        lines = [{"prompt_id": prompt.prompt_id, "response": trace(prompt)} for prompt in task.train]
    finally:
        task.close()
    args.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
