"""What pre-trained features are worth while pre-training runs: k-NN on labels, and health without.

    online = online_evaluation(config, sources=sources, mesh=mesh)  # None where it is off
    online.measure(train_state)
    # {"online_knn_accuracy": 0.31, "online_rankme": 212.0, "online_codes_share": 0.7, ...}

`online_knn_accuracy` is what a probe of the same checkpoint, images and settings says (its `knn`).
Health needs no labels, and is of held-out images of the run itself:

- `online_rankme`: RankMe (Garrido et al. 2023, arXiv 2210.02885, equation 1), the effective rank of
  their features; at most the number of images or the features' width, and near 1 where features
  have collapsed.
- `online_codes_share`: the share of the vocabulary that the model predicts for masked patches.
- `online_token_entropy`: of the distribution of these predictions, in nats. A healthy model's comes
  near the entropy of the tokens themselves, which is logged when a run starts.
- `online_seconds`: what all this took, of which compilation is a part the first time.

Images that take little memory are kept, as they are after decoding; others are read every time.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from beit_jax.config import (
    ConfigError,
    DataConfig,
    LabelledDataConfig,
    ModelConfig,
    RunConfig,
    check,
)
from beit_jax.config.data import ClassifyAugmentConfig
from beit_jax.config.online import OnlineConfig
from beit_jax.distributed import cluster
from beit_jax.evaluation.features import (
    FeatureSpec,
    frozen_encoder,
    image_features,
    needed_params,
    row_function,
    with_whole_params,
)
from beit_jax.evaluation.knn import KnnConfig, Vote, neighbour_accuracy, unit_features
from beit_jax.models.functional import Functional
from beit_jax.models.heads import masked_image_model
from beit_jax.preprocessing import normalize
from beit_jax.tasks.feed import feed_of, labelled_sources
from beit_jax.training import sharding
from beit_jax.training.job import Online
from beit_jax.training.state import TrainState
from beit_jax.types import Batch, HostBatch, Params

if TYPE_CHECKING:
    from beit_jax.data.pipeline import Views
    from beit_jax.data.sources import Source

# Decoded images of a set are kept where they take no more on a host; more are read every time.
KEPT_BYTES = 256 << 20

# A fresh pass over this host's part of a set.
Pass = Callable[[], Iterable[HostBatch]]


class _StoppedError(Exception):
    """SIGTERM came in the middle of a pass."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
    """Labelled images for k-NN; in batches of `image`, `label` and `valid`.

    Attributes:
      bank: a pass over those that vote.
      queries: a pass over those that ask.
      classes: how many.
    """

    bank: Pass
    queries: Pass
    classes: int


def online_evaluation(
    config: OnlineConfig,
    *,
    data: DataConfig,
    run: RunConfig,
    model: ModelConfig,
    vocabulary: int,
    sources: tuple["Source", "Source"],
    mesh: Mesh,
) -> Online | None:
    """The evaluation between steps; None where `config.every` is 0.

    Args:
      config: what is evaluated, and how often.
      data: the run's images and views.
      run: for the global batch.
      model: the encoder's sizes.
      vocabulary: of the tokens.
      sources: the run's training and held-out images, open.
      mesh: of all devices.

    Raises:
      ConfigError: there are fewer images than neighbours, or `config.source` has no classes or
        can't be opened.
    """
    if not config.every:
        return None
    block = config.block or max(1, round(0.75 * model.layers))
    spec = FeatureSpec(blocks=(block,), normalization=data.normalization)
    labelled = labelled_images(config, data=data, run=run, sources=sources)
    held_out = held_out_images(config, data=data, run=run, grid=model.grid, evaluation=sources[1])
    accuracy = neighbours(labelled, spec=spec, model=model, config=config, mesh=mesh)
    health = health_function(held_out, spec=spec, model=model, vocabulary=vocabulary, mesh=mesh)

    def measure(train_state: TrainState) -> dict[str, float] | None:
        began = time.perf_counter()
        try:
            found = accuracy(train_state.params) | health(train_state.params)
        except _StoppedError:
            return None
        return found | {"online_seconds": time.perf_counter() - began}

    known = {} if labelled is None else {"online_classes": labelled.classes}
    return Online(every=config.every, measure=measure, known=known)


