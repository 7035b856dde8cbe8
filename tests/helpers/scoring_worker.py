"""A process of a job that torchrun started in a test: rank 0 has rows scored by all, and says what they said.

Alone the shared engine is asked; with a folder the vision-language model in it, over its whole vocabulary.
"""

import json
import sys
from collections.abc import Sequence

from npo_cli.distributed.launch import read_launch_info
from npo_cli.inference.base import LogprobRequest
from npo_cli.policy.model import load_policy
from npo_cli.session.logprob_pass import run_logprob_pass
from npo_cli.session.weight_sync import build_check_rows
from npo_cli.session.worker_main import run_leader, run_worker
from npo_cli.session.worker_tasks import DistributedEngine, shard_across_workers
from tests.helpers.images import mixed_prompts
from tests.helpers.runs import tiny_recipe

REQUESTS = tuple(LogprobRequest(prompt_ids=(1, 2, 3), response_ids=tuple(range(4, 4 + length))) for length in (1, 5, 2))


def write_logps() -> int:
    """The log-probabilities as JSON on stdout."""
    recipe = tiny_recipe(*(f"model.path={folder}" for folder in sys.argv[1:]))
    policy = shard_across_workers(load_policy(recipe.model), recipe, folder=None)
    answers: Sequence[Sequence[float]]
    if policy.vision is None:
        answers = DistributedEngine(policy, recipe).compute_logps(REQUESTS)
    else:
        rows = build_check_rows(policy, mixed_prompts())
        found = run_logprob_pass(policy, recipe, rows, temperature=1.0, uses_full_vocabulary=True)
        answers = [each.logps_T.tolist() for each in found]
    sys.stdout.write(json.dumps(answers) + "\n")
    return 0


if __name__ == "__main__":
    place = read_launch_info()
    assert place is not None, "torchrun says who this is"
    sys.exit(run_leader(place, write_logps) if place.rank == 0 else run_worker(place))
