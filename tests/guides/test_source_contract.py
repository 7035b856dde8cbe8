"""What every registered guide source promises, and that a new one needs its class and its registration only."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from npo_cli import registry
from npo_cli.config.loading import load_recipe
from npo_cli.errors import NpoError, RunFailed
from npo_cli.guides.source import (
    GuideSource,
    PromptResponses,
    ReplayTarget,
    create_source,
    describe_sources,
    make_spec,
    open_source,
    parse_spec,
    sample_in_rounds,
    sample_source,
)
from npo_cli.guides.sources.checkpoint import CheckpointSource
from npo_cli.registry import GUIDE_SOURCES
from npo_cli.session.learner import find_learner, list_replay_prompts
from npo_cli.session.session import open_task_and_policy
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.layout import open_run
from npo_cli.training.scout import scout_run
from npo_cli.types.guides import ScoutRequest
from npo_cli.types.rollouts import Prompt
from tests.helpers.runs import copy_run, open_session_at, sample, train
from tests.helpers.teachers import correct_response, correct_rows, write_traces
from tests.inference.openai_server import run_server

EVERY_SOURCE = pytest.mark.parametrize("name", GUIDE_SOURCES.names())


@EVERY_SOURCE
def test_guide_source_describes_itself_and_its_options(name):
    source = GUIDE_SOURCES.get(name)
    assert issubclass(source, GuideSource)
    assert source.name == name
    assert source.usage.partition(":")[0] == name
    assert source.summary and all(source.options.values())
    assert source.optional <= source.options.keys()
    assert f"{source.usage} " in describe_sources() and source.summary in describe_sources()


@EVERY_SOURCE
def test_guide_source_spec_survives_a_round_trip(name):
    spec = parse_spec(GUIDE_SOURCES.get(name).example)
    assert spec.name == name
    assert parse_spec(spec.text) == spec == make_spec(name, spec.options)


@EVERY_SOURCE
def test_guide_source_refuses_unknown_and_missing_options(name):
    source = GUIDE_SOURCES.get(name)
    options = parse_spec(source.example).options
    with pytest.raises(NpoError, match="has no option colour"):
        make_spec(name, {**options, "colour": 1})
    for option in source.options.keys() - source.optional:
        with pytest.raises(NpoError, match=f"needs {option}"):
            make_spec(name, {key: value for key, value in options.items() if key != option})


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("100", "checkpoint", {"step": 100}),
        ("scout:early", "scout", {"branch": "early"}),
        ("scout:early@40", "scout", {"branch": "early", "step": 40}),
        ("run:runs/other", "run", {"dir": "runs/other"}),
        ("run:runs/other@late", "run", {"dir": "runs/other", "branch": "late"}),
        ("run:runs/other@late:7", "run", {"dir": "runs/other", "branch": "late", "step": 7}),
        ("run:runs/a@b/c", "run", {"dir": "runs/a@b/c"}),
        ("extrapolated:weights,k=5,a=0.5", "extrapolated", {"space": "weights", "k": 5, "a": 0.5}),
    ],
)
def test_source_spec_grammar(text, name, options):
    spec = parse_spec(text)
    assert (spec.name, spec.options) == (name, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("oracle", "not a known guide source"),
        ("self:3", "takes no argument"),
        ("checkpoint:near", "must be a whole number"),
        ("extrapolated:moon,k=2,a=1", "SPACE must be logits or weights"),
        ("extrapolated:logits,k=0,a=1", "k a whole number >= 1"),
        ("extrapolated:logits,k=2,a=0", "a a number > 0"),
        ("extrapolated:logits,k=2,a=nan", "a a number > 0"),
        ("extrapolated:logits,k=x,a=1", "k a whole number"),
    ],
)
def test_source_spec_that_does_not_parse_is_refused(text, message):
    with pytest.raises(NpoError, match=message):
        parse_spec(text)


@pytest.fixture(scope="module")
def specs(tmp_path_factory) -> Mapping[str, str]:
    """SPECs of sources for step 4 of `root`, a tiny run of 6 steps; others are in CONTRACT_SPECS of their own tests."""
    folder = tmp_path_factory.mktemp("specs")
    root, other = folder / "run", folder / "other"
    train(root, "train.num_steps=6", "guide.cache.samples_per_prompt=2", "guide.inject.max_accuracy=1.0")
    ahead = ScoutRequest(at=4, branch="main", steps=2, name="ahead", overrides=("scout.keep=true",))
    list(scout_run(root, ahead))
    train(other, "train.seed=7", "train.num_steps=2")
    prompts = open_session_at(root, 4).task.train
    by_text = {prompt.text: prompt for prompt in prompts}
    traces = write_traces(folder / "traces.jsonl", correct_rows(prompts))

    def answer(body: dict) -> dict:
        return {"text": correct_response(by_text[body["prompt"]]), "finish_reason": "stop"}

    with run_server(answer) as server:
        yield {
            "root": str(root),
            "checkpoint": "6",
            "self": "self",
            "earlier": "earlier:2",
            "scout": "scout:ahead",
            "base": "base",
            "run": f"run:{other}",
            "model": f"model:{find_checkpoint(open_run(root), 'main', 6).path}",
            "endpoint": f"endpoint:{server.url}#teacher",
            "file": f"file:{traces}",
            "extrapolated": "extrapolated:logits,k=2,a=1",
        }


def find_spec(specs: Mapping[str, str], name: str) -> str:
    """Of the fixture, or of the test of the source's module: tests/guides/test_MODULE.py."""
    if name in specs:
        return specs[name]
    module = GUIDE_SOURCES.get(name).__module__.rpartition(".")[2]
    file = Path(__file__).with_name(f"test_{module}.py")
    assert file.is_file(), f"write tests/guides/{file.name}, with CONTRACT_SPECS = {{{name!r}: SPEC}}"
    return import_module(f"tests.guides.{file.stem}").CONTRACT_SPECS[name]


