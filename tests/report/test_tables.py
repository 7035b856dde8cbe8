from npo_cli.report.tables import (
    evals_tables,
    groups_tables,
    guides_tables,
    index_tables,
    lineage_tables,
    metrics_tables,
    rollouts_tables,
)
from npo_cli.types.guides import GuideCacheInfo, SourceSpec
from npo_cli.types.rollouts import CheckpointEntry, EvalReport, Segment, StepReport
from npo_cli.types.views import GroupView, RolloutView
from tests.report.samples import group, rollout


def test_the_index_marks_an_incomplete_checkpoint_and_drops_columns_nobody_filled():
    whole = CheckpointEntry(
        branch="main", step=20, parent="main:0", tier="full", size_bytes=3_400_000, complete=True, digest="ab" * 32,
        path="x", reward=0.5,
    )  # fmt: skip
    torn = CheckpointEntry(
        branch="main", step=40, parent=None, tier="guide", size_bytes=10, complete=False, digest=None, path="y"
    )
    (table,) = index_tables([whole, torn])
    assert table.header == ("branch", "step", "parent", "tier", "size", "complete", "digest", "reward")
    assert table.rows == (
        ("main", "20", "main:0", "full", "3.4 MB", "yes", "abababababab", "0.500"),
        ("main", "40", "-", "guide", "10 B", "NO", "-", "-"),
    )


def test_training_is_summed_up_by_the_ends_of_each_branch():
    # 20 steps: a tenth is 2, so first = (0 + 1)/2 and last = (18 + 19)/2, of rewards step/100
    reports = [
        StepReport(branch="main", step=step, metrics={"reward": step / 100, "tokens": 10}, timings={})
        for step in range(20)
    ]
    fork = StepReport(
        branch="near", step=5, metrics={"reward": 1.0, "tokens": 7}, timings={"tokens_per_second": 1234.6}
    )
    summary, newest = metrics_tables([*reports, fork])
    assert summary.rows == (
        ("main", "0-19", "0.005", "0.185", "-", "-", "200"),
        ("near", "5-5", "1.000", "1.000", "-", "-", "7"),
    )
    assert newest.header == ("branch", "step", "reward", "tokens/s")
    assert len(newest.rows) == 10
    assert newest.rows[-1] == ("near", "5", "1.000", "1,235")


def test_evaluations_carry_their_intervals():
    report = EvalReport(
        branch="main", step=20, num_prompts=256, num_samples=2, accuracy=0.5, accuracy_low=0.45, accuracy_high=0.55,
        pass_at_k=0.6, pass_at_k_low=0.5, pass_at_k_high=0.7, mean_length=14.5, truncated_fraction=0.031, num_tokens=7424,  # noqa: E501
    )  # fmt: skip
    (table,) = evals_tables([report])
    assert table.rows == (
        ("main", "20", "0.500 [0.450, 0.550]", "0.600 [0.500, 0.700]", "2", "256", "14.5", "3.1%", "7,424"),
    )


def test_a_guide_says_which_steps_it_serves_and_how_many_prompts_it_solved():
    guide = GuideCacheInfo(
        name="near", run_id="r", branch="main", learner_step=80, guide_step=160, guide_digest="d", num_steps=80,
        source=SourceSpec(name="checkpoint", options={"step": 160}, text="checkpoint:160"),
        tokenizer_digest="t", sampling="8 by 2, random",
        num_prompts=1000, num_prompts_with_rollouts=900, num_samples=3000, num_tokens=45_000, complete=False,
    )  # fmt: skip
    (table,) = guides_tables([guide])
    assert table.rows == (
        ("near", "main", "81-160", "checkpoint:160", "160", "900 of 1,000", "900", "3,000", "45,000", "yes", "NO"),
    )


def test_lineage_shows_where_each_branch_left_its_parent():
    first = Segment(branch="main", parent=None, fork_step=0, guide_cache=None, guide_until=None)
    second = Segment(branch="near", parent="main", fork_step=80, guide_cache="g", guide_until=160)
    (table,) = lineage_tables([first, second])
    assert table.rows == (("main", "-", "0", "-", "-"), ("near", "main", "80", "g", "160"))


def test_rollout_table_marks_injected_guide_rollouts():
    lines = [
        RolloutView(branch="near", step=81, prompt_text="6*7=", reference_answer="42", rollout=one)
        for one in (rollout(0, reward=0.0, text="41"), rollout(1, reward=1.0, source="guide"))
    ]
    (table,) = rollouts_tables(lines)
    assert table.rows == (
        ("near", "81", "p1", "0", "own", "wrong", "0.000", "yes", "6*7=", "42", "41"),
        ("near", "81", "p1", "1", "guide 40", "correct", "1.000", "yes", "6*7=", "42", "42"),
    )


def test_group_table_reward_is_the_mean_over_rollouts():
    mixed = group(rollout(0, reward=0.0), rollout(1, reward=1.0, source="guide"), mix="injected", own_accuracy=0.0)
    (table,) = groups_tables([GroupView(branch="near", step=81, group=mixed)])
    assert table.rows == (("near", "81", "p1", "2", "0.000", "0.500", "injected"),)
