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

from beit_jax.config import ConfigError, ModelConfig, OptimizerConfig, RunConfig, check
from beit_jax.models.flops import (
    classifier_flops,
    encoder_flops,
    matmul_flops,
    mim_head_flops,
    student_flops,
)
from beit_jax.tasks import classify, pretrain
from beit_jax.tasks.classify import ClassifyConfig
from beit_jax.tasks.pretrain import PretrainConfig
from beit_jax.tokenizers.loading import open_tokenizer
from beit_jax.training.state import Task
from beit_jax.types import ConfigDataclass, PyTree, Setting

SHALLOW_LAYERS = (2, 4)
# What stays on the chips and is not trained; the name of its part in the tables.
FROZEN = "tokenizer"
# Parts of a model that the tables call by another name than its parameters do.
_PART_NAMES = {"lm_head": "head", "fc_norm": "head"}


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
      shallow: the same job with two depths, for `--plan_program=shallow`: of one to the other, and
        on to the config's own, every block adds the same.
    """

    task: Callable[..., Task]
    batch: Callable[..., dict[str, jax.ShapeDtypeStruct]]
    flops: Callable[..., dict[str, float]]
    images_per_vcpu: float
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


# -------------------------------------------------------------------------------------- the table

# By `config.task`. Reading and augmenting in the official order was measured on one core
# (`bench/input.py`); two vCPUs are one core.
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
    for name, tree in jax.eval_shape(task.init, jax.random.key(0)).items():
        part = _PART_NAMES.get(name, name)
        parameters[part] = parameters.get(part, 0) + _count(tree)
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
