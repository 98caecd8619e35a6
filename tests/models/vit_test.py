"""The encoder against its specification, and against `transformers` with the same weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.config import ConfigError, ModelConfig
from beit_jax.models import flops, heads, relative_positions, vit
from beit_jax.models.blocks import drop_path_factors
from beit_jax.models.functional import flatten, functional
from tests.tiny import PER_BLOCK, PLAIN, TINY

VOCABULARY = 40
VARIANTS = {"beit+": TINY, "plain": PLAIN, "per_block": PER_BLOCK}


def relative_error(actual, expected):
    """Largest difference over the largest value."""
    return (
        np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()
    )


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 24, 24, 3)).astype(np.float32)
    mask = np.zeros((4, 9), bool)
    for row, count in zip(mask, (4, 3, 1, 4), strict=True):  # ragged, as official masks are
        row[rng.permutation(9)[:count]] = True
    labels = rng.integers(0, VOCABULARY, (4, 9))
    return images, mask, labels


@pytest.mark.parametrize(
    "implementation",
    [
        "xla",
        pytest.param("fused", marks=pytest.mark.slow),
        pytest.param("cudnn", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient_equal_transformers(
    variant, implementation, batch, attention_anywhere
):
    """Float32, same weights: 1e-4 relative for all-position logits, loss and every gradient."""
    torch = pytest.importorskip("torch", reason="the PyTorch peer is not installed")
    from tests.models import beit_peer

    config = dataclasses.replace(VARIANTS[variant], attention="xla")
    if implementation != "xla":  # a kernel's heads are 64 wide
        config = dataclasses.replace(config, width=128, heads=2, attention=implementation)
    images, mask, labels = batch
    peer = beit_peer.masked_image_model(config, vocabulary=VOCABULARY)
    params = beit_peer.to_native(dict(peer.named_parameters()), layers=config.layers)
    output = peer(
        torch.from_numpy(images.transpose(0, 3, 1, 2)), bool_masked_pos=torch.from_numpy(mask)
    )
    loss = torch.nn.functional.cross_entropy(
        output.logits[torch.from_numpy(mask)], torch.from_numpy(labels[mask])
    )
    loss.backward()
    peer_gradients = beit_peer.to_native(
        {name: p.grad for name, p in peer.named_parameters()}, layers=config.layers
    )

    model = heads.masked_image_model(config, vocabulary=VOCABULARY)
    logits = jax.jit(model.apply)(params, images, mask=mask)
    assert relative_error(logits, output.logits.detach().numpy()) < 1e-4

    def our_loss(params):
        positions, weights = heads.masked_positions(jnp.asarray(mask), slots=5)
        logits = model.apply(params, images, mask=mask, positions=positions)
        picked = jnp.take_along_axis(jnp.asarray(labels), positions, axis=1)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), picked[..., None], axis=-1)[..., 0]
        return (nll * weights).sum() / weights.sum()

    our, gradients = jax.jit(jax.value_and_grad(our_loss))(params)
    assert abs(our - loss.item()) / loss.item() < 1e-4
    actual, expected = flatten(gradients), flatten(peer_gradients)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert relative_error(actual[name], expected[name]) < 1e-4, name


def test_the_relative_position_index_of_a_2x2_grid():
    """A 2 × 2 grid: nine patch offsets, then the three class-token rows."""
    expected = [
        [11, 9, 9, 9, 9],
        [10, 4, 3, 1, 0],
        [10, 5, 4, 2, 1],
        [10, 7, 6, 4, 3],
        [10, 8, 7, 5, 4],
    ]
    np.testing.assert_array_equal(relative_positions.relative_position_index(2), expected)
    assert [relative_positions.table_rows(g) for g in (14, 24, 32, 40)] == [732, 2212, 3972, 6244]


def test_initialisation_is_the_pre_training_one():
    """Cut at ±0.02, effective deviation 0.0108, 1/√(2l), zeros and LayerScale."""
    config = dataclasses.replace(TINY, width=256, heads=4, mlp_width=512, layer_scale_init=1e-5)
    params = heads.masked_image_model(config, vocabulary=VOCABULARY).init(jax.random.key(0))
    flat = flatten(params)
    for name, value in flat.items():
        value = np.asarray(value)
        if name.endswith("/bias") or name.endswith("table"):
            assert (value == 0).all(), name
        elif name.endswith("/scale"):
            assert (value == 1).all(), name
        elif "gamma" in name:
            assert (value == np.float32(1e-5)).all(), name
        elif name.endswith(("proj/kernel", "fc2/kernel")):
            for layer, kernel in enumerate(value, start=1):
                limit = 0.02 / np.sqrt(2 * layer)
                assert 0.98 * limit < np.abs(kernel).max() <= limit * 1.0001, (name, layer)
                np.testing.assert_allclose(kernel.std(), 0.0108 / np.sqrt(2 * layer), rtol=0.02)
        else:
            assert np.abs(value).max() <= 0.02, name
            if value.size > 5000:
                np.testing.assert_allclose(value.std(), 0.0108, rtol=0.02)
    blocks = params["encoder"]["blocks"]["attention"]["query"]["kernel"]
    assert not np.allclose(blocks[0], blocks[1]), "blocks draw different weights"


def test_pixels_of_masked_patches_have_no_influence(batch):
    """Changing hidden pixels changes nothing; changing visible ones changes every prediction."""
    images, mask, _ = batch
    model = heads.masked_image_model(TINY, vocabulary=VOCABULARY)
    params = model.init(jax.random.key(1))
    pixels = mask.reshape(4, 3, 3).repeat(8, 1).repeat(8, 2)[..., None]
    apply = jax.jit(lambda images: model.apply(params, images, mask=mask))
    base = apply(images)
    np.testing.assert_array_equal(base, apply(np.where(pixels, 5.0, images)))
    assert np.abs(base - apply(np.where(pixels, images, images + 1.0))).min(axis=-1).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_unrolling_and_remat_do_not_change_the_numbers(unroll, batch):
    images, mask, _ = batch
    model = heads.masked_image_model(TINY, vocabulary=VOCABULARY)
    params = model.init(jax.random.key(1))
    other = heads.masked_image_model(
        dataclasses.replace(TINY, scan_unroll=unroll, remat="dots" if unroll == 2 else "full"),
        vocabulary=VOCABULARY,
    )

    def gradient(model):
        return jax.jit(jax.grad(lambda p: (model.apply(p, images, mask=mask) ** 2).mean()))(params)

    actual, others = flatten(gradient(model)), flatten(gradient(other))
    for a, b in zip(actual.values(), others.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_last_hidden_state_is_the_final_norms_input(batch):
    images, mask, _ = batch
    model = heads.masked_image_model(TINY, vocabulary=VOCABULARY)
    params = model.init(jax.random.key(1))
    encoder = heads.functional(
        lambda rngs: vit.Encoder(TINY, mask_token=True, final_norm=True, rngs=rngs)
    )
    states = encoder.apply(params["encoder"], images, mask=mask, method="hidden_states")
    assert states.shape == (4, 4, 10, 32)
    mean = states[-1].mean(-1, keepdims=True)
    normal = (states[-1] - mean) / np.sqrt(states[-1].var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        normal, encoder.apply(params["encoder"], images, mask=mask), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [1, 2])
def test_chosen_block_outputs_equal_hidden_states(batch, unroll):
    """In any order, with repeats; 0 is the embeddings."""
    images, mask, _ = batch
    config = dataclasses.replace(TINY, scan_unroll=unroll)
    encoder = heads.functional(
        lambda rngs: vit.Encoder(config, mask_token=True, final_norm=True, rngs=rngs)
    )
    params = encoder.init(jax.random.key(1))
    states = encoder.apply(params, images, mask=mask, method="hidden_states")

    def chosen(*blocks):
        return encoder.apply(params, images, blocks=blocks, mask=mask, method="block_outputs")

    for blocks in ((2,), (0,), (3, 1), (0, 2, 2), (1, 2, 3)):
        np.testing.assert_array_equal(chosen(*blocks), states[np.array(blocks)])
    last = encoder.apply(params, chosen(3)[0], method="final_norm")
    np.testing.assert_array_equal(last, encoder.apply(params, images, mask=mask))
    for blocks in ((), (4,), (-1,)):
        with pytest.raises(ValueError, match="blocks must be numbers from 0 to 3"):
            chosen(*blocks)


def test_blocks_after_the_last_one_asked_for_do_not_run(batch):
    images, _, _ = batch
    encoder = heads.functional(
        lambda rngs: vit.Encoder(TINY, mask_token=True, final_norm=True, rngs=rngs)
    )

    def cost(block):
        apply = functools.partial(encoder.apply, blocks=(block,), method="block_outputs")
        return flops.matmul_flops(apply, encoder.shapes(), images)

    assert cost(2) - cost(1) == cost(3) - cost(2) > 0


@pytest.mark.slow
def test_drop_path_drops_whole_samples_at_the_linear_rate():
    """A branch is there, scaled by 1 / (1 - p), or not at all; block 0 always is."""
    factors = np.asarray(drop_path_factors(jax.random.key(0), rate=0.3, layers=3, batch=20_000))
    assert factors.shape == (3, 2, 20_000)
    np.testing.assert_array_equal(factors[0], 1)
    for layer, rate in ((1, np.float32(0.15)), (2, np.float32(0.3))):
        for branch in factors[layer]:
            np.testing.assert_allclose(np.unique(branch), [0, 1 / (1 - rate)], rtol=1e-6)
            assert abs((branch > 0).mean() - (1 - rate)) < 0.015
    kept = factors[1:].reshape(4, -1) > 0
    assert np.abs(np.corrcoef(kept) - np.eye(4)).max() < 0.03  # branches draw independently

    config = dataclasses.replace(TINY, drop_path_rate=0.5, layers=1)
    encoder = heads.functional(
        lambda rngs: vit.Encoder(config, mask_token=False, final_norm=False, rngs=rngs)
    )
    params = encoder.init(jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(8, 24, 24, 3)).astype(np.float32)
    np.testing.assert_allclose(
        encoder.apply(params, images),
        encoder.apply(params, images, drop_path_key=jax.random.key(3)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_masked_positions_lists_every_masked_patch_once():
    mask = jnp.asarray([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
    positions, weights = heads.masked_positions(mask, slots=3)
    np.testing.assert_array_equal(positions[0], [1, 3, 4])
    np.testing.assert_array_equal(weights, [[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert positions[1][0] == 4


@pytest.mark.slow
def test_bfloat16_stays_close_to_float32(batch):
    """bfloat16 keeps 8 bits: logits of size ~1 within a few hundredths."""
    images, mask, _ = batch
    model = heads.masked_image_model(TINY, vocabulary=VOCABULARY)
    params = model.init(jax.random.key(1))
    half = heads.masked_image_model(
        dataclasses.replace(TINY, dtype="bfloat16"), vocabulary=VOCABULARY
    )
    full = model.apply(params, images, mask=mask)
    low = half.apply(params, images, mask=mask)
    assert low.dtype == jnp.float32
    assert relative_error(low, full) < 0.03


def test_images_of_another_size_are_refused():
    with pytest.raises(ConfigError, match="image_size: 30 is not a multiple of patch_size 8"):
        dataclasses.replace(TINY, image_size=30)
    with pytest.raises(ConfigError, match="width: 32 is not a multiple of heads 5"):
        dataclasses.replace(TINY, heads=5)
    model = heads.masked_image_model(TINY, vocabulary=VOCABULARY)
    with pytest.raises(ValueError, match="images are 16 × 16; this encoder's image_size is 24"):
        jax.eval_shape(
            lambda p: model.apply(p, jnp.zeros((1, 16, 16, 3)), mask=None), model.shapes()
        )


def test_flops_of_base_and_large():
    """By hand: 35.13 and 123.11 GFLOP forward at 224."""
    base = ModelConfig.base()
    large = ModelConfig.large()
    assert abs(flops.encoder_flops(base) / 1e9 - 35.13) < 0.01
    assert abs(flops.encoder_flops(large) / 1e9 - 123.11) < 0.01
    assert abs(flops.mim_head_flops(base, vocabulary=8192, slots=75) / 1e9 - 0.94) < 0.01


@pytest.mark.parametrize(
    "implementation",
    [
        "xla",
        pytest.param("fused", marks=pytest.mark.slow),
        pytest.param("cudnn", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_weights_equal_transformers(variant, implementation, batch, attention_anywhere):
    torch = pytest.importorskip("torch", reason="the PyTorch peer is not installed")
    from tests.models import beit_peer

    config = dataclasses.replace(VARIANTS[variant], attention="xla")
    if implementation != "xla":  # a kernel's heads are 64 wide
        config = dataclasses.replace(config, width=128, heads=2, attention=implementation)
    images, mask, _ = batch
    peer = beit_peer.masked_image_model(config, vocabulary=VOCABULARY)
    expected = peer(
        torch.from_numpy(images.transpose(0, 3, 1, 2)),
        bool_masked_pos=torch.from_numpy(mask),
        output_attentions=True,
    ).attentions
    params = beit_peer.to_native(dict(peer.named_parameters()), layers=config.layers)
    encoder = functional(
        lambda rngs: vit.Encoder(config, mask_token=True, final_norm=True, rngs=rngs)
    )

    blocks = (3, 1, 2)
    found = encoder.apply(
        params["encoder"], images, mask=mask, method="attention_weights", blocks=blocks
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-5)
    for block, weights in zip(blocks, found, strict=True):
        np.testing.assert_allclose(weights, expected[block - 1].detach().numpy(), rtol=1e-4)


def test_blocks_without_attention_are_an_error(batch):
    encoder = functional(
        lambda rngs: vit.Encoder(TINY, mask_token=True, final_norm=True, rngs=rngs)
    )
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), encoder.shapes())
    for blocks in ((), (0,), (4,)):
        with pytest.raises(ValueError, match="blocks must be numbers from 1 to 3"):
            encoder.apply(params, batch[0], method="attention_weights", blocks=blocks)
