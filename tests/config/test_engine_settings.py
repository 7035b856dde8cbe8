import pytest

from npo_cli.config.loading import check_frozen_settings, load_recipe, recipe_to_yaml
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError


def test_mismatch_default_is_token_tis_with_cap_2():
    text = recipe_to_yaml(Recipe())
    assert "\nmismatch:\n  mode: token_tis\n  cap: 2.0\n  low: 0.5\n  high: 5.0\n" in text
    assert "  geo_low: 0.999\n  geo_high: 1.001\n  k3_max: 0.01\n" in text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "mode=tis",
            "mismatch.mode must be one of token_tis, sequence_tis, token_mis, sequence_mis, geometric, k3, off, "
            'got "tis"',
        ),
        ("cap=0.9", "mismatch.cap must be a number at least 1 and at most 100000000, got 0.9"),
        # e^-20 = 2e-9 is the smallest weight there is: a bound below would never act
        ("low=0", "mismatch.low must be a number at least 1e-08 and at most 1, got 0"),
        ("low=1.5", "mismatch.low must be a number at least 1e-08 and at most 1, got 1.5"),
        ("high=1e9", "mismatch.high must be a number at least 1 and at most 100000000, got 1000000000.0"),
        ("geo_high=0.99", "mismatch.geo_high must be a number at least 1 and at most 100000000, got 0.99"),
        ("k3_max=0", "mismatch.k3_max must be a number above 0 and at most 100000000, got 0"),
        ("{low: 1, high: 1}", "mismatch.low must be below mismatch.high, got 1 for both"),
        ("{geo_low: 1, geo_high: 1}", "mismatch.geo_low must be below mismatch.geo_high, got 1 for both"),
    ],
)
def test_mismatch_invalid_bound_is_refused(setting, message):
    with pytest.raises(NpoError) as caught:
        load_recipe("micro", [f"mismatch={setting}" if setting[0] == "{" else f"mismatch.{setting}"])
    assert message in caught.value.message


@pytest.mark.parametrize("fork", [False, True])
def test_mismatch_settings_never_change_within_a_run(fork):
    old, new = load_recipe("micro"), load_recipe("micro", ["mismatch.mode=off"])
    with pytest.raises(NpoError) as caught:
        check_frozen_settings(old, new, purpose="fork" if fork else "resume")
    assert "mismatch.mode cannot change from token_tis to off" in caught.value.message
