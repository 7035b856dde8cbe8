"""reasoning-gym as a source of prompts, and as the verifier of its own data sets."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from npo_cli.config.recipe import DatasetSettings, TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.base import LoadedPrompts, TaskSource, Verifier
from npo_cli.tasks.prompt_format import format_prompt
from npo_cli.tasks.reasoning_gym_worker import DatasetSpec, Entry, generate_entries, open_dataset
from npo_cli.tasks.verifier_pool import CheckResult, VerifierPool
from npo_cli.tasks.verifiers import last_numeral, read_number
from npo_cli.types.rollouts import Prompt, VerifierResult

FULL_SCORE = 1.0 - 1e-9
"""Scores below are wrong: a partial score is not correct. 1e-9 allows for float rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GymEntries:
    """What the verifier needs to know of the prompts."""

    dataset_specs: tuple[DatasetSpec, ...]
    entries: Mapping[str, Entry]
    """By prompt id."""


class ReasoningGymTask(TaskSource):
    """A mixture of reasoning-gym data sets."""

    name = "reasoning_gym"
    default_verifier = "reasoning_gym"

    @classmethod
    def validate(cls, settings: TaskSettings) -> None:
        """The package is installed, there are data sets, and task.system comes with task.chat."""
        super().validate(settings)
        if find_spec("reasoning_gym") is None:
            raise NpoError("task.source=reasoning_gym needs the package reasoning-gym", "pip install reasoning-gym")
        if not settings.datasets:
            raise NpoError("task.source=reasoning_gym needs data sets", "set task.datasets=[{name: NAME}, ...]")
        if settings.system and not settings.chat:
            raise NpoError("task.system needs chat prompts, but task.chat is false", "set task.chat=true")

    @classmethod
    def load(cls, settings: TaskSettings, *, seed: int) -> LoadedPrompts:
        """Each data set contributes to both splits in proportion to its weight."""
        return load_gym_prompts(settings, seed=seed)


def load_gym_prompts(settings: TaskSettings, *, seed: int) -> LoadedPrompts:
    """Pool and held-out split of a mixture, in random order."""
    weights = [dataset.weight for dataset in settings.datasets]
    pool_counts = allocate_counts(weights, settings.pool_size)
    heldout_counts = allocate_counts(weights, settings.heldout_size)
    labels = _labels(settings.datasets)
    specs = tuple(
        DatasetSpec(
            label=label, name=dataset.name, config=dict(dataset.config), seed=_seed(dataset, label, seed), count=a + b
        )
        for dataset, label, a, b in zip(settings.datasets, labels, pool_counts, heldout_counts, strict=True)
    )
    entries: dict[str, Entry] = {}
    train: list[Prompt] = []
    heldout: list[Prompt] = []
    for made, num_pool in zip(generate_entries(specs), pool_counts, strict=True):
        prompts = [_prompt(entry, settings) for entry in made]
        entries |= {prompt.prompt_id: entry for prompt, entry in zip(prompts, made, strict=True)}
        train += prompts[:num_pool]
        heldout += prompts[num_pool:]
    # Shuffled, so that the first prompts of a split are a sample of the mixture.
    for split, prompts in (("train", train), ("heldout", heldout)):
        random.Random(f"gym:{split}:{seed}").shuffle(prompts)
    return LoadedPrompts(
        train=tuple(train),
        heldout=tuple(heldout),
        verifier_data=GymEntries(dataset_specs=specs, entries=entries),
    )


