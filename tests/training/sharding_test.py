"""Which part of an array each device holds; the placement changes no result."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from beit_jax import jobs
from beit_jax.config import ConfigError, ModelConfig, OptimizerConfig
from beit_jax.models.functional import flatten, unflatten
from beit_jax.models.heads import classifier, masked_image_model
from beit_jax.tasks.pretrain import pretrain_task
from beit_jax.tokenizers.kinds import KINDS
from beit_jax.tokenizers.loading import load_params, open_tokenizer
from beit_jax.training import optim, sharding
from beit_jax.training.state import Task, init_state, state_shapes, train_step
from configs import beit_base
from tests.tasks import tiny

GOLDEN = """
encoder/blocks/attention/key/kernel          None,None,fsdp
encoder/blocks/attention/proj/bias           replicated
encoder/blocks/attention/proj/kernel         None,fsdp,None
encoder/blocks/attention/query/bias          replicated
encoder/blocks/attention/query/kernel        None,None,fsdp
encoder/blocks/attention/value/bias          replicated
encoder/blocks/attention/value/kernel        None,None,fsdp
encoder/blocks/gamma_1                       replicated
encoder/blocks/gamma_2                       replicated
encoder/blocks/mlp/fc1/bias                  replicated
encoder/blocks/mlp/fc1/kernel                None,None,fsdp
encoder/blocks/mlp/fc2/bias                  replicated
encoder/blocks/mlp/fc2/kernel                None,fsdp,None
encoder/blocks/norm1/bias                    replicated
encoder/blocks/norm1/scale                   replicated
encoder/blocks/norm2/bias                    replicated
encoder/blocks/norm2/scale                   replicated
encoder/cls_token                            replicated
encoder/mask_token                           replicated
encoder/norm/bias                            replicated
encoder/norm/scale                           replicated
encoder/patch_embed/bias                     replicated
encoder/patch_embed/kernel                   None,None,None,fsdp
encoder/relative_position_bias/table         replicated
lm_head/bias                                 replicated
lm_head/kernel                               None,fsdp
"""


def test_rules_of_beit_base():
    config = jobs.parse_job(beit_base.get_config().to_dict())
    mesh = sharding.make_mesh(fsdp=8)
    shapes = masked_image_model(config.model, vocabulary=8192).shapes()
    lines = [
        f"{name:<44} {','.join(map(str, placement.spec)) or 'replicated'}"
        for name, placement in flatten(sharding.shardings(shapes, mesh)).items()
    ]
    assert lines == GOLDEN.strip().splitlines()


TABLE = """
parameter                              shape     split                bytes on a device
encoder/blocks/attention/key/kernel    2×32×32   None,None,fsdp                   2,048
encoder/blocks/attention/proj/bias     2×32      replicated                         256
encoder/blocks/attention/proj/kernel   2×32×32   None,fsdp,None                   2,048
encoder/blocks/attention/query/bias    2×32      replicated                         256
encoder/blocks/attention/query/kernel  2×32×32   None,None,fsdp                   2,048
encoder/blocks/attention/value/bias    2×32      replicated                         256
encoder/blocks/attention/value/kernel  2×32×32   None,None,fsdp                   2,048
encoder/blocks/gamma_1                 2×32      replicated                         256
encoder/blocks/gamma_2                 2×32      replicated                         256
encoder/blocks/mlp/fc1/bias            2×64      replicated                         512
encoder/blocks/mlp/fc1/kernel          2×32×64   None,None,fsdp                   4,096
encoder/blocks/mlp/fc2/bias            2×32      replicated                         256
encoder/blocks/mlp/fc2/kernel          2×64×32   None,fsdp,None                   4,096
encoder/blocks/norm1/bias              2×32      replicated                         256
encoder/blocks/norm1/scale             2×32      replicated                         256
encoder/blocks/norm2/bias              2×32      replicated                         256
encoder/blocks/norm2/scale             2×32      replicated                         256
encoder/cls_token                      1×1×32    replicated                         128
encoder/mask_token                     1×1×32    replicated                         128
encoder/norm/bias                      32        replicated                         128
encoder/norm/scale                     32        replicated                         128
encoder/patch_embed/bias               32        replicated                         128
encoder/patch_embed/kernel             8×8×3×32  None,None,None,fsdp              6,144
encoder/relative_position_bias/table   52×2      replicated                         416
lm_head/bias                           64        replicated                         256
lm_head/kernel                         32×64     None,fsdp                        2,048
all                                                                              28,960
"""


def test_the_printed_table():
    """`--config.run.print_sharding`: kernels are in quarters, the rest is whole."""
    config = jobs.parse_job(tiny.pretrain().to_dict())
    shapes = masked_image_model(config.model, vocabulary=64).shapes()
    placements = sharding.shardings(shapes, sharding.make_mesh(fsdp=4))
    placed = jax.tree.map(
        lambda leaf, placement: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement),
        shapes,
        placements,
    )
    assert sharding.table(placed) == TABLE.strip()


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """As much of a device as the arrangement looks at."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_between_slices_goes_data_only():
    """Three slices of four devices, in no order: `fsdp` pairs stay inside a slice."""
    devices = [SliceDevice(id=i, slice_index=i % 3) for i in range(12)]
    assert sharding.count_slices(devices) == 3
    assert sharding.count_slices(jax.devices()) == 1
    grid = sharding.arrange_slices(devices, fsdp=2)
    assert grid.shape == (6, 2)
    assert {device.id for device in grid.flat} == set(range(12))
    slices = [[device.slice_index for device in row] for row in grid]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1], [2, 2], [2, 2]]
    with pytest.raises(ConfigError, match=r"run\.fsdp: 8 does not divide the 4 devices of each"):
        sharding.arrange_slices(devices, fsdp=8)


