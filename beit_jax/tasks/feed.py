"""Images from their source to this host's batches, as every image job reads them."""

from collections.abc import Iterable, Iterator

import jax
import numpy as np

from beit_jax.config import DataConfig, RunConfig
from beit_jax.training import cluster, loop


def image_feed(
    config: DataConfig, *, run: RunConfig, grid: int, keys: tuple[str, ...]
) -> loop.Feed:
    """Training and held-out batches of this host.

    Args:
      config: the source and the views.
      run: the seed, the global batch and how much to evaluate.
      grid: patches along one side, for the masks.
      keys: what the job takes to the devices; held-out batches also have `valid`.
    """
    # Here and not above: a job's step is measured where TensorFlow is not installed.
    from beit_jax.data import pipeline, sources

    train_source = sources.open_source(config, training=True)
    eval_source = sources.open_source(config, training=False)
    counts = [None if each is None else len(each) for each in (train_source, eval_source)]
    cluster.check_agreement("images of config.data.source and eval_source", counts)
    shard, shards = jax.process_index(), jax.process_count()
    bad = pipeline.BadImages(train_source, max_share=config.max_bad_share)

    def pick(batch: dict[str, np.ndarray], extra: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        return {key: batch[key] for key in (*keys, *extra)}

    def training(start_step: int) -> Iterator[dict[str, np.ndarray]]:
        batches = pipeline.training_batches(
            train_source,
            config=config,
            grid=grid,
            seed=run.seed,
            batch_size=run.batch_size,
            start_step=start_step,
            shard=shard,
            shards=shards,
        )
        for batch in batches:
            bad.count(batch)
            yield pick(batch)

    def evaluation() -> Iterable[dict[str, np.ndarray]]:
        if eval_source is None:
            return
        batches = pipeline.eval_batches(
            eval_source,
            config=config,
            grid=grid,
            batch_size=run.batch_size,
            shard=shard,
            shards=shards,
        )
        for number, batch in enumerate(batches):
            if run.eval_batches and number == run.eval_batches:
                return
            yield pick(batch, ("valid",))

    return loop.Feed(
        training=training,
        evaluation=evaluation,
        metrics=lambda: {"replaced_images": float(bad.bad)},
    )


def first_images(
    batches: Iterable[dict[str, np.ndarray]], *, count: int
) -> dict[str, np.ndarray] | None:
    """The first held-out images of this host, for pictures."""
    for batch in batches:
        valid = batch["valid"].astype(bool)
        return {name: values[valid][:count] for name, values in batch.items()}
    return None