def allocate_counts(weights: Sequence[float], total: int) -> list[int]:
    """Integers that add up to `total`, in proportion to the weights, by the largest-remainder method."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


class GymVerifier(Verifier):
    """Each data set scores its own problems; only the full score is correct.

    If the reference answer is a number, the last number of the response is scored in this process. Other responses are
    passed to the data set without surrounding whitespace. Some data sets evaluate them as expressions (countdown,
    puzzle24), which may take forever, so that happens in a `VerifierPool`.
    """

    name = "reasoning_gym"
    sources = ("reasoning_gym",)

    def __init__(self, data: GymEntries, pool: VerifierPool) -> None:
        self.data, self.pool = data, pool
        self._scorer: Callable[[tuple[Entry, str]], float] | None = None
        """Made when first needed: it imports reasoning-gym."""

    @classmethod
    def open(cls, settings: TaskSettings, loaded: LoadedPrompts) -> "GymVerifier":
        """Nothing is imported or started yet."""
        data: GymEntries = loaded.verifier_data
        build = partial(build_scorer, data.dataset_specs)
        pool = VerifierPool(build=build, num_workers=settings.verify_workers, timeout=settings.verify_timeout)
        return cls(data, pool)

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult]:
        """Numbers here, texts in the pool."""
        pairs = [
            (self.data.entries[prompt.prompt_id], text.strip()) for prompt, text in zip(prompts, responses, strict=True)
        ]
        results: dict[int, VerifierResult] = {}
        for index, (entry, text) in enumerate(pairs):
            if _has_numeric_answer(entry):
                results[index] = self._grade_number(entry, text)
            elif not text:
                results[index] = VerifierResult(verdict="unparseable")
        rest = [index for index in range(len(pairs)) if index not in results]
        for index, result in zip(rest, self.pool.run([pairs[index] for index in rest]), strict=True):
            results[index] = _to_verdict(result, pairs[index][1])
        return [results[index] for index in range(len(pairs))]

    def close(self) -> None:
        """End the pool."""
        self.pool.close()

    def _grade_number(self, entry: Entry, response: str) -> VerifierResult:
        numeral = last_numeral(response)
        if numeral is None or read_number(numeral) is None:
            return VerifierResult(verdict="unparseable")
        if self._scorer is None:
            self._scorer = build_scorer(self.data.dataset_specs)
        # References have no commas or plus signs, and most data sets compare texts.
        text = numeral if numeral == entry.content["answer"] else numeral.replace(",", "").removeprefix("+")
        try:
            score = self._scorer((entry, text))
        except Exception:  # a data set that cannot take this number (3.5 where it calls int)
            return VerifierResult(verdict="unparseable", extracted=numeral)
        return VerifierResult(verdict="correct" if score >= FULL_SCORE else "wrong", extracted=numeral)


def build_scorer(specs: Sequence[DatasetSpec]) -> Callable[[tuple[Entry, str]], float]:
    """A function (entry, response) -> score from 0 to 1, by the entry's own data set."""
    datasets = {spec.label: open_dataset(spec) for spec in specs}

    def score(pair: tuple[Entry, str]) -> float:
        entry, response = pair
        return float(datasets[entry.label].score_answer(response, entry.content))

    return score


def _to_verdict(result: CheckResult, text: str) -> VerifierResult:
    if result.timed_out:
        return VerifierResult(verdict="timeout")
    if result.error:
        return VerifierResult(verdict="unparseable", extracted=text)
    return VerifierResult(verdict="correct" if result.value >= FULL_SCORE else "wrong", extracted=text)


def _has_numeric_answer(entry: Entry) -> bool:
    answer = entry.content["answer"]
    return answer is not None and read_number(str(answer)) is not None


def _prompt(entry: Entry, settings: TaskSettings) -> Prompt:
    answer: Any = entry.content["answer"]
    return format_prompt(
        entry.content["question"],
        settings=settings,
        prompt=Prompt(
            prompt_id=f"{entry.label}/{entry.index:06d}",
            answer="" if answer is None else str(answer),  # puzzles with many solutions have no single answer
            dataset=entry.label,
            row=entry.index,
            columns=entry.content,
        ),
    )


def _labels(datasets: Sequence[DatasetSettings]) -> list[str]:
    """The names, made unique: a repeated name (with another config) gets a number."""
    names = [dataset.name for dataset in datasets]
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [name if count == 1 else f"{name}.{count}" for name, count in zip(names, counts, strict=True)]


def _seed(dataset: DatasetSettings, label: str, seed: int) -> int:
    """A hash of the seed: problem i of a data set depends on seed + i, so adjacent seeds would share most problems."""
    own = dataset.config.get("seed")
    return own if own is not None else random.Random(f"gym:{label}:{seed}").getrandbits(31)
