"""Training of a discrete VAE: a tokenizer for images that DALL-E's was not made for.

Official counterpart: modeling_discrete_vae.py, which has no training script.

A Gumbel-softmax over the vocabulary with an annealed temperature, a reconstruction error, and a
divergence from the uniform distribution that keeps codes in use. The result is
`tokenizer.safetensors`, which `config.tokenizer.path` of a pre-training run takes.
"""

import dataclasses
import functools
import math
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from beit_jax.config import (
    DataConfig,
    MaskConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
    check,
)
from beit_jax.config.bounds import OneOf, Temperature, Whole, Within, check_fields
from beit_jax.config.optimizer import check_warmup
from beit_jax.config.run import check_needs_source
from beit_jax.config.unused import Unused
from beit_jax.data.source_kinds import check_sources
from beit_jax.drawing import sheets
from beit_jax.models.flops import matmul_flops
from beit_jax.models.functional import Functional
from beit_jax.tasks.feed import held_out_sample, image_feed, image_sources
from beit_jax.tasks.run_job import run_job
from beit_jax.tokenizers import dvae
from beit_jax.tokenizers.kinds import BY_KIND, trainable, training
from beit_jax.tokenizers.loading import open_tokenizer, save_params
from beit_jax.tokenizers.tokenizer import join
from beit_jax.training import device_jitter, sharding
from beit_jax.training.batch_augment import image_weights
from beit_jax.training.job import Job, RunContext, Trained, picture_of
from beit_jax.training.state import Task, TrainState
from beit_jax.types import Batch, HostBatch, JsonObject, Params, PyTree, Sums, Variables

