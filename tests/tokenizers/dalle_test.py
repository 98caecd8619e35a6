"""The DALL-E discrete VAE against OpenAI's modules, with the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.models.blocks import compute_dtype
from beit_jax.models.functional import flatten, unflatten
from beit_jax.tokenizers.dalle import (
    DalleConfig,
    dalle_networks,
    dalle_tokenizer,
    map_pixels,
    unmap_pixels,
)

SMALL = DalleConfig(
    width=16,
    vocabulary=512,
    image_size=48,
    random_weights=True,
    dtype="float32",
)
HALF = dataclasses.replace(SMALL, dtype="bfloat16")
RELATIVE_TOLERANCE = 1e-4


def relative_error(actual, expected) -> float:
    """Largest difference over the largest magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def channels_last(tensor) -> np.ndarray:
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def converted(module) -> dict:
    """An original module's parameters in our names and layout."""
    flat = {}
    for name, tensor in module.state_dict().items():
        name = name.removeprefix("blocks.").replace("output.conv", "output")
        name = name.replace("res_path.", "").replace("id_path", "identity")
        *path, kind = name.split(".")
        array = tensor.detach().numpy()
        if kind == "w":
            array = array.transpose(2, 3, 1, 0)
        flat["/".join([*path, {"w": "kernel", "b": "bias"}[kind]])] = array
    return unflatten(flat)


def block_outputs(module, x) -> dict:
    """An original module's outputs by our names of the stages."""
    results, hooks = {}, []

    def record(name):
        def hook(module, inputs, output):
            results[name] = channels_last(output)

        return hook

    for name, child in module.named_modules():
        parts = name.split(".")
        if name == "blocks.input" or name == "blocks.output" or parts[-1].startswith("block_"):
            hooks.append(child.register_forward_hook(record("/".join(parts[1:]))))
    module(x)
    for hook in hooks:
        hook.remove()
    return results


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch runs the original")


@pytest.fixture(scope="module")
def originals(torch):
    """The original encoder and decoder, small, with random weights and non-zero biases."""
    package = pytest.importorskip("dall_e", reason="the DALL-E package is the original")
    torch.manual_seed(0)
    width, vocabulary = SMALL.width, SMALL.vocabulary
    encoder = package.Encoder(n_hid=width, vocab_size=vocabulary)
    decoder = package.Decoder(n_init=width // 2, n_hid=width, vocab_size=vocabulary)
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            if name.endswith(".b"):
                parameter.data.normal_(std=0.1)
    return {"encoder": encoder, "decoder": decoder}


@pytest.fixture(scope="module")
def params(originals):
    return {name: converted(module) for name, module in originals.items()}


@pytest.mark.parametrize("size", [32, 64])
def test_encoder_matches_the_original_block_by_block(torch, originals, params, size):
    images = np.random.default_rng(size).uniform(0.1, 0.9, (2, size, size, 3)).astype(np.float32)
    expected = block_outputs(originals["encoder"], torch.from_numpy(images.transpose(0, 3, 1, 2)))
    encoder = dalle_networks(SMALL)["encoder"]
    actual = jax.jit(lambda params, x: encoder.apply(params, x, method="stages"))(
        params["encoder"], images
    )
    assert set(actual) == set(expected)
    assert len(actual) == 10
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < RELATIVE_TOLERANCE, errors
    assert actual["output"].shape == (2, size // 8, size // 8, SMALL.vocabulary)


def test_decoder_matches_the_original_block_by_block(torch, originals, params):
    ids = np.random.default_rng(0).integers(0, SMALL.vocabulary, (2, 5, 7))
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(ids), SMALL.vocabulary)
    expected = block_outputs(originals["decoder"], one_hot.permute(0, 3, 1, 2).float())
    decoder = dalle_networks(SMALL)["decoder"]
    actual = jax.jit(lambda params, x: decoder.apply(params, x, method="stages"))(
        params["decoder"], ids
    )
    assert set(actual) == set(expected)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < RELATIVE_TOLERANCE, errors
    assert actual["output"].shape == (2, 40, 56, 6)


def test_tokenizer_matches_the_original_from_bytes_to_ids_and_back(torch, originals, params):
    from dall_e.utils import map_pixels as original_map
    from dall_e.utils import unmap_pixels as original_unmap

    images = np.random.default_rng(1).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    tokenizer = dalle_tokenizer(SMALL)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2)).float() / 255
    logits = originals["encoder"](original_map(pixels))
    error = relative_error(jax.jit(tokenizer.logits)(params, images), channels_last(logits))
    assert error < RELATIVE_TOLERANCE
    # Ties within rounding may go either way; random weights on noise have none at these sizes.
    expected = logits.argmax(1)
    ids = jax.jit(tokenizer.encode)(params, images)
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, expected.numpy())

    one_hot = torch.nn.functional.one_hot(expected, SMALL.vocabulary).permute(0, 3, 1, 2)
    output = originals["decoder"](one_hot.float())
    pictures = original_unmap(torch.sigmoid(output[:, :3]))
    np.testing.assert_allclose(
        jax.jit(tokenizer.decode)(params, ids), channels_last(pictures), atol=1e-5, rtol=0
    )


def test_parameter_counts_at_full_size():
    networks = dalle_networks(DalleConfig(random_weights=True))

    def count(name):
        return sum(leaf.size for leaf in jax.tree.leaves(networks[name].shapes()))

    assert count("encoder") == 53_786_240
    assert count("decoder") == 43_829_766
    assert len(jax.tree.leaves(networks["encoder"].shapes())) == 74
    assert len(jax.tree.leaves(networks["decoder"].shapes())) == 76


