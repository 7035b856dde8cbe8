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

from npo_cli.guide_records import GuideInfo
from npo_cli.records import Notice, Progress
from npo_cli.run_dir.guides import finish_guide, new_guide
from npo_cli.run_dir.lock import writing
from npo_cli.run_dir.paths import open_run, valid_name
from npo_cli.stages.guide_cache import Cache, fill
from npo_cli.stages.guide_plan import Ask, plan_of
from npo_cli.stages.guide_sources import open_source
from npo_cli.stages.segment import find_learner, segment_prompts
from npo_cli.stages.world import open_policy, open_task


def sample_run(
    root: Path,
    *,
    ask: Ask,
    at: int | None,
    name: str | None,
    branch: str | None,
    steps: int | None,
    overrides: Sequence[str],
    allow_code: bool,
) -> Iterator[Progress | Notice | GuideInfo]:
    """Fill the guide cache `name`; a cache that was left unfinished is gone on with."""
    run = open_run(root)
    learner = find_learner(run, at=at, branch=branch, overrides=overrides)
    plan = plan_of(run, learner, ask, steps=steps)
    name = valid_name(plan.default_name if name is None else name)
    with writing(run):
        task = open_task(learner.recipe, allow_code=allow_code)
        try:
            policy = open_policy(learner.recipe, task, learner.checkpoint)
            with closing(open_source(plan, task=task, policy=policy)) as source:
                prompts = segment_prompts(source.world, learner, plan.num_steps)
                yield from told(source.remarks)
                info = source.info(name, num_prompts=len(prompts))
                cache = Cache(info=info, store=new_guide(run, info))
                yield from fill(source.world, cache, prompts, author=source.author)
                yield from told(source.author.remarks())
                yield finish_guide(run, info)
        finally:
            task.close()


def told(remarks: Iterable[str]) -> Iterator[Notice]:
    """What a person should know of a source."""
    return (Notice(message=remark, level="warning") for remark in remarks)
