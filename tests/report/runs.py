"""Runs' directories made for tests, with whatever content."""

import json
import pathlib

from beit_jax.files import write_json

CONFIG = {
    "task": "pretrain",
    "run": {"steps": 100, "batch_size": 8},
    "tokenizer": {"kind": "dvae", "vocabulary": 128},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 10},
    "data": {"source": "embedded", "mask": {"kind": "block"}},
}
SUMMARY = {
    "steps": 100,
    "loss": 2.5,
    "token_entropy": 4.1,
    "majority_accuracy": 0.04,
    "chance_loss": 4.852,
    "codes_used": 86,
    "seconds": 12.5,
}


def line(step: int, **values) -> dict:
    """A line of training as a healthy run has it, with changes."""
    usual = {
        "loss": 4.8 - 0.02 * step,
        "mlm_acc": 0.01 + 0.002 * step,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "images_per_second": 200.0,
        "data_wait_share": 0.01,
        "skipped": 0.0,
        "replaced_images": 0.0,
    }
    return {"step": step, **usual, **values}


def make(folder: pathlib.Path, *, lines=None, config=None, summary=None) -> pathlib.Path:
    """A run's directory; of what is not given it has what a healthy run has."""
    folder.mkdir(parents=True)
    lines = [line(step) for step in range(10, 101, 10)] if lines is None else lines
    text = "".join(f"{json.dumps(each)}\n" for each in lines)
    (folder / "metrics.jsonl").write_text(text)
    write_json(folder / "config.json", CONFIG if config is None else config)
    write_json(folder / "summary.json", SUMMARY if summary is None else summary)
    return folder
