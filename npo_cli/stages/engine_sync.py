"""The engine holds the weights that the trainer has: sent when they changed, and proved each time.

Sync is lazy: whoever wants answers calls `in_step` first, and weights travel only if something wrote to them since the
last time. An engine that samples from the trainer's own model has nothing to be sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from npo_cli.config import Recipe
from npo_cli.engines.requests import Engine, ScoreRequest
from npo_cli.engines.sync import TOLERANCES, Agreement, Row, refuse_disagreement
from npo_cli.policy.logprobs import TokenRow
from npo_cli.policy.model import Policy
from npo_cli.records import Prompt
from npo_cli.stages.row_scores import row_scores

NUM_ROWS = 8
LONGEST = 64
"""Tokens of a probe row: a longer prompt is cut, which no answer depends on."""


@dataclass(kw_only=True, slots=True)
class Probe:
    """The fixed trajectories by which the two sides are compared, and what the trainer said of them last."""

    rows: tuple[TokenRow, ...]
    last: Sequence[Row] | None = field(default=None)


def fixed_probe(policy: Policy, prompts: Sequence[Prompt]) -> Probe:
    """The first prompts of the task, each token after the first predicted from those before it."""
    encoded = dict.fromkeys(policy.encode(prompt)[:LONGEST] for prompt in prompts[: 4 * NUM_ROWS])
    rows = [TokenRow(prompt_ids=ids[:1], response_ids=ids[1:]) for ids in encoded if len(ids) > 1]
    return Probe(rows=tuple(rows[:NUM_ROWS]))


def in_step(recipe: Recipe, policy: Policy, engine: Engine, probe: Probe, *, step: int) -> None:
    """Send the weights at hand, those of `step`, unless the engine holds them; then compare log-probabilities."""
    version = f"step {step}, write {policy.num_changes}"
    if engine.version == version:
        return
    engine.take_weights(policy.model, version=version)
    if not (engine.holds_copy and probe.rows):
        return
    trainer = [tuple(scores.logps_T.tolist()) for scores in row_scores(policy, recipe, probe.rows, temperature=1.0)]
    asked = [ScoreRequest(prompt_ids=row.prompt_ids, response_ids=row.response_ids) for row in probe.rows]
    found = Agreement(engine=engine.score(asked), trainer=trainer, before=probe.last)
    tolerance = recipe.engine.tolerance or TOLERANCES[recipe.model.dtype]
    refuse_disagreement(found, tolerance=tolerance, version=version)
    probe.last = trainer
