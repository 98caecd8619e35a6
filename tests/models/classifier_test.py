"""The classification head, how fine-tuning draws its parameters, and parity with `transformers`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.config import ConfigError, ModelConfig
from beit_jax.models.functional import flatten, functional
from beit_jax.models.heads import classifier
from beit_jax.models.vit import Encoder
from beit_jax.training import batch_augment, optim, sharding
from tests.tiny import PER_BLOCK

MODEL = dataclasses.replace(PER_BLOCK, width=128, mlp_width=256)


def parameters(config) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(config.shapes()))


@pytest.mark.parametrize(
    ("image_size", "classes", "count"),
    [(224, 1000, 86_530_984), (224, 21841, 102_557_713), (384, 1000, 86_744_104)],
)
def test_parameter_counts_are_the_published_ones(image_size, classes, count):
    base = ModelConfig(
        layers=12,
        width=768,
        heads=12,
        mlp_width=3072,
        image_size=image_size,
        positions="relative_per_block",
    )
    assert parameters(classifier(base, classes=classes)) == count


def test_plain_vit_parameter_count():
    plain = ModelConfig(
        layers=24,
        width=1024,
        heads=16,
        mlp_width=4096,
        positions="absolute",
        layer_scale_init=None,
    )
    assert parameters(classifier(plain, classes=1000)) == 304_302_056


def test_initialisation_is_the_fine_tuning_one():
    """Uncut normal of 0.02, 1/√(2l), patches as PyTorch draws them, a head 1000 times smaller."""
    model = classifier(MODEL, classes=50)
    flat = {k: np.asarray(v) for k, v in flatten(jax.jit(model.init)(jax.random.key(0))).items()}
    bound = 1 / np.sqrt(3 * 8 * 8)
    for name, value in flat.items():
        if name.startswith("encoder/patch_embed"):
            assert 0.95 * bound < np.abs(value).max() <= bound, name
        elif name == "head/kernel":
            np.testing.assert_allclose(value.std(), 2e-5, rtol=0.05)
        elif name.endswith("/bias") or name.endswith("table"):
            assert (value == 0).all(), name
        elif name.endswith(("proj/kernel", "fc2/kernel")):
            for layer, kernel in enumerate(value, start=1):
                np.testing.assert_allclose(kernel.std(), 0.02 / np.sqrt(2 * layer), rtol=0.03)
        elif name.endswith("kernel"):
            np.testing.assert_allclose(value.std(), 0.02, rtol=0.03)
            assert np.abs(value).max() > 0.06, "not cut at one standard deviation"


@pytest.mark.slow
def test_mean_pooling_leaves_out_the_class_token_and_cls_is_the_class_token():
    """Pooling by hand from the encoder's tokens; the 'cls' encoder ends in its norm."""
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 24, 3)), jnp.float32)
    for pooling in ("mean", "cls"):
        model = classifier(MODEL, classes=5, pooling=pooling, init_scale=1.0)
        params = model.init(jax.random.key(1))
        assert ("fc_norm" in params) == (pooling == "mean")
        assert ("norm" in params["encoder"]) == (pooling == "cls")
        norm = params.get("fc_norm") or params["encoder"]["norm"]
        norm["scale"] = norm["scale"] * 1.5
        headless = {k: v for k, v in params["encoder"].items() if k != "norm"}
        tokens = _tokens(headless, images)
        pooled = tokens[:, 1:].mean(1) if pooling == "mean" else tokens[:, 0]
        pooled = (pooled - pooled.mean(-1, keepdims=True)) / jnp.sqrt(
            pooled.var(-1, keepdims=True) + 1e-6
        )
        expected = 1.5 * pooled @ params["head"]["kernel"] + params["head"]["bias"]
        np.testing.assert_allclose(model.apply(params, images), expected, rtol=1e-4, atol=1e-5)


def _tokens(encoder_params, images):
    encoder = functional(lambda rngs: Encoder(MODEL, mask_token=False, final_norm=False, rngs=rngs))
    return encoder.apply(encoder_params, images)


def test_every_parameter_has_decay_and_sharding_rules():
    for pooling in ("mean", "cls"):
        shapes = classifier(MODEL, classes=5, pooling=pooling).shapes()
        decayed = flatten(optim.decay_mask(shapes))
        assert decayed["head/kernel"]
        assert not decayed["head/bias"]
        sharding.shardings(shapes, sharding.make_mesh(fsdp=1))


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ConfigError, match="pooling: must be one of mean, cls; got 'max'"):
        classifier(dataclasses.replace(MODEL, layers=1), classes=5, pooling="max")


