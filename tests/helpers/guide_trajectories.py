"""Guide trajectories by hand: the right scratchpad of a micro addition, charged to whoever is asked for."""

import random
from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter

from npo_cli.guides.source import compute_logprobs
from npo_cli.rollout.batch import ActiveGuide
from npo_cli.session.session import Session
from npo_cli.tasks.micro import Noise, noisy_response
from npo_cli.types.rollouts import Prompt, Rollout

EXACT = Noise(digit=0.0, carry=0.0, misconception=0.0)


def correct_trajectory(session: Session, prompt: Prompt, *, shift: float = 0.0) -> Rollout:
    """The exact calculation, with log-probabilities under the weights at hand moved by `shift` nats a token."""
    a, b = map(int, prompt.prompt_id.split("/")[1].split("+"))
    text = noisy_response(a, b, len(str(a)), noise=EXACT, wrong={}, rng=random.Random(0))
    ids = (*session.policy.tokenizer(text).input_ids, *session.policy.eos_ids)
    return make_trajectory(session, prompt, ids, text, shift=shift)


def make_trajectory(
    session: Session, prompt: Prompt, ids: tuple[int, ...], text: str, *, shift: float = 0.0
) -> Rollout:
    """Any correct response as a guide trajectory."""
    rollout = Rollout(
        prompt_id=prompt.prompt_id,
        slot=0,
        response_ids=ids,
        behavior_logps=(),
        text=text,
        finished=True,
        sampler_step=0,
    )
    (logps_T,) = compute_logprobs(session, [(prompt, rollout)])
    return replace(
        rollout,
        behavior_logps=tuple(logp + shift for logp in logps_T),
        sampler_step=99,
        source="guide",
        verdict="correct",
        reward=1.0,
    )


def make_active_guide(trajectories: Iterable[Rollout], *, until: int = 99) -> ActiveGuide:
    return ActiveGuide(rollouts={found.prompt_id: (found,) for found in trajectories}, until_step=until)


def override_settings(session: Session, section: str, **changes: object) -> Session:
    """The same world under changed settings of one section, such as `train` or `guide.inject`."""
    recipe, names = session.recipe, section.split(".")
    inner = attrgetter(section)(recipe).model_copy(update=changes)
    for depth in range(len(names) - 1, 0, -1):
        inner = attrgetter(".".join(names[:depth]))(recipe).model_copy(update={names[depth]: inner})
    return replace(session, recipe=recipe.model_copy(update={names[0]: inner}))
