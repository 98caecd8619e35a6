"""Linear probe: one classifier for each block on the block's pooled features, trained together.

Paper appendix D; official run_linear_eval.py. The losses of all blocks are summed, so that one run
trains them all without one influencing another. The classifiers are stacked arrays:

    probe/kernel [l, f, C]        probe/bias [l, C]

    params = init_probe(key, blocks=12, width=768, classes=1000)
    sums = probe_sums(params, features, labels, weight)  # loss, correct [l], weight

`probe_task` turns this into a task for the train loop. Features are computed from every batch's
views, as in the official code, or once for a few passes and stored (`stored_feed`).

Shapes: b images, l probed blocks, f feature width, C classes.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from beit_jax.config import RunError
from beit_jax.evaluation.features import (
    STORED,
    FeatureSpec,
    FrozenEncoder,
    image_features,
    on_host,
)
from beit_jax.models.flops import encoder_flops
from beit_jax.training import state
from beit_jax.training.batch_augment import image_weights, smoothed_cross_entropy
from beit_jax.training.state import Task
from beit_jax.types import Batch, HostBatch, Params, Sums

if TYPE_CHECKING:
    # Importing it brings orbax, which only training installs.
    from beit_jax.training import loop

# Standard deviation of a new classifier's weights (run_linear_eval.py).
INIT_SCALE = 0.01


def init_probe(key: jax.Array, *, blocks: int, width: int, classes: int) -> Params:
    """New classifiers of `blocks` blocks: small random weights, biases of zero."""
    kernel = INIT_SCALE * jax.random.normal(key, (blocks, width, classes))
    return {"probe": {"kernel": kernel, "bias": jnp.zeros((blocks, classes))}}


def probe_logits(params: Params, features: jax.Array) -> jax.Array:
    """Every block's classifier on its block: float32 `[b, l, f]` → `[b, l, C]`."""
    logits = jnp.einsum(
        "blf,lfc->blc", features, params["probe"]["kernel"], precision=jax.lax.Precision.HIGHEST
    )
    return logits + params["probe"]["bias"]


def probe_sums(params: Params, features: jax.Array, labels: jax.Array, weight: jax.Array) -> Sums:
    """Cross-entropy and correct predictions, summed over images.

    Args:
      params: as `init_probe` makes them.
      features: float32 `[b, l, f]`.
      labels: int `[b]`, in 0..C-1.
      weight: float32 `[b]`, 0 for images that do not count.

    Returns:
      `loss`, the sum over images and blocks; `correct` `[l]`; `weight`, how many images count.
    """
    logits = probe_logits(params, features)
    losses = jax.vmap(
        functools.partial(smoothed_cross_entropy, labels=labels, smoothing=0.0), in_axes=1
    )(logits)  # [l, b]
    correct = logits.argmax(axis=-1) == labels[:, None]
    return {
        "loss": (losses * weight).sum(),
        "correct": (correct * weight[:, None]).sum(axis=0),
        "weight": weight.sum(),
    }


def probe_task(
    encoder: FrozenEncoder, *, spec: FeatureSpec, classes: int, stored: bool = False
) -> Task:
    """The linear probe as a task for the train loop; sums are over images.

    Args:
      encoder: frozen.
      spec: the features; each of its blocks gets a classifier.
      classes: C.
      stored: whether batches have `features` [b, l, f] that were computed before, in place of
        `image`, uint8 [b, s, s, 3]. Beside either they have `label` [b].
    """
    blocks, width = spec.blocks, spec.width(encoder.model)

    def init(key: jax.Array) -> Params:
        return init_probe(key, blocks=len(blocks), width=width, classes=classes)

    def prepare(frozen: Params, batch: Batch, key: jax.Array | None) -> Batch:
        if "features" in batch:
            features = batch["features"].astype(jnp.float32)
        else:
            features = image_features(encoder.functions, frozen, batch["image"], spec=spec, key=key)
        labels = jnp.maximum(batch["label"], 0)
        return {"features": features, "label": labels, "weight": image_weights(batch)}

    def sums(params: Params, batch: Batch) -> Sums:
        return probe_sums(params, batch["features"], batch["label"], batch["weight"])

    def loss(
        params: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Sums]:
        del key, step
        result = sums(params, batch)
        return result["loss"], {name: result[name] for name in ("loss", "weight")}

    def evaluate(params: Params, frozen: Params, batch: Batch) -> Sums:
        return sums(params, prepare(frozen, batch, None))

    def to_metrics(totals: Sums) -> dict[str, jax.Array]:
        result = {"loss": totals["loss"] / totals["weight"]}
        if "correct" in totals:
            top1 = totals["correct"] / totals["weight"]
            result["top1"] = top1.max()
            result |= {f"top1_block_{block}": top1[i] for i, block in enumerate(blocks)}
        return result

    forward = 0.0 if stored else encoder_flops(encoder.model)
    return Task(
        init=init,
        prepare=prepare,
        loss=loss,
        evaluate=evaluate,
        metrics=to_metrics,
        frozen=encoder.params,
        # Features need no gradient: forward and the kernel's gradient, 2 × 2 FLOPs a weight.
        flops_per_image=forward + 4.0 * len(blocks) * width * classes,
        best="top1",
    )


