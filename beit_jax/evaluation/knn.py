"""Weighted k-NN classification: each held-out image takes the votes of its nearest training images.

DINO's vote (Caron et al. 2021, appendix F.1; official eval_knn.py): a neighbour's vote weighs
exp(cosine similarity / T). Nothing is trained.

    knn_accuracy(bank, labels, queries, query_labels, counts=(10, 20))  # {10: 0.31, 20: 0.33}
    block_accuracy(encoder, bank=..., queries=..., classes=10)  # {1: {10: 0.31, ...}, 2: ...}

The first takes features of any model as arrays, the second batches of images and an encoder.

Shapes: q queries, r bank rows in a chunk, c chunks, f feature width, C classes.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from beit_jax import progress
from beit_jax.config import check
from beit_jax.config.bounds import Block, Temperature, Within, check_fields
from beit_jax.evaluation.features import (
    STORED,
    FeatureSpec,
    FrozenEncoder,
    check_blocks,
    chosen_blocks,
    image_features,
    on_host,
)
from beit_jax.models.functional import Functional
from beit_jax.training import sharding
from beit_jax.types import Batch, HostBatch, Params, Sums

# Bank rows on a device that a batch of queries is compared with at once.
BANK_ROWS = 4096
# Queries that all devices together compare with the bank at once.
QUERY_ROWS = 1024

_BANK_SPLIT = PartitionSpec(None, (sharding.DATA, sharding.FSDP))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Settings of the weighted vote.

    Attributes:
      counts: the numbers of neighbours to try; empty for no k-NN.
      temperature: T; a neighbour's vote weighs exp(cosine similarity / T).
      blocks: whose output is compared, numbered from 1; empty for every block.
    """

    counts: tuple[Annotated[int, Within(ge=1, le=1_000_000)], ...] = (10, 20)
    temperature: Temperature = 0.07
    blocks: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        check_blocks(self.blocks)


def knn_accuracy(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    *,
    counts: tuple[int, ...] = (10, 20),
    temperature: float = 0.07,
    classes: int | None = None,
    mesh: Mesh | None = None,
) -> dict[int, float]:
    """The share of queries that the vote of their nearest bank rows classifies correctly.

    Features may come from any model. With several processes, each passes its own part of both
    arrays, of the same size on every process.

    Args:
      bank: float `[n, f]`, features of the training images; their length does not matter.
      labels: int `[n]`, their classes; -1 for rows that must not vote.
      queries: float `[m, f]`, features of the held-out images.
      query_labels: int `[m]`, their classes; -1 for rows that do not count.
      counts: numbers of neighbours that vote. Where a count is more than the bank has, all vote.
      temperature: T.
      classes: C; None: as many as the labels have.
      mesh: of the devices; None: all devices.

    Returns:
      Accuracy in 0..1 by number of neighbours.

    Raises:
      ConfigError: shapes do not fit, a label is not below `classes`, or a bad count or temperature.
    """
    check(bool(counts), "counts", "name at least one")
    config = KnnConfig(counts=tuple(counts), temperature=temperature)
    check(bank.ndim == queries.ndim == 2, "bank, queries", "must have shapes [n, f] and [m, f]")
    check(
        bank.shape[1] == queries.shape[1],
        "queries",
        f"have {queries.shape[1]} features, the bank has {bank.shape[1]}",
    )
    check(labels.shape == bank.shape[:1], "labels", f"{labels.shape} for {len(bank)} bank rows")
    check(
        query_labels.shape == queries.shape[:1],
        "query_labels",
        f"{query_labels.shape} for {len(queries)} queries",
    )
    highest = int(max(labels.max(initial=-1), query_labels.max(initial=-1)))
    classes = highest + 1 if classes is None else classes
    check(highest < classes, "labels", f"{highest} is not below classes = {classes}")
    return _vote_accuracy(
        _unit(bank),
        labels.astype(np.int32),
        _unit(queries),
        query_labels.astype(np.int32),
        vote=Vote(counts=config.counts, temperature=config.temperature, classes=classes),
        mesh=sharding.make_mesh(fsdp=1) if mesh is None else mesh,
    )


