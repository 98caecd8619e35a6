"""What a compilation took is said the next time, whatever has become of the file."""

import json

import jax
import jax.numpy as jnp
import pytest
from absl import logging as absl_logging
from jax.experimental.compilation_cache import compilation_cache

from beit_jax.training import compilation


@pytest.fixture
def folder(tmp_path):
    """A cache of compiled programs for this test."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def said(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_the_second_time_says_what_the_first_took(folder, caplog):
    absl_logging.set_verbosity(absl_logging.INFO)
    array = jnp.zeros(3)
    compiled = compilation.compile_step(jax.jit(lambda x: x + 1), array)
    assert compiled(array).tolist() == [1, 1, 1]
    assert "usually" not in said(caplog)
    (key,) = json.loads((folder / compilation.NAME).read_text())
    (folder / compilation.NAME).write_text(json.dumps({key: 41.7}))
    compilation.compile_step(jax.jit(lambda x: x + 2), array)  # other code, the same shapes
    assert "usually 42 s" in said(caplog)
    (seconds,) = json.loads((folder / compilation.NAME).read_text()).values()
    assert seconds < 41.7
    compilation.compile_step(jax.jit(lambda x: x + 2), jnp.zeros(4))
    assert len(json.loads((folder / compilation.NAME).read_text())) == 2


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": "b"}'])
def test_a_damaged_file_is_written_again(folder, content):
    (folder / compilation.NAME).write_text(content)
    compilation.compile_step(jax.jit(lambda x: x + 1), jnp.zeros(2))
    assert any(
        isinstance(value, float)
        for value in json.loads((folder / compilation.NAME).read_text()).values()
    )