# ---------------------------------------------------------------------------- stored features


def feature_function(
    encoder: FrozenEncoder, *, spec: FeatureSpec, seed: int, mesh: Mesh
) -> Callable[[HostBatch, int | None], np.ndarray]:
    """Features as the train step of `probe_task` computes them, for storing.

    Args:
      encoder: frozen.
      spec: blocks, pooling, normalisation, random erasing.
      seed: of the run; a step's randomness is that of the train step with its number.
      mesh: of all devices.

    Returns:
      `(batch, step) -> features`: this host's batch and its step, None for held-out images, to
      this host's features, float16 `[b, l, f]`.
    """

    def compute(params: Params, images: jax.Array, step: jax.Array | None) -> jax.Array:
        key = None
        if step is not None:
            key = jax.random.fold_in(jax.random.key(seed), step)
            key = jax.random.fold_in(key, state.PREPARATION)
        features = image_features(encoder.functions, params, images, spec=spec, key=key)
        return features.astype(STORED)

    extract = on_host(compute, encoder.params, mesh=mesh)

    def features(batch: HostBatch, step: int | None) -> np.ndarray:
        return extract(batch, None if step is None else np.int32(step))

    return features


def stored_feed(
    feed: "loop.Feed",
    features: Callable[[HostBatch, int | None], np.ndarray],
    *,
    steps: int,
    blocks: tuple[int, ...],
) -> "loop.Feed":
    """A feed of features in place of images, each computed once and kept in this host's memory.

    Training goes through the features of the first `steps` batches over and over. Which batch a
    step has does not depend on where a run started. Held-out features are kept too.

    Args:
      feed: of images.
      features: from `feature_function`.
      steps: training batches to keep.
      blocks: probed ones, for messages.

    Raises:
      RunError: while reading, where a feature is not finite in float16.
    """
    training: list[HostBatch] = []
    held_out: list[HostBatch] = []

    def training_batches(start_step: int) -> Iterator[HostBatch]:
        if not training:
            training.extend(_store_training(feed.training(0), features, steps=steps, blocks=blocks))
        for step in itertools.count(start_step):
            yield training[step % steps]

    def evaluation_batches() -> Iterator[HostBatch]:
        if held_out:
            yield from held_out
            return
        computed = []
        for batch in feed.evaluation():
            computed.append(_stored(batch, features(batch, None), blocks=blocks))
            yield computed[-1]
        held_out.extend(computed)  # only complete passes: the reader may leave in between

    return dataclasses.replace(feed, training=training_batches, evaluation=evaluation_batches)


def _store_training(
    batches: Iterable[HostBatch],
    features: Callable[[HostBatch, int | None], np.ndarray],
    *,
    steps: int,
    blocks: tuple[int, ...],
) -> list[HostBatch]:
    """The first `steps` batches with features in place of images."""
    began = time.perf_counter()
    stored: list[HostBatch] = []
    for step, batch in enumerate(itertools.islice(batches, steps)):
        stored.append(_stored(batch, features(batch, step), blocks=blocks))
        if step == 0:
            logging.info(
                "computing the features of %d batches once: %.3f GB in the memory of each of %d"
                " hosts",
                steps,
                steps * stored[0]["features"].nbytes / 1e9,
                jax.process_count(),
            )
    seconds = time.perf_counter() - began
    images = sum(len(batch["features"]) for batch in stored) * jax.process_count()
    logging.info("computed in %.1f s: %.1f images/s", seconds, images / seconds)
    return stored


def _stored(batch: HostBatch, features: np.ndarray, *, blocks: tuple[int, ...]) -> HostBatch:
    """The batch with features, float16 `[b, l, f]`, in place of images."""
    finite = np.isfinite(features).all(axis=(0, 2))
    if not finite.all():
        worst = [block for block, good in zip(blocks, finite, strict=True) if not good]
        raise RunError(
            f"config.cached_views: features of block {worst} are not finite in float16; 0"
            " computes them anew each time, in float32"
        )
    rest = {name: array for name, array in batch.items() if name != "image"}
    return {"features": features, **rest}
