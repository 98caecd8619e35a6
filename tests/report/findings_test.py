"""Each rule finds what it is for, says what to do, and is silent on a healthy run."""

import os

import pytest

pytest.importorskip("plotly", reason="the extra [report] is not installed")

from beit_jax.report import charts, findings
from beit_jax.report.published import LOSS_BAND, POINTS
from beit_jax.report.reading import read_runs
from tests.report.runs import CONFIG, SUMMARY, line, make

STEPS = range(10, 101, 10)
BASE = CONFIG | {
    "run": {"steps": 300 * 625, "batch_size": 2048},
    "model": {"layers": 12, "width": 768, "image_size": 224, "patch_size": 16},
    "tokenizer": {"kind": "dalle", "vocabulary": 8192},
    "data": {"source": "tfds:imagenet2012", "mask": {"kind": "block"}},
}


def at_the_end(**values):
    """Two lines of an ImageNet run at the end of its 300 epochs."""
    return [line(step, **values) for step in (300 * 625 - 50, 300 * 625)]


BROKEN = {
    "nothing logged": ({"lines": [], "summary": {}}, "Nothing has been logged", "log_every"),
    "not finite": (
        {"lines": [*map(line, STEPS[:-1]), line(100, loss=None, grad_norm=None)]},
        "loss was not finite at 1 of 10 logged steps, first at step 100",
        "learning_rate",
    ),
    "collapsed": ({"summary": SUMMARY | {"majority_accuracy": 0.9}}, "90% of all", "normalization"),
    "random tokens": (
        {"summary": SUMMARY | {"token_entropy": 4.84}},
        "about as frequent",
        "config.tokenizer.path",
    ),
    "few codes": ({"summary": SUMMARY | {"codes_used": 3}}, "3 of 128 codes", "tokenizer"),
    "few codes of a tokenizer": (
        {
            "config": CONFIG | {"task": "tokenizer"},
            "lines": [{"step": 10, "code_perplexity": 6.65}],
        },
        "6.65 of 128",
        "vocabulary",
    ),
    "few predicted": (
        {"lines": [line(100), {"step": 100, "online_codes_share": 3 / 128}]},
        "predicts 3 codes; 86 occur",
        "train longer",
    ),
    "collapsing features": (
        {"lines": [{"step": at, "online_rankme": rank} for at, rank in ((1, 9), (2, 9), (3, 2))]},
        "RankMe is 2",
        "earlier checkpoint",
    ),
    "lines that are none": (
        {"lines": [line(10), {"step": -5}, "x"]},
        "2 lines of metrics.jsonl are no metrics and are left out, the first is line 2",
        "made without it",
    ),
    "at chance": (
        {"lines": [line(step, loss=4.85) for step in STEPS]},
        "still that of guessing",
        "learning_rate",
    ),
    "above the entropy": (
        {"lines": [line(step, loss=4.3) for step in STEPS]},
        "above the token entropy, 4.1:",
        "first_batch.png",
    ),
    "off the band": (
        {"lines": at_the_end(loss=7.0, mlm_acc=0.0496), "config": BASE, "summary": {}},
        "loss at epoch 300 is 7; a published run of this recipe had 6.299",
        "tokenizer's file",
    ),
    "starved": (
        {"lines": [line(step, data_wait_share=0.4) for step in STEPS]},
        "40% of the time",
        "prepare",
    ),
    "skipped": ({"lines": [line(10), line(20, skipped=3.0)]}, "3 updates", "clip_norm"),
    "replaced": ({"lines": [line(10, replaced_images=2.0)]}, "2 images", "The log names"),
    "overfitted": (
        {
            "lines": [
                {"step": step, "eval_loss": loss}
                for step, loss in ((10, 3.0), (20, 2.5), (30, 2.7))
            ]
        },
        "lowest at step 20 (2.5) and is 2.7 now",
        "train shorter",
    ),
    "features stand still": (
        {"lines": [line(step, online_knn_accuracy=0.2) for step in STEPS]},
        "online_knn_accuracy is 20.0%, no better",
        "labels",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_is_said_with_what_to_do(kind, tmp_path):
    broken, what, do = BROKEN[kind]
    (run,) = read_runs([str(make(tmp_path / "run", **broken))])
    found = findings.findings(run)
    assert [each for each in found if what in each.what and do in each.do], found


def test_a_healthy_run_has_no_findings(tmp_path):
    (run,) = read_runs([str(make(tmp_path / "run"))])
    assert findings.findings(run) == []


def test_a_run_that_reaches_the_published_point_is_not_off_it(tmp_path):
    point = POINTS[0]
    lines = at_the_end(loss=point.loss, mlm_acc=point.accuracy)
    (run,) = read_runs([str(make(tmp_path / "run", lines=lines, config=BASE, summary={}))])
    assert findings.findings(run) == []
    ((chart, curves), *_) = charts.charts_of([run])
    drawn = charts.figure(chart, curves, [run]).data[-1]
    assert (list(drawn.x), list(drawn.y)) == ([round(300 * 1_281_167 / 2048)], [point.loss])
    assert list(drawn.error_y.array) == [LOSS_BAND]


def test_losses_under_different_tokens_are_not_compared(tmp_path):
    other = SUMMARY | {"token_entropy": 1.84}
    paths = [make(tmp_path / "a"), make(tmp_path / "b", summary=other)]
    runs = read_runs([str(path) for path in paths])
    (found,) = findings.comparisons(runs)
    assert "can't be compared" in found.what
    assert "a 1.300, b -0.960" in found.what
    assert findings.comparisons(runs[:1]) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "picture.png"])
@pytest.mark.parametrize("kind", ["pipe", "endless", "loop", "folder", "bytes"])
def test_whatever_a_file_is_the_rest_is_shown(name, kind, tmp_path):
    folder = make(tmp_path / "run")
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(bytes(range(256)) * 9)
    (run,) = read_runs([str(folder)])
    assert any(name in each.what for each in findings.findings(run))
    assert run.config["task"] == "pretrain"


def test_files_that_cant_be_read_are_named_and_the_rest_is_shown(tmp_path):
    folder = make(tmp_path / "run")
    (folder / "summary.json").write_text("{")
    (folder / "picture.png").write_bytes(b"no picture")
    (run,) = read_runs([str(folder)])
    found = [each.what for each in findings.findings(run)]
    assert any("summary.json" in what for what in found)
    assert any("picture.png is no PNG" in what for what in found)
    assert len(run.lines) == 10
