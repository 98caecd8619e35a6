"""The whole story in one command: train a tokenizer, pre-train with it, show what was learned."""

import dataclasses
import json
import time
from typing import Any

import jax
from absl import logging
from etils import epath

from beit_jax.config import check
from beit_jax.tasks import pretrain, tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Two jobs, one after the other; `pretrain.tokenizer.path` is filled in by the first."""

    task: str = "quickstart"
    tokenizer: tokenizer.TokenizerTaskConfig
    pretrain: pretrain.PretrainConfig

    def __post_init__(self):
        ours = dataclasses.replace(self.pretrain.tokenizer, path="")
        check(
            ours == dataclasses.replace(self.tokenizer.tokenizer, path=""),
            "pretrain.tokenizer",
            "must be the tokenizer that the first job trains",
        )


def run(config: QuickstartConfig, *, workdir: str) -> dict[str, Any]:
    """Runs both jobs, or what is left of them; writes `summary.json` and `reconstruction.png`."""
    began = time.perf_counter()
    logging.info("1 of 2: train a tokenizer")
    first = tokenizer.run(config.tokenizer, workdir=f"{workdir}/tokenizer")
    logging.info("2 of 2: pre-train with its tokens")
    second_config = dataclasses.replace(
        config.pretrain,
        tokenizer=dataclasses.replace(config.pretrain.tokenizer, path=first["tokenizer"]),
    )
    summary = pretrain.run(second_config, workdir=f"{workdir}/pretrain")
    if jax.process_index() != 0:
        return summary

    path = epath.Path(workdir) / "summary.json"
    if path.exists():  # continued: the time adds up
        began -= json.loads(path.read_text())["seconds"]
    summary |= {"seconds": time.perf_counter() - began, "tokenizer": first}
    path.write_text(json.dumps(summary, indent=2) + "\n")
    picture = epath.Path(workdir) / "reconstruction.png"
    (epath.Path(workdir) / "pretrain" / "reconstruction.png").copy(picture, overwrite=True)
    print(table(summary))
    print(f"\npicture: {picture}\nsummary: {path}")
    return summary


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
    ]
    lines = [f"{a:<34}{b:>12}{c:>12}" for a, b, c in rows]
    lines.insert(1, "-" * 58)
    speed = summary["images_per_second"]
    lines.append(
        f"\ntokenizer: {first['codes_used']:.0f} codes in use, perplexity"
        f" {first['code_perplexity']:.1f}, reconstruction error {first['reconstruction_l1']:.4f}"
        " (mean |Δ|, RGB in [-1, 1])"
        f"\n{summary['steps']} pre-training steps"
        + (f", {speed:.0f} images/s" if speed else "")
        + f", {summary['seconds']:.0f} s in all"
    )
    return "\n" + "\n".join(lines)


def _chance(summary: dict[str, Any]) -> float:
    return 2.718281828459045 ** -summary["chance_loss"]
