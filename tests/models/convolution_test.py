"""Layers on feature maps, against PyTorch's: values, gradients, running statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from beit_jax.models import convolution
from beit_jax.models.functional import functional
from beit_jax.training import sharding

torch = pytest.importorskip("torch", reason="the PyTorch peer is not installed")

FLOAT32 = jnp.dtype(jnp.float32)


def random(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def to_torch(x):
    """`[b, h, w, c]` → a leaf `[b, c, h, w]`."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).requires_grad_()


def from_torch(tensor):
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def compare(ours, theirs, x, *, rtol=1e-5):
    """Values and the gradient of a weighted sum of them."""
    peer_input = to_torch(x)
    peer = theirs(peer_input)
    expected = from_torch(peer)
    weights = random(*expected.shape, seed=99)

    def weighted(x):
        y = ours(x)
        return (y * weights).sum(), y

    gradient, actual = jax.jit(jax.grad(weighted, has_aux=True))(x)
    assert actual.shape == expected.shape
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)
    (peer * to_torch(weights).detach()).sum().backward()
    peer_gradient = from_torch(peer_input.grad)
    np.testing.assert_allclose(
        gradient, peer_gradient, rtol=rtol, atol=rtol * np.abs(peer_gradient).max()
    )


@pytest.mark.parametrize(
    ("old", "new"), [((3, 3), (12, 12)), ((4, 5), (7, 3)), ((1, 1), (4, 4)), ((9, 6), (2, 5))]
)
def test_bilinear_resizing_is_pytorchs_up_and_down(old, new):
    interpolate = functools.partial(
        torch.nn.functional.interpolate, size=new, mode="bilinear", align_corners=False
    )
    resize = functools.partial(convolution.resize_bilinear, size=new)
    compare(resize, interpolate, random(2, *old, 3))


def test_resizing_keeps_bfloat16_where_its_weights_are_exact():
    """By 4 they are: only the results are rounded. By 5/3 float32 does the work."""
    x = jnp.asarray(random(1, 3, 3, 2), jnp.bfloat16)
    for size in (12, 5):
        resized = convolution.resize_bilinear(x, size=(size, size))
        wide = convolution.resize_bilinear(x.astype(jnp.float32), size=(size, size))
        assert resized.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(resized), wide, atol=2**-7 * np.abs(wide).max())


@pytest.mark.parametrize(("side", "bins"), [(5, 1), (5, 2), (5, 3), (5, 6), (12, 6), (2, 3)])
def test_adaptive_pooling_is_pytorchs_where_bins_overlap_and_where_they_repeat(side, bins):
    pool = functools.partial(convolution.adaptive_average_pool, bins=bins)
    compare(pool, torch.nn.AdaptiveAvgPool2d(bins), random(2, side, side + 1, 3))


@pytest.mark.parametrize("size", [2, 4])
def test_max_pooling_leaves_an_incomplete_square_out(size):
    pool = functools.partial(convolution.max_pool, size=size)
    compare(pool, torch.nn.MaxPool2d(size), random(2, 9, 8, 3))


def test_max_pooling_takes_bfloat16():
    x = jnp.asarray(random(1, 4, 4, 2), jnp.bfloat16)
    pooled = convolution.max_pool(x, size=2)
    assert pooled.dtype == jnp.bfloat16
    assert (pooled == x.reshape(1, 2, 2, 2, 2, 2).max((2, 4))).all()


def test_a_doubling_is_pytorchs_transposed_convolution():
    layer = functional(lambda rngs: convolution.Doubling(4, 6, dtype=FLOAT32, rngs=rngs))
    params = layer.init(jax.random.key(0))
    peer = torch.nn.ConvTranspose2d(4, 6, 2, stride=2)
    bound = 1 / np.sqrt(6 * 4)  # PyTorch's default
    for leaf, theirs in ((params["kernel"], peer.weight), (params["bias"], peer.bias)):
        assert 0.6 * bound < np.abs(leaf).max() <= bound
        assert theirs.abs().max() <= bound
    with torch.no_grad():
        peer.weight.copy_(torch.from_numpy(np.array(params["kernel"]).transpose(2, 3, 0, 1)))
        peer.bias.copy_(torch.from_numpy(np.array(params["bias"])))
    compare(functools.partial(layer.apply, params), peer, random(2, 3, 5, 4))


@pytest.mark.parametrize("size", [1, 3])
def test_a_convolution_is_pytorchs(size):
    layer = functional(lambda rngs: convolution.Conv(4, 6, size, dtype=FLOAT32, rngs=rngs))
    params = layer.init(jax.random.key(0))
    peer = torch.nn.Conv2d(4, 6, size, padding=size // 2, bias=False)
    with torch.no_grad():
        peer.weight.copy_(torch.from_numpy(np.array(params["kernel"]).transpose(3, 2, 0, 1)))
    compare(functools.partial(layer.apply, params), peer, random(2, 5, 4, 4))


def norm_model():
    return functional(lambda rngs: convolution.BatchNorm(3, dtype=FLOAT32))


def test_batch_norm_is_pytorchs_in_training_and_evaluation():
    """Normalised by the biased variance; the unbiased one and the count go into the buffers."""
    model, peer = norm_model(), torch.nn.BatchNorm2d(3)
    params = {"scale": random(3) + 1, "bias": random(3, seed=1)}
    variables = model.init_variables(jax.random.key(0))
    with torch.no_grad():
        peer.weight.copy_(torch.from_numpy(params["scale"]))
        peer.bias.copy_(torch.from_numpy(params["bias"]))
    for seed in range(2):
        x = 2 + random(2, 3, 2, 3, seed=seed, scale=3)
        call = functools.partial(model.apply, params, variables=variables)
        compare(functools.partial(call, train=True), peer, x, rtol=1e-4)
        _, variables = model.apply_and_update(params, variables, x, train=True)
        np.testing.assert_allclose(variables["mean"], peer.running_mean, rtol=1e-5)
        np.testing.assert_allclose(variables["var"], peer.running_var, rtol=1e-5)
        assert float(variables["count"]) == int(peer.num_batches_tracked) == seed + 1
        assert variables["count"].dtype == jnp.float32
    evaluated, kept = model.apply_and_update(params, variables, x, train=False)
    expected = from_torch(peer.eval()(to_torch(x)))
    np.testing.assert_allclose(evaluated, expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, variables))


