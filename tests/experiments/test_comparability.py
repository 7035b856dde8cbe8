"""What makes methods alike: seen through `npo compare`, on real tiny runs of other kinds than a plain one."""

from contextlib import closing
from pathlib import Path

import pytest

from npo_cli.experiments.compare import compare_runs
from npo_cli.storage.guide_cache import read_cache_info
from npo_cli.storage.layout import open_run
from npo_cli.types.comparison import MethodSummary
from npo_cli.types.rollouts import Notice
from tests.helpers.runs import LORA, open_session_at, resume, sample, train
from tests.helpers.teachers import correct_rows, write_traces

SETTINGS = ("eval.every=2", "task.heldout_size=8")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain") / "run"
    train(root, *SETTINGS)
    return root


def second(*methods: str) -> tuple[MethodSummary, list[str]]:
    """The second method, and what was said."""
    records = list(compare_runs(methods, thresholds=(), baseline=None, csv=None, figure=None))
    _, method = (one for one in records if isinstance(one, MethodSummary))
    return method, [one.message for one in records if isinstance(one, Notice)]


def test_adapters_are_a_method_and_not_another_base(plain, tmp_path):
    train(tmp_path / "lora", *SETTINGS, *LORA)
    method, said = second(f"whole={plain}", f"lora={tmp_path / 'lora'}")
    assert (method.mismatched_settings, said) == ((), [])
    assert method.changed_settings == ("model.lora.rank None -> 4", "train.lr 0.0003 -> 0.001")


def test_adapters_beside_other_weights_are_not_alike(plain, tmp_path):
    base = open_run(plain).checkpoint_folder("main", 4)
    train(tmp_path / "near", *SETTINGS, *LORA)
    train(tmp_path / "far", *SETTINGS, *LORA, f"model.path={base}")
    method, said = second(f"a={tmp_path / 'near'}", f"b={tmp_path / 'far'}")
    path, weights = method.mismatched_settings
    assert path.startswith("model.path ")
    assert weights.startswith("base weights ")
    assert [message.partition(" (")[0] for message in said] == [f"not alike: {path}", f"not alike: {weights}"]


def test_a_guide_from_another_run_is_named_and_what_it_had_cost_there_is_told(plain, tmp_path):
    train(tmp_path / "other", *SETTINGS, "train.seed=7")
    sample(plain, source=f"run:{tmp_path}/other", name="taught")
    resume(plain, at=2, guide="taught")
    method, said = second(f"a={plain}:main", f"b={plain}:taught")
    assert method.changed_settings == ("guides none -> run at 2",)
    tokens = read_cache_info(open_run(plain).guide_folder("taught")).guide_training_tokens
    assert said == [f"b: its guides had cost {tokens:,} tokens outside of its runs; no figure counts them"]


def test_a_file_of_traces_is_another_one_for_each_seed_and_yet_one_method(plain, tmp_path):
    for seed in (0, 1):
        root = tmp_path / f"seed-{seed}"
        train(root, *SETTINGS, f"train.seed={seed}")
        with closing(open_session_at(root, 2)) as session:
            traces = write_traces(tmp_path / f"traces-{seed}.jsonl", correct_rows(session.prompts_between(8, 16)))
        sample(root, source=f"file:{traces}", name="taught")
        resume(root, at=2, guide="taught")
    taught = [f"luffy={tmp_path / f'seed-{seed}'}:taught" for seed in (0, 1)]
    method, _ = second(f"grpo={plain}:main", *taught)
    assert method.changed_settings == ("guides none -> file at 2",)


def test_its_own_past_is_a_guide_and_what_it_is_called_is_no_setting(plain, tmp_path):
    train(
        tmp_path / "past",
        *SETTINGS,
        "guide.experience.replay_fraction=0.5",
        "guide.inject.max_accuracy=1",
        "method.name=exgrpo",
    )
    method, said = second(f"a={plain}:main", f"b={tmp_path / 'past'}")
    assert (method.changed_settings, said) == (
        ("guide.experience.replay_fraction 0.0 -> 0.5", "guides none -> its past"),
        [],
    )
