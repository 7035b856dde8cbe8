"""Who is asked for a guide cache: `--source` to an author, with where its answers come from.

| source | who | behaviour log-probabilities |
|---|---|---|
| checkpoint | a later step of the learner's line | its forward pass |
| self, base | the learner itself, step 0: controls (is it the future, or only more samples?) | its forward pass |
| extrapolated | the learner pushed along its own motion (`docs/explanation/extrapolated-guides.md`) | a forward
pass under the same law |
| model | an outside model, from a folder or the hub | its forward pass, if it has the learner's tokenizer |
| run | a checkpoint of another run (RLEP's converged seed run) | as of a model |
| endpoint | a model behind an OpenAI-compatible address | none |
| file | traces that somebody brings, in JSONL or parquet | none, but those that the file brings |
| past | the learner's own line up to its step: what it once got right (ExGRPO) | as recorded when it was sampled |

Answers that were not given in the learner's tokens are told in them (`retelling.py`), and then nobody knows their
log-probabilities. All are verified here, except those of the past, which were verified when they were sampled.
"""

from collections.abc import Callable, Mapping

from npo_cli.guides.registry import ResolvedSource, SourceHandle
from npo_cli.guides.sources.checkpoint import CheckpointSource
from npo_cli.guides.sources.external_model import open_external_model
from npo_cli.guides.sources.extrapolated import open_extrapolated
from npo_cli.guides.sources.openai_endpoint import open_endpoint
from npo_cli.guides.sources.own_history import open_own_history
from npo_cli.guides.sources.trace_file import open_trace_file
from npo_cli.policy.model import Policy
from npo_cli.session.session import build_session, load_checkpoint
from npo_cli.tasks.task import Task


def open_source(plan: ResolvedSource, *, task: Task, policy: Policy) -> SourceHandle:
    """The author, ready to be asked; `policy` is the learner's."""
    return SOURCES[plan.spec.kind](plan, task, policy)


def open_checkpoint(plan: ResolvedSource, task: Task, policy: Policy) -> SourceHandle:
    """The guide's weights in the learner's place."""
    assert plan.guide is not None
    load_checkpoint(policy, plan.guide)
    session = build_session(plan.run, plan.learner.recipe, task=task, policy=policy)
    author = CheckpointSource(session=session, learner=plan.learner.checkpoint, guide=plan.guide)
    return SourceHandle(
        resolved=plan,
        session=session,
        source=author,
        digest=plan.guide.digest,
        tokenizer_digest=policy.tokenizer_digest,
    )


SOURCES: Mapping[str, Callable[[ResolvedSource, Task, Policy], SourceHandle]] = {
    "checkpoint": open_checkpoint,
    "self": open_checkpoint,
    "base": open_checkpoint,
    "extrapolated": open_extrapolated,
    "model": open_external_model,
    "run": open_external_model,
    "endpoint": open_endpoint,
    "file": open_trace_file,
    "past": open_own_history,
}
"""`--source` to what opens it."""
