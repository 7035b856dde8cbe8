"""Responses from a file: re-tokenized where they are text, all verified here. Generates nothing.

The order of the rows does not matter: responses to a prompt are sorted before the seed chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from npo_cli.errors import NpoError
from npo_cli.guides.source import GuideSource, OptionValue, PromptResponses, dedupe_rollouts
from npo_cli.types.rollouts import Prompt, Rollout

if TYPE_CHECKING:
    from npo_cli.guides.sources.retokenize import Retokenizer
    from npo_cli.policy.model import Policy
    from npo_cli.session.session import Session
    from npo_cli.tasks.traces import Trace, TraceFile


class TraceFileSource(GuideSource):
    """Responses of an unknown author, with log-probabilities where the file brings them."""

    name = "file"
    usage = "file:PATH"
    example = "file:traces.jsonl"
    summary = "responses from a .jsonl or .parquet file"
    options: ClassVar[Mapping[str, str]] = {"path": "a .jsonl or .parquet file; docs/how-to/external-teachers.md"}
    is_fresh = False
    is_external = True
    differs_by_seed = True
    has_logprobs = None

    @classmethod
    def parse(cls, argument: str) -> dict[str, OptionValue]:
        """A path."""
        return {"path": argument} if argument else {}

    @classmethod
    def format(cls, options: Mapping[str, OptionValue]) -> str:
        """The path."""
        return str(options["path"])

    @property
    def path(self) -> Path:
        """The file."""
        return Path(str(self.spec.options["path"])).expanduser()

    def validate(self) -> None:
        """The file exists and has a known format."""
        from npo_cli.tasks.traces import validate_trace_path

        validate_trace_path(self.path)

    def fingerprint(self) -> str:
        """Digest of the file."""
        from npo_cli.storage.files import hash_file

        return hash_file(self.path)

    def open(self, session: Session) -> None:
        """Read the file; refuse one with no response to the prompts of the replay."""
        from npo_cli.guides.sources.retokenize import Retokenizer
        from npo_cli.session.learner import list_replay_prompts
        from npo_cli.tasks.traces import read_traces

        super().open(session)
        found = read_traces(self.path, session.task.train, session.recipe.task)
        self.traces = _usable_traces(found, session.policy)
        self.retokenizer = Retokenizer(session=session, learner=session.policy)
        learner, num_steps = self.target.learner, self.num_steps
        wanted = {prompt.prompt_id for prompt in list_replay_prompts(session, learner, num_steps)}
        self._skipped = _describe_skipped(found, other_prompts=self.traces.keys() - wanted)
        if not self.traces.keys() & wanted:
            raise NpoError(
                f"{self.path} has no response to the {len(wanted)} prompts of steps "
                f"{learner.step + 1}-{learner.step + num_steps}" + (f": {self._skipped[0]}" if self._skipped else ""),
                "give each row the prompt_id of a prompt (npo show RUN rollouts lists them), or its exact prompt",
            )

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """Every row of each prompt, verified; of equal responses one with log-probabilities, if there is one."""
        from npo_cli.guides.sources.retokenize import grade_rollouts

        rows = [(prompt, trace) for prompt in prompts for trace in self.traces.get(prompt.prompt_id, ())]
        as_text = [row for row in rows if row[1].response_ids is None]
        as_ids = [row for row in rows if row[1].response_ids is not None]
        from_ids = [_from_token_ids(self.retokenizer, prompt, trace) for prompt, trace in as_ids]
        rollouts = [
            *self._from_text(as_text),
            *grade_rollouts(self.session, [prompt for prompt, _ in as_ids], from_ids),
        ]
        by_prompt: dict[str, list[Rollout]] = {}
        for rollout in sorted(rollouts, key=_sort_key):
            by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
        return [dedupe_rollouts(prompt, by_prompt.get(prompt.prompt_id, ())) for prompt in prompts]

    def _from_text(self, rows: Sequence[tuple[Prompt, Trace]]) -> list[Rollout]:
        from npo_cli.guides.sources.retokenize import TextResponse

        texts = [TextResponse(prompt=prompt, slot=0, text=trace.text or "", finished=True) for prompt, trace in rows]
        return [
            replace(rollout, behavior_logps=trace.logps if _one_per_token(trace, rollout) else None)
            for rollout, (_, trace) in zip(self.retokenizer.retokenize(texts), rows, strict=True)
        ]

    def warnings(self) -> list[str]:
        """Rows that are not used, and truncated responses."""
        return [*self._skipped, *self.retokenizer.warnings()]


def _sort_key(rollout: Rollout) -> tuple[object, ...]:
    logps = rollout.behavior_logps
    return (rollout.response_ids, logps is None, logps or ())


def _one_per_token(trace: Trace, rollout: Rollout) -> bool:
    return trace.logps is not None and len(trace.logps) == len(rollout.response_ids)


def _from_token_ids(retokenizer: Retokenizer, prompt: Prompt, trace: Trace) -> Rollout:
    """A row with token ids, truncated at the learner's limit; unfinished unless it has an end token."""
    ids, logps = trace.response_ids or (), trace.logps
    limit, finished = retokenizer.max_response_tokens(prompt), ids[-1] in retokenizer.learner.eos_ids
    if len(ids) > limit:
        retokenizer.num_too_long += finished
        ids, logps, finished = ids[:limit], logps and logps[:limit], False
    return Rollout(
        prompt_id=prompt.prompt_id,
        slot=0,
        response_ids=ids,
        behavior_logps=logps,
        text=retokenizer.learner.tokenizer.decode(ids[:-1] if finished else ids),
        finished=finished,
        sampler_step=None,
        source="teacher",
    )


