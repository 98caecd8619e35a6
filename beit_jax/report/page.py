"""The report as one HTML file: everything in it, nothing loaded, and no text of a run's is run.

Jinja escapes every value but those that the template calls safe: the style, the scripts, and their
data, which is written so that no element can end in it. The page's content security policy allows
its scripts by their digests, so that one which came with a name could not run even unescaped.
"""

import base64
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence

import jinja2
import plotly.offline

import beit_jax
from beit_jax.files import printable
from beit_jax.report import charts, findings
from beit_jax.report.reading import Run, flat, shown
from beit_jax.report.series import MOST
from beit_jax.types import Json, JsonObject

_HERE = pathlib.Path(__file__).parent
# In the order in which one needs the other.
_TITLES = {
    "tokenizer": "Tokenizer",
    "pretrain": "Pre-training",
    "probe": "Probing",
    "classify": "Classification",
    "segment": "Segmentation",
}
_UNTITLED = "Runs"
_NOTHING = "–"
# Of a picture of pre-training by its file's name, for those who can't see it.
_ALTS = {
    "first_batch.png": "The first training images, with their masked patches.",
    "reconstruction.png": "Held-out images, what is hidden of them, and their reconstructions.",
    "attention.png": "Held-out images, and what the last block attends to in them.",
}
_LONGEST_CELL = 400  # characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts.

    Attributes:
      caption: what it shows.
      columns: their headings.
      rows: each with a cell a column; the first names the row.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def page(runs: Sequence[Run], *, title: str) -> str:
    """The HTML of a report on runs, which `title` names."""
    found = [each for run in runs for each in findings.findings(run)]
    found += findings.comparisons(runs)
    tasks = sorted(
        {run.task for run in runs}, key=lambda task: ([*_TITLES, task].index(task), task)
    )
    groups = [[run for run in runs if run.task == task] for task in tasks]
    figures: list[JsonObject] = []
    sections = [_task(group, number, figures) for number, group in enumerate(groups)]
    pictures = list(_pictures(runs))
    settings = [_settings(group) for group in groups if any(run.config for run in group)]
    recorded = [run for run in runs if run.start]
    machine = _side_by_side(
        "What the runs were made with",
        recorded,
        [
            {key: run.start[key] for key in ("versions", "devices") if key in run.start}
            for run in recorded
        ],
    )
    contents = [{"id": "findings", "title": "What to look at"}, *sections]
    for there, name, heading in (
        (pictures, "pictures", "Pictures"),
        (settings, "settings", "Settings"),
        (machine, "machine", "Machine and versions"),
    ):
        if there:
            contents.append({"id": name, "title": heading})
    # One script may not end early, nor open a comment, by what is in it.
    plotly_js = plotly.offline.get_plotlyjs().replace("</script", "<\\/script")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html").render(
        title=f"Run report: {title}",
        policy=_policy(plotly_js, script),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        verdict=_verdict(found, runs),
        sections=contents,
        findings=found,
        several=len(runs) > 1,
        rules=len(findings.RULES),
        tasks=sections,
        pictures=pictures,
        settings=settings,
        machine=machine,
        version=beit_jax.__version__,
        made_of=", ".join(run.path for run in runs),
        charts=_script_json(figures),
        plotly=plotly_js,
        script=script,
    )


def _policy(*scripts: str) -> str:
    """A content security policy: these scripts run, pictures are in the page, nothing is loaded."""
    digests = [base64.b64encode(hashlib.sha256(each.encode()).digest()) for each in scripts]
    allowed = " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
    # Plotly writes style sheets of its own.
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )


