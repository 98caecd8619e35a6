"""What frozen features are worth: a linear probe of every block, and weighted k-NN.

Paper appendix D; official run_linear_eval.py; DINO's k-NN vote.

Linear probe: one classifier for each block on the block's pooled tokens, all trained in one run.
Their losses are summed, so that none sees another. The features come anew from each batch's views,
as in the official code, or from a few passes that were stored (`cached_views`).

k-NN: no training. Each held-out image takes the votes of its nearest training images.

    encoder = load_encoder("runs/quickstart/pretrain", image_size=64)
    knn_accuracy(
        encoder.functions, encoder.params, bank=..., queries=..., classes=10
    )  # {1: {10: 0.31, 20: 0.33}, 2: ...}

Shapes: b images, l probed blocks, d width, f feature width, C classes.
"""

import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from beit_jax.config import (
    ConfigError,
    LabelledDataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    RunError,
    check,
    one_of,
    to_dict,
)
from beit_jax.models.functional import Functional, functional, unflatten
from beit_jax.models.vit import Encoder, encoder_flops
from beit_jax.preprocessing import normalize
from beit_jax.tasks.feed import check_class_count, feed_of, labelled_sources
from beit_jax.training import loop, metrics, sharding, state
from beit_jax.training.batch_augment import erase, smoothed_cross_entropy
from beit_jax.training.state import Batch, Sums, Task
from beit_jax.weights import convert, native

# Images on a device whose every hidden state is held at once: 0.5 GB for base, 1.3 GB for large.
IMAGES_AT_ONCE = 64
# What features are kept as on the hosts: half the bytes; rounding is 0.05 %.
STORED = np.float16
# Training images on a device that a batch is compared with at once.
BANK_ROWS = 4096
# Standard deviation of a new classifier's weights (run_linear_eval.py).
INIT_SCALE = 0.01

FEATURES = {"mean": 1, "cls_mean": 2}  # width in units of the encoder's