FILE = "tokenizer.safetensors"
PICTURES = 8
COLLAPSED = 0.05  # a perplexity under this share of the vocabulary is logged as an error


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """The discrete VAE's losses.

    The defaults are the official module's (modeling_discrete_vae.py:124-136), except for the
    temperature, which is annealed as DALL-E's was (from 1 to 1/16).
    """

    temperature_start: Temperature = 1.0
    temperature_end: Temperature = 1 / 16
    temperature_steps: Whole = 0  # of the anneal; 0: the whole run
    # Times the mean divergence per position, in nats.
    kl_weight: Annotated[float, Within(ge=0, le=1_000_000)] = 0.0
    straight_through: bool = False
    reconstruction: Annotated[str, OneOf("mse", "smooth_l1")] = "mse"

    def __post_init__(self) -> None:
        check_fields(self)
        check(
            self.temperature_start >= self.temperature_end,
            "temperature_start",
            "must not be under temperature_end",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTaskConfig:
    """All settings of a tokenizer run.

    The data section is pre-training's, so that both jobs can share it; only view 2 is made of the
    images, whatever `data.image_size` is.
    """

    UNUSED: ClassVar[dict[str, Unused]] = {
        "tokenizer.path": Unused("this job writes the file"),
        "tokenizer.random_weights": Unused("this job trains the weights"),
        "tokenizer.sha256": Unused("this job writes the file"),
        "data.normalization": Unused("it concerns view 1, which this job does not read"),
        "data.token_cache": Unused("no token ids are kept while the tokenizer trains"),
        # The accepted mask is that of configs/dvae.py.
        "data.mask": Unused(
            "a tokenizer sees whole images", (MaskConfig(kind="random", count=1, min_block=1),)
        ),
        "optimizer.decay_relative_positions": Unused("a tokenizer has no relative positions"),
        "optimizer.decay_class_token": Unused("a tokenizer has no class token"),
        "optimizer.freeze_encoder": Unused("a tokenizer has no such encoder"),
    }

    task: Annotated[str, OneOf("tokenizer")] = "tokenizer"
    run: RunConfig
    tokenizer: Annotated[TokenizerConfig, BY_KIND]
    vae: VaeConfig
    data: DataConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        check_fields(self)
        check_sources(self.data)
        check(
            self.tokenizer.kind in trainable(),
            "tokenizer.kind",
            f"{self.tokenizer.kind!r} cannot be trained, only {', '.join(trainable())}",
        )
        check(
            self.data.token_image_size == self.tokenizer.image_size,
            "data.token_image_size",
            f"{self.data.token_image_size}, but the tokenizer takes {self.tokenizer.image_size}",
        )
        check_needs_source(self.run, "init_allow_missing", "init_allow_unused", section="run.")
        check_warmup(self.optimizer, self.run)


def run(config: TokenizerTaskConfig, *, workdir: str) -> JsonObject:
    """Trains a tokenizer; writes its weights, `summary.json` and `reconstruction.png`."""
    return run_job(config, build=build_job, workdir=workdir)


def build_job(config: TokenizerTaskConfig, context: RunContext) -> Job:
    """Opens the images and builds the tokenizer."""
    sources = image_sources(config.data)
    grid, keys = config.tokenizer.grid, ("token_image",)
    sample = held_out_sample(config.data, sources[1], grid=grid, keys=keys, count=PICTURES)
    draw = functools.partial(reconstructions, sample=sample, config=config)
    return Job(
        task=tokenizer_task(config),
        feed=image_feed(config.data, run=config.run, grid=grid, keys=keys, sources=sources),
        pictures={"reconstruction": picture_of(draw, of=all_params)},
        finish=functools.partial(write_tokenizer, config=config, workdir=context.workdir),
        leaves=(FILE,),
    )


def all_params(train_state: TrainState) -> Params:
    """The tokenizer's params: those that were trained, and the variables beside them."""
    return join(train_state.params, train_state.variables)


def write_tokenizer(trained: Trained, *, config: TokenizerTaskConfig, workdir: str) -> JsonObject:
    """Writes `tokenizer.safetensors`; returns the job's part of `summary.json`."""
    log_if_collapsed(trained.evaluation, vocabulary=config.tokenizer.vocabulary)
    params = sharding.to_host(all_params(trained.state))
    path = f"{workdir}/{FILE}"
    if jax.process_index() == 0:
        save_params(path, params, config=config.tokenizer)
    return {**trained.evaluation, "tokenizer": path}


def temperature(config: VaeConfig, *, steps: int, step: jax.Array) -> jax.Array:
    """The temperature at a step: geometric from start to end over the anneal, then constant."""
    share = jnp.clip(step / (config.temperature_steps or steps), 0.0, 1.0)
    log_start, log_end = math.log(config.temperature_start), math.log(config.temperature_end)
    return jnp.exp(log_start + share * (log_end - log_start))


# Long because its closures are the parts of one step, in order: prepare, reconstruct, score.
def tokenizer_task(config: TokenizerTaskConfig) -> Task:
    """The task of the train loop; sums are over images, code counts over positions."""
    trained = training(config.tokenizer)
    network = trained.network(config.tokenizer)
    vocabulary = config.tokenizer.vocabulary

    def prepare(frozen: PyTree, batch: Batch, key: jax.Array | None) -> Batch:
        del frozen, key
        batch = device_jitter.jitter_batch(batch)
        pixels = trained.normalize(batch["token_image"].astype(jnp.float32) / 255.0)
        return {"pixels": pixels, "valid": image_weights(batch)}

    def sums(reconstruction: jax.Array, logits: jax.Array, batch: Batch) -> Sums:
        pixels, valid = batch["pixels"], batch["valid"]

        def error(kind: str) -> jax.Array:
            per_image = jax.vmap(functools.partial(dvae.reconstruction_loss, kind=kind))
            return (per_image(reconstruction, pixels) * valid).sum()

        ids = jnp.argmax(logits, axis=-1).reshape(pixels.shape[0], -1)
        counts = jnp.zeros(vocabulary).at[ids].add(jnp.broadcast_to(valid[:, None], ids.shape))
        return {
            "mse": error("mse"),
            "l1": error("l1"),
            "kl": (dvae.kl_to_uniform(logits).mean((1, 2)) * valid).sum(),
            "objective": error(config.vae.reconstruction),
            "codes": counts,
            "weight": valid.sum(),
        }

    def loss(
        params: Params, variables: Variables, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Sums, Variables]:
        output, variables = network.apply_and_update(
            params,
            variables,
            batch["pixels"],
            key=key,
            temperature=temperature(config.vae, steps=config.run.steps, step=step),
            straight_through=config.vae.straight_through,
            method="gumbel_forward",
        )
        result = sums(output.reconstruction, output.logits, batch)
        result["objective"] = result["objective"] + config.vae.kl_weight * result["kl"]
        return result["objective"], result, variables

    def evaluate(params: Params, variables: Variables, frozen: PyTree, batch: Batch) -> Sums:
        """Evaluates with hard tokens, as pre-training uses the tokenizer."""
        batch = prepare(frozen, batch, None)
        apply = functools.partial(network.apply, params, variables=variables)
        logits = apply(batch["pixels"], method="logits")
        decoded = apply(jnp.argmax(logits, axis=-1), method="decode")
        return sums(decoded, logits, batch)

    return Task(
        init=network.init,
        init_variables=network.init_variables,
        prepare=prepare,
        loss=loss,
        evaluate=evaluate,
        metrics=metrics,
        frozen={},
        flops_per_image=3 * forward_flops(network, image_size=config.tokenizer.image_size),
    )


def metrics(totals: Sums) -> dict[str, jax.Array]:
    """Metrics of the summed losses and code counts."""
    weight = totals["weight"]
    shares = totals["codes"] / jnp.maximum(totals["codes"].sum(), 1)
    entropy = -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1.0)))
    return {
        "loss": totals["objective"] / weight,
        "reconstruction_mse": totals["mse"] / weight,
        "reconstruction_l1": totals["l1"] / weight,
        "kl": totals["kl"] / weight,
        "codes_used": (totals["codes"] > 0).sum().astype(jnp.float32),
        "code_perplexity": jnp.exp(entropy),
    }


