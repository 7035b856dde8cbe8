"""A process of a job that torchrun started in a test: rank 0 has rows scored by all, and says what they said.

Alone the shared engine is asked; with a folder the vision-language model in it, over its whole vocabulary.
"""

import json
import sys
from collections.abc import Sequence

from npo_cli.engines.requests import ScoreRequest
from npo_cli.launched import place_here
from npo_cli.policy.model import load_policy
from npo_cli.stages.engine_sync import probe_rows
from npo_cli.stages.follow import follow, lead
from npo_cli.stages.row_scores import row_scores
from npo_cli.stages.together import SharedEngine, shared_among_all
from tests.pictures import mixed_prompts
from tests.stages.running import tiny

ASKED = tuple(ScoreRequest(prompt_ids=(1, 2, 3), response_ids=tuple(range(4, 4 + length))) for length in (1, 5, 2))


def scored() -> int:
    """The log-probabilities as JSON on stdout."""
    recipe = tiny(*(f"model.path={folder}" for folder in sys.argv[1:]))
    policy = shared_among_all(load_policy(recipe.model), recipe, folder=None)
    answers: Sequence[Sequence[float]]
    if policy.vision is None:
        answers = SharedEngine(policy, recipe).score(ASKED)
    else:
        rows = probe_rows(policy, mixed_prompts())
        found = row_scores(policy, recipe, rows, temperature=1.0, whole_vocabulary=True)
        answers = [each.logps_T.tolist() for each in found]
    sys.stdout.write(json.dumps(answers) + "\n")
    return 0


if __name__ == "__main__":
    place = place_here()
    assert place is not None, "torchrun says who this is"
    sys.exit(lead(place, scored) if place.rank == 0 else follow(place))
