"""evals.jsonl: held-out evaluations. prompt_results.jsonl: how often each of their prompts was solved.

The results per prompt are there so that two policies can be compared on common prompts. A prompt is identified by a
hash of its content, not by its id or position: two runs with other prompts share none.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from npo_cli.storage.files import check_range, damaged_file_error, encode_record, to_row
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir
from npo_cli.types.rollouts import EvalReport, Prompt

KEY_LENGTH = 16
FRACTIONS = (
    *("accuracy", "accuracy_low", "accuracy_high", "pass_at_k", "pass_at_k_low", "pass_at_k_high"),
    "truncated_fraction",
)


def append_eval(run: RunDir, report: EvalReport) -> None:
    """Record a held-out evaluation. The same report again, of a resumed run, adds no second line."""
    JsonlLog(run.evals_path).append_once(to_row(report), tuple(asdict(report)))


def read_evals(run: RunDir) -> list[EvalReport]:
    """Every held-out evaluation, oldest first, checked."""
    found = JsonlLog(run.evals_path).read_records(EvalReport)
    for number, report in enumerate(found, start=1):
        line = f"{run.evals_path}, line {number}"
        check_range(report, FRACTIONS, line, high=1)
        check_range(report, ("step", "num_prompts", "num_samples", "mean_length", "num_tokens"), line)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptResults:
    """One evaluation of one checkpoint, prompt by prompt."""

    branch: str
    step: int
    num_samples: int
    """Samples per prompt."""
    prompt_keys: tuple[str, ...]
    """Keys of the held-out prompts (`hash_prompt`)."""
    num_correct: tuple[int, ...]
    """Correct samples of each, in the same order."""

    def matches(self, report: EvalReport) -> bool:
        """Whether the report is the sum of these counts."""
        place = (self.branch, self.step, self.num_samples, len(self.prompt_keys))
        total = self.num_samples * len(self.prompt_keys)
        return place == (report.branch, report.step, report.num_samples, report.num_prompts) and (
            abs(sum(self.num_correct) - report.accuracy * total) < 0.5
        )


def hash_prompt(prompt: Prompt) -> str:
    """The first 16 hexadecimal digits of the sha256 of question and reference answer."""
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    digests = [image.sha256 for image in prompt.images]
    content = {"text": prompt.text, "messages": turns, "images": digests, "answer": prompt.answer}
    return hashlib.sha256(encode_record(content).encode("ascii")).hexdigest()[:KEY_LENGTH]


def append_prompt_results(run: RunDir, outcomes: PromptResults) -> None:
    """Append one evaluation, once."""
    JsonlLog(run.prompt_results_path).append_once(outcomes, ("branch", "step", "num_samples"))


def read_prompt_results(run: RunDir) -> list[PromptResults]:
    """Every evaluation with results per prompt, oldest first."""
    found = []
    for number, row in enumerate(JsonlLog(run.prompt_results_path).read_records(PromptResults), start=1):
        one = replace(row, prompt_keys=tuple(row.prompt_keys), num_correct=tuple(row.num_correct))
        counted = all(isinstance(count, int) and 0 <= count <= one.num_samples for count in one.num_correct)
        if not (counted and len(one.num_correct) == len(set(one.prompt_keys)) > 0):
            raise damaged_file_error(f"{run.prompt_results_path}, line {number}", "its counts do not fit its prompts")
        if any((one.branch, one.step, one.num_samples) == (old.branch, old.step, old.num_samples) for old in found):
            raise damaged_file_error(f"{run.prompt_results_path}, line {number}", "this evaluation is there already")
        found.append(one)
    return found


def match_prompt_results(
    reports: Mapping[tuple[str, int], EvalReport], run: RunDir
) -> dict[tuple[str, int], PromptResults]:
    """The results per prompt of these reports, by branch and step."""
    found = {}
    for one in read_prompt_results(run):
        report = reports.get((one.branch, one.step))
        if report is not None and one.matches(report):
            found[one.branch, one.step] = one
    return found
