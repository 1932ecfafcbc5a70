"""Settings: there and back, unknown keys, wrong types; recipes and their tiny twins."""

import json
from typing import Any, get_type_hints

import pytest

from erw import flow
from erw.config import Flow, Optim, Run, from_dict, to_dict
from erw.ema import WIDEST, exponent
from erw.errors import ConfigError
from erw.recipes import names, note, recipe, tiny


@pytest.mark.parametrize("name", names())
def test_every_recipe_is_json_and_back_and_has_a_note_and_a_tiny_twin(name: str) -> None:
    run = recipe(name)
    assert run.name == name
    assert from_dict(Run, json.loads(json.dumps(to_dict(run)))) == run
    assert note(name)
    twin = tiny(run)
    assert twin.steps <= 12 and twin.model.width <= 64
    assert bool(twin.plan.warmup) == bool(run.plan.warmup)


@pytest.mark.parametrize(
    "values,words",
    [
        ({"sede": 1}, "unknown setting sede; did you mean seed?"),
        ({"optim": {"lrr": 1}}, "unknown setting optim.lrr; did you mean lr?"),
        ({"steps": "many"}, "steps is 'many'; expected int"),
        ({"steps": True}, "steps is True; expected int"),
        ({"optim": {"compile": 1}}, "optim.compile is 1; expected bool"),
        (
            {"flow": {"path": "curved"}},
            "flow.path is 'curved'; expected one of 'linear', 'cosine', 'vp'",
        ),
        (
            {"flow": {"objective": "ddpm", "times": "logit_normal"}},
            "flow.times logit_normal has no",
        ),
        (
            {"flow": {"objective": "ddpm"}},
            "sample.solver heun is not for objective ddpm",
        ),
        ({"sample": {"solver": "ddim"}}, "sample.solver ddim is not for objective flow"),
        ({"optim": {"betas": [0.9]}}, "optim.betas is"),
        ({"optim": {"lr": 0}}, "optim.lr is 0.0; expected a number in .0, inf"),
        ({"model": {"width": 100, "heads": 3}}, "not a multiple of model.heads"),
        ({"data": {"batch_size": 0}}, "data.batch_size is 0; expected a number in .1, inf"),
        ({"data": {"batch_size": 6}, "optim": {"accumulate": 4}}, "does not divide into 4"),
        ({"plan": {"warmup": 10}, "steps": 5}, "plan.warmup 10 is longer than the whole run"),
    ],
)
def test_bad_settings_are_said_in_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        from_dict(Run, values)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'quickstrat'; did you mean quickstart\?"):
        recipe("quickstrat")


def test_what_settings_allow_is_what_the_maths_takes() -> None:
    """The records name choices and ranges themselves, as they are read without torch."""
    hints = get_type_hints(Flow)
    assert hints["path"] == flow.PathName and hints["times"] == flow.Times
    assert hints["prediction"] == flow.Prediction
    for sigma_rel in (WIDEST, 0.05, 1e-5):
        assert exponent(sigma_rel) >= 0 and Optim(ema_profiles=(0.1, sigma_rel))
    for sigma_rel in (WIDEST + 1e-6, 0.0, 1e-7, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="sigma_rel is"):
            exponent(sigma_rel)
        with pytest.raises(ConfigError, match=r"optim\.ema_profiles is .*expected a number in"):
            Optim(ema_profiles=(0.1, sigma_rel))
