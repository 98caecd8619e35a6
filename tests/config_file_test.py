"""A config file and its overrides, as commands beside main.py read them."""

import pytest

from beit_jax import config_file
from beit_jax.config import ConfigError

QUICKSTART = "--config=configs/quickstart.py"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(__file__.rsplit("/", 2)[0])


def test_overrides_are_applied():
    plain = config_file.load([QUICKSTART])
    assert plain.name == "quickstart"
    section = next(name for name, value in plain.values.items() if isinstance(value, dict))
    changed = config_file.load([QUICKSTART, f"--config.{section}.run.steps=7"])
    assert changed.values[section]["run"]["steps"] == 7
    assert plain.values[section]["run"]["steps"] != 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--config is missing"),
        (["--config=configs/none.py"], "none.py"),
        ([QUICKSTART, "--config.no.such=1"], "no such setting"),
        ([QUICKSTART, "--config.nothing=1"], "config.nothing: no such setting"),
        ([QUICKSTART, "more"], "unexpected arguments: more"),
        ([QUICKSTART, "--other=1"], "other"),
    ],
)
def test_errors_are_one_line(arguments, said):
    with pytest.raises(ConfigError) as caught:
        config_file.load(arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
