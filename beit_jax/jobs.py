"""From a config's `task` to the job that runs it: the edge between settings and code."""

from collections.abc import Mapping
from typing import Any

from beit_jax.config import check, parse
from beit_jax.tasks import pretrain, quickstart, tokenizer

JOBS = {
    "pretrain": (pretrain.PretrainConfig, pretrain.run),
    "tokenizer": (tokenizer.TokenizerTaskConfig, tokenizer.run),
    "quickstart": (quickstart.QuickstartConfig, quickstart.run),
}


def parse_job(values: Mapping[str, Any]) -> Any:
    """The frozen config of the job that `values["task"]` names; raises ConfigError."""
    task = values.get("task")
    check(task in JOBS, "config.task", f"must be one of {', '.join(JOBS)}; got {task!r}")
    return parse(JOBS[task][0], values)


def run(values: Mapping[str, Any], *, workdir: str) -> dict[str, Any]:
    """Runs the job and returns its summary."""
    config = parse_job(values)
    return JOBS[config.task][1](config, workdir=workdir)