def block_accuracy(
    encoder: FrozenEncoder,
    *,
    bank: Iterable[HostBatch],
    queries: Iterable[HostBatch],
    classes: int,
    kind: str = "mean",
    normalization: str | None = None,
    config: KnnConfig = KnnConfig(),
    mesh: Mesh | None = None,
) -> dict[int, dict[int, float]]:
    """k-NN accuracy of the features of an encoder's blocks.

    Features are L2-normalised. Each is computed once and kept in float16 on the hosts; the devices
    hold one block's bank at a time, split over them.

    Args:
      encoder: frozen.
      bank: this host's part of every batch: `image` uint8 [b, s, s, 3], `label` int [b] and, where
        there is padding, `valid` bool [b]. All batches of one size that divides over the devices,
        as many on every host. Must end.
      queries: the held-out images, in the same form. Images without a label (-1) neither vote
        nor count.
      classes: C.
      kind: of features, see `FeatureSpec`. "cls_mean" is L2-normalised as a whole.
      normalization: of the pixels; None: what the encoder was trained on.
      config: neighbours, temperature, blocks. Where a count is more than the bank has, all vote.
      mesh: of the devices; None: all.

    Returns:
      Accuracy in 0..1: `{block: {neighbours: accuracy}}`, blocks numbered from 1.
    """
    mesh = sharding.make_mesh(fsdp=1) if mesh is None else mesh
    blocks = chosen_blocks(
        config.blocks, layers=encoder.model.layers, name="config.neighbours.blocks"
    )
    spec = FeatureSpec(
        blocks=blocks, kind=kind, normalization=normalization or encoder.normalization
    )
    return neighbour_accuracy(
        on_host(unit_features(encoder.functions, spec=spec), encoder.params, mesh=mesh),
        bank=bank,
        queries=queries,
        blocks=blocks,
        vote=Vote(counts=config.counts, temperature=config.temperature, classes=classes),
        mesh=mesh,
    )


def unit_features(
    encoder: Functional, *, spec: FeatureSpec
) -> Callable[[Params, jax.Array], jax.Array]:
    """A function of an encoder's parameters and of images: features of length 1, for k-NN.

    Returns:
      `(params, images) -> features`: uint8 `[b, s, s, 3]` → float16 `[b, l, f]`; pure.
    """

    def compute(params: Params, images: jax.Array) -> jax.Array:
        raw = image_features(encoder, params, images, spec=spec)
        return (raw / jnp.linalg.norm(raw, axis=-1, keepdims=True)).astype(STORED)

    return compute


def neighbour_accuracy(
    extract: Callable[[HostBatch], np.ndarray],
    *,
    bank: Iterable[HostBatch],
    queries: Iterable[HostBatch],
    blocks: tuple[int, ...],
    vote: "Vote",
    mesh: Mesh,
) -> dict[int, dict[int, float]]:
    """`block_accuracy` of features that somebody else computes.

    Args:
      extract: this host's part of a batch → its features, float `[b, l, f]`, of length 1.
      bank, queries: as for `block_accuracy`.
      blocks: what the l are called in the result.
      vote: neighbours, temperature, classes.
      mesh: of the devices.

    Returns:
      `{block: {neighbours: accuracy}}`.
    """
    began = time.perf_counter()
    banked = [(extract(batch), _voting_labels(batch)) for batch in _shown(bank, "training")]
    asked = [(extract(batch), _voting_labels(batch)) for batch in _shown(queries, "held-out")]
    accuracy = {
        block: _vote_accuracy(*_rows(banked, i), *_rows(asked, i), vote=vote, mesh=mesh)
        for i, block in enumerate(blocks)
    }
    logging.info("k-NN of %d blocks in %.1f s", len(blocks), time.perf_counter() - began)
    return accuracy