@dataclasses.dataclass(frozen=True)
class Chip(SliceDevice):
    """With the coordinates that it looks at on a TPU."""

    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    platform: str = "tpu"


@pytest.mark.parametrize(
    ("kind", "shape", "fsdp"),
    [
        ("TPU v4", (4, 4, 4), 1),
        ("TPU v4", (4, 4, 4), 2),
        ("TPU v4", (4, 4, 4), 8),
        ("TPU v4", (2, 2, 1), 4),
        ("TPU v5 lite", (4, 4, 1), 8),
        ("TPU v6 lite", (8, 8, 1), 4),
        ("TPU v6 lite", (8, 8, 1), 16),
    ],
)
def test_groups_that_are_no_whole_axis_of_the_torus(kind, shape, fsdp):
    """Two slices; 8 on 4 × 4 × 4 chips are half a plane."""
    devices = [
        Chip(id=i, slice_index=i // math.prod(shape), device_kind=kind, coords=coords)
        for i, coords in enumerate(2 * list(itertools.product(*map(range, shape))))
    ]
    mesh = sharding.make_mesh(fsdp=fsdp, devices=devices[::-1])
    assert dict(mesh.shape) == {"data": 2 * math.prod(shape) // fsdp, "fsdp": fsdp}
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
    assert all(len({device.slice_index for device in row}) == 1 for row in mesh.devices)


def test_arrays_come_back_whole():
    mesh = sharding.make_mesh(fsdp=8)
    tree = {"lm_head": {"kernel": np.arange(32.0, dtype=np.float32).reshape(2, 16)}}
    placed = jax.device_put(tree, sharding.shardings(tree, mesh))
    assert placed["lm_head"]["kernel"].addressable_shards[0].data.shape == (2, 2)
    whole = sharding.to_host(sharding.replicate(tree, mesh)), sharding.to_host(placed)
    for copy in whole:
        np.testing.assert_array_equal(copy["lm_head"]["kernel"], tree["lm_head"]["kernel"])


def test_an_axis_that_does_not_divide_is_named():
    mesh = sharding.make_mesh(fsdp=8)
    shapes = {"lm_head": {"kernel": jax.ShapeDtypeStruct((32, 60), jnp.float32)}}
    with pytest.raises(ValueError, match=r"lm_head/kernel \(32, 60\): 60 over 8"):
        sharding.shardings(shapes, mesh)
    with pytest.raises(ValueError, match="no sharding rule for these parameters: novelty"):
        sharding.shardings({"novelty": jax.ShapeDtypeStruct((2,), jnp.float32)}, mesh)


@pytest.mark.parametrize(
    "name",
    [
        "encoder/blocks/mlp/gate/kernel",
        "encoder/blocks/attention/key/bias",  # BEiT's keys have none
        "decoder/upsample/kernel",
        "encoder/novelty/scale",
        "neck/bias",
    ],
)
def test_a_parameter_nobody_thought_of_is_an_error_that_names_it(name):
    """Kernels too: none is replicated just for lying under an encoder or a decoder."""
    mesh = sharding.make_mesh(fsdp=1)
    shapes = unflatten({name: jax.ShapeDtypeStruct((8,), jnp.float32)})
    with pytest.raises(ValueError, match=f"no sharding rule for these parameters: {name}$"):
        sharding.shardings(shapes, mesh)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_a_tokenizer_has_a_rule(kind):
    config = KINDS[kind].config(vocabulary=16, image_size=32, width=8)
    shapes = jax.eval_shape(open_tokenizer(config).init, jax.random.key(0))
    for placed in jax.tree.leaves(sharding.shardings(shapes, sharding.make_mesh(fsdp=8))):
        assert placed.spec == sharding.REPLICATED


@pytest.mark.parametrize("positions", ["relative_shared", "relative_per_block", "absolute"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_parameter_of_a_classifier_has_a_rule(positions, pooling):
    config = ModelConfig(
        layers=2, width=16, heads=2, mlp_width=32, image_size=32, positions=positions
    )
    shapes = classifier(config, classes=8, pooling=pooling).shapes()
    placed = flatten(sharding.shardings(shapes, sharding.make_mesh(fsdp=8)))
    assert placed["head/kernel"].spec == PartitionSpec(None, "fsdp")


def test_a_job_brings_rules_for_its_own_parameters():
    """They come first, and hold for the optimizer's moments of the parameter too."""
    task = Task(
        init=lambda key: {"neck": {"kernel": jnp.zeros((8, 4))}, "head": {"bias": jnp.zeros(8)}},
        prepare=None,
        loss=None,
        evaluate=None,
        metrics=None,
        frozen={},
        flops_per_image=0.0,
    )
    rules = ((r"neck/kernel$", PartitionSpec("fsdp")), (r"head/bias$", PartitionSpec("fsdp")))
    optimizer = optim.adamw(OptimizerConfig(learning_rate=1e-3, warmup_steps=0))
    mesh = sharding.make_mesh(fsdp=8)
    with pytest.raises(ValueError, match=r"no sharding rule .*: params/neck/kernel"):
        state_shapes(task, optimizer, mesh)
    shapes = state_shapes(dataclasses.replace(task, sharding_rules=rules), optimizer, mesh)
    for tree in (shapes.params, shapes.opt_state[0].mu):
        assert tree["neck"]["kernel"].sharding.spec == PartitionSpec("fsdp")
        assert tree["head"]["bias"].sharding.spec == PartitionSpec("fsdp")


def test_batches_that_do_not_divide_are_named():
    with pytest.raises(ConfigError, match=r"config\.run\.fsdp: 3 does not divide 8 devices"):
        sharding.make_mesh(fsdp=3)
    mesh = sharding.make_mesh(fsdp=1)
    check = functools.partial(sharding.check_batch, mesh=mesh)
    check(16, accumulate=2, processes=1)
    for size, accumulate, processes, what in (
        (12, 1, 1, "12 does not divide over 8 devices"),
        (16, 4, 1, "16 does not divide over 32 devices times config.optimizer.accumulate = 4"),
        (16, 1, 3, "16 does not divide over 3 processes"),
    ):
        with pytest.raises(ConfigError, match=what):
            check(size, accumulate=accumulate, processes=processes)


@pytest.fixture(scope="module")
def curve():
    """Losses of six steps of pre-training on a mesh, and the placed state at the end."""
    config = jobs.parse_job(tiny.pretrain().to_dict())
    tokenizer = open_tokenizer(config.tokenizer)
    model = masked_image_model(config.model, vocabulary=tokenizer.vocabulary)
    task = pretrain_task(
        model,
        tokenizer,
        tokenizer_params=load_params(config.tokenizer),
        config=config,
        slots=config.data.mask.count,
    )
    optimizer = optim.adamw(config.optimizer)
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(6):
        image = rng.integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
        mask = np.zeros((16, 16), bool)
        for row in mask:
            row[rng.permutation(16)[: rng.integers(3, 7)]] = True
        batches.append(
            {"image": image, "token_image": image[:, ::2, ::2], "mask": mask.reshape(16, 4, 4)}
        )

    def run(*, devices: int, fsdp: int, accumulate: int = 1):
        mesh = sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])
        shapes = state_shapes(task, optimizer, mesh)
        placements = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        initialize = jax.jit(
            functools.partial(init_state, task, optimizer), out_shardings=placements
        )
        state = initialize(jax.random.key(0))
        step = jax.jit(
            functools.partial(
                train_step,
                task=task,
                config=dataclasses.replace(config.optimizer, accumulate=accumulate),
                optimizer=optimizer,
                schedule=optim.learning_rate(config.optimizer, steps=12),
                seed=0,
            ),
            donate_argnums=0,
            out_shardings=(placements, None),
        )
        losses = []
        for batch in batches:
            state, metrics = step(state, task.frozen, sharding.to_devices(batch, mesh))
            losses.append(float(metrics["loss"]))
        return losses, state

    return functools.cache(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "fsdp", "accumulate"), [(8, 1, 1), (8, 8, 1), (8, 2, 1), (4, 2, 2)]
)
def test_same_curve_on_every_mesh(curve, devices, fsdp, accumulate):
    """Drop path included: only float summation order may differ. Micro-batches draw their own
    drop path, so there the curve is compared from the first step only."""
    alone, _ = curve(devices=1, fsdp=1)
    losses, state = curve(devices=devices, fsdp=fsdp, accumulate=accumulate)
    assert losses[0] != losses[-1]
    count = 6 if accumulate == 1 else 1
    np.testing.assert_allclose(
        losses[:count], alone[:count], rtol=2e-4 if accumulate == 1 else 2e-2
    )
    kernel = state.opt_state[0].mu["encoder"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 32, 64 // fsdp)
    assert len(kernel.addressable_shards) == devices
