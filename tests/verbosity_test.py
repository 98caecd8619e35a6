"""Commands leave the log of the program that calls them as it was."""

import pytest
from absl import logging

from beit_jax import features
from beit_jax.data import prepare
from beit_jax.verbosity import verbosity
from beit_jax.weights.__main__ import main as weights_main


def test_the_level_is_put_back_after_an_error():
    before = logging.get_verbosity()

    def fail():
        with verbosity(logging.FATAL):
            assert logging.get_verbosity() == logging.FATAL
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert logging.get_verbosity() == before


def test_a_logger_that_follows_the_root_still_does(caplog):
    with verbosity(logging.ERROR):
        pass
    with caplog.at_level("INFO"):
        logging.info("heard")
    assert caplog.messages == ["heard"]


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        ("weights", ["inspect", "absent.pth"]),
        ("features", ["absent", "--weights=absent.pth", "--output=features.npz"]),
        ("prepare", ["--source=folder:absent", "--output=absent", "--max_side=64"]),
    ],
)
def test_a_command_puts_the_level_back(main, arguments, tmp_path, monkeypatch, capsys):
    commands = {"weights": weights_main, "features": features.main, "prepare": prepare.main}
    monkeypatch.chdir(tmp_path)
    level = logging.WARNING if logging.get_verbosity() == logging.INFO else logging.INFO
    with verbosity(level):
        assert commands[main](arguments) == 2
        assert logging.get_verbosity() == level
    assert capsys.readouterr().err.startswith("error: ")
