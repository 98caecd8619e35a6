"""What is on the page: the run's own numbers, every text as a text, and clear errors."""

import html.parser
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("plotly", reason="the extra [report] is not installed")

from beit_jax.report.command import main
from tests.report.runs import CONFIG, SUMMARY, line, make

HOSTILE = "<script>window.hacked=1</script><img src=x onerror=window.hacked=2>"


class Page(html.parser.HTMLParser):
    """The elements and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in = tag

    def handle_data(self, data):
        (self.scripts if self._in == "script" else self.texts).append(data)

    def handle_endtag(self, tag):
        self._in = ""

    @property
    def charts(self):
        (data,) = [each for each in self.scripts if each.startswith("[")]
        return json.loads(data)


def report(tmp_path, *runs) -> str:
    output = tmp_path / "report.html"
    assert main([*map(str, runs), f"--output={output}"]) == 0
    return output.read_text()


def test_the_curves_and_tables_have_the_numbers_of_the_metrics_file(tmp_path):
    lines = [line(step) for step in range(10, 101, 10)]
    lines += [{"step": step, "eval_loss": 5 - step / 30} for step in (50, 100)]
    page = Page(report(tmp_path, make(tmp_path / "run", lines=lines)))
    drawn = {
        (chart["layout"]["yaxis"]["title"]["text"], trace["name"]): (trace["x"], trace["y"])
        for chart in page.charts
        for trace in chart["data"]
    }
    assert drawn["nats", "training"] == (
        [each["step"] for each in lines if "loss" in each],
        [each["loss"] for each in lines if "loss" in each],
    )
    assert drawn["nats", "held-out"] == ([50, 100], [5 - 50 / 30, 5 - 100 / 30])
    assert drawn["nats", "token entropy"] == ([0, 100], [SUMMARY["token_entropy"]] * 2)
    assert drawn["of masked tokens", "training"][1] == [
        each["mlm_acc"] for each in lines if "mlm_acc" in each
    ]
    assert "4.6 at 10" in page.texts
    assert "2.8 at 100" in page.texts


def test_runs_are_compared_and_what_differs_is_listed(tmp_path):
    other = CONFIG | {"optimizer": {"learning_rate": 2e-3, "warmup_steps": 10}}
    runs = [make(tmp_path / "a"), make(tmp_path / "b", config=other)]
    text = report(tmp_path, *runs)
    page = Page(text)
    names = {trace["name"] for trace in page.charts[0]["data"]}
    assert {"a, training", "b, training"} <= names
    assert "chance" in names  # the same for both, hence once
    different = text.split("What differs")[-1].split("</table>")[0]
    assert "<title>Run report: a, b</title>" in text
    assert "optimizer.learning_rate" in different
    assert "0.002" in different
    assert "warmup_steps" not in different


def test_texts_are_texts(tmp_path):
    config = CONFIG | {HOSTILE: HOSTILE, "data": {"source": f"folder:{HOSTILE}"}}
    lines = [line(step, **{f"{HOSTILE}".replace("/", "") + "</script>": 1.0}) for step in (10, 20)]
    folder = make(tmp_path / HOSTILE.replace("/", ""), config=config, lines=lines)
    name = f"{HOSTILE.replace('/', '')}.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name)
    page = Page(report(tmp_path, folder))
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert not [attributes for _, attributes in page.elements if "onerror" in attributes]
    assert any(HOSTILE in text for text in page.texts)
    assert any(name in text for text in page.texts)


def test_numbers_that_no_run_wrote(tmp_path):
    lines = [line(10), line(10**26, loss=1e308, mlm_acc=-1e308)]
    summary = SUMMARY | {"chance_loss": -1e308, "token_entropy": 1e308, "codes_used": "all"}
    page = Page(report(tmp_path, make(tmp_path / "run", lines=lines, summary=summary)))
    (loss, *levels) = page.charts[0]["data"]
    assert loss["y"] == [line(10)["loss"], None]
    assert [each["name"] for each in levels] == ["chance"]  # of the config's vocabulary


@pytest.mark.parametrize(
    "lines",
    [[], [line(10)], [line(10, loss=None)], [line(10), line(20, loss=None), line(30)]],
    ids=["none", "one", "one not finite", "a gap"],
)
def test_few_points_and_gaps(lines, tmp_path):
    page = Page(report(tmp_path, make(tmp_path / "run", lines=lines)))
    if lines:
        (trace, *_) = page.charts[0]["data"]
        assert trace["y"] == [each["loss"] for each in lines]
        assert trace["mode"] == "lines+markers"
    else:
        assert page.charts == []


def test_a_folder_of_runs_is_all_of_them(tmp_path):
    for name in ("one", "two"):
        make(tmp_path / "runs" / name)
    (tmp_path / "runs" / "notes").mkdir()
    page = Page(report(tmp_path, tmp_path / "runs"))
    assert {"one", "two"} <= set(page.texts)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["missing", "--output=report.html"], "RUN: there is no directory missing"),
        (["empty", "--output=report.html"], "RUN: empty holds no run"),
        (["run", "--output=report.pdf"], "--output: report.pdf is no .html file"),
        (["run", "--output=nowhere/report.html"], "--output: there is no folder"),
    ],
)
def test_mistakes_are_named(arguments, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert main(arguments) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_task_has_its_own_row_and_online_figures_their_charts(tmp_path):
    tokenizer = CONFIG | {"task": "tokenizer"}
    online = {"step": 100, "online_knn_accuracy": 0.3, "online_token_entropy": 4.0}
    runs = [
        make(tmp_path / "a", config=tokenizer),
        make(tmp_path / "b", lines=[line(100), online]),
    ]
    page = Page(report(tmp_path, *runs))
    units = [chart["layout"]["yaxis"]["title"]["text"] for chart in page.charts]
    assert units.index("of the tokenizer's objective") < units.index("nats")
    (knn,) = [each for each in page.charts if each["data"][0]["y"] == [0.3]]
    assert knn["layout"]["yaxis"]["tickformat"].endswith("%")
    assert knn["data"][0]["name"] == "online"
    (entropy,) = [each for each in page.charts if each["data"][0]["y"] == [4.0]]
    assert [trace["name"] for trace in entropy["data"]] == ["online", "token entropy"]
