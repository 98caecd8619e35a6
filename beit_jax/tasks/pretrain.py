"""Masked image modelling, the main job, from images to the loss.

The host sends two uint8 views and a mask per image. On the device, the frozen tokenizer turns the
masked patches of view 2 into token ids `[b, slots]`; the encoder sees view 1 with masked patches
replaced; the head predicts their ids; the loss is the cross-entropy, averaged over all masked
patches of the global batch.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

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
from beit_jax.config.bounds import Line, OneOf, check_fields
from beit_jax.config.online import OnlineConfig
from beit_jax.config.optimizer import check_warmup
from beit_jax.config.run import check_needs_source
from beit_jax.config.unused import Unused
from beit_jax.data import masking
from beit_jax.data.source_kinds import check_sources
from beit_jax.evaluation.features import frozen_encoder
from beit_jax.models.flops import matmul_flops, student_flops
from beit_jax.models.functional import Functional
from beit_jax.models.heads import masked_image_model, masked_positions
from beit_jax.preprocessing import normalize
from beit_jax.tasks import token_cache
from beit_jax.tasks.attention_picture import attention_picture
from beit_jax.tasks.feed import (
    draw_first_batch,
    held_out_sample,
    image_feed,
    image_sources,
)
from beit_jax.tasks.online import online_evaluation
from beit_jax.tasks.reconstruction import PICTURES, first_batch_picture, reconstructions
from beit_jax.tasks.run_job import run_job
from beit_jax.tasks.token_feed import known_tokens, local_encoder
from beit_jax.tasks.token_statistics import (
    TokenStatistics,
    baselines,
    log_expectations,
    token_statistics,
)
from beit_jax.tokenizers.kinds import BY_KIND
from beit_jax.tokenizers.loading import load_params, open_tokenizer
from beit_jax.tokenizers.tokenizer import Tokenizer
from beit_jax.training import device_jitter, same_run
from beit_jax.training.batch_augment import image_weights
from beit_jax.training.job import Feed, Job, Picture, RunContext, Trained, picture_of
from beit_jax.training.start import digest
from beit_jax.training.state import Task
from beit_jax.types import Batch, HostBatch, JsonObject, Params, PyTree, Sums

if TYPE_CHECKING:
    from beit_jax.data.sources import Source

VIEWS = ("image", "token_image", "mask")  # the parts of a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """All settings of a pre-training run.

    Attributes:
      online: what the features are worth while they are trained.
      evaluate_only: no training: evaluate the run's newest checkpoint or `run.init_from`.
      reference: what the published run reached; logged at the start.
    """

    UNUSED: ClassVar[dict[str, Unused]] = {
        "optimizer.freeze_encoder": Unused("pre-training trains the encoder"),
    }

    task: Annotated[str, OneOf("pretrain")] = "pretrain"
    run: RunConfig
    model: ModelConfig
    tokenizer: Annotated[TokenizerConfig, BY_KIND] = dataclasses.field(
        metadata=fixes("vocabulary")  # the tokenizer is frozen: only the head's size depends on it
    )
    data: DataConfig
    optimizer: OptimizerConfig
    online: OnlineConfig = dataclasses.field(default_factory=OnlineConfig)
    evaluate_only: bool = False
    reference: Line = ""

    def __post_init__(self) -> None:
        check_fields(self)
        check_sources(self.data)
        if self.online.source:
            check_sources(self.online, section="online")
        check(
            self.online.block <= self.model.layers,
            "online.block",
            f"there is no block {self.online.block}, the encoder has {self.model.layers}",
        )
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
        check_needs_source(self.run, "init_allow_missing", "init_allow_unused", section="run.")
        check_warmup(self.optimizer, self.run)


def run(config: PretrainConfig, *, workdir: str) -> JsonObject:
    """Pre-trains; writes `summary.json` and pictures and returns the summary."""
    return run_job(config, build=build_job, workdir=workdir)


def build_job(config: PretrainConfig, context: RunContext) -> Job:
    """Opens tokenizer, model and images, and says what the tokens are like."""
    token_folder = token_cache.folder(config.data, workdir=context.workdir)
    tokenizer = open_tokenizer(config.tokenizer)
    tokenizer_params = load_params(config.tokenizer)
    task = task_from_config(config, tokenizer_params=tokenizer_params)
    identity = checked_identity(config, frozen=task.frozen, workdir=context.workdir)
    sources = image_sources(config.data)
    read = functools.partial(
        image_feed, config.data, run=config.run, grid=config.model.grid, sources=sources
    )
    feed = read(keys=VIEWS)
    online = online_evaluation(
        config.online,
        data=config.data,
        run=config.run,
        model=config.model,
        vocabulary=tokenizer.vocabulary,
        sources=sources,
        mesh=context.mesh,
    )
    context.timer.done("data")

    statistics = token_statistics(tokenizer, tokenizer_params, feed.evaluation())
    log_expectations(statistics, vocabulary=config.tokenizer.vocabulary, reference=config.reference)
    context.timer.done("statistics")

    feed = draw_first_batch(feed, first_batch_picture, workdir=context.workdir)
    if config.data.augmentation_cycle and not config.evaluate_only:
        feed = with_token_cache(
            feed,
            lean=read(keys=("image", "mask")),
            config=config,
            context=context,
            folder=token_folder,
            source=sources[0],
            encoding=(tokenizer, tokenizer.encoding_params(tokenizer_params)),
        )
    sample = held_out_sample(
        config.data, sources[1], grid=config.model.grid, keys=VIEWS, count=PICTURES
    )
    tokenizing = (tokenizer, tokenizer_params)
    return Job(
        task=task,
        feed=feed,
        pictures=pictures(config, sample=sample, tokenizing=tokenizing),
        online=online,
        finish=functools.partial(figures, statistics=statistics),
        known=baselines(statistics),
        identity=identity,
        evaluate_only=config.evaluate_only,
        headline=headline,
    )


def pictures(
    config: PretrainConfig, *, sample: HostBatch, tokenizing: tuple[Tokenizer, Params]
) -> dict[str, Picture]:
    """What the model fills in, and what its last block attends to.

    Args:
      config: the run's.
      sample: `VIEWS` of held-out images.
      tokenizing: the tokenizer and its parameters.
    """
    tokenizer, tokenizer_params = tokenizing
    encoder, _ = frozen_encoder(config.model, {})
    fill = functools.partial(
        reconstructions,
        model=masked_image_model(config.model, vocabulary=tokenizer.vocabulary),
        tokenizer=tokenizer,
        tokenizer_params=tokenizer_params,
        sample=sample,
        normalization=config.data.normalization,
    )
    attend = functools.partial(
        attention_picture,
        encoder=encoder,
        block=config.model.layers,
        images=sample["image"],
        normalization=config.data.normalization,
    )
    return {"reconstruction": picture_of(fill), "attention": picture_of(attend)}


def with_token_cache(
    feed: Feed,
    *,
    lean: Feed,
    config: PretrainConfig,
    context: RunContext,
    folder: str,
    source: "Source",
    encoding: tuple[Tokenizer, Params],
) -> Feed:
    """The feed with token ids, from the cache of a run with an augmentation cycle.

    Args:
      feed: with the tokenizer's view.
      lean: without it.
      config, context: of the run; the cache is closed with it.
      folder: of the cache.
      source: the training images.
      encoding: the tokenizer, and what it needs to encode.
    """
    tokenizer, params = encoding
    cache = token_cache.open_run_cache(
        folder,
        data=config.data,
        run=config.run,
        tokenizer=config.tokenizer,
        params=params,
        source=source,
    )
    return known_tokens(
        feed,
        lean=lean,
        cache=context.resources.enter_context(cache),
        encode=local_encoder(tokenizer, params),
    )


def checked_identity(config: PretrainConfig, *, frozen: PyTree, workdir: str) -> dict[str, str]:
    """What decides the token ids of an image: the digest of the tokenizer's parameters.

    Of random ones only names and shapes count: their last bits depend on the chip that drew them.

    Raises:
      ConfigError: the run's checkpoints were trained with other tokens. It is noticed here, before
        the token cache is opened, which starts anew for other tokens.
    """
    if config.tokenizer.random_weights:
        shapes = jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), frozen)
        identity = {"tokenizer": f"random {digest(shapes)}"}
    else:
        identity = {"tokenizer": digest(frozen)}
    same_run.check(workdir, config=config, identity=identity)
    return identity


def task_from_config(config: PretrainConfig, *, tokenizer_params: PyTree) -> Task:
    """The task of a config, with its model, tokenizer and number of scored positions.

    Args:
      config: the run's.
      tokenizer_params: from `load_params`; or their shapes, where nothing is computed.
    """
    tokenizer = open_tokenizer(config.tokenizer)
    return pretrain_task(
        masked_image_model(config.model, vocabulary=tokenizer.vocabulary),
        tokenizer,
        tokenizer_params=tokenizer_params,
        config=config,
        slots=scored_positions(config),
    )


def scored_positions(config: PretrainConfig) -> int:
    """How many masked positions of an image are scored: the size of the largest mask."""
    return masking.max_masked(config.data.mask, grid=config.model.grid)


# Long because its closures are the parts of one step, in order: prepare, predict, score.
def pretrain_task(
    model: Functional,
    tokenizer: Tokenizer,
    *,
    tokenizer_params: PyTree,
    config: PretrainConfig,
    slots: int,
) -> Task:
    """Pre-training as a task for the train loop.

    Args:
      model: from `masked_image_model`.
      tokenizer: gives the targets; frozen.
      tokenizer_params: its parameters or their shapes; what only decoding needs stays on the host.
      config: for the normalisation.
      slots: masked positions that are scored per image, at least the size of the largest mask.
    """
    normalization = config.data.normalization

    def prepare(frozen: PyTree, batch: Batch, key: jax.Array | None) -> Batch:
        """uint8 views and masks → normalised images, positions, their token ids and weights."""
        del key  # the host has drawn everything that is random
        batch = device_jitter.jitter_batch(batch)
        positions, weights = masked_positions(batch["mask"], slots=slots)
        if "token_ids" in batch:  # of all positions: `config.data.augmentation_cycle`
            ids = batch["token_ids"].astype(jnp.int32)
            labels = jnp.take_along_axis(ids, positions, axis=1)
        else:
            labels = tokenizer.encode(frozen, batch["token_image"], positions=positions)
        return {
            "image": normalize(batch["image"], kind=normalization),
            "mask": batch["mask"].astype(bool),
            "positions": positions,
            "labels": labels,
            "weights": weights * image_weights(batch)[:, None],
        }

    def sums(params: Params, batch: Batch, drop_path_key: jax.Array | None) -> Sums:
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

    def loss(
        params: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Sums]:
        del step
        result = sums(params, batch, key)
        return result["loss"], result

    def evaluate(params: Params, frozen: PyTree, batch: Batch) -> Sums:
        return sums(params, prepare(frozen, batch, None), None)

    return Task(
        init=model.init,
        prepare=prepare,
        loss=loss,
        evaluate=evaluate,
        metrics=metrics,
        frozen=tokenizer.encoding_params(tokenizer_params),
        flops_per_image=flops_per_image(tokenizer, config=config, slots=slots),
    )


def metrics(totals: Sums) -> dict[str, jax.Array]:
    """Cross-entropy in nats, and the share of masked tokens predicted right."""
    return {
        "loss": totals["loss"] / totals["weight"],
        "mlm_acc": totals["correct"] / totals["weight"],
    }


def flops_per_image(tokenizer: Tokenizer, *, config: PretrainConfig, slots: int) -> float:
    """Matmul FLOPs of a training step per image, the tokenizer's forward pass included.

    The tokenizer is counted whole, with every position scored, as published figures count it; the
    step itself scores only `slots` of them (DALL-E's with 75 of 196: 8 % less). With an
    augmentation cycle only the student is counted, also while tokens are still being computed.
    """
    student = student_flops(config.model, vocabulary=tokenizer.vocabulary, slots=slots)
    if config.data.augmentation_cycle:
        return student
    tokenising = matmul_flops(
        tokenizer.encode,
        jax.eval_shape(tokenizer.init, jax.random.key(0)),
        jax.ShapeDtypeStruct((1, tokenizer.image_size, tokenizer.image_size, 3), jnp.uint8),
    )
    return student + tokenising


def figures(trained: Trained, *, statistics: TokenStatistics | None) -> JsonObject:
    """The job's part of `summary.json`: held-out loss and accuracy, and baselines for both."""
    return {
        "loss": trained.evaluation.get("loss"),
        "accuracy": trained.evaluation.get("mlm_acc"),
        **baselines(statistics),
    }


def headline(evaluation: Mapping[str, float]) -> str:
    """An evaluation in one line."""
    if not evaluation:
        return "no held-out images"
    return f"loss {evaluation['loss']:.3f}  masked tokens right {evaluation['mlm_acc']:.2%}"
