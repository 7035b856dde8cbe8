"""GUIDE_GEN: one verified answer of the present policy for each mistake of the slice that will be replayed.

Correct answers of the probe are guides already; the other prompts are sampled up to
`guide.cache.samples_per_prompt` times, the probe's samples included. The cache is an ordinary
one: `npo show RUN guides` lists it, `npo resume` could use it.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

from npo_cli.guide.facts import Guided
from npo_cli.guide_records import GuideInfo
from npo_cli.records import Progress, Prompt, Rollout
from npo_cli.run_dir.checkpoints import Checkpoint
from npo_cli.run_dir.guides import finish_guide, identity, info_path, new_guide, read_info
from npo_cli.run_dir.paths import RunDir
from npo_cli.stages.authors import Answers
from npo_cli.stages.checkpoint_author import CheckpointAuthor
from npo_cli.stages.guide_cache import Cache, fill, sampling_law
from npo_cli.stages.world import World, load_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A guide cache to be made."""

    name: str
    branch: str
    learner: Checkpoint
    """Where the run goes back to."""
    guide: Checkpoint
    """The present policy."""
    num_steps: int
    prompts: tuple[Prompt, ...]
    probed: Mapping[str, tuple[Rollout, ...]]
    """What the probe heard, by prompt id."""


def made_guides(world: World, wanted: Wanted) -> Generator[Progress, None, Guided]:
    """Fill the cache, or find it filled: a killed run asks nothing twice."""
    info = free_name(world.run, _info(world, wanted))
    folder = world.run.guide_folder(info.name)
    load_checkpoint(world.policy, wanted.guide)
    if info_path(folder).exists() and read_info(folder).complete:
        done = read_info(folder)
    else:
        cache = Cache(info=info, store=new_guide(world.run, info))
        author = CheckpointAuthor(world=world, learner=wanted.learner, guide=wanted.guide, known=wanted.probed)
        yield from fill(world, cache, wanted.prompts, author=author)
        done = finish_guide(world.run, info)
    return Guided(
        guide=done.name,
        num_asked=done.num_prompts,
        num_found=done.num_found,
        num_reused=sum(bool(solved(wanted.probed, prompt)) for prompt in wanted.prompts),
        num_tokens=done.num_tokens,
    )


def solved(probed: Mapping[str, Sequence[Rollout]], prompt: Prompt) -> list[Rollout]:
    """Answers of the probe that can be guides as they are."""
    return Answers(prompt=prompt, rollouts=tuple(probed.get(prompt.prompt_id, ()))).correct


def free_name(run: RunDir, info: GuideInfo) -> GuideInfo:
    """The name wished for, or `NAME-2`, ... where a cache of another identity has it."""
    number = 1
    while True:
        tried = replace(info, name=info.name if number == 1 else f"{info.name}-{number}")
        path = info_path(run.guide_folder(tried.name))
        if not path.exists() or identity(read_info(path.parent)) == identity(tried):
            return tried
        number += 1


def _info(world: World, wanted: Wanted) -> GuideInfo:
    return GuideInfo(
        name=wanted.name,
        run_id=world.run.run_id,
        branch=wanted.branch,
        at_step=wanted.learner.step,
        guide_step=wanted.guide.step,
        guide_digest=wanted.guide.digest,
        num_steps=wanted.num_steps,
        tokenizer_digest=world.policy.tokenizer_digest,
        sampling=f"probe {world.recipe.autonpo.probe.samples_per_prompt}, then {sampling_law(world.recipe)}",
        num_prompts=len(wanted.prompts),
        num_found=0,
        num_samples=0,
        num_tokens=0,
    )
