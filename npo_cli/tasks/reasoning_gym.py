"""reasoning-gym as a source of problems, and its data sets as the judges of their own answers."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

from npo_cli.config.recipe import DatasetSettings, TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.prompt_format import format_prompt
from npo_cli.tasks.reasoning_gym_worker import DatasetSpec, Entry, generate_entries, open_dataset
from npo_cli.tasks.verifier_pool import CheckResult, VerifierPool
from npo_cli.tasks.verifiers import last_numeral, read_number
from npo_cli.types.rollouts import Prompt, VerifierResult

FULL_SCORE = 1.0 - 1e-9
"""A partial score is wrong; the rest is room for a float."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GymProblems:
    """What a mixture of data sets gave."""

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    dataset_specs: tuple[DatasetSpec, ...]
    entries: Mapping[str, Entry]
    """By prompt id."""


def load_gym_problems(settings: TaskSettings, *, seed: int) -> GymProblems:
    """Pool and held-out split of a mixture: each data set gives its weight's share of both."""
    if find_spec("reasoning_gym") is None:
        raise NpoError("task.source reasoning_gym needs the package reasoning-gym", "pip install reasoning-gym")
    weights = [dataset.weight for dataset in settings.datasets]
    pool_counts = allocate_counts(weights, settings.pool_size)
    heldout_counts = allocate_counts(weights, settings.heldout_size)
    labels = _labels(settings.datasets)
    draws = tuple(
        DatasetSpec(
            label=label, name=dataset.name, config=dict(dataset.config), seed=_seed(dataset, label, seed), count=a + b
        )
        for dataset, label, a, b in zip(settings.datasets, labels, pool_counts, heldout_counts, strict=True)
    )
    entries: dict[str, Entry] = {}
    train: list[Prompt] = []
    heldout: list[Prompt] = []
    for drawn, num_pool in zip(generate_entries(draws), pool_counts, strict=True):
        prompts = [_prompt(entry, settings) for entry in drawn]
        entries |= {prompt.prompt_id: entry for prompt, entry in zip(prompts, drawn, strict=True)}
        train += prompts[:num_pool]
        heldout += prompts[num_pool:]
    # Mixed, so that the first so many of either are a fair sample.
    for split, prompts in (("train", train), ("heldout", heldout)):
        random.Random(f"gym:{split}:{seed}").shuffle(prompts)
    return GymProblems(train=tuple(train), heldout=tuple(heldout), dataset_specs=draws, entries=entries)


def allocate_counts(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total` in proportion to the weights: rounded down, largest remainders up."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: (counts[place] - exact[place], place))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts


@dataclass(kw_only=True, slots=True, eq=False)
class GymVerifier:
    """Each data set scores its own problems; only the full score is correct.

    Where the answer is a number, the last number of the response is scored, here in this process. Other responses
    go to the data set as they are, blanks at the ends apart; some data sets evaluate them as expressions
    (countdown, puzzle24), which may take for ever, so that is done in a `VerifierPool`.
    """

    entries: Mapping[str, Entry]
    dataset_specs: tuple[DatasetSpec, ...]
    pool: VerifierPool
    _scorer: Callable[[tuple[Entry, str]], float] | None = field(init=False, repr=False, default=None)
    """The scorer of this process, made when first needed: it costs the import of reasoning-gym."""

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[VerifierResult]:
        asked = [(self.entries[p.prompt_id], said) for p, said in zip(prompts, responses, strict=True)]
        graded: dict[int, VerifierResult] = {}
        texts: list[int] = []
        for place, (entry, response) in enumerate(asked):
            if _wants_number(entry):
                graded[place] = self._grade_number(entry, response)
            elif response.strip():
                texts.append(place)
            else:
                graded[place] = VerifierResult(verdict="unparseable")
        outcomes = self.pool.run([(asked[place][0], asked[place][1].strip()) for place in texts])
        graded |= {
            place: _graded(outcome, asked[place][1].strip()) for place, outcome in zip(texts, outcomes, strict=True)
        }
        return [graded[place] for place in range(len(asked))]

    def check_answers(self, prompts: Sequence[Prompt]) -> None:
        """The data sets vouch for their answers."""

    def close(self) -> None:
        self.pool.close()

    def _grade_number(self, entry: Entry, response: str) -> VerifierResult:
        numeral = last_numeral(response)
        if numeral is None or read_number(numeral) is None:
            return VerifierResult(verdict="unparseable")
        if self._scorer is None:
            self._scorer = build_scorer(self.dataset_specs)
        # The reference is written without commas and plus signs, and most data sets compare texts.
        said = numeral if numeral == entry.content["answer"] else numeral.replace(",", "").removeprefix("+")
        try:
            score = self._scorer((entry, said))
        except Exception:  # a data set that cannot take this number (3.5 where it calls int)
            return VerifierResult(verdict="unparseable", extracted=numeral)
        return VerifierResult(verdict="correct" if score >= FULL_SCORE else "wrong", extracted=numeral)


def make_gym_verifier(problems: GymProblems, *, num_workers: int, timeout: float) -> GymVerifier:
    """The grader, with nothing imported or started yet."""
    pool = VerifierPool(build=partial(build_scorer, problems.dataset_specs), num_workers=num_workers, timeout=timeout)
    return GymVerifier(entries=problems.entries, dataset_specs=problems.dataset_specs, pool=pool)


def build_scorer(draws: Sequence[DatasetSpec]) -> Callable[[tuple[Entry, str]], float]:
    """(entry, response) -> the score that the entry's own data set gives, from 0 to 1."""
    datasets = {draw.label: open_dataset(draw) for draw in draws}

    def score(asked: tuple[Entry, str]) -> float:
        entry, response = asked
        return float(datasets[entry.label].score_answer(response, entry.content))

    return score


def _graded(outcome: CheckResult, said: str) -> VerifierResult:
    if outcome.timed_out:
        return VerifierResult(verdict="timeout")
    if outcome.error:
        return VerifierResult(verdict="unparseable", extracted=said)
    return VerifierResult(verdict="correct" if outcome.value >= FULL_SCORE else "wrong", extracted=said)


def _wants_number(entry: Entry) -> bool:
    answer = entry.content["answer"]
    return answer is not None and read_number(str(answer)) is not None


def _prompt(entry: Entry, settings: TaskSettings) -> Prompt:
    answer: Any = entry.content["answer"]
    return format_prompt(
        entry.content["question"],
        settings=settings,
        prompt=Prompt(
            prompt_id=f"{entry.label}/{entry.index:06d}",
            answer="" if answer is None else str(answer),  # puzzles with many solutions have no one answer
            dataset=entry.label,
            row=entry.index,
        ),
    )


def _labels(datasets: Sequence[DatasetSettings]) -> list[str]:
    """The names; a name met again (with another config) gets a number, as ids must differ."""
    names = [dataset.name for dataset in datasets]
    met = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if count == 1 else f"{name}.{count}" for name, count in zip(names, met, strict=True)]


def _seed(dataset: DatasetSettings, label: str, seed: int) -> int:
    """Problem i of a data set depends on seed + i: neighbouring seeds would share most problems, so scatter them."""
    own = dataset.config.get("seed")
    return own if own is not None else random.Random(f"gym:{label}:{seed}").getrandbits(31)
