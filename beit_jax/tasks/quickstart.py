"""The whole story in one command.

Train a tokenizer, pre-train with its tokens, and show what was learned: masked tokens named right,
and what the weights are worth to a classifier, beside the same model without pre-training.
"""

import dataclasses
import json
import statistics
import time
from typing import Any

import jax
from absl import logging
from etils import epath

from beit_jax.config import RunConfig, check, to_dict
from beit_jax.distributed import cluster
from beit_jax.models.heads import masked_image_model
from beit_jax.tasks import classify, pretrain, probe, tokenizer
from beit_jax.weights.native import write_params

SIZES = ("layers", "width", "heads", "mlp_width", "image_size", "patch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Jobs, one after the other; each finds what it needs in what the ones before wrote.

    Attributes:
      tokenizer: writes the tokenizer that `pretrain.tokenizer.path` is then set to.
      pretrain: masked image modelling.
      probe: k-NN, and perhaps a linear probe, of the encoder before and after pre-training.
      classify: fine-tuning, once from the pre-trained weights and once from scratch, alike in
        everything else.
      seeds: fine-tuning is done for each.
    """

    task: str = "quickstart"
    tokenizer: tokenizer.TokenizerTaskConfig
    pretrain: pretrain.PretrainConfig
    probe: probe.ProbeConfig
    classify: classify.ClassifyConfig
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self):
        ours = dataclasses.replace(self.pretrain.tokenizer, path="")
        check(
            ours == dataclasses.replace(self.tokenizer.tokenizer, path=""),
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
        check(len(self.seeds) > 0, "seeds", "name at least one")

    @property
    def run(self) -> RunConfig:
        """What holds for the whole process."""
        return self.pretrain.run


def run(config: QuickstartConfig, *, workdir: str) -> dict[str, Any]:
    """Runs all jobs, or what is left of them; writes `summary.json` and `reconstruction.png`."""
    began = time.perf_counter()
    logging.info("1 of 4: train a tokenizer")
    first = tokenizer.run(config.tokenizer, workdir=f"{workdir}/tokenizer")

    logging.info("2 of 4: pre-train with its tokens")
    pretrain_config = dataclasses.replace(
        config.pretrain,
        tokenizer=dataclasses.replace(config.pretrain.tokenizer, path=first["tokenizer"]),
    )
    pretrained = f"{workdir}/pretrain"
    summary = pretrain.run(pretrain_config, workdir=pretrained)

    logging.info("3 of 4: what its features know, before and after pre-training")
    write_untrained(pretrain_config, path=f"{workdir}/untrained")
    probes = {
        name: probe.run(
            dataclasses.replace(
                config.probe, run=dataclasses.replace(config.probe.run, init_from=weights)
            ),
            workdir=f"{workdir}/probe_{name}",
        )
        for name, weights in (("before", f"{workdir}/untrained"), ("after", pretrained))
    }

    logging.info("4 of 4: fine-tune it, and the same model from scratch")
    classified: dict[str, list[dict[str, Any]]] = {"pretrained": [], "scratch": []}
    for seed in config.seeds:
        for name, weights in (("pretrained", pretrained), ("scratch", "")):
            run_config = dataclasses.replace(config.classify.run, seed=seed, init_from=weights)
            classified[name].append(
                classify.run(
                    dataclasses.replace(config.classify, run=run_config),
                    workdir=f"{workdir}/classify_{name}_{seed}",
                )
            )
    if jax.process_index() != 0:
        return summary

    path = epath.Path(workdir) / "summary.json"
    if path.exists():  # continued: the time adds up
        began -= json.loads(path.read_text())["seconds"]
    summary |= {
        "seconds": time.perf_counter() - began,
        "tokenizer": first,
        "probe": probes,
        "classify": classified,
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")
    picture = epath.Path(workdir) / "reconstruction.png"
    (epath.Path(workdir) / "pretrain" / "reconstruction.png").copy(picture, overwrite=True)
    print(table(summary))
    print(f"\npicture: {picture}\nsummary: {path}")
    return summary


def write_untrained(config: pretrain.PretrainConfig, *, path: str) -> None:
    """The encoder that pre-training started from, as a checkpoint."""
    if not (epath.Path(path) / "state").exists():
        model = masked_image_model(config.model, vocabulary=config.tokenizer.vocabulary)
        params = jax.jit(model.init)(jax.random.key(config.run.seed))
        write_params(path, params, config=to_dict(config))
    cluster.barrier("to have the untrained weights")


def table(summary: dict[str, Any]) -> str:
    """What was learned, against what needs no learning."""
    first = summary["tokenizer"]
    rows = [
        ("held-out masked tokens", "loss (nats)", "accuracy"),
        ("this model", f"{summary['loss']:.3f}", f"{summary['accuracy']:.1%}"),
        (
            "always the most frequent tokens",
            f"{summary['token_entropy']:.3f}",
            f"{summary['majority_accuracy']:.1%}",
        ),
        ("chance", f"{summary['chance_loss']:.3f}", f"{_chance(summary):.1%}"),
        None,
        ("held-out images, classified", "without", "pre-trained"),
    ]
    before, after = summary["probe"]["before"], summary["probe"]["after"]
    for what, part, figure in (
        ("k nearest neighbours", "knn", "accuracy"),
        ("linear probe", "linear", "top1"),
    ):
        if part in before:
            figures = (f"{each[part]['best'][figure]:.1%}" for each in (before, after))
            rows.append((what, *figures))
    rows.append(
        (
            "fine-tuned, the same way",
            _spread(summary["classify"]["scratch"]),
            _spread(summary["classify"]["pretrained"]),
        )
    )
    lines = []
    for row in rows:
        lines.append("" if row is None else f"{row[0]:<34}{row[1]:>16}{row[2]:>16}")
        if row is not None and row[0].startswith("held-out"):
            lines.append("-" * 66)
    speed = summary["images_per_second"]
    lines.append(
        f"\ntokenizer: {first['codes_used']:.0f} codes in use, perplexity"
        f" {first['code_perplexity']:.1f}, reconstruction error {first['reconstruction_l1']:.4f}"
        " (mean |Δ|, RGB in [-1, 1])"
        f"\n{summary['steps']} pre-training steps"
        + (f", {speed:.0f} images/s" if speed else "")
        + f", {summary['classify']['scratch'][0]['steps']} of fine-tuning,"
        f" {summary['seconds']:.0f} s in all"
    )
    return "\n" + "\n".join(lines)


def _spread(runs: list[dict[str, Any]]) -> str:
    """Top-1 at the end of the runs: the mean and, of several, the sample's standard deviation."""
    values = [each["top1"] for each in runs]
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def _chance(summary: dict[str, Any]) -> float:
    return 2.718281828459045 ** -summary["chance_loss"]