def _usable_traces(found: TraceFile, policy: Policy) -> dict[str, list[Trace]]:
    """Rows by prompt id; a row that does not fit the learner's tokens is added to `found.invalid_rows`."""
    num_tokens = policy.model.get_input_embeddings().num_embeddings
    end_ids = set(policy.eos_ids)
    checks: Sequence[tuple[str, Callable[[tuple[int, ...]], bool]]] = (
        ("response_ids holds a token that the learner does not have", lambda ids: max(ids) >= num_tokens),
        ("response_ids has tokens after an end token", lambda ids: not end_ids.isdisjoint(ids[:-1])),
    )
    usable: dict[str, list[Trace]] = {}
    invalid: dict[str, str] = {}
    for prompt_id, traces in found.by_prompt.items():
        for trace in traces:
            ids = trace.response_ids
            problem = next((problem for problem, is_bad in checks if ids and is_bad(ids)), None)
            if trace.text is not None and trace.logps is not None:
                count = len(policy.encode_response(trace.text)) + 1
                if count != len(trace.logps):
                    problem = f"it has {len(trace.logps)} logps, and its response is {count} tokens with the end token"
            if problem is None:
                usable.setdefault(prompt_id, []).append(trace)
            else:
                invalid[trace.location] = problem
    found.invalid_rows.extend(f"{location}: {problem}" for location, problem in invalid.items())
    return usable


def _describe_skipped(found: TraceFile, *, other_prompts: set[str]) -> list[str]:
    """Which rows are not used, and why."""
    from npo_cli.tasks.traces import format_locations

    warnings = []
    if found.invalid_rows:
        warnings.append(f"{len(found.invalid_rows)} rows cannot be used: {format_locations(found.invalid_rows)}")
    if found.unmatched_rows:
        warnings.append(
            f"{len(found.unmatched_rows)} rows match no prompt of this task: {format_locations(found.unmatched_rows)}"
        )
    num_other = sum(len(found.by_prompt[prompt_id]) for prompt_id in other_prompts)
    if num_other:
        warnings.append(f"{num_other} rows belong to prompts that the replay does not visit")
    return warnings