def labelled_images(
    config: OnlineConfig,
    *,
    data: DataConfig,
    run: RunConfig,
    sources: tuple["Source", "Source"],
) -> Labelled | None:
    """The images for k-NN: those that `config` names, or the run's own.

    Args are those of `online_evaluation`.

    Returns:
      None, with a line in the log, where the run's own images have no classes.

    Raises:
      ConfigError: as `online_evaluation`.
    """
    from beit_jax.data import views

    settings = labelled_config(config, data=data)
    if config.source:
        training, evaluation = named_sources(config, data=data)
    else:
        training, evaluation = sources
        if not training.classes or training.classes != evaluation.classes:
            logging.info(
                "no k-NN between steps: the images of %s have no classes, or not those of the"
                " held-out ones; config.online.source may name others",
                data.source,
            )
            return None
        _check_neighbours(config, training=training)
    made = views.classification_views(settings)
    part = functools.partial(_part, settings, run=run, views=made, training=training)
    return Labelled(
        bank=part(training, count=config.bank),
        queries=part(evaluation, count=config.queries),
        classes=len(training.classes),
    )


def named_sources(config: OnlineConfig, *, data: DataConfig) -> tuple["Source", "Source"]:
    """Opens the images of `config.source`, which isn't empty: those that vote, those that ask.

    Raises:
      ConfigError: they can't be opened, have no classes, or are fewer than the neighbours.
    """
    try:
        training, evaluation = labelled_sources(labelled_config(config, data=data))
    except ConfigError as error:
        raise ConfigError(str(error).replace("config.data.", "config.online.")) from None
    _check_neighbours(config, training=training)
    return training, evaluation


def _check_neighbours(config: OnlineConfig, *, training: "Source") -> None:
    voting = min(config.bank or len(training), len(training))
    check(
        config.neighbours <= voting,
        "config.online.neighbours",
        f"{config.neighbours}, but {voting} images vote",
    )


def labelled_config(config: OnlineConfig, *, data: DataConfig) -> LabelledDataConfig:
    """How labelled images are read: as a probe reads them, with what the run says of images."""
    named = config if config.source else data
    return LabelledDataConfig(
        source=named.source,
        split=named.split,
        eval_source=named.eval_source,
        eval_split=named.eval_split,
        holdout=named.holdout,
        image_size=data.image_size,
        normalization=data.normalization,
        max_bad_share=data.max_bad_share,
        max_pixels=data.max_pixels,
        exif_orientation=data.exif_orientation,
        workers=data.workers,
        prefetch=data.prefetch,
        augment=ClassifyAugmentConfig(eval_crop=config.eval_crop),
    )


def held_out_images(
    config: OnlineConfig,
    *,
    data: DataConfig,
    run: RunConfig,
    grid: int,
    evaluation: "Source",
) -> Pass:
    """A pass over held-out images of the run itself, with masks.

    Args are those of `online_evaluation`; `grid` is the number of patches along a side.
    """
    from beit_jax.data import views

    made = views.pretraining_views(data, grid=grid, keys=("image", "mask"))
    return _part(data, evaluation, run=run, views=made, training=evaluation, count=config.queries)


