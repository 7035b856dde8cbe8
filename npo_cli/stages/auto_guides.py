"""GUIDE_GEN: one verified answer of the present policy for each mistake of the slice that will be replayed.

Correct answers of the probe are guides already; the other prompts are sampled up to
`guide.cache.samples_per_prompt` times, the probe's samples included. The cache is an ordinary
one: `npo show RUN guides` lists it, `npo resume` could use it.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

from npo_cli.guide.facts import GuideBuilt
from npo_cli.guide_records import GuideCacheInfo
from npo_cli.records import Progress, Prompt, Rollout
from npo_cli.run_dir.checkpoints import Checkpoint
from npo_cli.run_dir.guides import finish_guide_cache, cache_identity, cache_info_path, open_guide_cache, read_cache_info
from npo_cli.run_dir.paths import RunDir
from npo_cli.stages.authors import PromptResponses
from npo_cli.stages.checkpoint_author import CheckpointSource
from npo_cli.stages.guide_cache import CacheBuild, fill_cache, describe_sampling
from npo_cli.stages.world import Session, load_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class GuideRequest:
    """A guide cache to be made."""

    name: str
    branch: str
    learner: Checkpoint
    """Where the run goes back to."""
    guide: Checkpoint
    """The present policy."""
    num_steps: int
    prompts: tuple[Prompt, ...]
    probe_rollouts: Mapping[str, tuple[Rollout, ...]]
    """What the probe heard, by prompt id."""


def build_guides(world: Session, wanted: GuideRequest) -> Generator[Progress, None, GuideBuilt]:
    """Fill the cache, or find it filled: a killed run asks nothing twice."""
    info = choose_cache_name(world.run, _info(world, wanted))
    folder = world.run.guide_folder(info.name)
    load_checkpoint(world.policy, wanted.guide)
    if cache_info_path(folder).exists() and read_cache_info(folder).complete:
        done = read_cache_info(folder)
    else:
        cache = CacheBuild(info=info, store=open_guide_cache(world.run, info))
        author = CheckpointSource(session=world, learner=wanted.learner, guide=wanted.guide, prior_rollouts=wanted.probe_rollouts)
        yield from fill_cache(world, cache, wanted.prompts, source=author)
        done = finish_guide_cache(world.run, info)
    return GuideBuilt(
        guide=done.name,
        num_prompts=done.num_prompts,
        num_found=done.num_prompts_with_rollouts,
        num_reused=sum(bool(select_correct_rollouts(wanted.probe_rollouts, prompt)) for prompt in wanted.prompts),
        num_tokens=done.num_tokens,
    )


def select_correct_rollouts(probed: Mapping[str, Sequence[Rollout]], prompt: Prompt) -> list[Rollout]:
    """Answers of the probe that can be guides as they are."""
    return PromptResponses(prompt=prompt, rollouts=tuple(probed.get(prompt.prompt_id, ()))).correct_rollouts


def choose_cache_name(run: RunDir, info: GuideCacheInfo) -> GuideCacheInfo:
    """The name wished for, or `NAME-2`, ... where a cache of another identity has it."""
    number = 1
    while True:
        tried = replace(info, name=info.name if number == 1 else f"{info.name}-{number}")
        path = cache_info_path(run.guide_folder(tried.name))
        if not path.exists() or cache_identity(read_cache_info(path.parent)) == cache_identity(tried):
            return tried
        number += 1


def _info(world: Session, wanted: GuideRequest) -> GuideCacheInfo:
    return GuideCacheInfo(
        name=wanted.name,
        run_id=world.run.run_id,
        branch=wanted.branch,
        learner_step=wanted.learner.step,
        guide_step=wanted.guide.step,
        guide_digest=wanted.guide.digest,
        num_steps=wanted.num_steps,
        tokenizer_digest=world.policy.tokenizer_digest,
        sampling=f"probe {world.recipe.autonpo.probe.samples_per_prompt}, then {describe_sampling(world.recipe)}",
        num_prompts=len(wanted.prompts),
        num_prompts_with_rollouts=0,
        num_samples=0,
        num_tokens=0,
    )
