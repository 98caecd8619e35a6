"""The discrete VAE against a PyTorch reference written here after the official module."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beit_jax.config import ConfigError
from beit_jax.models.functional import unflatten
from beit_jax.tokenizers.dvae import (
    DvaeConfig,
    denormalize,
    discrete_vae,
    dvae_tokenizer,
    kl_to_uniform,
    normalize,
    reconstruction_loss,
)

SMALL = DvaeConfig(width=12, vocabulary=40, codebook_width=20, levels=2, image_size=16)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is the reference")


def reference(torch, config) -> dict:
    """Encoder, codebook and decoder of `config` with PyTorch's layers and initialisation."""
    nn = torch.nn

    class Residual(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, width, 1),
            )

        def forward(self, x):
            return x + self.net(x)

    def stack(make, inputs, outputs):
        layers = []
        for index in range(config.levels):
            resample = make(inputs if index == 0 else config.width, config.width, 4, 2, 1)
            layers += [nn.Sequential(resample, nn.ReLU()), Residual(config.width)]
        return nn.Sequential(*layers, nn.Conv2d(config.width, outputs, 1))

    torch.manual_seed(0)
    return {
        "encoder": stack(nn.Conv2d, 3, config.vocabulary),
        "codebook": nn.Embedding(config.vocabulary, config.codebook_width),
        "decoder": stack(nn.ConvTranspose2d, config.codebook_width, 3),
    }


def converted(modules, config) -> dict:
    """The reference's parameters in our names and layout."""
    flat = {"codebook": modules["codebook"].weight.detach().numpy()}
    for part in ("encoder", "decoder"):
        for name, tensor in modules[part].state_dict().items():
            array = tensor.detach().numpy()
            *path, kind = name.split(".")
            index = int(path[0])
            if index == 2 * config.levels:
                target = "output"
            elif index % 2 == 0:
                target = f"level_{index // 2 + 1}/resample"
            else:
                target = f"level_{index // 2 + 1}/conv_{int(path[2]) // 2 + 1}"
            if kind == "weight" and part == "decoder" and target.endswith("resample"):
                array = array[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
            elif kind == "weight":
                array = array.transpose(2, 3, 1, 0)
            flat[f"{part}/{target}/{'kernel' if kind == 'weight' else 'bias'}"] = array
    return unflatten(flat)


def channels_last(tensor) -> np.ndarray:
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(discrete_vae(SMALL).init)(jax.random.key(0))


def test_logits_match_pytorch(torch, images):
    modules = reference(torch, SMALL)
    expected = channels_last(modules["encoder"](torch.from_numpy(images.transpose(0, 3, 1, 2))))
    actual = discrete_vae(SMALL).apply(converted(modules, SMALL), images, method="logits")
    assert actual.shape == (2, 4, 4, 40)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_some_positions_have_the_ids_that_all_have(params):
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    positions = np.stack([rng.permutation(16)[:5] for _ in images]).astype(np.int32)
    tokenizer = dvae_tokenizer(SMALL)
    ids = np.asarray(jax.jit(tokenizer.encode)(params, images)).reshape(8, 16)
    expected = np.take_along_axis(ids, positions, axis=1)
    assert len(np.unique(expected)) > 3
    some = jax.jit(tokenizer.encode)(params, images, positions=positions)
    np.testing.assert_array_equal(some, expected)


def test_reconstruction_from_the_same_soft_codes_matches_pytorch(torch):
    modules = reference(torch, SMALL)
    weights = np.random.default_rng(1).dirichlet(np.full(40, 0.3), (2, 4, 5)).astype(np.float32)
    codes = torch.einsum("bhwn,nd->bdhw", torch.from_numpy(weights), modules["codebook"].weight)
    expected = channels_last(modules["decoder"](codes))
    actual = discrete_vae(SMALL).apply(converted(modules, SMALL), weights, method="decode_soft")
    assert actual.shape == (2, 16, 20, 3)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_decode_is_decode_soft_of_one_hot(params):
    vae = discrete_vae(SMALL)
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 40, (1, 3, 3)))
    hard = vae.apply(params, ids, method="decode")
    soft = vae.apply(params, jax.nn.one_hot(ids, 40), method="decode_soft")
    np.testing.assert_allclose(hard, soft, rtol=1e-5, atol=1e-6)