def _part(
    settings: DataConfig | LabelledDataConfig,
    source: "Source",
    *,
    run: RunConfig,
    views: "Views",
    training: "Source",
    count: int,
) -> Pass:
    """Passes over `count` images of a source (0: all), which stop where SIGTERM came."""
    from beit_jax.data.sources import spread

    count = min(count or len(source), len(source))
    batches = -(-count // run.batch_size)
    feed = feed_of(
        views,
        config=settings,
        run=dataclasses.replace(run, eval_batches=batches),
        training=training,
        evaluation=spread(source, count=count),
    )
    size = batches * run.batch_size // jax.process_count() * 3 * settings.image_size**2
    read = kept(feed.evaluation) if size <= KEPT_BYTES else feed.evaluation
    return lambda: _until_stopped(read())


def kept(read: Pass) -> Pass:
    """A pass that is made once; further ones repeat its batches."""
    batches: list[HostBatch] = []
    whole = False

    def again() -> Iterator[HostBatch]:
        nonlocal whole
        if whole:
            yield from batches
            return
        batches.clear()
        for batch in read():
            batches.append(batch)
            yield batch
        whole = True

    return again


def _until_stopped(batches: Iterable[HostBatch]) -> Iterator[HostBatch]:
    for batch in batches:
        if cluster.preemption_point():
            raise _StoppedError
        yield batch


def neighbours(
    labelled: Labelled | None,
    *,
    spec: FeatureSpec,
    model: ModelConfig,
    config: OnlineConfig,
    mesh: Mesh,
) -> Callable[[Params], dict[str, float]]:
    """k-NN accuracy of the parameters it is given, as `evaluation.knn.block_accuracy` defines it.

    Args are those of `online_evaluation`, the features and the images; {} where there are none.
    """
    if labelled is None:
        return lambda params: {}
    functions, _ = frozen_encoder(model, {})
    extract = row_function(unit_features(functions, spec=spec), mesh=mesh)
    vote = Vote(
        counts=(config.neighbours,), temperature=KnnConfig().temperature, classes=labelled.classes
    )

    def accuracy(params: Params) -> dict[str, float]:
        found = neighbour_accuracy(
            functools.partial(extract, needed_params(params["encoder"])),
            bank=labelled.bank(),
            queries=labelled.queries(),
            blocks=spec.blocks,
            vote=vote,
            mesh=mesh,
        )
        return {"online_knn_accuracy": found[spec.blocks[0]][config.neighbours]}

    return accuracy


def health_function(
    held_out: Pass, *, spec: FeatureSpec, model: ModelConfig, vocabulary: int, mesh: Mesh
) -> Callable[[Params], dict[str, float]]:
    """Health of the parameters it is given, by the module's names; nothing where no image is good.

    Args:
      held_out: batches of `image`, `mask` and `valid`.
      spec: the features.
      model, vocabulary: of the whole model.
      mesh: of all devices.
    """
    functions, _ = frozen_encoder(model, {})
    whole = masked_image_model(model, vocabulary=vocabulary)
    look = jax.jit(
        with_whole_params(
            functools.partial(_look, functions=functions, whole=whole, spec=spec), mesh
        ),
        out_shardings=NamedSharding(mesh, sharding.REPLICATED),
    )

    def health(params: Params) -> dict[str, float]:
        rows, counts = [], np.zeros(vocabulary)
        for batch in held_out():
            features, valid, predicted = look(params, sharding.to_devices(batch, mesh))
            rows.append(np.asarray(features)[np.asarray(valid)])
            counts += np.asarray(predicted)
        if not counts.sum():
            return {}
        shares = counts[counts > 0] / counts.sum()
        return {
            "online_rankme": rankme(np.concatenate(rows)),
            "online_codes_share": float((counts > 0).mean()),
            "online_token_entropy": float(-(shares * np.log(shares)).sum()),
        }

    return health


def _look(
    params: Params,
    batch: Batch,
    *,
    functions: Functional,
    whole: Functional,
    spec: FeatureSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Looks at a global batch.

    Returns:
      Features of whole images, float32 `[b, f]`; which of them are images, bool `[b]`; how often
      each token is predicted for their masked patches, float32 `[v]`.
    """
    encoder = needed_params(params["encoder"])
    features = image_features(functions, encoder, batch["image"], spec=spec)[:, 0]
    pixels, mask = normalize(batch["image"], kind=spec.normalization), batch["mask"].astype(bool)
    logits = whole.apply(params, pixels, mask=mask)
    valid = batch["valid"].astype(bool)
    hidden = mask.reshape(mask.shape[0], -1) & valid[:, None]
    counts = jnp.zeros(logits.shape[-1]).at[jnp.argmax(logits, axis=-1)].add(hidden)
    return features, valid, counts


def rankme(features: np.ndarray) -> float:
    """RankMe: exp of the entropy of the singular values' shares.

    Args:
      features: float `[n, f]`, a row for each image, neither centred nor normalised.

    Returns:
      1..min(n, f); NaN where a feature is not finite, and where all are 0.
    """
    if not np.isfinite(features).all():
        return float("nan")
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    if not values.sum():
        return float("nan")
    # The paper adds 1e-7, so that the logarithm of 0 never comes up; 0 log 0 is left out instead.
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))
