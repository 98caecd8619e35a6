"""The jobs that can be planned: what each computes, from shapes alone.

A further job needs one row in `PLANNED`; the compiler, the numbers and the tables follow from it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.config import ConfigError, ModelConfig, OptimizerConfig, RunConfig, check
from beit_jax.models.flops import (
    classifier_flops,
    encoder_flops,
    matmul_flops,
    mim_head_flops,
    segmenter_flops,
    student_flops,
)
from beit_jax.models.segmenter import segmenter
from beit_jax.segmentation import windows
from beit_jax.tasks import classify, pretrain, segment
from beit_jax.tasks.classify import ClassifyConfig
from beit_jax.tasks.pretrain import PretrainConfig
from beit_jax.tasks.segment import SegmentConfig
from beit_jax.tokenizers.loading import open_tokenizer
from beit_jax.training.state import Task
from beit_jax.types import ConfigDataclass, PyTree, Setting

SHALLOW_LAYERS = (2, 4)
# What stays on the chips and is not trained; the name of its part in the tables.
FROZEN = "tokenizer"
# The parts of a model as the tables call them, in their order, by the names of its parameters.
_PARTS = {
    "encoder": "encoder",
    "neck": "neck",
    "fc_norm": "head",
    "lm_head": "head",
    "head": "head",
    "auxiliary": "auxiliary",
}


class PlannedConfig(ConfigDataclass, Protocol):
    """What the config of a job that can be planned has, among other things."""

    def __hash__(self) -> int: ...

    @property
    def task(self) -> str:
        """A key of `PLANNED`."""

    @property
    def run(self) -> RunConfig:
        """Batch, steps, sharding."""

    @property
    def model(self) -> ModelConfig:
        """The encoder."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """AdamW and its schedule."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is counted without a compiler.

    Attributes:
      parameters: by part: "encoder", "head" and so on, which are trained, and those of the
        "tokenizer" that stay on the chips, where there is one.
      flops: per image: of every part forward, and of the whole "step". Pre-training also has the
        "student" (what is trained, forward and backward).
      input_bytes: bytes of one image as the host sends it.
      images_per_vcpu: what one vCPU of a host reads and augments, images/s.
      batch_size: images of a step on all chips.
      micro_batches: forward and backward passes per step.
      steps: length of the recipe.
    """

    parameters: dict[str, int]
    flops: dict[str, float]
    input_bytes: int
    images_per_vcpu: float
    batch_size: int
    micro_batches: int
    steps: int

    @property
    def trained(self) -> dict[str, int]:
        """The parameters by part, without those that stay as they are."""
        return {part: count for part, count in self.parameters.items() if part != FROZEN}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """How a kind of job is planned.

    Attributes:
      task: its task on shapes; nothing is read or computed. Raises ConfigError where the config
        leaves something open that only the images say.
      batch: `(config, *, batch_size)`, the shapes of a batch as the host sends it.
      flops: `Workload.flops` of a config and its task.
      images_per_vcpu: see `Workload`.
      held_out: `(config, *, batch_size)`, the shapes of a batch of held-out images; None where
        evaluating one takes less memory than the step.
      shallow: the same job with two depths, for `--plan_program=shallow`: of one to the other, and
        on to the config's own, every block adds the same.
    """

    task: Callable[..., Task]
    batch: Callable[..., dict[str, jax.ShapeDtypeStruct]]
    flops: Callable[..., dict[str, float]]
    images_per_vcpu: float
    held_out: Callable[..., dict[str, jax.ShapeDtypeStruct]] | None = None
    shallow: Callable[..., tuple[PlannedConfig, PlannedConfig]] = lambda config: shallow(config)


# ------------------------------------------------------------------------------------ pre-training


def _pretraining_task(config: PretrainConfig) -> Task:
    tokenizer = open_tokenizer(config.tokenizer)
    shapes = jax.eval_shape(tokenizer.init, jax.random.key(0))
    return pretrain.task_from_config(config, tokenizer_params=shapes)


def _pretraining_batch(
    config: PretrainConfig, *, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    size, token_size, grid = (
        config.model.image_size,
        config.tokenizer.image_size,
        config.model.grid,
    )
    return {
        "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
        "token_image": jax.ShapeDtypeStruct((batch_size, token_size, token_size, 3), jnp.uint8),
        "mask": jax.ShapeDtypeStruct((batch_size, grid, grid), jnp.bool_),
    }


def _pretraining_flops(config: PretrainConfig, task: Task) -> dict[str, float]:
    del task  # whose count has no tokenizer where tokens are kept; this step computes them
    scored = pretrain.scored_positions(config)
    tokenizer = open_tokenizer(config.tokenizer)
    vocabulary, size = tokenizer.vocabulary, tokenizer.image_size
    tokenization = matmul_flops(
        tokenizer.encode,
        jax.eval_shape(tokenizer.init, jax.random.key(0)),
        jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8),
    )
    student = student_flops(config.model, vocabulary=vocabulary, slots=scored)
    return {
        "encoder": encoder_flops(config.model),
        "head": mim_head_flops(config.model, vocabulary=vocabulary, slots=scored),
        "student": student,
        FROZEN: tokenization,
        "step": student + tokenization,
    }


# ---------------------------------------------------------------------------------- classification


def _classification_task(config: ClassifyConfig) -> Task:
    _check_classes(config.classes)
    return classify.task_from_config(config)


def _classification_batch(
    config: ClassifyConfig, *, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    size = config.model.image_size
    return {
        "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }


def _classification_flops(config: ClassifyConfig, task: Task) -> dict[str, float]:
    encoder = encoder_flops(config.model)
    head = classifier_flops(config.model, classes=config.classes) - encoder
    return {"encoder": encoder, "head": head, "step": task.flops_per_image}


# ------------------------------------------------------------------------------------ segmentation


def _segmentation_task(config: SegmentConfig) -> Task:
    config = _named_classes(config)
    _check_classes(config.classes)
    model = segmenter(config.model, head=config.head, classes=config.classes)
    return segment.segment_task(model, config=config)


def _named_classes(config: SegmentConfig) -> SegmentConfig:
    return dataclasses.replace(config, classes=config.classes or len(config.labels))


def _segmentation_batch(
    config: SegmentConfig, *, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    size = config.model.image_size
    return {
        "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
        "segmentation": jax.ShapeDtypeStruct((batch_size, size, size), jnp.uint8),
        "size": jax.ShapeDtypeStruct((batch_size, 2), jnp.int32),
    }


def _segmentation_held_out(
    config: SegmentConfig, *, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Photographs of 4 : 3 that are as large as images are made at scale 1."""
    data, inference = config.data, config.inference
    height, width = data.shorter, 4 * data.shorter // 3
    prepared = windows.prepare_image(
        np.zeros((height, width, 3), np.uint8),
        config=inference,
        crop=data.image_size,
        shorter=data.shorter,
        longer=data.longer,
    )
    batch = windows.pack(
        [prepared],
        [np.zeros((height, width), np.uint8)],
        images=1,
        crop=data.image_size,
        rooms=windows.Rooms(tile=inference.tile),
    )
    return {
        name: jax.ShapeDtypeStruct((batch_size, *values.shape[1:]), values.dtype)
        for name, values in batch.items()
    }