def _script_json(value: Sequence[JsonObject]) -> str:
    """JSON that can stand in a script element, whatever its strings are."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _verdict(found: Sequence[findings.Finding], runs: Sequence[Run]) -> str:
    problems = sum(each.level == findings.PROBLEM for each in found)
    warnings = len(found) - problems
    what = f"{len(runs)} runs" if len(runs) > 1 else "One run"
    if not found:
        return f"{what}. Nothing looks wrong."
    counts = [
        f"{number} {name}{'s' * (number > 1)}"
        for number, name in ((problems, "problem"), (warnings, "warning"))
        if number
    ]
    return f"{what}. {' and '.join(counts)}, see below."


def _task(runs: Sequence[Run], number: int, figures: list[JsonObject]) -> dict[str, object]:
    """A task's section; its charts' data are added to `figures`."""
    drawn = []
    for chart, curves in charts.charts_of(runs):
        name = f"chart-{len(figures)}"
        figure = json.loads(charts.figure(chart, curves, runs).to_json())
        figures.append(
            {
                "id": name,
                "data": figure["data"],
                "layout": {key: figure["layout"][key] for key in ("xaxis", "yaxis")},
            }
        )
        drawn.append(
            {
                "id": name,
                "title": chart.title,
                "read": chart.read,
                "described": charts.described(chart, curves),
                "table": _numbers(chart, curves),
                "thinned": any(len(curve.series.steps) > MOST for curve in curves),
            }
        )
    title = _TITLES.get(runs[0].task, runs[0].task or _UNTITLED)
    return {
        "id": f"task-{number}",
        "title": title,
        "progress": Table(
            caption="How far the runs are",
            columns=("run", "steps", "state"),
            rows=[(run.name, *_progress(run)) for run in runs],
        ),
        "charts": drawn,
        "results": _side_by_side(
            "Results (summary.json)",
            runs,
            [
                {key: value for key, value in run.summary.items() if key != "time_to_first_step"}
                for run in runs
            ],
        ),
    }


def _progress(run: Run) -> tuple[str, str]:
    steps = run.setting("run.steps")
    planned = f" of {steps:,}" if isinstance(steps, int) and run.lines else ""
    done = f"{run.step:,}{planned}" if run.lines else _NOTHING
    # A run that is continued has the summary of before.
    going_on = isinstance(steps, int) and run.lines and run.step < steps
    return done, "finished" if run.summary and not going_on else "not finished"


def _numbers(chart: charts.Chart, curves: Sequence[charts.Curve]) -> Table:
    rows = []
    for curve in curves:
        finite = curve.series.finite
        gaps = len(curve.series.steps) - len(finite)
        if not finite:
            rows.append((curve.name, *[_NOTHING] * 4, "0", str(gaps)))
            continue
        lowest = min(finite, key=lambda each: each[1])
        highest = max(finite, key=lambda each: each[1])
        cells = [
            f"{charts.written(value, chart)} at {step}"
            for step, value in (finite[0], finite[-1], lowest, highest)
        ]
        rows.append((curve.name, *cells, str(len(finite)), str(gaps)))
    return Table(
        caption=f"{chart.title}: values, at steps",
        columns=("curve", "first", "last", "lowest", "highest", "points", "not finite"),
        rows=rows,
    )


def _settings(runs: Sequence[Run]) -> dict[str, object]:
    rows = _rows([run.config for run in runs])
    columns = ("setting", *(run.name for run in runs))
    # What only some have recorded, since they are older, say, does not tell them apart.
    different = [row for row in rows if len(set(row[1:]) - {_NOTHING}) > 1]
    return {
        "title": _TITLES.get(runs[0].task, runs[0].task or _UNTITLED),
        "several": len(runs) > 1,
        "different": Table(caption="What differs", columns=columns, rows=different)
        if different
        else None,
        "all": Table(caption="All settings", columns=columns, rows=rows),
    }


def _side_by_side(caption: str, runs: Sequence[Run], values: Sequence[JsonObject]) -> Table | None:
    """What each run has under each name; None where none has anything."""
    rows = _rows(values)
    if not rows:
        return None
    return Table(caption=caption, columns=("", *(run.name for run in runs)), rows=rows)


def _rows(values: Sequence[JsonObject]) -> list[tuple[str, ...]]:
    leaves = [dict(flat(each)) for each in values]
    names = dict.fromkeys(name for each in leaves for name in each)
    return [
        (shown(name), *(_cell(each[name]) if name in each else _NOTHING for each in leaves))
        for name in names
    ]


def _cell(value: Json) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if value == "":
        return '""'
    text = printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _LONGEST_CELL else f"{text[:_LONGEST_CELL]}…"


def _pictures(runs: Sequence[Run]) -> Iterator[dict[str, str]]:
    for run in runs:
        for name, content in run.pictures.items():
            title = f"{run.name}: {name}" if len(runs) > 1 else name
            yield {
                "title": title,
                "alt": _alt(run, name) or f"{title}, without a description.",
                "source": f"data:image/png;base64,{base64.b64encode(content).decode()}",
            }


def _alt(run: Run, name: str) -> str:
    if name == "first_batch.png" and run.task != "pretrain":
        return "The first training images, as the model is given them."
    return _ALTS.get(name, "")