def _voting_labels(batch: HostBatch) -> np.ndarray:
    """int32 `[b]`: the labels, -1 where the image is padding or has none."""
    labels = np.asarray(batch["label"], np.int32)
    return np.where(batch["valid"], labels, -1) if "valid" in batch else labels


def _rows(parts: list[tuple[np.ndarray, np.ndarray]], block: int) -> tuple[np.ndarray, np.ndarray]:
    """Features `[rows, f]` of one block, and labels, of all batches. Only this block is copied."""
    features = np.concatenate([features[:, block] for features, _ in parts])
    return features, np.concatenate([labels for _, labels in parts])


def _unit(features: np.ndarray) -> np.ndarray:
    """float32 rows of length 1; rows of zeros stay zeros."""
    features = np.asarray(features, np.float32)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(length, np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vote:
    """How neighbours vote. Hashable: a jitted function takes it as a static argument.

    Attributes:
      counts: the k's.
      temperature: T.
      classes: C.
    """

    counts: tuple[int, ...]
    temperature: float
    classes: int


def _vote_accuracy(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    *,
    vote: Vote,
    mesh: Mesh,
) -> dict[int, float]:
    """`knn_accuracy` of unit vectors."""
    placed_bank = split_bank(bank, labels, mesh=mesh)
    local_devices = mesh.local_mesh.devices.size
    per_device = min(QUERY_ROWS // mesh.devices.size, math.ceil(len(queries) / local_devices))
    rows = local_devices * max(1, per_device)
    correct, weight = np.zeros(len(vote.counts)), 0.0
    for start in range(0, len(queries), rows):
        features, known = queries[start : start + rows], query_labels[start : start + rows]
        missing = rows - len(features)  # the last batch is filled up: one compilation for all
        batch = sharding.to_devices(
            {
                "features": np.pad(features, ((0, missing), (0, 0))),
                "label": np.pad(known, (0, missing), constant_values=-1),
            },
            mesh,
        )
        sums = _count_correct(placed_bank, batch, vote=vote, mesh=mesh)
        correct += np.asarray(sums["correct"], np.float64)
        weight += float(sums["weight"])
    shares = (correct / max(weight, 1.0)).tolist()
    return dict(zip(vote.counts, shares, strict=True))


@functools.partial(jax.jit, static_argnames=("vote", "mesh"))
def _count_correct(bank: Batch, batch: Batch, *, vote: Vote, mesh: Mesh) -> Sums:
    """For each k, how many labelled queries the vote classifies correctly, and their number."""
    predicted = weighted_vote(
        bank["features"], bank["label"], batch["features"], vote=vote, mesh=mesh
    )
    # No prediction is -1, so that queries without a label never count as correct.
    correct = (predicted == batch["label"][:, None]).astype(jnp.float32)
    sums = {"correct": correct.sum(axis=0), "weight": (batch["label"] >= 0).sum()}
    return jax.lax.with_sharding_constraint(sums, NamedSharding(mesh, sharding.REPLICATED))


def split_bank(features: np.ndarray, labels: np.ndarray, *, mesh: Mesh) -> Batch:
    """Places this host's part of the bank: the whole is split over all devices, in chunks.

    Args:
      features: `[n, f]`, the same n on every host.
      labels: int `[n]`, -1 where the row must not vote.
      mesh: of the devices.

    Returns:
      `features` `[c, r, f]` and `label` `[c, r]`, the second axis split; filled up with rows that
      don't vote.
    """
    n, f = features.shape
    devices = mesh.local_mesh.devices.size
    rows = devices * min(BANK_ROWS, math.ceil(n / devices))
    chunks = math.ceil(n / rows)
    padding = chunks * rows - n
    padded = np.concatenate([features, np.zeros((padding, f), features.dtype)])
    padded_labels = np.concatenate([labels, np.full(padding, -1, labels.dtype)])
    split = NamedSharding(mesh, _BANK_SPLIT)
    return {
        "features": jax.make_array_from_process_local_data(split, padded.reshape(chunks, rows, f)),
        "label": jax.make_array_from_process_local_data(split, padded_labels.reshape(chunks, rows)),
    }


def _shown(batches: Iterable[HostBatch], what: str) -> Iterable[HostBatch]:
    """The batches, with progress on process 0."""
    return progress.over(
        batches,
        doing=f"features of {what} images (this host's)",
        size=lambda batch: len(batch["image"]),
        shown=jax.process_index() == 0,
    )


def weighted_vote(
    bank: jax.Array, labels: jax.Array, queries: jax.Array, *, vote: Vote, mesh: Mesh
) -> jax.Array:
    """The class with the most votes of the k nearest, each weighing exp(similarity / T).

    Args:
      bank: float `[c, r, f]`, unit vectors, from `split_bank`.
      labels: int32 `[c, r]`, -1 for rows without a vote.
      queries: float `[q, f]`, unit vectors.
      vote: the k's, T, C.
      mesh: of the devices.

    Returns:
      int32 `[q, len(vote.counts)]`.
    """
    similarity, neighbours = nearest(bank, labels, queries, count=max(vote.counts), mesh=mesh)
    # Relative to the nearest, which changes no vote: exp(1 / T) overflows for a small T.
    weight = jnp.exp((similarity - similarity[:, :1]) / vote.temperature)
    weight = jnp.where(neighbours >= 0, weight, 0.0)
    row = jnp.arange(queries.shape[0])[:, None]
    predicted = []
    for count in vote.counts:
        votes = jnp.zeros((queries.shape[0], vote.classes))
        votes = votes.at[row, jnp.maximum(neighbours[:, :count], 0)].add(weight[:, :count])
        predicted.append(votes.argmax(axis=1))
    return jnp.stack(predicted, axis=1).astype(jnp.int32)


def nearest(
    bank: jax.Array, labels: jax.Array, queries: jax.Array, *, count: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Similarity and class of the nearest bank rows of each query, the nearest first.

    Each device finds the nearest of its own rows, and only these are gathered: no array of the size
    of queries times bank is ever whole.

    Args:
      bank, labels, queries: as for `weighted_vote`.
      count: how many.
      mesh: of the devices.

    Returns:
      float32 and int32 `[q, count]`; similarity -inf and class -1 where the bank has fewer rows.
    """
    axes = (sharding.DATA, sharding.FSDP)

    def best(similarity: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
        similarity, indices = jax.lax.top_k(similarity, min(count, similarity.shape[1]))
        return similarity, jnp.take_along_axis(classes, indices, axis=1)

    def search(
        bank: jax.Array, labels: jax.Array, queries: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        queries = queries.astype(jnp.float32)

        def compare(
            found: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            rows, classes = chunk
            similarity = jnp.einsum(
                "qf,rf->qr",
                queries,
                rows.astype(jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
            similarity = jnp.where(classes >= 0, similarity, -jnp.inf)
            new = best(similarity, jnp.broadcast_to(classes, similarity.shape))
            both = [jnp.concatenate(pair, axis=1) for pair in zip(found, new, strict=True)]
            return best(both[0], both[1]), None

        shape = (queries.shape[0], count)
        nothing = jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32)
        found, _ = jax.lax.scan(compare, nothing, (bank, labels))
        similarity, classes = (jax.lax.all_gather(part, axes, axis=1, tiled=True) for part in found)
        return best(similarity, classes)

    return jax.shard_map(
        search,
        mesh=mesh,
        in_specs=(_BANK_SPLIT, _BANK_SPLIT, sharding.REPLICATED),
        out_specs=sharding.REPLICATED,
        check_vma=False,  # the checker does not see that gathered arrays agree on all devices
    )(bank, labels, queries)
