"""Which settings make two methods comparable: `npo compare` on real tiny runs with adapters, guides and ExGRPO."""

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

SETTINGS = ("train.num_steps=2", "train.save_every=1", "eval.every=2", "task.heldout_size=8")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain") / "run"
    train(root, *SETTINGS)
    return root


def compare_second(*methods: str) -> tuple[MethodSummary, list[str]]:
    """The second method, and the notices."""
    records = list(compare_runs(methods, thresholds=(), baseline=None, figure=None))
    _, method = (one for one in records if isinstance(one, MethodSummary))
    return method, [one.message for one in records if isinstance(one, Notice)]


def test_comparability_of_lora_and_full_weights_on_one_base(plain, tmp_path):
    train(tmp_path / "lora", *SETTINGS, *LORA)
    method, notices = compare_second(f"whole={plain}", f"lora={tmp_path / 'lora'}")
    assert (method.mismatched_settings, notices) == ((), [])
    assert method.changed_settings == ("model.lora.rank None -> 4", "train.lr 0.0003 -> 0.001")


def test_comparability_of_lora_on_other_base_weights_is_denied(plain, tmp_path):
    base = open_run(plain).checkpoint_folder("main", 2)
    train(tmp_path / "near", *SETTINGS, *LORA)
    train(tmp_path / "far", *SETTINGS, *LORA, f"model.path={base}")
    method, notices = compare_second(f"a={tmp_path / 'near'}", f"b={tmp_path / 'far'}")
    path, weights = method.mismatched_settings
    assert path.startswith("model.path ")
    assert weights.startswith("base weights ")
    assert [message.partition(" (")[0] for message in notices] == [f"not alike: {path}", f"not alike: {weights}"]


def test_comparability_reports_the_cost_of_a_guide_from_another_run(plain, tmp_path):
    train(tmp_path / "other", *SETTINGS, "train.seed=7")
    sample(plain, source=f"run:{tmp_path}/other", at=1, name="guided")
    resume(plain, at=1, guide="guided")
    method, notices = compare_second(f"a={plain}:main", f"b={plain}:guided")
    assert method.changed_settings == ("guides none -> run at 1",)
    tokens = read_cache_info(open_run(plain).guide_folder("guided")).guide_training_tokens
    assert notices == [f"b: its guides had cost {tokens:,} tokens outside of its runs; no figure counts them"]


@pytest.mark.slow
def test_comparability_of_seeds_with_different_trace_files(plain, tmp_path):
    for seed in (0, 1):
        root = tmp_path / f"seed-{seed}"
        train(root, *SETTINGS, f"train.seed={seed}")
        with closing(open_session_at(root, 1)) as session:
            traces = write_traces(tmp_path / f"traces-{seed}.jsonl", correct_rows(session.prompts_between(4, 8)))
        sample(root, source=f"file:{traces}", at=1, name="guided")
        resume(root, at=1, guide="guided")
    guided = [f"luffy={tmp_path / f'seed-{seed}'}:guided" for seed in (0, 1)]
    method, _ = compare_second(f"grpo={plain}:main", *guided)
    assert method.changed_settings == ("guides none -> file at 1",)


def test_comparability_of_exgrpo_names_its_past_and_not_its_method_name(plain, tmp_path):
    train(
        tmp_path / "past",
        *SETTINGS,
        "guide.experience.replay_fraction=0.5",
        "guide.inject.max_accuracy=1",
        "method.name=exgrpo",
    )
    method, notices = compare_second(f"a={plain}:main", f"b={tmp_path / 'past'}")
    assert (method.changed_settings, notices) == (
        ("guide.experience.replay_fraction 0.0 -> 0.5", "guides none -> its past"),
        [],
    )
