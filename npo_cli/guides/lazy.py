"""Guide caches that are filled while training: a prompt is sampled when its group first turns out to need a guide.

The guide is a second model beside the learner, sampled by the transformers engine. Its seeds derive from the run's
seed, the guide, the prompt and the slot, as in a cache that is filled before: when a prompt is sampled does not decide
what is sampled.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from npo_cli.config.guides import GuideCacheSettings
from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError
from npo_cli.guides.build_cache import fill_cache, new_cache_info
from npo_cli.guides.source import GuideSource, ReplayTarget, create_source, open_source
from npo_cli.guides.sources.checkpoint import CheckpointSource
from npo_cli.losses.importance_ratio import check_ratio_available
from npo_cli.rollout.batch import ActiveGuide
from npo_cli.session.learner import Learner
from npo_cli.session.session import Session, load_second_policy
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.guide_cache import check_cache_identity, finish_guide_cache, read_guide_prompts
from npo_cli.storage.sample_store import SampleStore
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import Prompt, PromptSamples, Rollout


@dataclass(kw_only=True, slots=True)
class LazySampler:
    """Samples the source of a cache on the prompts that are not in it yet."""

    session: Session
    """The learner's."""
    source: GuideSource
    """Open."""
    info: GuideCacheInfo
    store: SampleStore
    done: dict[str, PromptSamples]
    """Every prompt of the cache, in the order sampled."""
    rollouts: dict[str, Sequence[Rollout]]
    """The kept responses by prompt id, which training reads."""

    def sample_missing(self, prompts: Sequence[Prompt]) -> None:
        """Add these prompts to the cache, unless they are there or the guide's yield was too low.

        The seconds are part of the training step's, which are charged as such.
        """
        new = [prompt for prompt in prompts if prompt.prompt_id not in self.done]
        if not new:
            return
        before = [self.session.task.prompt(prompt_id) for prompt_id in self.done]
        for _ in fill_cache(self.source, self.info, self.store, [*before, *new], done=self.done, charges_seconds=False):
            pass
        sampled = [self.done[prompt.prompt_id] for prompt in new if prompt.prompt_id in self.done]
        has_logprobs = all(one.behavior_logps is not None for samples in sampled for one in samples.rollouts)
        ratio = self.session.recipe.guide.inject.ratio
        check_ratio_available(ratio, has_logprobs=has_logprobs, guide=f"guide {self.info.name!r}")
        self.rollouts |= {samples.prompt_id: samples.rollouts for samples in sampled if samples.rollouts}


@contextmanager
def open_lazy_guide(session: Session, info: GuideCacheInfo, guide: ActiveGuide) -> Iterator[ActiveGuide]:
    """The guide of a cache that is filled while training; guide.json has its counts after the block."""
    if current_group().world_size > 1:
        raise NpoError(f"guide {info.name!r} is sampled while training, by one process", "start without torchrun")
    cache = GuideCacheSettings(**info.lazy_settings)
    recipe = session.recipe.model_copy(update={"guide": session.recipe.guide.model_copy(update={"cache": cache})})
    learner = Learner(
        recipe=recipe, branch=info.branch, checkpoint=find_checkpoint(session.run, info.branch, info.learner_step)
    )
    source = create_source(info.source, ReplayTarget(run=session.run, learner=learner, steps=info.num_steps))
    # The learner's engine holds the learner's weights.
    source.uses_engine = False
    policy = load_second_policy(session, learner.checkpoint)
    with open_source(source, task=session.task, policy=policy):
        check_cache_identity(session.run, info, new_cache_info(source, info.name, num_prompts=0, is_lazy=True))
        if isinstance(source, CheckpointSource):
            source.reuse_recorded(session.task.train)
        store = SampleStore(session.run.guide_folder(info.name))
        done = read_guide_prompts(store.folder)
        rollouts = dict(guide.rollouts)
        sampler = LazySampler(session=session, source=source, info=info, store=store, done=done, rollouts=rollouts)
        try:
            yield replace(guide, rollouts=rollouts, sample_missing=sampler.sample_missing)
        finally:
            finish_guide_cache(session.run, info, is_external=source.is_external)
