"""TensorFlow's greetings are left out of a log, and nothing else is."""

import os
import subprocess
import sys

import pytest

PROGRAM = "from beit_jax.data import quiet_import; quiet_import.tensorflow(); {}"
GREETING = "I0000 port.cc:153] oneDNN custom operations are on."


def _stderr(then: str, **environment: str) -> list[str]:
    settings = {**os.environ, **environment}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(then)], env=settings, text=True, capture_output=True
    )
    return result.stderr.splitlines()


@pytest.mark.slow
def test_tensorflow_itself_is_silent():
    """Fails where a new version greets in other words."""
    assert _stderr("import os; os.write(2, b'after')", TF_CPP_MIN_LOG_LEVEL="3") == ["after"]


def test_other_lines_are_kept_also_where_the_import_fails(tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        f"import os\nos.write(2, b'{GREETING}\\nno room for the table\\n')\nraise OSError('broken')"
    )
    lines = _stderr("", PYTHONPATH=f"{tmp_path}:{os.getcwd()}", TF_CPP_MIN_LOG_LEVEL="1")
    assert lines[0] == "no room for the table"
    assert lines[-1] == "OSError: broken"
    shown = _stderr("", PYTHONPATH=f"{tmp_path}:{os.getcwd()}", TF_CPP_MIN_LOG_LEVEL="0")
    assert shown[:2] == [GREETING, "no room for the table"]
