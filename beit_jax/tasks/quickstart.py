"""The quickstart: every job once, in one command.

Train a tokenizer, pre-train with its tokens, and show what was learned: how many masked tokens are
predicted right, and what the weights are worth to a classifier, beside the same model without
pre-training.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import Annotated, ClassVar, TypeVar

import jax
from absl import logging
from etils import epath

from beit_jax.config import ConfigError, RunConfig, check, to_dict
from beit_jax.config.bounds import OneOf, Seed, check_fields
from beit_jax.config.facts import FACTS, differences
from beit_jax.config.unused import Unused
from beit_jax.distributed import cluster
from beit_jax.models.heads import masked_image_model
from beit_jax.tasks import classify, online, pretrain, probe, tokenizer
from beit_jax.tasks.summary import read_summary, write_summary
from beit_jax.text_table import text_table
from beit_jax.training import run_directory
from beit_jax.training.writers import check_wandb
from beit_jax.types import Json, JsonObject
from beit_jax.weights.native import write_params

SIZES = ("layers", "width", "heads", "mlp_width", "image_size", "patch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Jobs that run one after the other; a job reads what earlier ones wrote.

    Attributes:
      tokenizer: writes the tokenizer that `pretrain.tokenizer.path` is then set to.
      pretrain: masked image modelling.
      probe: k-NN, and perhaps a linear probe, of the encoder before and after pre-training.
      classify: fine-tuning, once from the pre-trained weights and once from scratch, with the same
        settings otherwise.
      seeds: of fine-tuning, which is repeated for every seed.
    """

    UNUSED: ClassVar[dict[str, Unused]] = {
        "pretrain.tokenizer.path": Unused("the first job writes the tokenizer"),
        "probe.run.init_from": Unused("the pre-trained weights are probed", ("pretrain",)),
        "classify.run.init_from": Unused("fine-tuning starts from pre-training and from scratch"),
        "classify.run.seed": Unused("fine-tuning has config.seeds"),
        **{
            f"{job}.run.compilation_cache": Unused(
                "config.pretrain.run.compilation_cache is that of all jobs"
            )
            for job in ("tokenizer", "probe", "classify")
        },
        **{
            f"{job}.evaluate_only": Unused("the quickstart trains")
            for job in ("pretrain", "classify")
        },
    }

    task: Annotated[str, OneOf("quickstart")] = "quickstart"
    tokenizer: tokenizer.TokenizerTaskConfig
    pretrain: pretrain.PretrainConfig
    probe: probe.ProbeConfig
    classify: classify.ClassifyConfig
    seeds: tuple[Seed, ...] = (0,)

    def __post_init__(self) -> None:
        check_fields(self)
        frozen = dataclasses.replace(self.pretrain.tokenizer, path="")
        check(
            frozen == dataclasses.replace(self.tokenizer.tokenizer, path=""),
            "pretrain.tokenizer",
            "must be the tokenizer that the first job trains",
        )
        for name in SIZES:
            value, wanted = getattr(self.classify.model, name), getattr(self.pretrain.model, name)
            check(
                value == wanted,
                f"classify.model.{name}",
                f"{value}, but the pre-trained model has {wanted}",
            )
        for name, job in (("probe", self.probe), ("classify", self.classify)):
            for it in differences(to_dict(self.pretrain), to_dict(job)):
                check(
                    it.name in job.run.init_allow_different,
                    f"{name}.{FACTS[it.name].setting}",
                    f"{it.target}, but pre-training has {it.source}; {FACTS[it.name].why}",
                )
        check(len(self.seeds) > 0, "seeds", "name at least one")

    @property
    def run(self) -> RunConfig:
        """The settings that hold for the whole process."""
        return self.pretrain.run


def run(config: QuickstartConfig, *, workdir: str) -> JsonObject:
    """Runs all jobs, or what is left of them; writes `summary.json` and `reconstruction.png`."""
    with run_directory.opened(workdir):
        return _run(config, workdir=workdir)


