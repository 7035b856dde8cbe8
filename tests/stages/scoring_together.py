"""A process of a job that torchrun started in a test: rank 0 asks the shared engine to score, and says what it said."""

import json
import sys
from collections.abc import Sequence

from npo_cli.engines.requests import ScoreRequest
from npo_cli.launched import place_here
from npo_cli.policy.model import load_policy
from npo_cli.stages.follow import follow, lead
from npo_cli.stages.together import SharedEngine, shared_among_all
from tests.stages.running import tiny

ASKED = tuple(ScoreRequest(prompt_ids=(1, 2, 3), response_ids=tuple(range(4, 4 + length))) for length in (1, 5, 2))


def scored() -> int:
    """The log-probabilities as JSON on stdout."""
    recipe = tiny()
    policy = shared_among_all(load_policy(recipe.model), recipe, folder=None)
    answers: Sequence[Sequence[float]] = SharedEngine(policy, recipe).score(ASKED)
    sys.stdout.write(json.dumps(answers) + "\n")
    return 0


if __name__ == "__main__":
    place = place_here()
    assert place is not None, "torchrun says who this is"
    sys.exit(lead(place, scored) if place.rank == 0 else follow(place))