def forward_flops(network: Functional, *, image_size: int) -> float:
    """Matmul FLOPs of the training forward pass for one image."""
    return matmul_flops(
        lambda arrays, image: network.apply(
            arrays[0],
            image,
            variables=arrays[1],
            key=jax.random.key(0),
            temperature=1.0,
            method="gumbel_forward",
        ),
        (network.shapes(), network.variables_shapes()),
        jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32),
    )


def log_if_collapsed(evaluation: dict[str, float], *, vocabulary: int) -> None:
    """Logs an error where a few codes encode all images."""
    if not evaluation:
        return
    perplexity, used = evaluation["code_perplexity"], evaluation["codes_used"]
    if perplexity < COLLAPSED * vocabulary:
        logging.error(
            "THE CODEBOOK HAS COLLAPSED: perplexity %.1f of %d, %d codes in use. Raise"
            " config.vae.kl_weight, anneal slower, or take a smaller vocabulary.",
            perplexity,
            vocabulary,
            int(used),
        )


def reconstructions(
    params: Params, *, sample: HostBatch, config: TokenizerTaskConfig
) -> np.ndarray:
    """Draws originals, and their reconstructions from the tokens: uint8 `[h, w, 3]`."""
    images = sample["token_image"]
    decoded = sheets.to_uint8(_through_tokens(params, images, config=config.tokenizer))
    return sheets.columns_sheet({"original": images, "tokenizer": decoded})


# Compiled once for all the pictures of a run.
@functools.partial(jax.jit, static_argnames="config")
def _through_tokens(params: Params, images: jax.Array, *, config: TokenizerConfig) -> jax.Array:
    """Images decoded from their tokens, float32 `[b, s, s, 3]` in [0, 1]."""
    tokenizer = open_tokenizer(config)
    return tokenizer.decode(params, tokenizer.encode(params, images))
