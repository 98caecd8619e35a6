"""Masked image modelling: the main job, told whole.

Two uint8 views and a mask per image come from the host. On the device: the frozen tokenizer names
the masked places of view 2 → token ids `[b, slots]`; the encoder sees view 1 with masked patches
replaced; the head predicts their ids; the loss is the cross-entropy, averaged over every masked
patch of the global batch.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from beit_jax import pictures
from beit_jax.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
    check,
    fixes,
)
from beit_jax.data import masking
from beit_jax.models.flops import matmul_flops, student_flops
from beit_jax.models.functional import Functional
from beit_jax.models.heads import masked_image_model, masked_positions
from beit_jax.preprocessing import normalize
from beit_jax.tasks import token_cache
from beit_jax.tasks.feed import first_images, image_feed, image_sources, with_first
from beit_jax.tasks.summary import write_summary
from beit_jax.tokenizers.kinds import BY_KIND
from beit_jax.tokenizers.loading import load_params, open_tokenizer
from beit_jax.tokenizers.tokenizer import Tokenizer
from beit_jax.training import device_jitter, loop, sharding, startup
from beit_jax.training.state import Batch, Sums, Task, TrainState

if TYPE_CHECKING:
    from beit_jax.data.sources import Source

PICTURES = 8  # held-out images in the reconstruction picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything a pre-training run is made of."""

    task: str = "pretrain"
    run: RunConfig
    model: ModelConfig
    tokenizer: Annotated[TokenizerConfig, BY_KIND] = dataclasses.field(
        metadata=fixes("vocabulary")  # it is frozen: only the head's size depends on it
    )
    data: DataConfig
    optimizer: OptimizerConfig
    reference: str = ""  # what the published run reached, printed at the start

    def __post_init__(self):
        grid = self.model.grid
        check(
            self.tokenizer.grid == grid,
            "tokenizer.image_size",
            f"{self.tokenizer.image_size} gives {self.tokenizer.grid} × {self.tokenizer.grid}"
            f" tokens, the model has {grid} × {grid} patches",
        )
        for name, value, wanted in (
            ("image_size", self.data.image_size, self.model.image_size),
            ("token_image_size", self.data.token_image_size, self.tokenizer.image_size),
        ):
            check(value == wanted, f"data.{name}", f"{value}, but the consumer takes {wanted}")
        try:
            masking.check_masks(self.data.mask, grid=grid)
        except ConfigError as error:
            raise ConfigError(f"data.mask.{error}") from None
        check(
            not self.data.augmentation_cycle or self.tokenizer.vocabulary <= token_cache.VOCABULARY,
            "data.augmentation_cycle",
            f"at most {token_cache.VOCABULARY} tokens can be kept, not"
            f" {self.tokenizer.vocabulary}; set it to 0",
        )
        if self.optimizer.warmup_steps > self.run.steps:
            raise ConfigError(
                f"optimizer.warmup_steps: {self.optimizer.warmup_steps} is more than run.steps,"
                f" {self.run.steps}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """What is known about held-out tokens without looking at images.

    Attributes:
      entropy: nats, of the masked tokens' distribution: the loss of a model that ignores the
        image.
      majority_accuracy: of always naming the most frequent token.
      chance_loss: ln(vocabulary).
      codes_used: token ids that occur.
      tokens: masked tokens counted.
    """

    entropy: float
    majority_accuracy: float
    chance_loss: float
    codes_used: int
    tokens: int


def run(config: PretrainConfig, *, workdir: str) -> dict[str, Any]:
    """Pre-trains, writes `summary.json` and `reconstruction.png`, and returns the summary."""
    began, begun = time.perf_counter(), startup.Startup()
    token_folder = token_cache.folder(config.data, workdir=workdir)
    loop.open_mesh(run=config.run, accumulate=config.optimizer.accumulate)
    slots = masking.max_masked(config.data.mask, grid=config.model.grid)
    tokenizer = open_tokenizer(config.tokenizer)
    tokenizer_params = load_params(config.tokenizer)
    model = masked_image_model(config.model, vocabulary=tokenizer.vocabulary)
    task = pretrain_task(
        model, tokenizer, tokenizer_params=tokenizer_params, config=config, slots=slots
    )
    sources = image_sources(config.data)
    read = functools.partial(
        image_feed, config.data, run=config.run, grid=config.model.grid, sources=sources
    )
    feed = read(keys=("image", "token_image", "mask"))
    begun.done("data")

    held_out = iter(feed.evaluation())
    first = list(itertools.islice(held_out, 1))
    sample = first_images(first, count=PICTURES)
    statistics = token_statistics(tokenizer, tokenizer_params, itertools.chain(first, held_out))
    log_expectations(statistics, config)
    begun.done("statistics")

    def draw(train_state: TrainState) -> np.ndarray | None:
        params = sharding.to_host(train_state.params)  # of all hosts, together
        if jax.process_index() != 0:
            return None
        return reconstructions(model, tokenizer, tokenizer_params, params, sample, config=config)

    feed = dataclasses.replace(feed, training=show_first(feed.training, workdir=workdir))
    with contextlib.ExitStack() as stack:
        if config.data.augmentation_cycle:
            feed = token_cache.name_tokens(
                feed,
                lean=read(keys=("image", "mask")),
                cache=stack.enter_context(
                    open_token_cache(
                        token_folder, config, params=tokenizer_params, source=sources[0]
                    )
                ),
                encode=token_cache.local_encoder(
                    tokenizer, tokenizer.encoding_params(tokenizer_params)
                ),
            )
        trained = loop.train(
            task,
            feed,
            run=config.run,
            optimizer_config=config.optimizer,
            config=config,
            workdir=workdir,
            picture=draw if sample else None,
            begun=begun,
        )
    summary = summarize(trained, statistics, workdir=workdir, began=began)
    picture = draw(trained.state) if sample else None
    if picture is not None:
        pictures.save_png(f"{workdir}/reconstruction.png", picture)
    return summary


def open_token_cache(
    folder: str, config: PretrainConfig, *, params: Any, source: "Source"
) -> contextlib.AbstractContextManager[token_cache.TokenCache]:
    """This host's file of token ids, for `config.data.augmentation_cycle`.

    Raises:
      ConfigError: the folder can't be used, or another run has the file.
    """
    from beit_jax.data import pipeline

    hosts, batch_size = jax.process_count(), config.run.batch_size
    steps = pipeline.steps_per_epoch(source, batch_size=batch_size, shards=hosts)
    check(steps > 0, "config.run.batch_size", f"{batch_size} is more than all images")
    rows = config.data.augmentation_cycle * steps
    if config.run.steps <= rows:
        logging.warning(
            "config.data.augmentation_cycle: a cycle is %d steps, the run ends at %d: no token is"
            " used twice",
            rows,
            config.run.steps,
        )
    return token_cache.open_cache(
        folder,
        facts=token_cache.cache_facts(
            config.data,
            run=config.run,
            tokenizer=config.tokenizer,
            params=open_tokenizer(config.tokenizer).encoding_params(params),
            source=source,
        ),
        rows=rows,
        images=batch_size // hosts,
        tokens=config.tokenizer.grid**2,
        shard=jax.process_index(),
        shards=hosts,
    )


def pretrain_task(
    model: Functional,
    tokenizer: Tokenizer,
    *,
    tokenizer_params: Any,
    config: PretrainConfig,
    slots: int,
) -> Task:
    """The job as the train loop wants it.

    Args:
      model: from `masked_image_model`.
      tokenizer: names the targets; frozen.
      tokenizer_params: its weights; what only decoding needs stays on the host.
      config: for the normalisation.
      slots: masked positions that are scored per image, at least the largest mask.
    """
    encoder_params = tokenizer.encoding_params(tokenizer_params)
    normalization = config.data.normalization

    def prepare(frozen: Any, batch: Batch, key: jax.Array | None) -> Batch:
        """uint8 views and masks → normalised images, positions, their token ids and weights."""
        del key  # all that is random was drawn on the host
        batch = device_jitter.jitter_batch(batch)
        positions, weights = masked_positions(batch["mask"], slots=slots)
        if "token_ids" in batch:  # known, of all positions: `config.data.augmentation_cycle`
            ids = batch["token_ids"].astype(jnp.int32)
            labels = jnp.take_along_axis(ids, positions, axis=1)
        else:
            labels = tokenizer.encode(frozen, batch["token_image"], positions=positions)
        if "valid" in batch:  # padding of a last batch counts for nothing
            weights = weights * batch["valid"][:, None]
        return {
            "image": normalize(batch["image"], kind=normalization),
            "mask": batch["mask"].astype(bool),
            "positions": positions,
            "labels": labels,
            "weights": weights,
        }

    def sums(params: Any, batch: Batch, drop_path_key: jax.Array | None) -> Sums:
        logits = model.apply(
            params,
            batch["image"],
            mask=batch["mask"],
            positions=batch["positions"],
            drop_path_key=drop_path_key,
        )
        labels, weights = batch["labels"], batch["weights"]
        picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        cross_entropy = jax.nn.logsumexp(logits, axis=-1) - picked
        correct = jnp.argmax(logits, axis=-1) == labels
        return {
            "loss": (cross_entropy * weights).sum(),
            "correct": (correct * weights).sum(),
            "weight": weights.sum(),
        }

    def loss(params: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Sums]:
        del step
        result = sums(params, batch, key)
        return result["loss"], result

    def evaluate(params: Any, frozen: Any, batch: Batch) -> Sums:
        return sums(params, prepare(frozen, batch, None), None)

    def metrics(totals: Sums) -> dict[str, jax.Array]:
        return {
            "loss": totals["loss"] / totals["weight"],
            "mlm_acc": totals["correct"] / totals["weight"],
        }

    return Task(
        init=model.init,
        prepare=prepare,
        loss=loss,
        evaluate=evaluate,
        metrics=metrics,
        frozen=encoder_params,
        flops_per_image=flops_per_image(tokenizer, config=config, slots=slots),
    )


def flops_per_image(tokenizer: Tokenizer, *, config: PretrainConfig, slots: int) -> float:
    """Matmul FLOPs of one image's training step, the tokenizer's forward pass included.

    The tokenizer's is the whole one, every position scored, as published figures count it; the step
    itself scores only `slots` of them (DALL-E's at 75 of 196: 8 % less). With an augmentation cycle
    the student's alone, also while the tokens are being named.
    """
    student = student_flops(config.model, vocabulary=tokenizer.vocabulary, slots=slots)
    if config.data.augmentation_cycle:
        return student
    naming = matmul_flops(
        tokenizer.encode,
        jax.eval_shape(tokenizer.init, jax.random.key(0)),
        jax.ShapeDtypeStruct((1, tokenizer.image_size, tokenizer.image_size, 3), jnp.uint8),
    )
    return student + naming


def show_first(
    training: Callable[[int], Iterator[dict[str, np.ndarray]]], *, workdir: str
) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
    """Writes `first_batch.png` when the first batch is read: what the model is really given."""

    def draw(batch: dict[str, np.ndarray]) -> None:
        batch = jax.tree.map(np.asarray, device_jitter.jitter_batch(batch))
        side = batch["image"].shape[1]
        columns = {
            "view 1": batch["image"],
            "masked": pictures.hide_patches(batch["image"], batch["mask"]),
            "view 2": pictures.to_uint8(batch["token_image"] / 255.0, side=side),
        }
        rows = [list(row) for row in zip(*columns.values(), strict=True)][:PICTURES]
        sheet = pictures.contact_sheet(rows, captions=list(columns))
        pictures.save_png(f"{workdir}/first_batch.png", sheet)

    return with_first(training, draw)


def token_statistics(
    tokenizer: Tokenizer, params: Any, batches: Iterable[dict[str, np.ndarray]]
) -> TokenStatistics | None:
    """Counts the masked tokens of held-out images; None where there are no held-out images."""
    encode = jax.jit(tokenizer.encode)
    encoder_params = tokenizer.encoding_params(params)
    counts = np.zeros(tokenizer.vocabulary, np.int64)
    for batch in batches:
        ids = np.asarray(encode(encoder_params, batch["token_image"]))
        hidden = batch["mask"].astype(bool) & batch["valid"].astype(bool)[:, None, None]
        counts += np.bincount(ids[hidden], minlength=tokenizer.vocabulary)
    if jax.process_count() > 1:
        counts = multihost_utils.process_allgather(counts).sum(axis=0)
    total = counts.sum()
    if total == 0:
        return None
    shares = counts[counts > 0] / total
    return TokenStatistics(
        entropy=float(-(shares * np.log(shares)).sum()),
        majority_accuracy=float(shares.max()),
        chance_loss=math.log(tokenizer.vocabulary),
        codes_used=int((counts > 0).sum()),
        tokens=int(total),
    )


def log_expectations(statistics: TokenStatistics | None, config: PretrainConfig) -> None:
    """Says what the loss will be compared with; shouts where the tokens look broken."""
    vocabulary = config.tokenizer.vocabulary
    logging.info(
        "chance: loss ln(%d) = %.3f, accuracy %.2g",
        vocabulary,
        math.log(vocabulary),
        1 / vocabulary,
    )
    if statistics is not None:
        logging.info(
            "held-out tokens: entropy %.3f nats (the loss of a model that ignores the image), the"
            " most frequent one is %.2f %% of %d; %d of %d codes occur",
            statistics.entropy,
            100 * statistics.majority_accuracy,
            statistics.tokens,
            statistics.codes_used,
            vocabulary,
        )
        if statistics.majority_accuracy > 0.5:
            logging.error(
                "ONE TOKEN IS %.0f %% OF ALL: the tokenizer has collapsed, or its input is not"
                " what it was trained on. There is nothing to learn from these tokens.",
                100 * statistics.majority_accuracy,
            )
    if config.reference:
        logging.info("published reference: %s", config.reference)


def reconstructions(
    model: Functional,
    tokenizer: Tokenizer,
    tokenizer_params: Any,
    params: Any,
    sample: dict[str, np.ndarray],
    *,
    config: PretrainConfig,
) -> np.ndarray:
    """A picture: original, masked, decoded with the predicted tokens, decoded with the true ones.

    In the third column the tokens of visible patches are the true ones. Both decoded columns are
    left out where the tokenizer has no decoder.
    """
    grid = config.model.grid
    ids = jax.jit(tokenizer.encode)(
        tokenizer.encoding_params(tokenizer_params), sample["token_image"]
    )
    logits = jax.jit(model.apply)(
        params,
        normalize(sample["image"], kind=config.data.normalization),
        mask=sample["mask"],
    )
    predicted = jnp.argmax(logits, axis=-1).reshape(-1, grid, grid).astype(jnp.int32)
    filled = jnp.where(sample["mask"].astype(bool), predicted, ids)
    columns = {
        "original": sample["image"],
        "masked": pictures.hide_patches(sample["image"], sample["mask"]),
    }
    if tokenizer.paints(tokenizer_params):
        decode = jax.jit(tokenizer.decode)
        side = config.model.image_size
        columns["predicted"] = pictures.to_uint8(decode(tokenizer_params, filled), side=side)
        columns["tokenizer"] = pictures.to_uint8(decode(tokenizer_params, ids), side=side)
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return pictures.contact_sheet(rows, captions=list(columns))


def summarize(
    trained: loop.Trained, statistics: TokenStatistics | None, *, workdir: str, began: float
) -> dict[str, Any]:
    """Writes and returns `summary.json`."""
    figures = {
        "loss": trained.evaluation.get("loss"),
        "accuracy": trained.evaluation.get("mlm_acc"),
        "token_entropy": statistics.entropy if statistics else None,
        "majority_accuracy": statistics.majority_accuracy if statistics else None,
        "chance_loss": statistics.chance_loss if statistics else None,
        "codes_used": statistics.codes_used if statistics else None,
    }
    return write_summary(figures, trained=trained, workdir=workdir, began=began)
