"""How to add a tokenizer: one file like this one and one row, without editing the package.

The toy has no weights to speak of and no decoder: a token is the colour, among 4 × 4 × 4, that the
mean of a cell of pixels falls into.
"""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from beit_jax import jobs
from beit_jax.config import ConfigError, TokenizerConfig, check, shape_setting, to_dict
from beit_jax.models.functional import Functional, functional
from beit_jax.tokenizers.dvae import (
    DiscreteVAE,
    DvaeConfig,
    GumbelOutput,
    denormalize,
    normalize,
)
from beit_jax.tokenizers.kinds import KINDS, TokenizerKind, Training
from beit_jax.tokenizers.loading import load_params, open_tokenizer, save_params
from beit_jax.tokenizers.tokenizer import Tokenizer, join, split
from tests.tasks import tiny


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColourConfig(TokenizerConfig):
    """Colours of cells."""

    kind: str = shape_setting("colour")
    cell: int = shape_setting(4)  # pixels

    def __post_init__(self):
        super().__post_init__()
        check(round(self.vocabulary ** (1 / 3)) ** 3 == self.vocabulary, "vocabulary", "is cubic")

    @property
    def stride(self) -> int:
        return self.cell


def colour_tokenizer(config: ColourConfig, *, precision=None) -> Tokenizer:
    """The only parameters are the levels at which a channel goes into the next bin."""
    del precision
    bins = round(config.vocabulary ** (1 / 3))

    def init(key: jax.Array) -> dict:
        del key
        return {"edges": jnp.arange(1, bins, dtype=jnp.float32) / bins}

    def pixel_features(params: dict, pixels: jax.Array) -> jax.Array:
        b, height, width, channels = pixels.shape
        cell = config.cell
        cells = pixels.reshape(b, height // cell, cell, width // cell, cell, channels)
        return cells.mean((2, 4))

    def feature_logits(params: dict, features: jax.Array) -> jax.Array:
        levels = (features[..., None] >= params["edges"]).sum(-1)
        ids = levels @ jnp.array([bins**2, bins, 1])
        return jax.nn.one_hot(ids, config.vocabulary)

    return Tokenizer(
        vocabulary=config.vocabulary,
        image_size=config.image_size,
        grid=config.grid,
        init=init,
        encoding_params=lambda params: params,
        pixel_features=pixel_features,
        feature_logits=feature_logits,
    )


ROW = TokenizerKind(
    config=ColourConfig, open=colour_tokenizer, how_to_get="take random_weights", paints=False
)


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(KINDS, "colour", ROW)


def settings() -> dict:
    """The tiny run, as a config file of a job with this tokenizer would have it."""
    values = tiny.pretrain().to_dict()
    shared = [field.name for field in dataclasses.fields(TokenizerConfig)]
    values["tokenizer"] = {name: values["tokenizer"][name] for name in shared}
    values["tokenizer"] |= {"kind": "colour", "vocabulary": 64, "cell": 4}
    return values


def test_its_settings_are_parsed_checked_and_written_back():
    config = jobs.parse_job(settings())
    assert config.tokenizer == ColourConfig(random_weights=True, vocabulary=64, image_size=16)
    assert jobs.parse_job(to_dict(config)) == config
    wrong = settings()
    wrong["tokenizer"]["vocabulary"] = 65
    with pytest.raises(ConfigError, match=r"^config\.tokenizer\.vocabulary: is cubic"):
        jobs.parse_job(wrong)
    wrong["tokenizer"] |= {"vocabulary": 64, "levels": 2}
    with pytest.raises(ConfigError, match=r"^config\.tokenizer\.levels: 2 .* only with 'dvae'"):
        jobs.parse_job(wrong)


def test_it_tokenises_and_says_that_it_cannot_paint():
    config = ColourConfig(random_weights=True, vocabulary=64, image_size=8)
    tokenizer, params = open_tokenizer(config), load_params(config)
    images = np.zeros((1, 8, 8, 3), np.uint8)
    images[0, :4, :4] = [255, 0, 0]
    images[0, 4:, 4:] = [70, 130, 200]
    assert tokenizer.encode(params, images).tolist() == [[[3 * 16, 0], [0, 16 + 2 * 4 + 3]]]
    assert not tokenizer.paints(params)
    with pytest.raises(ValueError, match="this kind of tokenizer has no decoder"):
        tokenizer.decode(params, np.zeros((1, 2, 2), np.int32))


def test_its_file_is_checked_as_any_other(tmp_path):
    config = ColourConfig(path=str(tmp_path / "a.safetensors"), vocabulary=64, image_size=16)
    params = {"edges": np.array([0.1, 0.2, 0.3], np.float32)}
    save_params(config.path, params, config=config)
    np.testing.assert_array_equal(load_params(config)["edges"], params["edges"])
    with pytest.raises(ValueError, match=r"^config\.tokenizer\.cell: 8, but .* was made with 4"):
        load_params(dataclasses.replace(config, cell=8))
    with pytest.raises(ConfigError, match="path: empty; take random_weights"):
        load_params(dataclasses.replace(config, path=""))


def test_it_cannot_be_trained():
    values = tiny.tokenizer().to_dict()
    values["tokenizer"] = settings()["tokenizer"]
    with pytest.raises(ConfigError, match=r"^config\.tokenizer\.kind: 'colour' cannot be trained"):
        jobs.parse_job(values)


@pytest.mark.slow
def test_pre_training_learns_its_tokens(tmp_path, caplog):
    """Every column of the picture that needs no decoder is there."""
    with caplog.at_level(logging.INFO):
        summary = jobs.run(settings(), workdir=str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert summary["loss"] < summary["chance_loss"]
    assert (tmp_path / "reconstruction.png").exists()


def test_capabilities_of_the_kinds_that_come_with_the_package():
    for name, kind in KINDS.items():
        config = kind.config(random_weights=True, vocabulary=64, image_size=16)
        assert config.kind == name
        assert (open_tokenizer(config).pixel_decode is not None) == kind.paints


class CountingVAE(DiscreteVAE):
    """A discrete VAE that also keeps a moving average of how often each token is drawn."""

    def __init__(self, *, vocabulary: int, rngs: nnx.Rngs, **settings):
        super().__init__(vocabulary=vocabulary, rngs=rngs, **settings)
        self.usage = nnx.BatchStat(jnp.full((vocabulary,), 1 / vocabulary))

    def gumbel_forward(self, images: jax.Array, **settings) -> GumbelOutput:
        output = super().gumbel_forward(images, **settings)
        drawn = jax.nn.softmax(output.logits).mean((0, 1, 2))
        self.usage[...] = jax.lax.stop_gradient(0.9 * self.usage[...] + 0.1 * drawn)
        return output


def counting_vae(config: DvaeConfig, *, precision=None) -> Functional:
    settings = {name: getattr(config, name) for name in ("width", "levels", "codebook_width")}
    return functional(lambda rngs: CountingVAE(vocabulary=config.vocabulary, rngs=rngs, **settings))


def counting_tokenizer(config: DvaeConfig, *, precision=None) -> Tokenizer:
    """The discrete VAE's tokenizer, whose params carry the counts as variables."""
    vae = counting_vae(config)

    def init(key: jax.Array) -> dict:
        return join(vae.init(key), vae.init_variables(key))

    def pixel_features(params: dict, pixels: jax.Array) -> jax.Array:
        params, variables = split(params)
        return vae.apply(params, normalize(pixels), variables=variables, method="features")

    def feature_logits(params: dict, features: jax.Array) -> jax.Array:
        params, variables = split(params)
        return vae.apply(params, features, variables=variables, method="feature_logits")

    def pixel_decode(params: dict, ids: jax.Array) -> jax.Array:
        params, variables = split(params)
        return denormalize(vae.apply(params, ids, variables=variables, method="decode"))

    return Tokenizer(
        vocabulary=config.vocabulary,
        image_size=config.image_size,
        grid=config.grid,
        init=init,
        encoding_params=lambda params: params,
        pixel_features=pixel_features,
        feature_logits=feature_logits,
        pixel_decode=pixel_decode,
        decoding_parts=("codebook", "decoder"),
    )


@pytest.mark.slow
def test_a_kind_with_state_of_its_own_is_trained_by_the_tokenizer_job(tmp_path, monkeypatch):
    """Its variables are trained by no gradient, and end up in the file beside the parameters."""
    monkeypatch.setitem(
        KINDS,
        "counting",
        TokenizerKind(
            config=DvaeConfig,
            open=counting_tokenizer,
            how_to_get="train one",
            training=Training(network=counting_vae, normalize=normalize),
        ),
    )
    values = tiny.tokenizer().to_dict()
    values["tokenizer"]["kind"] = "counting"
    values["run"]["steps"] = 4
    values["optimizer"]["warmup_steps"] = 1
    summary = jobs.run(values, workdir=str(tmp_path))
    config = dataclasses.replace(jobs.parse_job(values).tokenizer, path=summary["tokenizer"])
    params = load_params(config)
    usage = params["variables"]["usage"]
    np.testing.assert_allclose(usage.sum(), 1, rtol=1e-5)
    assert np.abs(usage - 1 / 16).max() > 1e-4
    images = np.zeros((1, 16, 16, 3), np.uint8)
    tokenizer = open_tokenizer(config)
    assert tokenizer.paints(params)
    assert tokenizer.decode(params, tokenizer.encode(params, images)).shape == (1, 16, 16, 3)