@EVERY_SOURCE
def test_guide_source_samples_verified_responses_with_the_fields_it_promises(specs, name):
    if name not in GUIDE_SOURCES.built_in:
        pytest.skip("a source of another package: its own tests open it")
    run = open_run(Path(specs["root"]))
    learner = find_learner(run, at=4, branch=None, overrides=("guide.cache.samples_per_prompt=2",))
    source = create_source(parse_spec(find_spec(specs, name)), ReplayTarget(run=run, learner=learner, steps=2))
    with (
        open_task_and_policy(source.session_recipe(), learner.checkpoint) as (task, policy),
        open_source(source, task=task, policy=policy) as session,
    ):
        prompts = list_replay_prompts(session, learner, source.num_steps)
        responses = source.sample(prompts)
        pairs = [(entry.prompt, rollout) for entry in responses for rollout in entry.rollouts]
        logprobs = source.logprobs(pairs)
        learner_logprobs = source.learner_logprob(pairs)
    assert [entry.prompt for entry in responses] == prompts
    assert pairs and {rollout.verdict for _, rollout in pairs} <= {"correct", "wrong", "unparseable"}
    assert all(rollout.is_off_policy for _, rollout in pairs)
    if source.has_logprobs is not None:
        assert {logps is not None for logps in logprobs} == {source.has_logprobs}
    assert all(
        len(logps) == len(rollout.response_ids) for (_, rollout), logps in zip(pairs, logprobs, strict=True) if logps
    )
    assert len(learner_logprobs) == len(pairs) and all(value <= 0 for value in learner_logprobs)
    assert sum(entry.num_tokens for entry in responses) == 0 or source.is_fresh
    assert source.forwards_per_token >= 1


def test_subclass_of_a_line_checkpoint_cannot_sample_in_its_own_way():
    # scoring would not call it
    with pytest.raises(TypeError, match="SampledCheckpoint"):
        type("ShortSource", (CheckpointSource,), {"draw": lambda self, prompts, slots: []})


def test_source_that_leaves_out_a_slot_is_refused_instead_of_drawing_it_forever():
    guide = load_recipe("micro").guide
    prompt = Prompt(prompt_id="a", answer="1", text="1=")
    with pytest.raises(ValueError, match="one rollout per prompt and slot"):
        sample_in_rounds(guide, [prompt], lambda prompts, _slots: [PromptResponses(prompt=prompts[0], rollouts=())])


class NotAnswering(CheckpointSource):
    name = "not_answering"


def test_source_without_an_entry_per_prompt_is_refused(monkeypatch):
    source = object.__new__(NotAnswering)
    source.spec = make_spec("self", {})
    monkeypatch.setattr(NotAnswering, "sample", lambda self, prompts: [])
    with pytest.raises(RunFailed, match="responses to 0 prompts, not to the 1 requested"):
        sample_source(source, [Prompt(prompt_id="a", answer="1", text="1=")])


def test_source_with_a_name_must_describe_itself():
    with pytest.raises(TypeError, match="has no usage, example, summary"):
        type("Nameless", (GuideSource,), {"name": "nameless"})


def test_source_of_a_plug_in_that_cannot_be_imported_does_not_hide_the_others(monkeypatch):
    point = EntryPoint(name="gone", value="no_such_module:Gone", group=GUIDE_SOURCES.group)
    monkeypatch.setattr(registry, "entry_points", lambda **_: [point])
    listed = describe_sources().splitlines()
    assert len(listed) == len(GUIDE_SOURCES.built_in) + 1
    assert listed[-1].startswith("gone ") and "no_such_module" in listed[-1]


class CopiedSource(GuideSource):
    """The correct responses of the task itself."""

    name = "solutions"
    usage = "solutions"
    example = "solutions"
    summary = "correct responses, written by the test"
    is_fresh = False
    has_logprobs = False

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        from npo_cli.guides.sources.retokenize import Retokenizer, TextResponse

        texts = [TextResponse(prompt=each, slot=0, text=correct_response(each), finished=True) for each in prompts]
        rollouts = Retokenizer(session=self.session, learner=self.session.policy).retokenize(texts)
        return [
            PromptResponses(prompt=prompt, rollouts=(rollout,))
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        ]


def test_new_guide_source_needs_its_class_and_its_registration_only(specs, tmp_path):
    root = copy_run(open_run(Path(specs["root"])).root, tmp_path / "run")
    with pytest.raises(NpoError, match="not a known guide source"):
        parse_spec("solutions")
    with GUIDE_SOURCES.registered(CopiedSource):
        assert CopiedSource.summary in describe_sources()
        info = sample(root, source="solutions", at=4, steps=2)
    assert (info.source.text, info.num_prompts_with_rollouts, info.has_logps) == ("solutions", info.num_prompts, False)
    assert set(load_guide(open_run(root), "near")[1])