def test_full_size_kernels_have_the_released_shapes():
    networks = dalle_networks(DalleConfig(random_weights=True))
    encoder = flatten(networks["encoder"].shapes())
    decoder = flatten(networks["decoder"].shapes())
    assert encoder["input/kernel"].shape == (7, 7, 3, 256)
    assert encoder["group_1/block_1/conv_1/kernel"].shape == (3, 3, 256, 64)
    assert encoder["group_1/block_1/conv_4/kernel"].shape == (1, 1, 64, 256)
    assert encoder["group_2/block_1/identity/kernel"].shape == (1, 1, 256, 512)
    assert encoder["output/kernel"].shape == (1, 1, 2048, 8192)
    assert decoder["input/kernel"].shape == (1, 1, 8192, 128)
    assert decoder["group_1/block_1/conv_1/kernel"].shape == (1, 1, 128, 512)
    assert decoder["group_1/block_1/conv_4/kernel"].shape == (3, 3, 512, 2048)
    assert decoder["output/kernel"].shape == (1, 1, 256, 6)
    assert not any(name.startswith("group_1") and "identity" in name for name in encoder)


def test_initialisation_is_normal_with_variance_one_over_fan_in():

    @jax.jit  # so that only what is looked at is drawn
    def draw(key):
        networks = dalle_networks(SMALL)
        encoder, decoder = networks["encoder"].init(key), networks["decoder"].init(key)
        biases = {name: leaf for name, leaf in flatten(encoder).items() if name.endswith("bias")}
        return encoder["output"]["kernel"], decoder["input"]["kernel"], biases

    kernel, lookup, biases = jax.device_get(draw(jax.random.key(0)))
    # 128 inputs, 65,536 values.
    assert kernel.std() == pytest.approx(1 / np.sqrt(128), rel=0.02)
    assert np.abs(kernel).max() > 3.5 / np.sqrt(128)  # not truncated
    assert lookup.std() == pytest.approx(1 / np.sqrt(512), rel=0.05)
    assert all(not np.any(bias) for bias in biases.values())


def test_pixel_maps():
    pixels = jnp.asarray([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(map_pixels(pixels), [0.1, 0.3, 0.5, 0.9], rtol=1e-6)
    np.testing.assert_allclose(unmap_pixels(map_pixels(pixels)), pixels, atol=1e-6)
    np.testing.assert_array_equal(unmap_pixels(jnp.asarray([0.0, 1.0])), [0.0, 1.0])


def test_bfloat16_keeps_the_two_convolutions_of_token_width_in_float32(params):
    networks = dalle_networks(HALF)
    images = jnp.full((1, 32, 32, 3), 0.5)
    encode = jax.jit(lambda *args: networks["encoder"].apply(*args, method="stages"))
    stages = encode(params["encoder"], images)
    assert stages["input"].dtype == jnp.bfloat16
    assert stages["group_4/block_2"].dtype == jnp.bfloat16
    assert stages["output"].dtype == jnp.float32
    x = jax.nn.relu(stages["group_4/block_2"].astype(jnp.float32))
    output = params["encoder"]["output"]
    exact = x @ output["kernel"][0, 0] + output["bias"]
    np.testing.assert_allclose(stages["output"], exact, rtol=1e-5, atol=1e-5)

    decode = jax.jit(lambda *args: networks["decoder"].apply(*args, method="stages"))
    stages = decode(params["decoder"], jnp.zeros((1, 4, 4), jnp.int32))
    assert stages["input"].dtype == jnp.float32
    assert stages["group_1/block_1"].dtype == jnp.bfloat16
    assert stages["output"].dtype == jnp.float32


def test_bfloat16_moves_logits_little(params):
    images = np.random.default_rng(2).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    full = jax.jit(dalle_tokenizer(SMALL).logits)(params, images)
    error = relative_error(jax.jit(dalle_tokenizer(HALF).logits)(params, images), full)
    assert 0 < error < 0.03  # bfloat16 rounds to 1 in 256; ten layers of residuals


@pytest.mark.slow
def test_some_positions_have_the_ids_that_all_have(params):
    rng = np.random.default_rng(3)
    colours = rng.integers(0, 256, (6, 6, 6, 3), dtype=np.uint8)
    images = np.repeat(np.repeat(colours, 8, axis=1), 8, axis=2)
    positions = np.stack([rng.permutation(36)[:13] for _ in images]).astype(np.int32)
    for config in (SMALL, HALF):
        tokenizer = dalle_tokenizer(config)
        ids = np.asarray(jax.jit(tokenizer.encode)(params, images)).reshape(6, 36)
        expected = np.take_along_axis(ids, positions, axis=1)
        assert len(np.unique(expected)) > 3
        some = jax.jit(tokenizer.encode)(params, images, positions=positions)
        assert some.dtype == jnp.int32
        np.testing.assert_array_equal(some, expected)


def test_auto_is_float32_on_cpu():
    assert jax.default_backend() == "cpu"
    auto = dataclasses.replace(SMALL, dtype="auto")
    assert DalleConfig(random_weights=True).dtype == "auto"
    assert compute_dtype(auto) == compute_dtype(SMALL) == jnp.float32
    assert compute_dtype(HALF) == jnp.bfloat16