def _run(config: QuickstartConfig, *, workdir: str) -> JsonObject:
    began = time.perf_counter()
    for name in ("tokenizer", "pretrain", "probe", "classify"):
        check_wandb(getattr(config, name).run.wandb, name=f"config.{name}.run.wandb")
    _check_online(config.pretrain)
    logging.info("1 of 4: train a tokenizer")
    first = tokenizer.run(config.tokenizer, workdir=f"{workdir}/tokenizer")

    logging.info("2 of 4: pre-train with its tokens")
    pretrain_config = dataclasses.replace(
        config.pretrain,
        tokenizer=dataclasses.replace(config.pretrain.tokenizer, path=first["tokenizer"]),
    )
    pretrained = f"{workdir}/pretrain"
    summary = pretrain.run(pretrain_config, workdir=pretrained)

    logging.info("3 of 4: probe its features, before and after pre-training")
    untrained = f"{workdir}/untrained"
    write_untrained(pretrain_config, path=untrained)
    probes = {
        name: probe.run(
            _starting_from(config.probe, init_from=weights), workdir=f"{workdir}/probe_{name}"
        )
        for name, weights in (("before", untrained), ("after", pretrained))
    }

    logging.info("4 of 4: fine-tune it, and the same model from scratch")
    classified: dict[str, list[JsonObject]] = {"pretrained": [], "scratch": []}
    for seed in config.seeds:
        for name, weights in (("pretrained", pretrained), ("scratch", "")):
            result = classify.run(
                _starting_from(config.classify, init_from=weights, seed=seed),
                workdir=f"{workdir}/classify_{name}_{seed}",
            )
            classified[name].append(result)
    if jax.process_index() != 0:
        return summary

    # Where the quickstart was continued, the time adds up.
    before = read_summary(workdir).get("seconds")
    began -= before if isinstance(before, int | float) else 0.0
    summary |= {
        "seconds": time.perf_counter() - began,
        "tokenizer": first,
        "probe": probes,
        "classify": classified,
    }
    path = write_summary(summary, workdir=workdir)
    picture = epath.Path(workdir) / "reconstruction.png"
    (epath.Path(workdir) / "pretrain" / "reconstruction.png").copy(picture, overwrite=True)
    print(report(summary))
    print(f"\npicture: {picture}\nsummary: {path}")
    return summary


def _check_online(config: pretrain.PretrainConfig) -> None:
    """Opens the images for k-NN, so that a mistake is said before the first job, not after it."""
    if not config.online.every or not config.online.source:
        return
    try:
        online.named_sources(config.online, data=config.data)
    except ConfigError as error:
        named = str(error).replace("config.online.", "config.pretrain.online.")
        raise ConfigError(named) from None


C = TypeVar("C", probe.ProbeConfig, classify.ClassifyConfig)


def _starting_from(config: C, **run_settings: Json) -> C:
    """The config with other weights to start from, and perhaps another seed."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **run_settings))


def write_untrained(config: pretrain.PretrainConfig, *, path: str) -> None:
    """Writes the encoder that pre-training started from as a checkpoint."""
    if not (epath.Path(path) / "state").exists():
        model = masked_image_model(config.model, vocabulary=config.tokenizer.vocabulary)
        params = jax.jit(model.init)(jax.random.key(config.run.seed))
        write_params(path, params, config=to_dict(config))
    cluster.barrier("to have the untrained weights")


def report(summary: JsonObject) -> str:
    """What the model has learned, next to baselines: two tables and a few numbers."""
    first, speed = summary["tokenizer"], summary["images_per_second"]
    numbers = (
        f"tokenizer: {first['codes_used']:.0f} codes in use, perplexity"
        f" {first['code_perplexity']:.1f}, reconstruction error {first['reconstruction_l1']:.4f}"
        " (mean |Δ|, RGB in [-1, 1])\n"
        f"{summary['steps']} pre-training steps"
        + (f", {speed:.0f} images/s" if speed else "")
        + f", {summary['classify']['scratch'][0]['steps']} of fine-tuning,"
        f" {summary['seconds']:.0f} s in all"
    )
    return "\n".join(["", _tokens_table(summary), "", _classes_table(summary), "", numbers])


def _tokens_table(summary: JsonObject) -> str:
    rows = [
        ("this model", f"{summary['loss']:.3f}", f"{summary['accuracy']:.1%}"),
        (
            "always the most frequent tokens",
            f"{summary['token_entropy']:.3f}",
            f"{summary['majority_accuracy']:.1%}",
        ),
        (
            "chance",
            f"{summary['chance_loss']:.3f}",
            f"{math.exp(-summary['chance_loss']):.1%}",
        ),
    ]
    return _aligned(rows, header=("held-out masked tokens", "loss (nats)", "accuracy"))


def _classes_table(summary: JsonObject) -> str:
    before, after = summary["probe"]["before"], summary["probe"]["after"]
    rows = [
        (title, *(f"{result[part]['best'][figure]:.1%}" for result in (before, after)))
        for title, part, figure in (
            ("k nearest neighbours", "knn", "accuracy"),
            ("linear probe", "linear", "top1"),
        )
        if part in before
    ]
    classified = summary["classify"]
    tuned = (_spread(classified["scratch"]), _spread(classified["pretrained"]))
    rows.append(("fine-tuned, the same way", *tuned))
    return _aligned(rows, header=("held-out images, classified", "without", "pre-trained"))


def _aligned(rows: Sequence[tuple[str, ...]], *, header: tuple[str, ...]) -> str:
    """A table as wide as the other one: columns of 34 and twice 16 characters."""
    return text_table(rows, header=header, align="lrr", gap="", widths=(34, 16, 16))


def _spread(runs: list[JsonObject]) -> str:
    """Top-1 at the end of the runs: the mean and, of several, the sample's standard deviation."""
    values = [run["top1"] for run in runs]
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"
