"""One rank of a job that torchrun started in a test: all ranks score the same rows, rank 0 prints the result.

Without arguments by the split engine; with a folder by its vision-language model, over the full vocabulary.
"""

import json
import sys
from collections.abc import Sequence

from npo_cli.distributed.launch import read_launch_info
from npo_cli.distributed.process_group import current_group, join_job
from npo_cli.inference.base import LogprobRequest
from npo_cli.policy.model import load_policy
from npo_cli.session.distributed import SplitEngine, shard_policy
from npo_cli.session.logprob_pass import run_logprob_pass
from npo_cli.session.weight_sync import build_check_rows
from tests.helpers.images import mixed_prompts
from tests.helpers.runs import tiny_recipe

REQUESTS = tuple(LogprobRequest(prompt_ids=(1, 2, 3), response_ids=tuple(range(4, 4 + length))) for length in (1, 5, 2))


def write_logps() -> None:
    """The log-probabilities as JSON on stdout."""
    recipe = tiny_recipe(*(f"model.path={folder}" for folder in sys.argv[1:]))
    policy = shard_policy(load_policy(recipe.model), recipe, folder=None)
    answers: Sequence[Sequence[float]]
    if policy.vision is None:
        answers = SplitEngine(None, policy, recipe).compute_logps(REQUESTS)
    else:
        rows = build_check_rows(policy, mixed_prompts())
        found = run_logprob_pass(policy, recipe, rows, temperature=1.0, uses_full_vocabulary=True)
        answers = [each.logps_T.tolist() for each in found]
    if current_group().is_main:
        sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    launch = read_launch_info()
    assert launch is not None, "torchrun sets the environment"
    with join_job(launch):
        write_logps()
