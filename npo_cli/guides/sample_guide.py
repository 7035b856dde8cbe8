"""`npo sample-guide`: ask somebody the prompts of a segment, verify, and keep answers for training.

Who is asked is a source (`stages/guide_sources.py`): a later checkpoint by default. Prompts are asked in rounds of
`guide.cache.samples_per_round` samples until one is correct or `guide.cache.samples_per_prompt` were drawn.
Stopping at the first success keeps the law of the trajectory, g(. | correct), and saves most of the tokens where the
guide is good. Behaviour log-probabilities come from the trainer's forward pass under the weights that wrote, where
these are at hand.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from npo_cli.guides.build_cache import CacheBuild, fill_cache
from npo_cli.guides.registry import SourceSpec, resolve_source
from npo_cli.guides.sources.opening import open_source
from npo_cli.session.learner import find_learner, list_replay_prompts
from npo_cli.session.session import open_task_and_policy
from npo_cli.storage.guide_cache import finish_guide_cache, open_guide_cache
from npo_cli.storage.layout import open_run, validate_name
from npo_cli.storage.lock import lock_run
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import Notice, Progress


def build_guide_cache(
    root: Path,
    *,
    spec: SourceSpec,
    at: int | None,
    name: str | None,
    branch: str | None,
    steps: int | None,
    overrides: Sequence[str],
) -> Iterator[Progress | Notice | GuideCacheInfo]:
    """Fill the guide cache `name`; a cache that was left unfinished is gone on with."""
    run = open_run(root)
    learner = find_learner(run, at=at, branch=branch, overrides=overrides)
    plan = resolve_source(run, learner, spec, steps=steps)
    name = validate_name(plan.default_name if name is None else name)
    with (
        lock_run(run),
        open_task_and_policy(learner.recipe, learner.checkpoint) as (task, policy),
        closing(open_source(plan, task=task, policy=policy)) as source,
    ):
        prompts = list_replay_prompts(source.session, learner, plan.num_steps)
        yield from build_warnings(source.warnings)
        info = source.info(name, num_prompts=len(prompts))
        cache = CacheBuild(info=info, store=open_guide_cache(run, info))
        yield from fill_cache(source.session, cache, prompts, source=source.source)
        yield from build_warnings(source.source.warnings())
        yield finish_guide_cache(run, info)


def build_warnings(remarks: Iterable[str]) -> Iterator[Notice]:
    """What a person should know of a source."""
    return (Notice(message=remark, level="warning") for remark in remarks)
