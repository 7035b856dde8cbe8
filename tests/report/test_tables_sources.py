from dataclasses import replace

import pytest

from npo_cli.errors import NpoError
from npo_cli.report.score_plots import plot_sources, validate_figure_format
from npo_cli.report.tables_sources import sources_tables
from npo_cli.types.guides import SourceScore

NEAR = SourceScore(
    name="step 60", kind="near", distance=20, num_prompts=10, num_samples=80, samples_per_prompt=8.0, quality_kind="pass@k",  # noqa: E501
    quality=0.5, quality_low=0.4, quality_high=0.6, quality_net=0.25, pass_at_1=0.2, variance_kind="group2",
    variance=2.0, variance_low=1.5, variance_high=2.5, signal=0.25, signal_low=0.2, signal_high=0.3, p_best=0.75,
    is_selected=True, kl_per_token=0.02, kl_per_sequence=0.3, p_best_by_variance_kind={"group2": 0.75, "kl_exp": 0.25},
    best_for_variance_kinds=("group2",),
)  # fmt: skip
ITSELF = replace(
    NEAR, name="self", kind="self", distance=0, quality_net=0.0, p_best=0.25, is_selected=False,
    p_best_by_variance_kind={"group2": 0.25, "kl_exp": 0.75}, best_for_variance_kinds=("kl_exp",),
)  # fmt: skip
TEACHER = SourceScore(
    name="model teach", kind="model", distance=None, num_prompts=10, num_samples=80, samples_per_prompt=8.0,
    quality_kind="pass@k", quality=0.9, quality_low=0.8, quality_high=1.0, quality_net=0.65, pass_at_1=0.7,
    variance_kind="group2", note="no V",
)  # fmt: skip


def test_sources_stand_from_the_own_past_to_others_and_an_unknown_v_is_a_dash():
    signal, lead = sources_tables([TEACHER, NEAR, ITSELF])
    assert [row[0] for row in signal.rows] == ["self", "step 60", "model teach"]
    assert signal.rows[1] == (
        *("step 60", "near", "20", "0.500 [0.400, 0.600]", "2.000 [1.500, 2.500]", "0.250 [0.200, 0.300]"),
        *("0.75", "0.200", "8.0", "0.250", "0.020", "0.300", "<- largest S"),
    )
    assert signal.rows[2][2:7] == ("-", "0.900 [0.800, 1.000]", "-", "-", "-")
    assert signal.notes[-1] == "model teach: no V."
    assert lead.header == ("source", "kind", "group2", "kl_exp")
    assert lead.rows == (("self", "self", "0.25", "0.75 *"), ("step 60", "near", "0.75 *", "0.25"))


@pytest.mark.parametrize("suffix", ["png", "svg", "PNG"])
def test_a_picture_holds_every_source_by_name(tmp_path, suffix):
    path = tmp_path / f"sources.{suffix}"
    validate_figure_format(path)
    plot_sources([TEACHER, NEAR, replace(ITSELF, name="self $x^{$")], path, title="a $ b")
    assert path.stat().st_size > 5_000
    if suffix == "svg":
        # matplotlib keeps each text in a comment beside its outlines
        text = path.read_text()
        assert all(f"<!-- {name} -->" in text for name in ("model teach", "step 60 (+20)", "not known"))


def test_a_picture_of_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(NpoError, match=r"a picture ends in \.png, \.svg, \.pdf"):
        validate_figure_format(tmp_path / "sources.bmp")