def _segmentation_flops(config: SegmentConfig, task: Task) -> dict[str, float]:
    classes = _named_classes(config).classes
    forward = functools.partial(segmenter_flops, config.model, head=config.head, classes=classes)
    # Blocks that nothing reads do not run.
    encoder = encoder_flops(dataclasses.replace(config.model, layers=max(config.head.blocks)))
    evaluated = forward()
    flops = {"encoder": encoder, "neck and head": evaluated - encoder}
    if config.head.auxiliary_channels:
        flops["auxiliary"] = forward(auxiliary=True) - evaluated
    return flops | {"step": task.flops_per_image}


def _segmentation_shallow(config: SegmentConfig) -> tuple[PlannedConfig, PlannedConfig]:
    """With as few blocks as the head can read, and with two more.

    The last block read stays as far from the last one, and the others come first: what lies between
    two outputs that are kept makes no difference.
    """
    read = len(config.head.blocks)
    unread = config.model.layers - max(config.head.blocks)
    low = max(read, SHALLOW_LAYERS[0])

    def with_depth(last: int) -> PlannedConfig:
        blocks = (*range(1, read), last)
        head = dataclasses.replace(config.head, blocks=blocks)
        return with_layers(config, last + unread, head=head)

    return with_depth(low), with_depth(low + 2)


