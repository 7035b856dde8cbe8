"""Which guide source is sampled, and which are scored: what is chosen and refused without a model."""

from collections.abc import Sequence
from dataclasses import replace

from npo_cli.config.guides import GuideSettings
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.guides.source import GuideSource, ReplayTarget, create_source, make_spec, parse_spec
from npo_cli.guides.sources.checkpoint import LineCheckpoint
from npo_cli.scoring.halving import HalvingRound, halving_rounds
from npo_cli.session.learner import Learner, find_learner, list_later_checkpoints
from npo_cli.storage.layout import RunDir, validate_name
from npo_cli.storage.sample_store import find_latest_scores
from npo_cli.types.guides import SourceSpec
from npo_cli.types.scores import choose_guide


def choose_source(
    run: RunDir,
    *,
    spec: SourceSpec | None,
    at: int | None,
    name: str | None,
    branch: str | None,
    steps: int | None,
    overrides: Sequence[str],
) -> tuple[GuideSource, str]:
    """The source of a guide cache, and the cache's name: as given, or made of learner and source.

    `spec` None: the choice of the newest scoring of this learner.
    """
    learner = find_learner(run, at=at, branch=branch, overrides=overrides)
    target = ReplayTarget(run=run, learner=learner, steps=steps)
    source = create_source(find_chosen_guide(run, learner) if spec is None else spec, target)
    return source, validate_name(f"{learner.branch}-{learner.step}-by-{source.default_label}" if name is None else name)


def find_chosen_guide(run: RunDir, learner: Learner) -> SourceSpec:
    """The guide that the newest scoring of the learner selected; without a scoring, guide.replay.guide_step.

    Refused where the scoring found no guide worth it.
    """
    scored = find_latest_scores(run, branch=learner.branch, learner_step=learner.step)
    if scored is None:
        return parse_spec("checkpoint")
    choice = choose_guide(scored.scores)
    if choice.chosen is None:
        raise NpoError(
            f"the newest scoring of step {learner.step} selects no guide: {choice.reason}",
            "name one with --source SPEC to use it all the same, score others, or choose another --at",
        )
    return parse_spec(choice.chosen)


def find_candidates(
    run: RunDir, *, at: int | None, sources: Sequence[SourceSpec] | None, branch: str | None, overrides: Sequence[str]
) -> tuple[Learner, list[GuideSource]]:
    """The learner, and the candidates to score for it; `sources` None: every later checkpoint."""
    learner = find_learner(run, at=at, branch=branch, overrides=overrides)
    candidates = create_candidates(run, learner, sources)
    find_horizon(candidates, learner)
    plan_rounds(candidates, learner.recipe)
    return learner, candidates


def create_candidates(run: RunDir, learner: Learner, sources: Sequence[SourceSpec] | None) -> list[GuideSource]:
    """Each source once: checkpoints of the line by step, then the others as given; all validated without a model.

    Other sources draw as checkpoints do.
    """
    if sources is None:
        sources = [make_spec("checkpoint", {"step": found.step}) for found in list_later_checkpoints(run, learner)]
    recipe = learner.recipe
    guide = draw_settings(recipe)
    scored = replace(learner, recipe=recipe.model_copy(update={"guide": guide}))
    target = ReplayTarget(run=run, learner=scored, purpose="score")
    created = [create_source(spec, target) for spec in sources]
    candidates = list({source.spec.text: source for source in created}.values())
    if learner.step == 0 and any(source.name == "base" for source in candidates):
        raise NpoError("the learner at step 0 is the base itself", "use --source self, or a later --at")
    checkpoints = [source for source in candidates if isinstance(source, LineCheckpoint)]
    others = [source for source in candidates if not isinstance(source, LineCheckpoint)]
    return [*sorted(checkpoints, key=lambda source: source.checkpoint.step), *others]


def draw_settings(recipe: Recipe) -> GuideSettings:
    """How responses are drawn for a scoring, as settings of a guide cache: `scoring.samples_per_prompt` per prompt at
    once, or with `scoring.samples_per_round` until one is correct."""
    k = recipe.scoring.samples_per_prompt
    cache = recipe.guide.cache.model_copy(
        update={
            "samples_per_prompt": k,
            "samples_per_round": recipe.scoring.samples_per_round or k,
            "min_yield": 0.0,
            "temperature": None,
            "select": "random",
            "max_responses_per_prompt": 1,
            "min_correct": 1,
        }
    )
    return recipe.guide.model_copy(update={"cache": cache})


def find_horizon(candidates: Sequence[GuideSource], learner: Learner) -> int:
    """Last step of the segment whose prompts are screened: the last candidate's, else the end of the replay or run."""
    recipe = learner.recipe
    steps = [source.checkpoint.step for source in candidates if isinstance(source, LineCheckpoint)]
    if any(step > learner.step for step in steps):
        return max(steps)
    if recipe.guide.replay.num_steps is not None:
        return learner.step + recipe.guide.replay.num_steps
    if recipe.train.num_steps <= learner.step:
        raise NpoError(
            f"step {learner.step} is the run's last: there is no segment to take prompts from",
            "choose an earlier --at, or set guide.replay.num_steps",
        )
    return recipe.train.num_steps


def plan_rounds(candidates: Sequence[GuideSource], recipe: Recipe) -> list[HalvingRound] | None:
    """Rounds of sequential halving within `scoring.budget`; None without a budget."""
    budget = recipe.scoring.budget
    if budget is None:
        return None
    if not all(isinstance(source, LineCheckpoint) for source in candidates):
        raise NpoError(
            "scoring.budget is only available if all candidates are checkpoints of this run",
            "set scoring.budget=null, or leave out the other sources",
        )
    return halving_rounds(len(candidates), budget)
