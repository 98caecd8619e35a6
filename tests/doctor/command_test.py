"""The command: exit codes, lines and JSON, and the jobs that a config has."""

import json

import pytest

from beit_jax import jobs
from beit_jax.doctor import checks, command
from beit_jax.doctor.finding import ok, wrong
from tests.tasks import tiny

CONFIG = "--config=tests/tasks/tiny.py:pretrain"


@pytest.fixture
def one_check(monkeypatch):
    """A table of one check, which says that batches of 16 are wrong."""

    def check(context):
        size = context.config.run.batch_size
        return [wrong("a batch of 16", "take 8") if size == 16 else ok(f"a batch of {size}")]

    monkeypatch.setattr(checks, "CHECKS", {"size": checks.Check(run=check, fix="")})


@pytest.mark.usefixtures("one_check")
def test_findings_are_lines_and_the_exit_code_says_whether_something_is_wrong(capsys):
    assert command.main([CONFIG]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok           pretrain: size: a batch of 8",
        "0 wrong, 0 warnings, 1 ok",
    ]
    assert command.main([CONFIG, "--config.run.batch_size=16"]) == 1
    assert "WRONG        pretrain: size: a batch of 16; fix: take 8" in capsys.readouterr().out


@pytest.mark.usefixtures("one_check")
def test_json_has_the_same(capsys):
    assert command.main([CONFIG, "--json", "--config.run.batch_size=16"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"ok": 0, "skipped": 0, "warning": 0, "wrong": 1}
    assert found["findings"] == [
        {
            "job": "pretrain",
            "check": "size",
            "level": "wrong",
            "what": "a batch of 16",
            "fix": "take 8",
        }
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        ([CONFIG, "--config.run.no=1"], "config.run.no: no such setting"),
        ([CONFIG, "--config.run.batch_size=0"], "config.run.batch_size: "),
        ([CONFIG, "--steps=1"], "--steps: 1"),
        ([CONFIG, "--stepz=4"], "stepz"),
        ([CONFIG, "--workdir=/dev/null/run"], "--workdir: "),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line(arguments, message, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_all_jobs_of_the_quickstart_are_checked():
    config = jobs.parse_job(tiny.story().to_dict())
    found = command.jobs_of(config, workdir="runs/a")
    assert [(name, part.task, folder) for name, part, folder in found] == [
        ("tokenizer", "tokenizer", "runs/a/tokenizer"),
        ("pretrain", "pretrain", "runs/a/pretrain"),
        ("probe", "probe", "runs/a/probe_after"),
        ("classify", "classify", "runs/a/classify_pretrained_0"),
    ]
    single = jobs.parse_job(tiny.pretrain().to_dict())
    assert command.jobs_of(single, workdir="runs/a") == [("pretrain", single, "runs/a")]


@pytest.mark.slow
def test_nothing_is_wrong_with_the_quickstart(tmp_path, capsys):
    """Every check is made, with steps of every job, and nothing is left in the run's folder."""
    arguments = ["--config=tests/tasks/tiny.py:story", f"--workdir={tmp_path}/run", "--json"]
    assert command.main([*arguments, "--seconds=0.1", "--steps=2"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [one for one in findings if one["level"] in ("wrong", "warning")] == []
    stepped = {one["job"] for one in findings if one["check"] == "step" and one["level"] == "ok"}
    assert stepped == {"tokenizer", "pretrain", "classify"}
    assert not (tmp_path / "run").exists()
