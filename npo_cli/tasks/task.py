"""A task, loaded from its settings: prompts and verifier; and the order in which training visits the prompts.

The order is a pure function of (seed, position), so there is no iterator state to save: a rollback uses an earlier
position again.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from npo_cli.config.recipe import TaskSettings
from npo_cli.distributed.process_group import current_group
from npo_cli.errors import NpoError
from npo_cli.registry import TASKS, VERIFIERS
from npo_cli.tasks.base import LoadedPrompts, TaskSource, UnusableAnswer, Verifier
from npo_cli.tasks.custom_verifier import code_path, is_custom_verifier, make_custom_verifier
from npo_cli.tasks.rewards import WeightedVerifier, grade_weighted, name_terms
from npo_cli.types.rollouts import Prompt, VerifierResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Training prompts, held-out prompts, and the verifiers whose weighted sum is the reward."""

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    verifiers: tuple[WeightedVerifier, ...]
    _by_id: Mapping[str, Prompt] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_id = {prompt.prompt_id: prompt for prompt in (*self.train, *self.heldout)}
        assert len(by_id) == len(self.train) + len(self.heldout), "prompt ids must be unique in a task"
        object.__setattr__(self, "_by_id", by_id)

    def prompt(self, prompt_id: str) -> Prompt:
        """The training or held-out prompt with this id."""
        if prompt_id not in self._by_id:
            raise NpoError(
                f"the task has no prompt {prompt_id}",
                "use the task settings (task.* and the seed) with which the id was made",
            )
        return self._by_id[prompt_id]

    def compute_digest(self) -> str:
        """sha256 of every prompt, answer, image and column that JSON can hold: equal for equal data."""
        digest = hashlib.sha256()
        for prompt in (*self.train, None, *self.heldout):
            digest.update(b"held out" if prompt is None else _describe_prompt(prompt))
        return digest.hexdigest()

    def grade(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, finished: Sequence[bool] | None = None
    ) -> list[VerifierResult]:
        """Verdict and reward of each response; response i answers prompt i. Several ranks share the work.

        `finished`: whether each ended with an end token (None: all did); a truncated response is never correct.
        """

        def grade_part(part: Sequence[tuple[Prompt, str, bool]]) -> list[VerifierResult]:
            columns = [list(column) for column in zip(*part, strict=True)] or [[], [], []]
            return grade_weighted(self.verifiers, *columns)

        finished = [True] * len(responses) if finished is None else finished
        return current_group().map(grade_part, list(zip(prompts, responses, finished, strict=True)), phase="verify")

    def close(self) -> None:
        """End the verifiers' processes. Grading again starts new ones."""
        for term in self.verifiers:
            term.verifier.close()


def _describe_prompt(prompt: Prompt) -> bytes:
    """Its content as JSON, one line."""
    turns = [(turn.role, turn.content) for turn in prompt.messages]
    images = [image.sha256 for image in prompt.images]
    fields = [json.dumps([prompt.prompt_id, prompt.answer, prompt.text, turns, images])]
    for name, value in prompt.columns.items():
        with suppress(TypeError, ValueError):  # bytes, dates, ...
            fields.append(json.dumps([name, value], sort_keys=True))
    return "\0".join([*fields, "\n"]).encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOrder:
    """Epochs, each a permutation of the pool seeded by (seed, epoch).

    A position counts the prompts visited since the start of the run, so a batch may span two epochs:
    indices(p, a + b) = indices(p, a) + indices(p + a, b).
    """

    num_prompts: int
    seed: int

    def epoch(self, position: int) -> int:
        """Number of complete passes over the pool before `position`."""
        return position // self.num_prompts

    def indices(self, position: int, count: int) -> tuple[int, ...]:
        """Indices into the pool of the `count` prompts from `position` on."""
        found: list[int] = []
        while len(found) < count:
            epoch, offset = divmod(position + len(found), self.num_prompts)
            order = _permutation(self.num_prompts, seed=self.seed, epoch=epoch)
            found.extend(order[offset : offset + count - len(found)])
        return tuple(found)


@lru_cache(maxsize=4)
def _permutation(num_prompts: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of one epoch, cached for the steps of that epoch."""
    order = list(range(num_prompts))
    random.Random(f"order:{seed}:{epoch}").shuffle(order)
    return tuple(order)


# From task settings to a task


def load_task(settings: TaskSettings, *, seed: int) -> Task:
    """The task of a run. `seed` is the run's, used unless task.seed is set; the same settings give the same task."""
    source: type[TaskSource] = TASKS.get(settings.source)
    source.validate(settings)
    loaded = source.load(settings, seed=seed if settings.seed is None else settings.seed)
    verifiers = open_verifiers(settings, loaded)
    task = Task(train=loaded.train, heldout=loaded.heldout, verifiers=verifiers)
    try:
        for term in verifiers:
            term.verifier.check_answers((*loaded.train, *loaded.heldout))
    except BaseException as error:
        task.close()
        if isinstance(error, UnusableAnswer):
            raise NpoError(f"{source.locate(error.prompt, settings)}{error.message}", error.hint) from error
        raise
    return task


def format_location(prompt: Prompt, settings: TaskSettings) -> str:
    """`data.jsonl line 3: ` to start an error with; empty if prompts come from no file."""
    return TASKS.get(settings.source).locate(prompt, settings)


def list_code_files(settings: TaskSettings) -> list[Path]:
    """The files of the user's code that a task runs, which --allow-code permits."""
    source: type[TaskSource] = TASKS.get(settings.source)
    code = [*source.list_code(settings), *filter(is_custom_verifier, settings.verifiers)]
    return [path for path in map(code_path, code) if path is not None]


def open_verifiers(settings: TaskSettings, loaded: LoadedPrompts) -> tuple[WeightedVerifier, ...]:
    """The verifiers that task.verifier names, each with its weight."""
    default: str = TASKS.get(settings.source).choose_verifier(loaded)
    names = [default if name == "auto" else name for name in settings.verifiers]
    weights = settings.reward_weights or (1.0,) * len(names)
    terms = tuple(
        WeightedVerifier(name=short, verifier=open_verifier(name, settings, loaded), weight=weight)
        for short, name, weight in zip(name_terms(names), names, weights, strict=True)
    )
    threshold = settings.correct_threshold
    if threshold != TaskSettings().correct_threshold and not any(term.verifier.uses_threshold for term in terms):
        raise NpoError(
            f"task.correct_threshold={threshold:g} has no effect: {', '.join(names)} gives verdicts, not numbers",
            "remove it, or set task.verifier to a function of yours (file.py:function)",
        )
    return terms


def open_verifier(name: str, settings: TaskSettings, loaded: LoadedPrompts) -> Verifier:
    """A registered verifier, or `file.py:function`."""
    if is_custom_verifier(name):
        return make_custom_verifier(name, settings, loaded)
    if name not in VERIFIERS.names():
        raise NpoError(
            f"task.verifier={name} is not a known verifier", f"{VERIFIERS.suggest(name)} (or file.py:function)"
        )
    verifier: type[Verifier] = VERIFIERS.get(name)
    if verifier.sources and settings.source not in verifier.sources:
        raise NpoError(
            f"task.verifier={name} needs task.source={' or '.join(verifier.sources)}, but task.source is "
            f"{settings.source}",
            "set task.verifier=auto",
        )
    return verifier.open(settings, loaded)
