"""The jobs that can be planned besides pre-training: what is counted, and what a shallow one is."""

import jax
import pytest

from beit_jax import jobs
from beit_jax.models.flops import matmul_flops
from beit_jax.planning import ahead_of_time, plan, report, slices, workloads
from beit_jax.training import optim, sharding, state
from configs import ade20k_base_512, ade20k_base_linear, beit_base_ft1k
from tests.tasks import tiny


def config_of(values, **settings):
    values.update_from_flattened_dict(settings)
    return jobs.parse_job(values.to_dict())


def test_a_classifiers_parameters_flops_and_input():
    config = config_of(beit_base_ft1k.get_config(), **{"optimizer.accumulate": 2})
    work = workloads.workload(config)
    # 86,530,984: the encoder without mask token and final norm, `fc_norm`, 768 × 1000 and 1000.
    assert work.parameters == {"encoder": 85_760_448, "head": 2 * 768 + 769_000}
    assert work.flops["encoder"] / 1e9 == pytest.approx(35.13, abs=0.01)
    assert work.flops["head"] == 2 * 768 * 1000
    assert work.flops["step"] == 3 * (work.flops["encoder"] + work.flops["head"])
    assert work.input_bytes == 224 * 224 * 3 + 4
    made = plan.make_plan(config, slices.parse_slice("v4-32"), program="none")
    assert made.images_per_chip == 64
    assert made.memory.parameters == 4 * sum(work.parameters.values())
    assert made.memory.tokenizer == 0
    printed = report.table(made)
    assert "64 per chip in 2 parts" in printed
    assert "encoder 85,760,448, head 770,536 " in f"{printed} ".replace("\n", " ")
    assert "forward: encoder 35.13, head 0.00; backward 70.26" in printed
    assert "tokenizer" not in printed


@pytest.mark.slow
def test_a_segmenters_parameters_flops_and_input():
    config = config_of(ade20k_base_512.get_config())
    work = workloads.workload(config)
    # mmseg's 163,407,980 at 640, whose 12 tables have 79² + 3 rows of 12 instead of 63² + 3.
    assert sum(work.trained.values()) == 163_407_980 - 12 * 12 * (79**2 - 63**2)
    assert list(work.trained) == ["encoder", "neck", "head", "auxiliary"]
    assert work.flops["encoder"] / 1e9 == pytest.approx(214.05, abs=0.01)
    # The fusion alone, 3 × 3 from 4 · 768 to 768 channels on 128 × 128 pixels, is 695.8.
    assert work.flops["neck and head"] / 1e9 == pytest.approx(995.87, abs=0.01)
    assert work.flops["step"] == workloads.task_of_shapes(config).flops_per_image
    assert work.input_bytes == 512 * 512 * (3 + 1) + 8
    made = plan.make_plan(config, slices.parse_slice("v4-8"), program="none")
    assert made.images_per_chip == 4
    assert (made.memory.fits, made.memory.evaluation) == (None, None)
    assert "neck and head 995.87, auxiliary 3.70; backward 2426.0" in report.table(made)


@pytest.mark.parametrize(
    ("blocks", "shallow"),
    [
        ((4, 6, 8, 12), [(4, (1, 2, 3, 4)), (6, (1, 2, 3, 6))]),
        # Hugging Face's: the last two blocks have parameters, but do not run.
        ((2, 4, 6, 10), [(6, (1, 2, 3, 4)), (8, (1, 2, 3, 6))]),
    ],
)
def test_a_shallow_segmenter_reads_as_many_blocks(blocks, shallow):
    config = config_of(ade20k_base_512.get_config(), **{"head.blocks": blocks})
    made = workloads.planned(config).shallow(config)
    assert [(job.model.layers, job.head.blocks) for job in made] == shallow
    assert all(job.model.blocks_per_step == job.model.layers for job in made)


def test_a_segmenter_that_reads_the_last_block_alone():
    config = config_of(ade20k_base_linear.get_config(), **{"head.blocks": (12,)})
    made = workloads.planned(config).shallow(config)
    assert [(job.model.layers, job.head.blocks) for job in made] == [(2, (2,)), (4, (4,))]
    # Its encoder is frozen: nothing goes back through it.
    flops = workloads.workload(config).flops
    assert flops["step"] == flops["encoder"] + 3 * flops["neck and head"]


def step_flops(config):
    """Matrix products of the whole train step, and bytes of its state; nothing is compiled."""
    task = workloads.task_of_shapes(config)
    optimizer = optim.adamw(config.optimizer)
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
    shapes = state.state_shapes(task, optimizer, mesh)

    def step(shapes, batch):
        return state.train_step(
            shapes,
            {},
            batch,
            task=task,
            config=config.optimizer,
            optimizer=optimizer,
            schedule=optim.learning_rate(config.optimizer, steps=config.run.steps),
            seed=0,
        )

    batch = workloads.batch_shapes(config, batch_size=config.run.batch_size)
    held = sum(map(workloads.array_bytes, jax.tree.leaves(shapes)))
    return matmul_flops(step, shapes, batch), held


@pytest.mark.slow
def test_a_segmenters_step_is_linear_in_the_depth_of_the_shallow_ones():
    """Work and state of the full step lie on the line through those of the two shallow steps."""
    settings = {"model.layers": 9, "head.blocks": (2, 3, 5, 8)}  # the last block is not read
    full = config_of(tiny.segment(), classes=5, **settings)
    low, high = workloads.planned(full).shallow(full)
    reach = (full.model.layers - low.model.layers) / 2
    for a, b, whole in zip(*map(step_flops, (low, high, full)), strict=True):
        assert whole == pytest.approx(a + reach * (b - a), rel=1e-6)


def test_held_out_images_are_planned_as_windows():
    config = config_of(ade20k_base_512.get_config())
    batch = workloads.planned(config).held_out(config, batch_size=16)
    # 683 columns are two windows of 512; 512 × 683 pixels are 2 × 3 tiles of 256, rooms 8.
    assert batch["windows"].shape == (16, 2, 512, 512, 3)
    assert batch["labels"].shape == (16, 8, 256, 256)


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_is_said():
    config = config_of(tiny.segment(), classes=5, **{"run.batch_size": 64})
    made, other = (
        plan.assemble(
            config,
            slices.parse_slice("v4-8"),
            compiled=ahead_of_time.Compiled(needed=20 * 2**30),
            described="",
            evaluation=size * 2**30,
        )
        for size in (31, 16)
    )
    assert made.memory.fits is False
    assert other.memory.fits is True
    assert made.bound == "memory: it does not fit"
    assert any("the evaluation does not fit" in line for line in made.advice)
    assert not any("the evaluation" in line for line in other.advice)
    assert "DOES NOT FIT" in report.table(made)
    assert "16.00 GiB  all during an evaluation" in report.table(other)


def test_advice_on_micro_batches_says_what_batch_norm_sees():
    config = config_of(tiny.segment(), classes=5, **{"run.batch_size": 64})
    compiled = ahead_of_time.Compiled(needed=40 * 2**30)
    made = plan.assemble(config, slices.parse_slice("v4-8"), compiled=compiled, described="")
    assert any("accumulate = 2" in line and "BatchNorm sees only" in line for line in made.advice)
