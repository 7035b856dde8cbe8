"""`npo replay` on a real run: the three stages in one, after a kill in each of them, and where no guide is worth it."""

from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import list_branches
from npo_cli.storage.sample_store import read_all_scores
from npo_cli.training.replay import replay_run
from npo_cli.types.guides import GuideCacheInfo, ReplayRequest
from npo_cli.types.rollouts import Notice, StepReport
from npo_cli.types.scores import CandidateScore, GuideChoice
from tests.helpers.cli_errors import assert_refused, json_rows, npo
from tests.helpers.runs import WHOLE_REPLAY, copy_run, reproducible_digests, train

FEW = ("scoring.num_prompts=8", "scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=50", *WHOLE_REPLAY)


@pytest.fixture(scope="module")
def main_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 steps on main with checkpoints 0, 2 and 4."""
    root = tmp_path_factory.mktemp("replay") / "run"
    train(root)
    return root


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 4 steps no guide is worth it: the choice is given, everything else is the real thing."""
    import npo_cli.training.replay as module

    real = module.score_run

    def score(*args, **kwargs):
        for record in real(*args, **kwargs):
            yield GuideChoice(chosen="checkpoint:4", reason="") if isinstance(record, GuideChoice) else record

    monkeypatch.setattr(module, "score_run", score)


def replay(root: Path, **options):
    fields = {"at": 2, "branch": "main", "sources": None, "name": "r", "steps": None, "until": None}
    return replay_run(root, ReplayRequest(**fields | options, overrides=FEW))


def run_until(root: Path, kind: type) -> None:
    """Drop the command at its first record of a kind, as a kill does."""
    records = replay(root)
    for record in records:
        if isinstance(record, kind):
            records.close()
            return


def test_replay_scores_samples_and_trains(main_only, tmp_path, chosen):
    root = copy_run(main_only, tmp_path / "run")
    records = list(replay(root))
    kinds = list(dict.fromkeys(type(one) for one in records))
    assert [kind for kind in kinds if kind in (CandidateScore, GuideChoice, GuideCacheInfo, StepReport)] == [
        *(CandidateScore, GuideChoice, GuideCacheInfo, StepReport)
    ]
    run = open_run(root)
    assert list_branches(run) == ["main", "r"]
    info, _ = load_guide(run, "r")
    assert (info.source.text, info.branch, info.learner_step, info.complete) == ("checkpoint:4", "main", 2, True)
    assert [one.step for one in records if isinstance(one, StepReport)] == [3, 4]
    # repeated, there is nothing left
    before = reproducible_digests(root, "r")
    result = npo("replay", root, "--at", "2", "--name", "r", *FEW)
    assert (result.code, reproducible_digests(root, "r")) == (0, before)
    assert result.err.endswith("branch r is trained already, to step 4\n")
    assert result.out.startswith("r is trained to step 4, without a held-out evaluation\n")


@pytest.mark.parametrize("stage", [CandidateScore, GuideCacheInfo, StepReport])
def test_replay_killed_in_a_stage_ends_the_same(main_only, tmp_path, stage, chosen):
    straight, killed = (copy_run(main_only, tmp_path / name) for name in ("straight", "killed"))
    list(replay(straight))
    run_until(killed, stage)
    messages = [one.message for one in replay(killed) if isinstance(one, Notice)]
    done = {CandidateScore: 0, GuideCacheInfo: 2, StepReport: 2}[stage]
    stages = [text for text in messages if text.startswith("stage ")]
    assert [text[6] for text in stages] == [str(number) for number in (1, 2, 3)[done:]]
    assert reproducible_digests(killed, "r") == reproducible_digests(straight, "r")
    # scored once, and not again once a guide was sampled
    assert len(read_all_scores(open_run(killed))) == 1


def test_replay_refuses_a_name_that_belongs_to_something_else(main_only, tmp_path, chosen):
    root = copy_run(main_only, tmp_path / "run")
    list(replay(root))
    with pytest.raises(NpoError, match="guide r is for step 2 of main, not step 0 of main"):
        list(replay(root, at=0))
    result = assert_refused("replay", root, "--at", "2", "--name", "r", "--candidates", "2", beside=tmp_path)
    assert "which is none of these candidates" in result.message or "not later" in result.message
    result = assert_refused("replay", root, "--at", "2", "--name", "main", beside=tmp_path)
    assert "already has a branch 'main', which is no replay of step 2" in result.message


def test_replay_ends_well_where_no_guide_is_worth_it(main_only, tmp_path):
    root = copy_run(main_only, tmp_path / "run")
    result = npo("replay", root, "--at", "2", "--source", "self", *FEW)
    assert result.code == 0
    sentence = " ".join(result.out.partition("\n\n")[0].splitlines())
    assert sentence.startswith("no guide is worth it here, for step 2 of main: ")
    assert result.out.endswith(f"\nnext: npo index {root}\n")
    assert result.err.startswith("replay step 2 of branch main\n")
    assert list_branches(open_run(root)) == ["main"]
    rows = json_rows(npo("replay", root, "--at", "2", "--source", "self", *FEW, "--json").out)
    assert (rows[-1]["record"], rows[-1]["chosen"]) == ("guide_choice", None)


def test_replay_from_the_command_line_ends_with_both_accuracies(main_only, tmp_path, chosen):
    root = copy_run(main_only, tmp_path / "run")
    assert npo("eval", root, "--all").code == 0
    result = npo("replay", root, "--at", "2", "--name", "r", *FEW, "eval.every=2")
    assert result.code == 0
    assert result.out.startswith("accuracy ")
    assert " at step 4 of r" in result.out.partition("\n\n")[0].replace("\n", " ")
    assert "; main had " in result.out.partition("\n\n")[0].replace("\n", " ")
    assert result.out.endswith(f"\nnext: npo compare main={root}:main r={root}:r\n")
