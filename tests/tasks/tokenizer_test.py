"""Training a tokenizer of one's own."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from beit_jax import jobs
from beit_jax.config import ConfigError
from beit_jax.tasks import tokenizer
from beit_jax.tokenizers.loading import load_params, open_tokenizer
from tests.tasks import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tokenizer")
    config = jobs.parse_job(tiny.tokenizer().to_dict())
    said = Said(logging.INFO)
    logger = logging.getLogger("absl")
    level = logger.level
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    try:
        summary = tokenizer.run(config, workdir=str(workdir))
    finally:
        logger.removeHandler(said)
        logger.setLevel(level)
    return workdir, config, summary, said.lines


class Said(logging.Handler):
    """Keeps the lines of a log, also in a fixture of a module."""

    def __init__(self, level: int):
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.slow
def test_the_log_counts_the_images_and_ends_with_where_the_results_lie(finished):
    workdir, _, _, lines = finished
    assert "images of embedded:64: 64 to train on, 12 held out" in lines
    start, _, results = lines[-1].partition("; there: ")
    assert start == f"done: 12 steps in {workdir}"
    files = results.split(", ")
    assert files == [
        "summary.json",
        "tokenizer.safetensors",
        "reconstruction.png",
        "checkpoints/12",
    ]
    assert all((workdir / name).exists() for name in files)


@pytest.mark.slow
def test_its_file_tokenises_images(finished):
    workdir, config, summary, _ = finished
    settings = dataclasses.replace(config.tokenizer, path=summary["tokenizer"])
    params = load_params(settings)
    opened = open_tokenizer(settings)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    ids = opened.encode(params, images)
    assert ids.shape == (3, 4, 4)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 16
    assert np.asarray(Image.open(workdir / "reconstruction.png")).std() > 10


@pytest.mark.slow
def test_it_reports_what_matters(finished):
    _, config, summary, _ = finished
    assert 1 <= summary["code_perplexity"] <= summary["codes_used"] <= config.tokenizer.vocabulary
    assert summary["reconstruction_l1"] > 0
    assert summary["steps"] == 12


def test_perplexity_and_codes_by_hand():
    config = jobs.parse_job(tiny.tokenizer().to_dict())
    task = tokenizer.tokenizer_task(config)
    counts = jnp.zeros(16).at[jnp.array([0, 3])].set(jnp.array([6.0, 2.0]))
    ones = {name: jnp.float32(4) for name in ("objective", "mse", "l1", "kl")}
    values = task.metrics({**ones, "codes": counts, "weight": jnp.float32(2)})
    assert float(values["codes_used"]) == 2
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    np.testing.assert_allclose(values["code_perplexity"], expected, rtol=1e-6)
    np.testing.assert_allclose(values["loss"], 2.0)


def test_temperature_goes_down_geometrically():
    config = tokenizer.VaeConfig(temperature_start=1.0, temperature_end=1 / 16)
    steps = jnp.array([0, 50, 100, 200])
    np.testing.assert_allclose(
        tokenizer.temperature(config, steps=100, step=steps), [1, 1 / 4, 1 / 16, 1 / 16], rtol=1e-6
    )
    with pytest.raises(ConfigError, match="temperature_start"):
        tokenizer.VaeConfig(temperature_start=0.01)


def test_a_collapsed_codebook_is_logged_as_an_error(caplog):
    with caplog.at_level(logging.ERROR):
        tokenizer.log_if_collapsed({"code_perplexity": 50.0, "codes_used": 60}, vocabulary=128)
        assert not caplog.text
        tokenizer.log_if_collapsed({"code_perplexity": 1.5, "codes_used": 2}, vocabulary=128)
    assert "THE CODEBOOK HAS COLLAPSED: perplexity 1.5 of 128, 2 codes" in caplog.text


@pytest.mark.slow
def test_gradients_reach_encoder_codebook_and_decoder():
    config = jobs.parse_job(tiny.tokenizer().to_dict())
    task = tokenizer.tokenizer_task(config)
    params = jax.jit(task.init)(jax.random.key(0))
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    batch = task.prepare({}, {"token_image": image}, None)
    gradients = jax.jit(jax.grad(lambda *args: task.loss(*args)[0]))(
        params, {}, batch, jax.random.key(1), jnp.int32(0)
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, path
