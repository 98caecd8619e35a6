"""The segmenter against `transformers`, its initialisation, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.config import ConfigError, ModelConfig, SegmentHeadConfig
from beit_jax.models import convolution, flops
from beit_jax.models.functional import flatten, functional
from beit_jax.models.segmentation_heads import HEADS, auxiliary_side, logits_side
from beit_jax.models.segmenter import segmenter
from beit_jax.models.vit import Encoder
from beit_jax.training import optim, sharding
from tests.models import upernet_peer
from tests.tiny import PER_BLOCK

# Five patches: no pooling bin is a whole number of them, and max pooling leaves a row out.
MODEL = dataclasses.replace(
    PER_BLOCK, layers=4, width=16, heads=2, mlp_width=32, image_size=20, patch_size=4
)
HEAD = SegmentHeadConfig(blocks=(1, 2, 3, 4), channels=12, auxiliary_channels=8)
CLASSES = 5


def images(config, batch=2):
    shape = (batch, config.image_size, config.image_size, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def relative_error(actual, expected):
    """Largest difference over the largest value."""
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def parity(peer, config, *, head, classes, pixels):
    """The largest relative error of both heads' logits with the peer's weights."""
    params, variables = upernet_peer.to_segmenter(
        peer.state_dict(), head=head, layers=config.layers
    )
    model = segmenter(config, head=head, classes=classes)
    assert upernet_peer.same_layout(params, model.shapes())
    assert upernet_peer.same_layout(variables, model.variables_shapes())
    expected = upernet_peer.both_logits(peer, pixels)
    actual = jax.jit(
        lambda params, variables, pixels: model.apply(
            params, pixels, variables=variables, method="with_auxiliary"
        )
    )(params, variables, pixels)
    side = logits_side(config, head)
    assert actual[0].shape == (len(pixels), side, side, classes)
    return max(relative_error(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {},
        pytest.param({"auxiliary_convs": 2, "auxiliary_concat": True}, marks=pytest.mark.slow),
    ],
)
def test_both_logits_are_those_of_the_official_graph(change):
    head = dataclasses.replace(HEAD, **change)
    peer = upernet_peer.upernet(MODEL, head=head, classes=CLASSES)
    assert parity(peer, MODEL, head=head, classes=CLASSES, pixels=images(MODEL)) < 1e-4


@pytest.mark.slow
def test_both_logits_are_beit_for_semantic_segmentations_with_its_blocks():
    """It reads 2, 4, 6 and 10 of twelve where the official graph reads 4, 6, 8 and 12."""
    config = dataclasses.replace(MODEL, layers=12)
    head = dataclasses.replace(HEAD, blocks=(2, 4, 6, 10), channels=0)
    peer = upernet_peer.beit_segmenter(config, head=head, classes=CLASSES)
    pixels = images(config)
    assert parity(peer, config, head=head, classes=CLASSES, pixels=pixels) < 1e-4
    official = dataclasses.replace(head, blocks=(4, 6, 8, 12))
    assert parity(peer, config, head=official, classes=CLASSES, pixels=pixels) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "narrower"), [(512, {"width": 96, "heads": 2, "mlp_width": 192}), (640, {})]
)
def test_both_logits_of_base_are_those_of_the_official_graph(size, narrower):
    """At the released models' window; at the recipe's smaller one as deep but narrower."""
    config = ModelConfig.base(
        image_size=size, positions="relative_per_block", dtype="float32", drop_path_rate=0.0
    )
    config = dataclasses.replace(config, **narrower)
    head = SegmentHeadConfig(channels=64) if narrower else SegmentHeadConfig()
    peer = upernet_peer.upernet(config, head=head, classes=150)
    assert parity(peer, config, head=head, classes=150, pixels=images(config, batch=1)) < 1e-4


@pytest.mark.parametrize(
    ("model", "blocks", "size", "count"),
    [
        (ModelConfig.base, (4, 6, 8, 12), 640, 163_407_980),
        (ModelConfig.large, (8, 12, 16, 24), 640, 441_271_084),
    ],
)
def test_parameter_counts_are_the_published_ones(model, blocks, size, count):
    """Of the released checkpoints, auxiliary head included."""
    config = model(image_size=size, positions="relative_per_block")
    shapes = segmenter(config, head=SegmentHeadConfig(blocks=blocks), classes=150).shapes()
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


KINDS = {
    "upernet": HEAD,
    "patch_8": HEAD,
    "setr_pup": SegmentHeadConfig(kind="setr_pup", blocks=(2, 3, 4), channels=12),
    "linear": SegmentHeadConfig(kind="linear", blocks=(2, 4), auxiliary_channels=0),
}


def model_of(name):
    return dataclasses.replace(MODEL, patch_size=8, image_size=40) if name == "patch_8" else MODEL


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_the_side_the_rules_and_the_flops_that_are_said_of_it(name, monkeypatch):
    """Shapes alone: logits, decay, sharding, layer decay, and FLOPs as the jaxpr has them."""
    config, head = model_of(name), KINDS[name]
    model = segmenter(config, head=head, classes=CLASSES)
    shapes, variables = model.shapes(), model.variables_shapes()
    side, auxiliary = logits_side(config, head), auxiliary_side(config, head)
    assert (side, auxiliary) == {
        "upernet": (20, 5),
        "patch_8": (10, 2),
        "setr_pup": (20, 5),
        "linear": (5, 5),
    }[name]

    # Interpolation and pooling, matrix products here, are no work.
    def counted_as_nothing(x, rows, columns):
        return jnp.zeros((x.shape[0], len(rows), len(columns), x.shape[-1]), x.dtype)

    monkeypatch.setattr(convolution, "_products", counted_as_nothing)
    pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    for training, method in ((False, None), (True, "with_auxiliary")):

        def forward(params, variables, pixels, method=method):
            return model.apply(params, pixels, variables=variables, method=method)

        counted = flops.matmul_flops(forward, shapes, variables, pixels)
        formula = flops.segmenter_flops(config, head=head, classes=CLASSES, auxiliary=training)
        assert formula == counted
        logits = jax.eval_shape(forward, shapes, variables, pixels)
        logits = logits if training else (logits,)
        assert logits[0].shape == (1, side, side, CLASSES)
        assert logits[0].dtype == jnp.float32
        if training and head.auxiliary_channels:
            assert logits[1].shape == (1, auxiliary, auxiliary, CLASSES)
        elif training:
            assert logits[1] is None

    decayed = flatten(optim.decay_mask(shapes))
    for leaf, value in decayed.items():
        if not leaf.startswith("encoder/"):
            assert value == leaf.endswith("kernel"), leaf
    multipliers = flatten(optim.layer_multipliers(shapes, decay=0.5, layers=config.layers))
    assert {
        float(value) for leaf, value in multipliers.items() if not leaf.startswith("encoder/")
    } == {1.0}
    mesh = sharding.make_mesh(fsdp=2)
    placed = flatten(sharding.shardings(shapes, mesh))
    for leaf, placement in placed.items():
        if not leaf.startswith("encoder/"):
            assert placement.is_fully_replicated == (not leaf.endswith("kernel")), leaf
    assert all(
        placement.is_fully_replicated
        for placement in flatten(sharding.shardings({"variables": variables}, mesh)).values()
    )


@pytest.mark.parametrize("name", KINDS)
def test_in_bfloat16_logits_and_statistics_stay_float32(name):
    """Variables must keep their layout from step to step; convolutions are in bfloat16."""
    config = dataclasses.replace(model_of(name), dtype="bfloat16")
    model = segmenter(config, head=KINDS[name], classes=CLASSES)
    assert hash(model) == hash(model)  # a static argument of jitted functions
    shapes, variables = model.shapes(), model.variables_shapes()
    pixels = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, 3), jnp.float32)
    step = functools.partial(model.apply_and_update, train=True)
    logits, updated = jax.eval_shape(step, shapes, variables, pixels)
    assert {leaf.dtype for leaf in jax.tree.leaves(logits)} == {jnp.dtype(jnp.float32)}
    assert flatten(updated) == flatten(variables)
    jaxpr = str(jax.make_jaxpr(step)(shapes, variables, pixels))
    wide = [line for line in jaxpr.splitlines() if "conv_general" in line and ":f32" in line]
    assert not wide
    assert name == "linear" or "conv_general" in jaxpr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patch_8", "setr_pup", "linear"])
def test_training_and_evaluation_of_the_other_kinds(name):
    """What a training call gives, and that running statistics alone change the evaluation."""
    config, head = model_of(name), KINDS[name]
    model = segmenter(config, head=head, classes=CLASSES)
    params = jax.jit(model.init)(jax.random.key(0))
    variables = model.init_variables(jax.random.key(0))
    pixels = images(config)
    step = jax.jit(functools.partial(model.apply_and_update, train=True))
    (logits, auxiliary), updated = step(params, variables, pixels)
    assert (auxiliary is None) == (head.auxiliary_channels == 0)
    evaluate = jax.jit(model.apply)
    before = evaluate(params, pixels, variables=variables)
    after = evaluate(params, pixels, variables=updated)
    assert before.shape == after.shape == logits.shape
    assert np.isfinite(after).all()
    assert np.abs(before - after).max() > 0


@pytest.mark.slow
def test_the_linear_head_is_a_matrix_on_normalised_patches():
    config, head = MODEL, KINDS["linear"]
    model = segmenter(config, head=head, classes=CLASSES)
    params = jax.jit(model.init)(jax.random.key(0))
    variables = {
        "head": {"norm": {"mean": np.float32(0.3), "var": np.float32(4.0), "count": np.float32(1)}}
    }
    variables = jax.tree.map(
        lambda leaf, shape: jnp.full(shape.shape, leaf), variables, model.variables_shapes()
    )
    encoder = functional(
        lambda rngs: Encoder(config, mask_token=False, final_norm=False, rngs=rngs)
    )
    pixels = images(config)
    outputs = functools.partial(encoder.apply, blocks=head.blocks, method="block_outputs")
    second, fourth = jax.jit(outputs)(params["encoder"], pixels)[:, :, 1:]
    patches = (np.concatenate([second, fourth], -1) - 0.3) / np.sqrt(4 + 1e-5)
    expected = patches @ np.asarray(params["head"]["classifier"]["kernel"][0, 0])
    logits = jax.jit(model.apply)(params, pixels, variables=variables)
    np.testing.assert_allclose(logits.reshape(2, 25, CLASSES), expected, rtol=1e-4, atol=1e-6)


def test_the_progressive_head_is_setrs_whose_classifier_comes_last():
    """LayerNorm, then convolution, BatchNorm, ReLU and doubling twice, then the classifier."""
    torch = upernet_peer.torch
    head = KINDS["setr_pup"]
    model = functional(
        lambda rngs: HEADS["setr_pup"].build(MODEL, head=head, classes=CLASSES, rngs=rngs)
    )
    rng = np.random.default_rng(1)
    params, variables = (
        jax.tree.map(lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(np.float32), shapes)
        for shapes in (model.shapes(), model.variables_shapes())
    )
    for stage in ("stage_0", "stage_1"):
        params[stage]["conv"]["kernel"] -= 0.5  # else no ReLU would cut
    x = rng.normal(size=(2, 5, 5, 16)).astype(np.float32)
    actual = jax.jit(functools.partial(model.apply, train=False, dropout_key=None))(
        params, [x], variables=variables
    )

    def convolve(x, kernel):
        weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        return torch.nn.functional.conv2d(x, weight, padding=kernel.shape[0] // 2)

    norm = {name: torch.from_numpy(leaf) for name, leaf in params["norm"].items()}
    y = torch.nn.functional.layer_norm(
        torch.from_numpy(x), (16,), norm["scale"], norm["bias"], eps=1e-6
    ).permute(0, 3, 1, 2)
    for stage in ("stage_0", "stage_1"):
        norm = {**params[stage]["norm"], **variables[stage]["norm"]}
        norm = {name: torch.from_numpy(np.asarray(leaf)) for name, leaf in norm.items()}
        y = torch.nn.functional.batch_norm(
            convolve(y, params[stage]["conv"]["kernel"]),
            norm["mean"],
            norm["var"],
            norm["scale"],
            norm["bias"],
        ).relu()
        y = torch.nn.functional.interpolate(y, scale_factor=2, mode="bilinear")
    y = convolve(y, params["classifier"]["kernel"]).permute(0, 2, 3, 1).numpy()
    assert relative_error(actual, y + params["classifier"]["bias"]) < 1e-5


@pytest.mark.slow
def test_drop_path_and_dropout_need_their_own_keys():
    """Each changes the logits; without keys training is deterministic."""
    config = dataclasses.replace(MODEL, drop_path_rate=0.5, layer_scale_init=1.0)
    head = dataclasses.replace(KINDS["linear"], dropout=0.5)
    model = segmenter(config, head=head, classes=CLASSES)
    params = jax.jit(model.init)(jax.random.key(0))
    variables = model.init_variables(jax.random.key(0))
    pixels = images(config)

    @jax.jit
    def logits(drop_path_key=None, dropout_key=None):
        both, _ = model.apply_and_update(
            params,
            variables,
            pixels,
            train=True,
            drop_path_key=drop_path_key,
            dropout_key=dropout_key,
        )
        return both[0]

    plain = logits()
    assert np.array_equal(plain, logits())
    for name in ("drop_path_key", "dropout_key"):
        changed = [logits(**{name: jax.random.key(seed)}) for seed in (0, 1)]
        assert np.abs(changed[0] - plain).max() > 1e-4, name
        assert np.abs(changed[0] - changed[1]).max() > 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_kept_outputs_have_the_whole_encoders_drop_path_and_gradients(remat):
    """The last block's are what the encoder returns with the same key, and so is the gradient."""
    config = dataclasses.replace(MODEL, drop_path_rate=0.5, layer_scale_init=1.0, remat=remat)
    encoder = functional(
        lambda rngs: Encoder(config, mask_token=False, final_norm=False, rngs=rngs)
    )
    params, key = jax.jit(encoder.init)(jax.random.key(0)), jax.random.key(1)
    pixels = images(config)

    def whole(params):
        tokens = encoder.apply(params, pixels, drop_path_key=key)
        return (tokens**2).sum(), tokens

    def kept(params):
        second, last = encoder.apply(
            params, pixels, blocks=(2, 4), drop_path_key=key, method="block_outputs"
        )
        return (last**2).sum() + 0 * second.sum(), last

    expected = jax.jit(jax.grad(whole, has_aux=True))(params)
    actual = jax.jit(jax.grad(kept, has_aux=True))(params)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "head", "message"),
    [
        ({}, {"kind": "fcn"}, "head.kind: must be one of upernet, setr_pup, linear; got 'fcn'"),
        ({}, {"blocks": (1, 2, 3, 5)}, r"head.blocks: \(1, 2, 3, 5\) of an encoder that has 4"),
        ({}, {"blocks": (1, 2, 3)}, r'head.blocks: "upernet" reads 4, but these are \(1, 2, 3\)'),
        (
            {"image_size": 4},
            {},
            'model.image_size: 1 × 1 patches are too few for "upernet", which pools 2 × 2',
        ),
        (
            {"patch_size": 8, "image_size": 24},
            {},
            'model.image_size: 3 × 3 patches are too few for "upernet", which pools 4 × 4',
        ),
        (
            {"patch_size": 5},
            {"kind": "setr_pup"},
            'model.patch_size: "setr_pup" doubles .* powers of two, not 5',
        ),
        ({}, {"kind": "linear"}, 'head.channels: "linear" has none to set, got 12'),
        (
            {},
            {"kind": "setr_pup", "blocks": (4,)},
            r"head.auxiliary_channels: the auxiliary head reads the third of head.blocks, which",
        ),
        ({}, {"auxiliary_convs": 0}, "head.auxiliary_convs: .* must be the width, 16"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(model, head, message):
    with pytest.raises(ConfigError, match=message) as error:
        segmenter(
            dataclasses.replace(MODEL, **model),
            head=dataclasses.replace(HEAD, **head),
            classes=CLASSES,
        )
    assert "\n" not in str(error.value)


def test_no_class_is_refused():
    with pytest.raises(ConfigError, match="classes: must be at least 1, got 0"):
        segmenter(MODEL, head=HEAD, classes=0)
