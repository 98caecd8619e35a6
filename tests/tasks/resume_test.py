"""What may not change between a run and its resumption is refused in one line, in every job."""

import jax.numpy as jnp
import optax
import pytest

from beit_jax import jobs
from beit_jax.config import ConfigError
from beit_jax.training.checkpoint import Checkpoints
from beit_jax.training.state import state_from_params
from tests.tasks import tiny


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "key", "value", "message"),
    [
        ("tokenizer", "tokenizer.width", 12, "was 8, now 12"),
        ("tokenizer", "optimizer.ema_decay", 0.9, "was None, now 0.9"),
        ("pretrain", "model.layers", 3, "was 2, now 3"),
        ("pretrain", "tokenizer.vocabulary", 32, "was 64, now 32"),
        ("classify", "pooling", "cls", "was 'mean', now 'cls'"),
        ("segment", "data.ignore_label", 3, "was 255, now 3"),
    ],
)
def test_a_run_directory_of_another_model_is_refused(tmp_path, job, key, value, message):
    values = tiny.get_config(job).to_dict()
    if "classes" in values:
        values["classes"] = {"classify": 6, "segment": 11}[
            job
        ]  # as many as the images have, which is what the run records
    config = jobs.parse_job(values)
    checkpoints = Checkpoints(str(tmp_path), run=config.run, config=config)
    checkpoints.write_config()
    params = {"head": {"bias": jnp.zeros(1)}}
    checkpoints.save(state_from_params(params, optimizer=optax.identity()), step=2)
    checkpoints.close()

    *sections, last = key.split(".")
    section = values
    for name in sections:
        section = section[name]
    section[last] = value
    with pytest.raises(ConfigError, match=rf"^config\.{key}: {message}: .* another --workdir$"):
        jobs.run(values, workdir=str(tmp_path))
