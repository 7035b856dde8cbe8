"""Traces from a file: somebody else's answers, told in the learner's tokens where they are text, all verified here.

Nothing is generated. The order of the rows means nothing: answers to a prompt are sorted before the seed chooses.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from npo_cli.errors import NpoError
from npo_cli.guides.registry import ResolvedSource, SourceHandle, open_session_without_engine
from npo_cli.guides.source import Pairs, PromptResponses, compute_mean_logprobs, dedupe_rollouts
from npo_cli.guides.sources.retokenize import Retokenizer, TextResponse, grade_rollouts
from npo_cli.policy.model import Policy
from npo_cli.session.learner import list_replay_prompts
from npo_cli.session.session import Session
from npo_cli.storage.files import hash_file
from npo_cli.tasks.task import Task
from npo_cli.tasks.traces import Trace, TraceFile, format_locations, read_traces
from npo_cli.types.rollouts import Prompt, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceFileSource:
    """Whoever wrote the file."""

    forwards_per_token: ClassVar[int] = 1
    session: Session
    """With the learner's weights."""
    traces: Mapping[str, Sequence[Trace]]
    """By prompt id."""
    retokenizer: Retokenizer

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """Every row of each prompt, verified; the same answer once, with its log-probabilities where a row has them."""
        asked = [(prompt, trace) for prompt in prompts for trace in self.traces.get(prompt.prompt_id, ())]
        as_text = [pair for pair in asked if pair[1].response_ids is None]
        as_ids = [pair for pair in asked if pair[1].response_ids is not None]
        heard = [*self._retold(as_text), *self._verified(as_ids)]
        by_prompt: dict[str, list[Rollout]] = {}
        for rollout in sorted(heard, key=_rank):
            by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
        return [dedupe_rollouts(prompt, by_prompt.get(prompt.prompt_id, ())) for prompt in prompts]

    def _retold(self, asked: Sequence[tuple[Prompt, Trace]]) -> list[Rollout]:
        said = [TextResponse(prompt=prompt, slot=0, text=trace.text or "", finished=True) for prompt, trace in asked]
        return [
            replace(rollout, behavior_logps=trace.logps if _one_each(trace, rollout) else None)
            for rollout, (_, trace) in zip(self.retokenizer.retokenize(said), asked, strict=True)
        ]

    def _verified(self, asked: Sequence[tuple[Prompt, Trace]]) -> list[Rollout]:
        rollouts = [_as_given(self.retokenizer, prompt, trace) for prompt, trace in asked]
        return grade_rollouts(self.session, [prompt for prompt, _ in asked], rollouts)

    def logprobs(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """Those that the file brought: nobody can check them."""
        return [rollout.behavior_logps for _, rollout in pairs]

    def learner_logprob(self, pairs: Pairs) -> list[float]:
        """Under the learner, whose weights are at hand."""
        return compute_mean_logprobs(self.session, pairs)

    def warnings(self) -> list[str]:
        """Answers that the learner has no room for."""
        return self.retokenizer.warnings()


def _rank(rollout: Rollout) -> tuple[object, ...]:
    logps = rollout.behavior_logps
    return (rollout.response_ids, logps is None, logps or ())


def _one_each(trace: Trace, rollout: Rollout) -> bool:
    return trace.logps is not None and len(trace.logps) == len(rollout.response_ids)


def _as_given(retelling: Retokenizer, prompt: Prompt, trace: Trace) -> Rollout:
    """Token ids as they are, cut at the learner's limit; without an end token nobody ended them."""
    ids, logps = trace.response_ids or (), trace.logps
    room, finished = retelling.max_response_tokens(prompt), ids[-1] in retelling.learner.eos_ids
    if len(ids) > room:
        retelling.num_too_long += finished
        ids, logps, finished = ids[:room], logps and logps[:room], False
    return Rollout(
        prompt_id=prompt.prompt_id,
        slot=0,
        response_ids=ids,
        behavior_logps=logps,
        text=retelling.learner.tokenizer.decode(ids[:-1] if finished else ids),
        finished=finished,
        sampler_step=None,
        source="teacher",
    )


def open_trace_file(plan: ResolvedSource, task: Task, policy: Policy) -> SourceHandle:
    """The file, read and sorted out; refused where it answers nothing that is asked."""
    path = Path(plan.origin).expanduser()
    found = read_traces(path, task.train, plan.learner.recipe.task)
    traces = _in_learners_tokens(found, policy)
    session = open_session_without_engine(plan, task, policy)
    asked = {prompt.prompt_id for prompt in list_replay_prompts(session, plan.learner, plan.num_steps)}
    remarks = _left_out(found, elsewhere=traces.keys() - asked)
    if not traces.keys() & asked:
        first = plan.learner.step + 1
        raise NpoError(
            f"{path} answers none of the {len(asked)} prompts of steps {first}-{plan.learner.step + plan.num_steps}"
            + (f": {remarks[0]}" if remarks else ""),
            "give each row the prompt_id of a prompt (npo show RUN rollouts lists them), or its exact prompt",
        )
    return SourceHandle(
        resolved=plan,
        session=session,
        source=TraceFileSource(
            session=session, traces=traces, retokenizer=Retokenizer(session=session, learner=policy)
        ),
        digest=hash_file(path),
        tokenizer_digest=policy.tokenizer_digest,
        origin=plan.origin,
        warnings=tuple(remarks),
    )


def _in_learners_tokens(found: TraceFile, policy: Policy) -> dict[str, list[Trace]]:
    """The usable traces; one whose tokens are not the learner's is a bad row."""
    top = policy.model.get_input_embeddings().num_embeddings
    ends = set(policy.eos_ids)
    checks: Sequence[tuple[str, Callable[[tuple[int, ...]], bool]]] = (
        ("response_ids holds a token that the learner does not have", lambda ids: max(ids) >= top),
        ("response_ids goes on after an end token", lambda ids: not ends.isdisjoint(ids[:-1])),
    )
    kept: dict[str, list[Trace]] = {}
    bad: dict[str, str] = {}
    for prompt_id, traces in found.by_prompt.items():
        for trace in traces:
            why = next((why for why, is_bad in checks if trace.response_ids and is_bad(trace.response_ids)), None)
            if trace.text is not None and trace.logps is not None:
                count = len(policy.encode_response(trace.text)) + 1
                if count != len(trace.logps):
                    why = f"it has {len(trace.logps)} logps, and its response is {count} tokens with the end token"
            if why is None:
                kept.setdefault(prompt_id, []).append(trace)
            else:
                bad[trace.location] = why
    found.invalid_rows.extend(f"{place}: {why}" for place, why in bad.items())
    return kept


def _left_out(found: TraceFile, *, elsewhere: set[str]) -> list[str]:
    """Which rows are not used, and why."""
    remarks = []
    if found.invalid_rows:
        remarks.append(f"{len(found.invalid_rows)} rows cannot be used: {format_locations(found.invalid_rows)}")
    if found.unmatched_rows:
        remarks.append(
            f"{len(found.unmatched_rows)} rows answer no prompt of this task: {format_locations(found.unmatched_rows)}"
        )
    unasked = sum(len(found.by_prompt[prompt_id]) for prompt_id in elsewhere)
    if unasked:
        remarks.append(f"{unasked} rows answer prompts that the replay does not visit")
    return remarks