# -------------------------------------------------------------------------------------- the table

# By `config.task`. Images per vCPU: reading and augmenting in the official order on one core
# (docs/speed.md), of which two vCPUs are one.
PLANNED: dict[str, Planned] = {
    "pretrain": Planned(
        task=_pretraining_task,
        batch=_pretraining_batch,
        flops=_pretraining_flops,
        images_per_vcpu=75,
    ),
    "classify": Planned(
        task=_classification_task,
        batch=_classification_batch,
        flops=_classification_flops,
        images_per_vcpu=75,
    ),
    "segment": Planned(
        task=_segmentation_task,
        batch=_segmentation_batch,
        flops=_segmentation_flops,
        images_per_vcpu=53,
        held_out=_segmentation_held_out,
        shallow=_segmentation_shallow,
    ),
}


def planned(config: PlannedConfig) -> Planned:
    """The row of a config's job.

    Raises:
      ConfigError: such jobs can't be planned; the message names those that can.
    """
    if config.task not in PLANNED:
        raise ConfigError(
            f"--plan: a job of config.task = {config.task!r} can't be planned, only"
            f" {', '.join(map(repr, PLANNED))}"
        )
    return PLANNED[config.task]


@functools.cache
def task_of_shapes(config: PlannedConfig) -> Task:
    """The run's task on shapes: no weights and no images are read.

    Raises:
      ConfigError: see `planned` and `Planned.task`.
    """
    return planned(config).task(config)


def batch_shapes(config: PlannedConfig, *, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as the host sends it (`data.pipeline.training_batches`)."""
    return planned(config).batch(config, batch_size=batch_size)


@functools.cache
def workload(config: PlannedConfig) -> Workload:
    """Counts parameters, FLOPs and input bytes."""
    task, row = task_of_shapes(config), planned(config)
    parameters: dict[str, int] = {}
    trees = jax.eval_shape(task.init, jax.random.key(0))
    order = list(_PARTS)
    for name in sorted(trees, key=lambda name: order.index(name) if name in order else len(order)):
        part = _PARTS.get(name, name)
        parameters[part] = parameters.get(part, 0) + _count(trees[name])
    if jax.tree.leaves(task.frozen):
        parameters[FROZEN] = _count(task.frozen)
    return Workload(
        parameters=parameters,
        flops=row.flops(config, task),
        input_bytes=sum(map(array_bytes, row.batch(config, batch_size=1).values())),
        images_per_vcpu=row.images_per_vcpu,
        batch_size=config.run.batch_size,
        micro_batches=config.optimizer.accumulate,
        steps=config.run.steps,
    )


def shallow(config: PlannedConfig) -> tuple[PlannedConfig, PlannedConfig]:
    """The job with 2 and with 4 layers, unrolled."""
    low, high = SHALLOW_LAYERS
    return with_layers(config, low), with_layers(config, high)


def with_layers(config: PlannedConfig, layers: int, **sections: Setting) -> PlannedConfig:
    """The job with another depth, unrolled, and with other sections where they are given."""
    model = dataclasses.replace(config.model, layers=layers, scan_unroll=0)
    return dataclasses.replace(config, model=model, **sections)


def array_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array that is not split."""
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def _check_classes(classes: int) -> None:
    check(
        classes > 0,
        "config.classes",
        "0 means as many as the images have, and --plan opens no images: say how many",
    )


def _count(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
