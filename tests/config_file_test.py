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
        (["--config=configs/none.py"], "--config: there is no file configs/none.py"),
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_thing", "line 1: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def get_config():\n    return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("\ndef get_config():\n    return {}['a']", "line 3: KeyError: 'a'"),
        ("def get_config():\n    return int('x')", "line 2: ValueError: invalid literal"),
        ("x = (", "line 1: SyntaxError: "),
        ("x = 1", "which has no function get_config"),
    ],
)
def test_what_a_config_file_raises_is_said_with_its_line(tmp_path, text, said):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config_file.load([f"--config={path}"])
    assert f"--config: {path}"[:80] in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_settings_of_a_run_are_no_config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"evaluate_only": false}')
    with pytest.raises(ConfigError, match=r"is JSON, but a config file is Python"):
        config_file.load([f"--config={path}"])