@pytest.mark.parametrize("devices", [1, 8])
def test_statistics_are_the_global_batchs_on_any_number_of_devices(devices):
    model, x = norm_model(), 5 + random(16, 2, 2, 3)
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:devices])
    batch = jax.device_put(x, NamedSharding(mesh, sharding.BATCH))
    params, variables = model.init(jax.random.key(0)), model.init_variables(jax.random.key(0))
    step = jax.jit(functools.partial(model.apply_and_update, train=True))
    y, variables = step(params, variables, batch)
    pixels = x.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(variables["mean"], 0.1 * pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variables["var"], 0.9 + 0.1 * pixels.var(0, ddof=1), rtol=1e-5)
    normal = (pixels - pixels.mean(0)) / np.sqrt(pixels.var(0) + 1e-5)
    np.testing.assert_allclose(y, normal.reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_statistics_in_bfloat16_are_those_of_float32():
    wide, narrow = (
        functional(lambda rngs, d=dtype: convolution.BatchNorm(3, dtype=jnp.dtype(d)))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    x = jnp.asarray(3 + random(4, 5, 5, 3), jnp.bfloat16)
    params, variables = wide.init(jax.random.key(0)), wide.init_variables(jax.random.key(0))
    expected, kept = wide.apply_and_update(params, variables, x, train=True)
    actual, ours = narrow.apply_and_update(params, variables, x, train=True)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(actual), expected, rtol=1e-2, atol=1e-2)
    for name in kept:
        assert ours[name].dtype == jnp.float32
        np.testing.assert_allclose(ours[name], kept[name], rtol=1e-5)


def test_one_value_per_channel_cannot_be_normalised():
    """PyTorch refuses it, too: its variance is 0, and every image would look the same."""
    model = norm_model()
    params, variables = model.init(jax.random.key(0)), model.init_variables(jax.random.key(0))
    with pytest.raises(ValueError, match="a batch of at least two images"):
        model.apply_and_update(params, variables, random(1, 1, 1, 3), train=True)


def test_dropout_drops_whole_channels_at_its_rate():
    x = 1 + np.abs(random(64, 3, 2, 50))
    dropped = np.asarray(convolution.drop_channels(x, key=jax.random.key(0), rate=0.2))
    whole = (dropped == 0).all((1, 2))
    assert ((dropped == 0).any((1, 2)) == whole).all(), "part of a channel"
    np.testing.assert_allclose(whole.mean(), 0.2, atol=0.03)
    assert whole.mean(0).min() > 0.05, "a channel's fate differs between images"
    kept = np.broadcast_to(~whole[:, None, None], x.shape)
    np.testing.assert_allclose(dropped[kept], x[kept] / 0.8, rtol=1e-6)


def test_a_classifier_drops_only_with_a_key():
    model = functional(
        lambda rngs: convolution.PixelClassifier(
            64, 5, dropout=0.5, dtype=jnp.dtype(jnp.bfloat16), rngs=rngs
        )
    )
    params, x = model.init(jax.random.key(0)), random(2, 3, 3, 64)
    plain = model.apply(params, x, dropout_key=None)
    assert plain.dtype == jnp.float32
    narrow = np.float32(jnp.asarray(x, jnp.bfloat16))
    kernel = np.float32(params["kernel"][0, 0].astype(jnp.bfloat16))
    np.testing.assert_allclose(plain, narrow @ kernel, rtol=1e-4, atol=1e-5)
    assert np.abs(model.apply(params, x, dropout_key=jax.random.key(1)) - plain).max() > 0.01


def test_initial_kernels_are_mmsegs():
    """Before a ReLU a variance of 2 / (9 · outputs); the classifier's deviation is 0.01."""
    key = jax.random.key(0)
    kernel = np.asarray(convolution.kaiming_normal(key, (3, 3, 64, 32)))
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 32)), rtol=0.03)
    peer = torch.nn.Conv2d(64, 32, 3)
    torch.nn.init.kaiming_normal_(peer.weight, a=0, mode="fan_out", nonlinearity="relu")
    np.testing.assert_allclose(kernel.std(), peer.weight.std().item(), rtol=0.05)
    kernel = np.asarray(convolution.classifier_normal(key, (1, 1, 256, 150)))
    np.testing.assert_allclose(kernel.std(), 0.01, rtol=0.03)


def test_a_module_is_convolution_norm_and_relu():
    module = functional(lambda rngs: convolution.ConvModule(4, 6, 3, dtype=FLOAT32, rngs=rngs))
    params, variables = module.init(jax.random.key(0)), module.init_variables(jax.random.key(0))
    assert set(params) == {"conv", "norm"}
    assert set(variables) == {"norm"}
    y = module.apply(params, random(2, 4, 4, 4), variables=variables, train=True)
    assert (y >= 0).all()
    assert 0.3 < float((y == 0).mean()) < 0.7
    assert isinstance(module.build(nnx.Rngs(0)), convolution.ConvModule)