def test_initialisation_is_pytorchs(torch, params):
    """Every parameter's bound is PyTorch's; the codebook is N(0, 1)."""
    expected = converted(reference(torch, SMALL), SMALL)
    expected.pop("codebook")
    actual = dict(params)
    codebook = np.asarray(actual.pop("codebook"))
    assert codebook.mean() == pytest.approx(0, abs=0.1)
    assert codebook.std() == pytest.approx(1, abs=0.1)

    def compare(actual, expected):
        assert actual.shape == expected.shape
        if actual.size >= 100:
            assert np.abs(actual).max() == pytest.approx(np.abs(expected).max(), rel=0.06)
            assert np.std(actual) == pytest.approx(np.std(expected), rel=0.15)

    jax.tree.map(compare, actual, expected)


def test_parameter_count_at_the_official_size():
    vae = discrete_vae(DvaeConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(vae.shapes())) == 20_081_411


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_each_level_halves_the_resolution(levels):
    config = DvaeConfig(width=8, vocabulary=16, codebook_width=8, levels=levels, image_size=64)
    tokenizer = dvae_tokenizer(config)
    params = jax.eval_shape(tokenizer.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    ids = jax.eval_shape(tokenizer.encode, params, images)
    assert ids.shape == (1, 64 // 2**levels, 64 // 2**levels)
    assert tokenizer.grid == ids.shape[1]
    assert jax.eval_shape(tokenizer.decode, params, ids).shape == (1, 64, 64, 3)


@pytest.mark.slow
def test_gumbel_forward_samples_the_softmax(params, images):
    """At low temperature the sample is one-hot, distributed as softmax(logits): Gumbel-max."""
    vae = discrete_vae(SMALL)
    output = {
        "kernel": jnp.zeros_like(params["encoder"]["output"]["kernel"]),
        "bias": jnp.where(jnp.arange(40) < 2, jnp.log(jnp.asarray([3.0, 1.0] * 20)), -1e9),
    }
    hot = params | {"encoder": params["encoder"] | {"output": output}}
    batch = jnp.broadcast_to(images[:1], (64, 16, 16, 3))
    output = vae.apply(hot, batch, method="gumbel_forward", key=jax.random.key(3), temperature=1e-6)
    noise = jax.random.gumbel(jax.random.key(3), (64, 4, 4, 40))
    ids = jnp.argmax(output.logits + noise, axis=-1)
    share = float(jnp.mean(ids == 0))
    assert share == pytest.approx(0.75, abs=0.05)  # 1,024 draws, standard deviation 0.0135
    expected = vae.apply(hot, ids, method="decode")
    np.testing.assert_allclose(output.reconstruction, expected, rtol=1e-4, atol=1e-4)


def test_gumbel_forward_matches_the_formula(params, images):
    vae = discrete_vae(SMALL)
    key = jax.random.key(4)
    output = vae.apply(params, images, method="gumbel_forward", key=key, temperature=0.7)
    logits = vae.apply(params, images, method="logits")
    np.testing.assert_array_equal(output.logits, logits)
    weights = jax.nn.softmax((logits + jax.random.gumbel(key, logits.shape)) / 0.7)
    expected = vae.apply(params, weights, method="decode_soft")
    np.testing.assert_allclose(output.reconstruction, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_straight_through_is_hard_forward_and_soft_backward(params, images):
    vae = discrete_vae(SMALL)
    key = jax.random.key(5)

    @jax.jit
    def forward(params):
        return vae.apply(
            params,
            images,
            method="gumbel_forward",
            key=key,
            temperature=1.0,
            straight_through=True,
        )

    output = forward(params)
    noise = jax.random.gumbel(key, output.logits.shape)
    ids = jnp.argmax(output.logits + noise, axis=-1)
    np.testing.assert_allclose(
        output.reconstruction, vae.apply(params, ids, method="decode"), rtol=1e-4, atol=1e-5
    )

    def loss_of(bias):
        output = params["encoder"]["output"] | {"bias": bias}
        moved = params | {"encoder": params["encoder"] | {"output": output}}
        return jnp.square(forward(moved).reconstruction).sum()

    gradient = jax.grad(loss_of)(params["encoder"]["output"]["bias"])
    assert float(jnp.abs(gradient).max()) > 0


def test_gumbel_forward_repeats_with_its_key_and_varies_with_another(params, images):
    vae = discrete_vae(SMALL)

    def forward(seed):
        output = vae.apply(
            params, images, method="gumbel_forward", key=jax.random.key(seed), temperature=0.9
        )
        return np.asarray(output.reconstruction)

    np.testing.assert_array_equal(forward(0), forward(0))
    assert np.abs(forward(0) - forward(1)).max() > 1e-3


def test_kl_to_uniform():
    certain = jnp.asarray([[100.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(kl_to_uniform(certain), [math.log(4)], rtol=1e-6)
    np.testing.assert_allclose(kl_to_uniform(jnp.full((2, 3, 8), 5.0)), np.zeros((2, 3)), atol=1e-6)


def test_kl_summed_is_the_official_term(torch):
    """Official: kl_div(input=log_uniform [1], target=log_q, batchmean, log_target)."""
    logits = np.random.default_rng(3).normal(size=(2, 4, 4, 10)).astype(np.float32)
    log_q = torch.log_softmax(torch.from_numpy(logits), -1).reshape(2, 16, 10)
    log_uniform = torch.log(torch.tensor([1 / 10]))
    with_batchmean = torch.nn.functional.kl_div(
        log_uniform.expand_as(log_q), log_q, reduction="sum", log_target=True
    )
    np.testing.assert_allclose(kl_to_uniform(logits).sum(), with_batchmean.numpy(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "l1"])
def test_reconstruction_loss_matches_pytorch(torch, kind):
    rng = np.random.default_rng(4)
    actual, target = rng.normal(size=(2, 2, 8, 8, 3)).astype(np.float32)
    function = {"mse": "mse_loss", "smooth_l1": "smooth_l1_loss", "l1": "l1_loss"}[kind]
    expected = getattr(torch.nn.functional, function)(
        torch.from_numpy(actual), torch.from_numpy(target)
    )
    np.testing.assert_allclose(
        reconstruction_loss(actual, target, kind=kind), expected.numpy(), rtol=1e-5
    )


def test_reconstruction_loss_rejects_another_kind():
    with pytest.raises(ConfigError, match="kind: must be one of"):
        reconstruction_loss(jnp.zeros(3), jnp.zeros(3), kind="huber")


def test_normalisation():
    np.testing.assert_allclose(normalize(jnp.asarray([0.0, 0.5, 1.0])), [-1, 0, 1])
    np.testing.assert_allclose(denormalize(jnp.asarray([-2.0, -1, 0, 1, 2])), [0, 0, 0.5, 1, 1])


@pytest.mark.slow
def test_it_learns_to_reconstruct_flat_colours():
    """Two hundred steps of gradient descent on the training loss beat predicting the mean."""
    config = DvaeConfig(width=16, vocabulary=16, codebook_width=16, levels=1, image_size=4)
    vae = discrete_vae(config)
    colours = np.random.default_rng(5).uniform(-1, 1, (16, 1, 1, 3)).astype(np.float32)
    inputs = jnp.broadcast_to(colours, (16, 4, 4, 3))

    def loss_of(params, key):
        output = vae.apply(params, inputs, method="gumbel_forward", key=key, temperature=0.9)
        return reconstruction_loss(output.reconstruction, inputs)

    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(carry, key):
        params, state = carry
        loss, gradients = jax.value_and_grad(loss_of)(params, key)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    params = jax.jit(vae.init)(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 200)
    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    variance = float(np.square(colours - colours.mean(axis=0)).mean())
    assert float(losses[-20:].mean()) < 0.5 * variance