def relative_error(actual, expected):
    """Largest difference over the largest value."""
    return (
        np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image_size", "implementation"), [(224, "xla"), (384, "xla"), (224, "fused"), (384, "fused")]
)
def test_logits_loss_and_every_gradient_equal_transformers(
    image_size, implementation, attention_anywhere
):
    """Float32, same weights, real sizes: relative 1e-4 for logits, smoothed loss, gradients."""
    torch = pytest.importorskip("torch", reason="the PyTorch peer is not installed")
    from tests.models import beit_peer

    sizes = {"xla": {"width": 32, "heads": 2}, "fused": {"layers": 1, "width": 64, "heads": 1}}
    config = dataclasses.replace(
        MODEL,
        **sizes[implementation],
        mlp_width=64,
        image_size=image_size,
        patch_size=16,
        attention=implementation,
    )
    classes = 12
    peer = beit_peer.classifier(config, classes=classes, pooling="mean")
    params = beit_peer.classifier_to_native(dict(peer.named_parameters()), layers=config.layers)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, image_size, image_size, 3)).astype(np.float32)
    labels = rng.integers(0, classes, 3)
    output = peer(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    loss = torch.nn.functional.cross_entropy(
        output.logits, torch.from_numpy(labels), label_smoothing=0.1
    )
    loss.backward()
    expected = flatten(
        beit_peer.classifier_to_native(
            {name: p.grad for name, p in peer.named_parameters()}, layers=config.layers
        )
    )

    model = classifier(config, classes=classes)

    def our_loss(params):
        logits = model.apply(params, images)
        losses = batch_augment.smoothed_cross_entropy(logits, jnp.asarray(labels), smoothing=0.1)
        return losses.mean(), logits

    (our, logits), gradients = jax.jit(jax.value_and_grad(our_loss, has_aux=True))(params)
    errors = {
        "logits": relative_error(logits, output.logits.detach()),
        "loss": abs(float(our) - loss.item()) / loss.item(),
    }
    actual = flatten(gradients)
    assert actual.keys() == expected.keys()
    errors |= {name: relative_error(actual[name], expected[name]) for name in actual}

    assert not {name: error for name, error in errors.items() if not error < 1e-4}


FEATURES = {
    "per block, mean": (MODEL, "mean"),
    "shared, cls": (dataclasses.replace(MODEL, positions="relative_shared"), "cls"),
    "plain, mean": (
        dataclasses.replace(MODEL, positions="absolute", layer_scale_init=None),
        "mean",
    ),
    "224": (dataclasses.replace(MODEL, image_size=224, patch_size=16), "mean"),
}


@pytest.mark.parametrize("variant", FEATURES)
def test_hidden_states_equal_transformers(variant):
    """A probe's input: the embeddings and every block's output, without the final norm.

    Each block's own contribution is compared too: the residual stream would hide a small one.
    """
    torch = pytest.importorskip("torch", reason="the PyTorch peer is not installed")
    from tests.models import beit_peer

    config, pooling = FEATURES[variant]
    size = config.image_size
    peer = beit_peer.classifier(config, classes=5, pooling=pooling)
    params = beit_peer.classifier_to_native(dict(peer.named_parameters()), layers=config.layers)[
        "encoder"
    ]
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        output = peer(torch.from_numpy(images.transpose(0, 3, 1, 2)), output_hidden_states=True)
    expected = np.stack([states.numpy() for states in output.hidden_states])

    encoder = functional(
        lambda rngs: Encoder(config, mask_token=False, final_norm=pooling == "cls", rngs=rngs)
    )
    actual = jax.jit(lambda p, x: encoder.apply(p, x, method="hidden_states"))(params, images)
    assert actual.shape == expected.shape == (config.layers + 1, 2, config.tokens + 1, config.width)
    for layer in range(config.layers + 1):
        assert relative_error(actual[layer], expected[layer]) < 1e-5, layer
    for layer, contribution in enumerate(np.diff(expected, axis=0)):
        assert relative_error(np.diff(actual, axis=0)[layer], contribution) < 1e-4, layer