def _check_blocks(blocks: tuple[int, ...]) -> None:
    check(all(block >= 1 for block in blocks), "blocks", "they are numbered from 1")
    check(len(set(blocks)) == len(blocks), "blocks", f"one is there twice: {blocks}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """DINO's weighted vote.

    Attributes:
      counts: numbers of neighbours that vote; each is tried; none: no k-NN.
      temperature: T; a neighbour's vote weighs exp(cosine similarity / T).
      blocks: whose output is compared, numbered from 1; none: every block.
    """

    counts: tuple[int, ...] = (10, 20)
    temperature: float = 0.07
    blocks: tuple[int, ...] = ()

    def __post_init__(self):
        check(all(count >= 1 for count in self.counts), "counts", "each must be at least 1")
        check(self.temperature > 0, "temperature", "must be positive")
        _check_blocks(self.blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Everything a probe is made of. The model is the checkpoint's own.

    Attributes:
      run: `init_from` is the checkpoint to probe; `steps` are the linear probe's.
      data: `image_size` may differ from the checkpoint's: its positions are resized.
      classes: outputs; 0: as many as the images have.
      features: "mean": the patch tokens' average (paper); "cls_mean": the class token, then that
        average (official code). Of a block's raw output, without the final norm.
      blocks: that get a classifier, numbered from 1 as in the paper ("9th layer"; the official
        `acc1_layer8`, counted from 0, is block 9); none: every block.
      linear: whether to train the linear probe.
      neighbours: k-NN.
      cached_views: 0: features are computed from new views of each training batch (official). K:
        those of the first K epochs are computed once, kept in float16 in the hosts' memory and
        used in turn. The held-out images' are then kept too.
      reference: what was published, printed at the start.
    """

    task: str = "probe"
    run: RunConfig
    data: LabelledDataConfig
    optimizer: OptimizerConfig
    classes: int = 0
    features: str = "mean"
    blocks: tuple[int, ...] = ()
    linear: bool = True
    neighbours: KnnConfig = KnnConfig()
    cached_views: int = 0
    reference: str = ""

    def __post_init__(self):
        check(bool(self.run.init_from), "run.init_from", "missing: the checkpoint to probe")
        for name in ("init_allow_missing", "init_allow_unused"):
            check(
                not getattr(self.run, name),
                f"run.{name}",
                "a probe takes the encoder alone and all of it; import a checkpoint that needs"
                " this with `python -m beit_jax.weights import` first",
            )
        check(self.classes >= 0, "classes", "must not be negative")
        one_of(self.features, "features", *FEATURES)
        _check_blocks(self.blocks)
        check(
            self.linear or bool(self.neighbours.counts),
            "linear",
            "false, and neighbours.counts is empty: nothing to do",
        )
        check(self.cached_views >= 0, "cached_views", "must not be negative")
        optimizer = self.optimizer
        check(
            optimizer.clip_norm is None,
            "optimizer.clip_norm",
            "must be None: a norm over all classifiers would tie them to each other",
        )
        check(optimizer.layer_decay == 1, "optimizer.layer_decay", "must be 1: nothing is stacked")
        check(optimizer.ema_decay is None, "optimizer.ema_decay", "must be None in a probe")
        if optimizer.warmup_steps > self.run.steps:
            raise ConfigError(
                f"optimizer.warmup_steps: {optimizer.warmup_steps} is more than run.steps,"
                f" {self.run.steps}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenEncoder:
    """An encoder to be looked at, not trained.

    Attributes:
      functions: of an `Encoder` without mask token and final norm: neither is in raw block outputs.
      params: its parameters.
      model: its sizes.
      normalization: of the pixels it was trained on.
    """

    functions: Functional
    params: Any
    model: ModelConfig
    normalization: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """This host's labelled images.

    Attributes:
      feed: augmented training batches and held-out ones.
      bank: a fresh pass over the training images, not augmented and padded as held-out ones are.
      classes: how many.
      size: training images of all hosts.
    """

    feed: loop.Feed
    bank: Callable[[], Iterable[loop.HostBatch]]
    classes: int
    size: int


def run(config: ProbeConfig, *, workdir: str) -> dict[str, Any]:
    """Probes the checkpoint; writes `summary.json`, prints a table and returns the summary."""
    began = time.perf_counter()
    mesh = loop.open_mesh(run=config.run, accumulate=config.optimizer.accumulate)
    images = open_images(config)
    config = dataclasses.replace(config, classes=images.classes)
    encoder = load_encoder(config.run.init_from, image_size=config.data.image_size)
    layers = encoder.model.layers
    # Both, before an hour goes into the first.
    blocks = chosen_blocks(config.blocks, layers=layers, name="config.blocks")
    chosen_blocks(config.neighbours.blocks, layers=layers, name="config.neighbours.blocks")
    check(
        max(config.neighbours.counts, default=0) <= images.size,
        "config.neighbours.counts",
        f"{config.neighbours.counts}, but there are {images.size} training images",
    )
    compare_normalization(encoder, config.data)
    if config.reference:
        logging.info("published reference: %s", config.reference)

    summary: dict[str, Any] = {"init_from": config.run.init_from, "features": config.features}
    if config.linear:
        check_same_probe(config, workdir=workdir)
        trained = train_probe(
            encoder, images, config=config, blocks=blocks, mesh=mesh, workdir=workdir
        )
        history = metrics.read(f"{workdir}/metrics.jsonl")
        summary["linear"] = summarize_linear(trained, history, blocks=blocks)
    if config.neighbours.counts:
        accuracy = knn_accuracy(
            encoder.functions,
            encoder.params,
            bank=images.bank(),
            queries=images.feed.evaluation(),
            classes=images.classes,
            features=config.features,
            normalization=config.data.normalization,
            config=config.neighbours,
            mesh=mesh,
        )
        summary["knn"] = summarize_neighbours(accuracy)
    summary["seconds"] = time.perf_counter() - began
    if jax.process_index() == 0:
        path = epath.Path(workdir) / "summary.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=2) + "\n")
        print(f"{table(summary)}\n\nsummary: {path}")
    return summary


def open_images(config: ProbeConfig) -> Images:
    """Opens the labelled images.

    Raises:
      ConfigError: they have no classes, others than the held-out ones, or not `config.classes`.
    """
    # Here and not above: the step is measured where TensorFlow is not installed.
    from beit_jax.data import views

    training, evaluation = labelled_sources(config.data)
    check_class_count(config.classes, training.classes, source=config.data.source)
    shared = {
        "views": views.classification_views(config.data),
        "config": config.data,
        "training": training,
    }
    every = dataclasses.replace(config.run, eval_batches=0)
    return Images(
        feed=feed_of(**shared, run=config.run, evaluation=evaluation, repeats=config.data.repeats),
        bank=feed_of(**shared, run=every, evaluation=training).evaluation,
        classes=len(training.classes),
        size=len(training),
    )


def load_encoder(
    source: str, *, image_size: int | None = None, name: str = "config.run.init_from"
) -> FrozenEncoder:
    """The encoder of any checkpoint we can read.

    Args:
      source: a run's directory, a checkpoint, a Hugging Face folder, `.safetensors` of timm or
        `.pth` of unilm.
      image_size: resizes positions to it; None: the checkpoint's own.
      name: the setting `source` came from, for messages.

    Raises:
      ConfigError: nothing there, or nothing that has an encoder, or no such image size.
    """
    try:
        params, description, _ = convert.read_any(source)
        size, patch = image_size or description.model.image_size, description.model.patch_size
        check(size % patch == 0, "image_size", f"{size} is not a multiple of its patches, {patch}")
        params, description, reshaped = convert.resized(params, description, image_size=size)
    except ConfigError as error:
        raise ConfigError(f"{name}: {source}: {error}") from None
    logging.info("probing %s (%s)", source, description.task)
    for line in reshaped:
        logging.info("resized %s", line)
    functions, params = frozen_encoder(description.model, unflatten(params)["encoder"])
    return FrozenEncoder(
        functions=functions,
        params=params,
        model=description.model,
        normalization=description.normalization,
    )


def compare_normalization(encoder: FrozenEncoder, data: LabelledDataConfig) -> None:
    """Shouts where pixels will not be what the encoder was trained on."""
    if encoder.normalization != data.normalization:
        logging.warning(
            "THE CHECKPOINT EXPECTS PIXELS NORMALISED BY %r; config.data.normalization is %r."
            " Features of other pixels are worth less.",
            encoder.normalization,
            data.normalization,
        )


def frozen_encoder(model: ModelConfig, params: Mapping[str, Any]) -> tuple[Functional, Any]:
    """An encoder's functions and parameters without what raw block outputs don't depend on.

    Args:
      model: its sizes.
      params: its parameters: what a whole model has under "encoder".
    """
    functions = functional(functools.partial(_build_encoder, model=model))
    kept = {name: each for name, each in params.items() if name not in ("mask_token", "norm")}
    return functions, kept


def _build_encoder(rngs: Any, *, model: ModelConfig) -> Encoder:
    return Encoder(model, mask_token=False, final_norm=False, rngs=rngs)


def chosen_blocks(blocks: tuple[int, ...], *, layers: int, name: str) -> tuple[int, ...]:
    """These blocks, or all where there are none; raises ConfigError for one beyond the last."""
    beyond = [block for block in blocks if block > layers]
    check(not beyond, name, f"there is no block {beyond}, the encoder has {layers}")
    return blocks or tuple(range(1, layers + 1))


def block_features(
    encoder: Functional, params: Any, images: jax.Array, *, blocks: tuple[int, ...], kind: str
) -> jax.Array:
    """Pooled raw outputs of some blocks; no gradient, no drop path.

    Args:
      encoder: with the method `hidden_states`.
      params: its parameters.
      images: normalised, float `[b, s, s, 3]`.
      blocks: numbered from 1.
      kind: "mean" or "cls_mean", see `ProbeConfig.features`.

    Returns:
      float32 `[b, l, f]`, f = d or 2 d.
    """

    def pool(tokens: jax.Array) -> jax.Array:  # [n, tokens, d] → [n, f]
        tokens = tokens.astype(jnp.float32)
        mean = tokens[:, 1:].mean(axis=1)
        return mean if kind == "mean" else jnp.concatenate([tokens[:, 0], mean], axis=-1)

    def features(piece: jax.Array) -> jax.Array:
        states = encoder.apply(params, piece, method="hidden_states")  # 0 is the embeddings
        return jnp.stack([pool(states[block]) for block in blocks], axis=1)

    # All hidden states of a batch may not fit. Every k-th image goes into the same piece: none
    # leaves its device.
    b = images.shape[0]
    each = b // jax.device_count() if b % jax.device_count() == 0 else b
    pieces = next(k for k in itertools.count(1) if each % k == 0 and each // k <= IMAGES_AT_ONCE)
    if pieces == 1:
        return jax.lax.stop_gradient(features(images))
    split = jnp.moveaxis(images.reshape(b // pieces, pieces, *images.shape[1:]), 1, 0)
    whole = jnp.moveaxis(jax.lax.map(features, split), 0, 1)
    return jax.lax.stop_gradient(whole.reshape(b, *whole.shape[2:]))


# ---------------------------------------------------------------------------- linear


def train_probe(
    encoder: FrozenEncoder,
    images: Images,
    *,
    config: ProbeConfig,
    blocks: tuple[int, ...],
    mesh: Mesh,
    workdir: str,
) -> loop.Trained:
    """Trains the classifiers of all blocks, or what is left of it."""
    task = probe_task(encoder, config=config, blocks=blocks)
    feed = images.feed
    if config.cached_views:
        epochs = config.cached_views * images.size / config.run.batch_size
        feed = stored_feed(
            feed,
            feature_function(encoder, config=config, blocks=blocks, mesh=mesh),
            steps=min(math.ceil(epochs), config.run.steps),
            blocks=blocks,
            width=FEATURES[config.features] * encoder.model.width,
            batch_size=config.run.batch_size,
        )
    return loop.train(
        task,
        feed,
        # `init_from` is what the loop would look for the classifiers in.
        run=dataclasses.replace(config.run, init_from=""),
        optimizer_config=config.optimizer,
        config=to_dict(config),
        workdir=workdir,
    )


def probe_task(encoder: FrozenEncoder, *, config: ProbeConfig, blocks: tuple[int, ...]) -> Task:
    """The linear probe as the train loop wants it; sums are over images.

    Batches have `image`, or `features` [b, l, f] that were computed before; and `label`.

    Args:
      encoder: frozen.
      config: classes, kind of features, normalisation, erasing.
      blocks: that get a classifier.
    """
    width = FEATURES[config.features] * encoder.model.width
    shape = (len(blocks), width, config.classes)

    def init(key: jax.Array) -> Any:
        kernel = INIT_SCALE * jax.random.normal(key, shape)
        return {"probe": {"kernel": kernel, "bias": jnp.zeros((shape[0], shape[2]))}}

    def prepare(frozen: Any, batch: Batch, key: jax.Array | None) -> Batch:
        if "features" in batch:
            features = batch["features"].astype(jnp.float32)
        else:
            features = features_of(
                encoder.functions, frozen, batch["image"], key, config=config, blocks=blocks
            )
        # Where nothing could be decoded there is a grey image without a class.
        weight = (batch["label"] >= 0).astype(jnp.float32)
        if "valid" in batch:  # padding of a last batch counts for nothing
            weight = weight * batch["valid"]
        return {"features": features, "label": jnp.maximum(batch["label"], 0), "weight": weight}

    def sums(params: Any, batch: Batch) -> Sums:
        logits = probe_logits(params, batch["features"])
        labels, weight = batch["label"], batch["weight"]
        losses = jax.vmap(
            functools.partial(smoothed_cross_entropy, labels=labels, smoothing=0.0), in_axes=1
        )(logits)  # [l, b]
        right = logits.argmax(axis=-1) == labels[:, None]
        return {
            "loss": (losses * weight).sum(),
            "right": (right * weight[:, None]).sum(axis=0),
            "weight": weight.sum(),
        }

    def loss(params: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Sums]:
        del key, step
        result = sums(params, batch)
        return result["loss"], {name: result[name] for name in ("loss", "weight")}

    def evaluate(params: Any, frozen: Any, batch: Batch) -> Sums:
        return sums(params, prepare(frozen, batch, None))

    def to_metrics(totals: Sums) -> dict[str, jax.Array]:
        result = {"loss": totals["loss"] / totals["weight"]}
        if "right" in totals:
            top1 = totals["right"] / totals["weight"]
            each = {f"top1_block_{block}": top1[i] for i, block in enumerate(blocks)}
            result |= {"top1": top1.max(), **each}
        return result

    forward = 0.0 if config.cached_views else encoder_flops(encoder.model)
    return Task(
        init=init,
        prepare=prepare,
        loss=loss,
        evaluate=evaluate,
        metrics=to_metrics,
        frozen=encoder.params,
        # Features need no gradient: forward and the kernel's gradient, 2 × 2 FLOPs a weight.
        flops_per_image=forward + 4.0 * math.prod(shape),
        best="top1",
    )


def probe_logits(params: Any, features: jax.Array) -> jax.Array:
    """Every block's classifier on its block: float32 `[b, l, f]` → `[b, l, C]`."""
    logits = jnp.einsum(
        "blf,lfc->blc", features, params["probe"]["kernel"], precision=jax.lax.Precision.HIGHEST
    )
    return logits + params["probe"]["bias"]


def features_of(
    encoder: Functional,
    params: Any,
    images: jax.Array,
    key: jax.Array | None,
    *,
    config: ProbeConfig,
    blocks: tuple[int, ...],
) -> jax.Array:
    """uint8 views `[b, s, s, 3]` → float32 `[b, l, f]`; erased where there is a key."""
    pixels = normalize(images, kind=config.data.normalization)
    if key is not None:
        pixels = erase(pixels, key=key, probability=config.data.augment.erase_probability)
    return block_features(encoder, params, pixels, blocks=blocks, kind=config.features)


def feature_function(
    encoder: FrozenEncoder, *, config: ProbeConfig, blocks: tuple[int, ...], mesh: Mesh
) -> Callable[[loop.HostBatch, int | None], np.ndarray]:
    """This host's batch and its step (None: held-out) → this host's features, float16 `[b, l, f]`.

    What is random is that of the train step with this number.
    """
    params = sharding.replicate(encoder.params, mesh)

    def compute(params: Any, images: jax.Array, step: jax.Array | None) -> jax.Array:
        key = None
        if step is not None:
            key = jax.random.fold_in(jax.random.key(config.run.seed), step)
            key = jax.random.fold_in(key, state.PREPARATION)
        features = features_of(encoder.functions, params, images, key, config=config, blocks=blocks)
        return features.astype(STORED)

    compute = jax.jit(
        sharding.on_mesh(compute, mesh), out_shardings=NamedSharding(mesh, sharding.BATCH)
    )

    def features(batch: loop.HostBatch, step: int | None) -> np.ndarray:
        placed = sharding.to_devices({"image": batch["image"]}, mesh)
        return host_rows(compute(params, placed["image"], None if step is None else np.int32(step)))

    return features


def host_rows(array: jax.Array) -> np.ndarray:
    """The rows of this host's devices, of an array split over all devices along the first axis."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def stored_feed(
    feed: loop.Feed,
    features: Callable[[loop.HostBatch, int | None], np.ndarray],
    *,
    steps: int,
    blocks: tuple[int, ...],
    width: int,
    batch_size: int,
) -> loop.Feed:
    """Features in place of images: of the first `steps` batches, over and over, and the held-out.

    They are computed when they are first asked for and kept in this host's memory. Which batch a
    step has does not depend on where a run started.

    Args:
      feed: of images.
      features: from `feature_function`.
      steps: training batches to keep.
      blocks: probed ones.
      width: f.
      batch_size: of all hosts together.
    """
    training: list[loop.HostBatch] = []
    held_out: list[loop.HostBatch] = []

    def stored(batch: loop.HostBatch, step: int | None) -> loop.HostBatch:
        computed = features(batch, step)
        finite = np.isfinite(computed).all(axis=(0, 2))
        if not finite.all():
            worst = [block for block, good in zip(blocks, finite, strict=True) if not good]
            raise RunError(
                f"config.cached_views: features of block {worst} are not finite in float16; 0"
                " computes them anew each time, in float32"
            )
        rest = {name: each for name, each in batch.items() if name != "image"}
        return {"features": computed, **rest}

    def fill() -> None:
        began = time.perf_counter()
        size = steps * batch_size * len(blocks) * width * np.dtype(STORED).itemsize
        logging.info(
            "computing the features of %d batches once: %.3f GB in the memory of each of %d hosts",
            steps,
            size / jax.process_count() / 1e9,
            jax.process_count(),
        )
        batches = itertools.islice(feed.training(0), steps)
        training.extend([stored(batch, step) for step, batch in enumerate(batches)])
        seconds = time.perf_counter() - began
        speed = steps * batch_size / seconds
        logging.info("computed in %.1f s: %.1f images/s", seconds, speed)

    def training_batches(start_step: int) -> Iterator[loop.HostBatch]:
        if not training:
            fill()
        for step in itertools.count(start_step):
            yield training[step % steps]

    def evaluation_batches() -> Iterator[loop.HostBatch]:
        if held_out:
            yield from held_out
            return
        computed = []
        for batch in feed.evaluation():
            computed.append(stored(batch, None))
            yield computed[-1]
        held_out.extend(computed)  # complete: not where the reader left in between

    return dataclasses.replace(feed, training=training_batches, evaluation=evaluation_batches)


def check_same_probe(config: ProbeConfig, *, workdir: str) -> None:
    """Raises ConfigError where the run's directory holds classifiers of other features."""
    if not native.is_checkpoint(workdir):
        return
    before, now = native.saved_config(workdir), to_dict(config)
    for path in (("run", "init_from"), ("features",), ("blocks",)):
        old, new = (functools.reduce(lambda node, key: node[key], path, c) for c in (before, now))
        check(
            old == new,
            f"config.{'.'.join(path)}",
            f"was {old!r} for the classifiers in {workdir}, now {new!r}; choose another --workdir",
        )


# ---------------------------------------------------------------------------- k-NN


def knn_accuracy(
    encoder: Functional,
    params: Any,
    *,
    bank: Iterable[loop.HostBatch],
    queries: Iterable[loop.HostBatch],
    classes: int,
    features: str = "mean",
    normalization: str = "half",
    config: KnnConfig = KnnConfig(),
    mesh: Mesh | None = None,
) -> dict[int, dict[int, float]]:
    """Share of the queries whose class the vote of their nearest bank images names.

    Features are L2-normalised. Each is computed once and kept in float16 on the hosts; on the
    devices there is one block's bank at a time, split over them.

    Args:
      encoder: with the method `hidden_states`; `frozen_encoder` makes one.
      params: its parameters.
      bank: this host's part of every batch: `image` uint8 [b, s, s, 3], `label` int [b] and, where
        there is padding, `valid` bool [b]. All batches of one size that divides over the devices,
        as many on every host. Must end.
      queries: likewise. Images without a label (-1) neither vote nor count.
      classes: C.
      features: see `ProbeConfig`. "cls_mean" is normalised as a whole.
      normalization: of the pixels.
      config: neighbours, temperature, blocks. Where a count is more than the bank has, all vote.
      mesh: of the devices; None: all.

    Returns:
      Accuracy in 0..1: `{block: {neighbours: accuracy}}`, blocks numbered from 1.
    """
    mesh = sharding.make_mesh(fsdp=1) if mesh is None else mesh
    layers = params["blocks"]["mlp"]["fc1"]["kernel"].shape[0]
    blocks = chosen_blocks(config.blocks, layers=layers, name="config.neighbours.blocks")
    placed_params = sharding.replicate(params, mesh)

    def unit_features(params: Any, images: jax.Array) -> jax.Array:
        pixels = normalize(images, kind=normalization)
        raw = block_features(encoder, params, pixels, blocks=blocks, kind=features)
        return (raw / jnp.linalg.norm(raw, axis=-1, keepdims=True)).astype(STORED)

    unit_features = jax.jit(
        sharding.on_mesh(unit_features, mesh), out_shardings=NamedSharding(mesh, sharding.BATCH)
    )

    def extract(batch: loop.HostBatch) -> tuple[np.ndarray, np.ndarray]:
        """This host's features, [b, l, f], and labels, -1 where there is none."""
        images = sharding.to_devices({"image": batch["image"]}, mesh)["image"]
        labels = np.asarray(batch["label"], np.int32)
        if "valid" in batch:
            labels = np.where(batch["valid"], labels, -1)
        return host_rows(unit_features(placed_params, images)), labels

    predict = functools.partial(
        weighted_vote,
        mesh=mesh,
        counts=config.counts,
        temperature=config.temperature,
        classes=classes,
    )

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, sharding.REPLICATED))
    def count_right(bank: Batch, batch: Batch) -> Sums:
        named = predict(bank["features"], bank["label"], batch["features"])
        right = (named == batch["label"][:, None]).astype(jnp.float32)  # never so for -1
        return {"right": right.sum(axis=0), "weight": (batch["label"] >= 0).sum()}

    began = time.perf_counter()
    banked = [extract(batch) for batch in bank]
    asked = [extract(batch) for batch in queries]
    bank_labels = np.concatenate([labels for _, labels in banked])
    result = {}
    for i, block in enumerate(blocks):
        rows = np.concatenate([each[:, i] for each, _ in banked])
        placed_bank = split_bank(rows, bank_labels, mesh=mesh)
        right, weight = np.zeros(len(config.counts)), 0.0
        for each, labels in asked:
            batch = sharding.to_devices({"features": each[:, i], "label": labels}, mesh)
            sums = count_right(placed_bank, batch)
            right += np.asarray(sums["right"], np.float64)
            weight += float(sums["weight"])
        shares = (right / max(weight, 1.0)).tolist()
        result[block] = dict(zip(config.counts, shares, strict=True))
    logging.info("k-NN of %d blocks in %.1f s", len(blocks), time.perf_counter() - began)
    return result


def split_bank(features: np.ndarray, labels: np.ndarray, *, mesh: Mesh) -> Batch:
    """This host's part of the bank → the whole bank, split over all devices, in chunks.

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
    place = NamedSharding(mesh, _BANK)
    return {
        "features": jax.make_array_from_process_local_data(place, padded.reshape(chunks, rows, f)),
        "label": jax.make_array_from_process_local_data(place, padded_labels.reshape(chunks, rows)),
    }


_BANK = PartitionSpec(None, (sharding.DATA, sharding.FSDP))


def weighted_vote(
    bank: jax.Array,
    labels: jax.Array,
    queries: jax.Array,
    *,
    mesh: Mesh,
    counts: tuple[int, ...],
    temperature: float,
    classes: int,
) -> jax.Array:
    """The class that the k nearest name, each voting with exp(similarity / temperature).

    Each device finds the nearest of its own rows; only these meet. Nothing of the size of queries
    times bank is ever whole.

    Args:
      bank: float `[c, r, f]`, unit vectors, from `split_bank`.
      labels: int32 `[c, r]`, -1 for rows without a vote.
      queries: float `[q, f]`, unit vectors.
      mesh: of the devices.
      counts: the k's.
      temperature: T.
      classes: C.

    Returns:
      int32 `[q, len(counts)]`.
    """
    most = max(counts)
    axes = (sharding.DATA, sharding.FSDP)

    def best(similarity: jax.Array, names: jax.Array) -> tuple[jax.Array, jax.Array]:
        similarity, places = jax.lax.top_k(similarity, min(most, similarity.shape[1]))
        return similarity, jnp.take_along_axis(names, places, axis=1)

    def search(
        bank: jax.Array, labels: jax.Array, queries: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        queries = queries.astype(jnp.float32)
        q = queries.shape[0]

        def chunk(found: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]):
            rows, names = part
            similarity = jnp.einsum(
                "qf,rf->qr",
                queries,
                rows.astype(jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
            similarity = jnp.where(names >= 0, similarity, -jnp.inf)
            new = best(similarity, jnp.broadcast_to(names, similarity.shape))
            both = [jnp.concatenate(pair, axis=1) for pair in zip(found, new, strict=True)]
            return best(*both), None

        nothing = jnp.full((q, most), -jnp.inf), jnp.full((q, most), -1, jnp.int32)
        found, _ = jax.lax.scan(chunk, nothing, (bank, labels))
        return best(*(jax.lax.all_gather(each, axes, axis=1, tiled=True) for each in found))

    similarity, names = jax.shard_map(
        search,
        mesh=mesh,
        in_specs=(_BANK, _BANK, sharding.REPLICATED),
        out_specs=sharding.REPLICATED,
        check_vma=False,  # the checker does not see that what was gathered is the same everywhere
    )(bank, labels, queries)
    # Relative to the nearest, which changes no vote: exp(1 / T) overflows for a small T.
    weight = jnp.exp((similarity - similarity[:, :1]) / temperature)
    weight = jnp.where(names >= 0, weight, 0.0)
    row = jnp.arange(queries.shape[0])[:, None]
    named = []
    for count in counts:
        votes = jnp.zeros((queries.shape[0], classes))
        votes = votes.at[row, jnp.maximum(names[:, :count], 0)].add(weight[:, :count])
        named.append(votes.argmax(axis=1))
    return jnp.stack(named, axis=1).astype(jnp.int32)


# ---------------------------------------------------------------------------- results


def summarize_linear(
    trained: loop.Trained, history: list[dict[str, Any]], *, blocks: tuple[int, ...]
) -> dict[str, Any]:
    """The linear probe's part of the summary.

    Args:
      trained: how the run ended.
      history: the lines of its `metrics.jsonl`.
      blocks: probed ones.

    Returns:
      `steps`; `top1`, at the end, and `best_top1`, over all evaluations of the run, by block;
      `best` of all, as the official code reports it: its block, top-1 and step;
      `images_per_second` (None where no step was left to do).
    """
    best, steps = {}, {}
    for line in history:
        for block in blocks:
            value = line.get(f"eval_top1_block_{block}")
            if value is not None and value > best.get(block, -1.0):
                best[block], steps[block] = value, line["step"]
    winner = max(best, key=best.get)
    return {
        "steps": int(trained.state.step),
        "top1": {str(block): trained.evaluation[f"top1_block_{block}"] for block in blocks},
        "best_top1": {str(block): best[block] for block in blocks},
        "best": {"block": winner, "top1": best[winner], "step": steps[winner]},
        "images_per_second": trained.images_per_second,
    }


def summarize_neighbours(accuracy: Mapping[int, Mapping[int, float]]) -> dict[str, Any]:
    """k-NN's part of the summary: `accuracy` by block and neighbours, and the `best` of all."""
    block, count = max(
        ((block, count) for block, each in accuracy.items() for count in each),
        key=lambda place: accuracy[place[0]][place[1]],
    )
    return {
        "accuracy": {
            str(block): {str(count): value for count, value in each.items()}
            for block, each in accuracy.items()
        },
        "best": {"block": block, "neighbours": count, "accuracy": accuracy[block][count]},
    }


def table(summary: Mapping[str, Any]) -> str:
    """One row for each block: linear probe at the end and at its best, k-NN for each count."""
    columns: dict[str, dict[str, float]] = {}
    if "linear" in summary:
        columns["linear"] = summary["linear"]["top1"]
        columns["at its best"] = summary["linear"]["best_top1"]
    if "knn" in summary:
        accuracy = summary["knn"]["accuracy"]
        for count in next(iter(accuracy.values())):
            columns[f"{count}-NN"] = {block: each[count] for block, each in accuracy.items()}
    blocks = sorted({block for column in columns.values() for block in column}, key=int)
    lines = ["block" + "".join(f"{name:>13}" for name in columns)]
    lines.append("-" * len(lines[0]))
    for block in blocks:
        cells = [f"{column[block]:.2%}" if block in column else "" for column in columns.values()]
        lines.append(f"{block:>5}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n" + "\n".join(lines)
