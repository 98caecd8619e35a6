"""The curves: which metrics share a chart, what is drawn beside them, and the figures themselves.

To give a metric a chart of its own, add a row to CHARTS; those without one come after them.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from plotly import graph_objects

from beit_jax.report import published
from beit_jax.report.findings import chance
from beit_jax.report.reading import Run
from beit_jax.report.series import Series, thinned

_HELD_OUT, _ONLINE = "eval_", "online_"
# Not shown: the other names of what is shown, and what is over when the report is read.
_HIDDEN = ("seconds_left", "images_per_second_per_chip", "skipped_in_row")
_FEW = 60  # points that are drawn one by one
MUTED = -1  # the ink of what is there to compare with
_DASHES = ("dot", "dashdot", "longdash")  # of horizontal lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of the page.

    Attributes:
      metric: its name in `metrics.jsonl`; the held-out one, `eval_` before it, is drawn with it.
      title: of the chart.
      unit: of the vertical axis.
      share: whether the values are shares of one, to be written in percent.
      read: a sentence on what a healthy curve looks like; "" where there is nothing to say.
      task: the only one that the row is for; "" for all that no other row of the metric is for.
      from_zero: whether the axis starts at 0.
      often_zero: whether the chart is left out where all values are 0.
    """

    metric: str
    title: str
    unit: str
    share: bool = False
    read: str = ""
    task: str = ""
    from_zero: bool = False
    often_zero: bool = False


CHARTS = (
    Chart(
        metric="loss",
        title="Loss",
        unit="nats",
        read="Falls to the token entropy quickly, and below it slowly; held-out and training close"
        " together.",
        task="pretrain",
    ),
    Chart(
        metric="mlm_acc",
        title="Masked-token accuracy",
        unit="of masked tokens",
        share=True,
        read="Above that of naming the most frequent token, and rising. It is low by nature: tokens"
        " that look alike are different classes.",
    ),
    Chart(
        metric="loss",
        title="Loss",
        unit="of the tokenizer's objective",
        read="Falls quickly, then slowly; held-out and training close together.",
        task="tokenizer",
    ),
    Chart(metric="loss", title="Loss", unit="nats"),
    Chart(
        metric="online_knn_accuracy",
        title="k-NN accuracy of the features",
        unit="of labelled images",
        share=True,
        read="Rising: the features get better at what nobody has taught them. Of as many images"
        " as config.online says: a probe of all images gives another figure.",
    ),
    Chart(metric="top1", title="Accuracy", unit="of images", share=True),
    Chart(metric="top5", title="Accuracy among the first five", unit="of images", share=True),
    Chart(metric="miou", title="Mean IoU", unit="over classes", share=True),
    Chart(metric="macc", title="Mean accuracy of classes", unit="over classes", share=True),
    Chart(metric="pixel_accuracy", title="Pixel accuracy", unit="of labelled pixels", share=True),
    Chart(metric="reconstruction_mse", title="Reconstruction error", unit="mean square"),
    Chart(metric="reconstruction_l1", title="Reconstruction error, absolute", unit="mean |Δ|"),
    Chart(metric="kl", title="KL of the codes to uniform", unit="nats per patch"),
    Chart(
        metric="codes_used",
        title="Codes used",
        unit="codes",
        read="Most of the vocabulary, and not falling: a codebook that collapses shows here first.",
        task="tokenizer",
    ),
    Chart(
        metric="code_perplexity",
        title="Code perplexity",
        unit="codes",
        read="As many codes as would have the same entropy if all were used alike.",
        task="tokenizer",
    ),
    Chart(
        metric="online_rankme",
        title="RankMe",
        unit="effective rank of the features",
        read="Near 1, the features have collapsed.",
    ),
    Chart(
        metric="online_codes_share",
        title="Codes that the model predicts",
        unit="of the vocabulary",
        share=True,
        read="Near the share of codes that occur, once the model has learnt.",
    ),
    Chart(
        metric="online_token_entropy",
        title="Entropy of predicted tokens",
        unit="nats",
        read="Near the token entropy, once the model has learnt.",
    ),
    Chart(
        metric="learning_rate", title="Learning rate", unit="largest of all layers", from_zero=True
    ),
    Chart(
        metric="grad_norm",
        title="Gradient norm",
        unit="before clipping",
        from_zero=True,
        read="Falls at first, then level, without spikes.",
    ),
    Chart(
        metric="images_per_second",
        title="Throughput",
        unit="images per second",
        read="Level: falling, another job or a disk that slows down.",
        from_zero=True,
    ),
    Chart(metric="mfu", title="Use of the chip", unit="of its peak FLOP/s", share=True),
    Chart(
        metric="data_wait_share",
        title="Waiting for data",
        unit="of the time",
        share=True,
        read="Under 10 %: more says that the host is the bottleneck.",
    ),
    Chart(metric="skipped", title="Skipped updates", unit="updates so far", often_zero=True),
    Chart(metric="replaced_images", title="Replaced images", unit="images", often_zero=True),
    Chart(metric="online_seconds", title="Time of the evaluation between steps", unit="seconds"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a chart.

    Attributes:
      name: in the legend.
      series: all its points.
      ink: the number of its colour.
      held_out: whether it is of held-out images: dashed, with squares.
    """

    name: str
    series: Series
    ink: int
    held_out: bool


def charts_of(runs: Sequence[Run]) -> Iterator[tuple[Chart, list[Curve]]]:
    """The charts of runs of one task that have something to show, with their curves."""
    logged = dict.fromkeys(name for run in runs for name in run.metrics)
    # A row for this task comes before one for all, whose place it takes.
    rows = [chart for chart in CHARTS if chart.task in ("", runs[0].task)]
    known: dict[str, Chart] = {}
    for chart in rows:
        if chart.metric not in known or not known[chart.metric].task:
            known[chart.metric] = chart
    plain = dict.fromkeys(name.removeprefix(_HELD_OUT) for name in logged)
    # "iou/road": one of each class, and classes may be many. The summary has them.
    others = [name for name in plain if not (name in known or name in _HIDDEN or "/" in name)]
    for metric in (*known, *others):
        curves = list(_curves(runs, metric))
        chart = known.get(metric) or Chart(metric=metric, title=metric, unit="")
        nothing = all(value == 0 for curve in curves for value in curve.series.values)
        if curves and not (nothing and chart.often_zero):
            yield chart, curves


def figure(chart: Chart, curves: Sequence[Curve], runs: Sequence[Run]) -> graph_objects.Figure:
    """A chart as Plotly draws it; the page's script gives it colours by each trace's `meta`."""
    drawn = graph_objects.Figure()
    for curve in curves:
        shown = thinned(curve.series)
        drawn.add_scatter(
            x=list(shown.steps),
            y=list(shown.values),
            name=curve.name,
            mode="lines+markers" if _has_lone_points(shown) else "lines",
            line={"dash": "dash" if curve.held_out else "solid", "width": 2},
            marker={"size": 6, "symbol": "square" if curve.held_out else "circle"},
            meta={"ink": curve.ink},
        )
    steps = [step for curve in curves for step in curve.series.steps]
    for number, (name, value) in enumerate(_levels(chart, runs)):
        drawn.add_scatter(
            x=[0, max(steps)],
            y=[value, value],
            name=name,
            mode="lines",
            line={"dash": _DASHES[number % len(_DASHES)], "width": 1.5},
            meta={"ink": MUTED},
        )
    points = {
        (step, _of_point(chart, point), point.source)
        for run in runs
        for step, point in published.points_for(run)
    }
    reached = [each for each in sorted(points, key=str) if each[1] is not None]
    if reached:
        drawn.add_scatter(
            x=[step for step, *_ in reached],
            y=[value for _, value, _ in reached],
            name="published",
            mode="markers",
            marker={"size": 10, "symbol": "diamond-open"},
            error_y={"array": [_band(chart, value) for _, value, _ in reached], "width": 8},
            text=[source for *_, source in reached],
            meta={"ink": MUTED},
        )
    drawn.update_layout(
        xaxis={"title": {"text": "step"}, "rangemode": "tozero"},
        yaxis={
            "title": {"text": chart.unit},
            "tickformat": ".3~%" if chart.share else ".4~g",
            "rangemode": "tozero" if chart.share or chart.from_zero else "normal",
        },
    )
    return drawn


def described(chart: Chart, curves: Sequence[Curve]) -> str:
    """A chart in words, for those who can't see it."""
    parts = []
    for curve in curves:
        numbers = curve.series.finite
        if numbers:
            first, last = numbers[0], numbers[-1]
            parts.append(
                f"{curve.name} goes from {written(first[1], chart)} at step {first[0]} to"
                f" {written(last[1], chart)} at step {last[0]}"
            )
        else:
            parts.append(f"{curve.name} has no finite values")
    return f"{chart.title} over steps: {'; '.join(parts)}."


def written(value: float, chart: Chart) -> str:
    """A value as the page writes it."""
    return f"{value:.2%}" if chart.share else f"{value:.6g}"


def _curves(runs: Sequence[Run], metric: str) -> Iterator[Curve]:
    for number, run in enumerate(runs):
        for prefix, what in (("", "training"), (_HELD_OUT, "held-out")):
            series = run.series(f"{prefix}{metric}")
            if not series.steps:
                continue
            alone = len(runs) == 1
            kind = "online" if metric.startswith(_ONLINE) else what
            name = kind if alone else f"{run.name}, {kind}"
            # One run: a colour a curve. Several: a colour a run, and the dashes tell them apart.
            ink = int(bool(prefix)) if alone else number
            yield Curve(name=name, series=series, ink=ink, held_out=bool(prefix))


def _levels(chart: Chart, runs: Sequence[Run]) -> list[tuple[str, float]]:
    """What horizontal lines show; those of runs that share them, once."""
    found: dict[tuple[str, float], list[str]] = {}
    for run in runs:
        levels = _levels_of(run, chart.metric)
        for name, value in levels.items():
            if value is not None:
                found.setdefault((name, round(value, 6)), []).append(run.name)
    several = {name for name, _ in found if sum(other == name for other, _ in found) > 1}
    return [
        (f"{name} of {', '.join(names)}" if name in several else name, value)
        for (name, value), names in found.items()
    ]


def _levels_of(run: Run, metric: str) -> dict[str, float | None]:
    """What a metric of a run is compared with, by name."""
    highest, entropy = chance(run), run.number("token_entropy")
    classes = run.setting("classes") if run.task == "classify" else run.number("online_classes")
    known = classes if isinstance(classes, int | float) and classes >= 1 else None
    of_classes = {
        "loss": None if known is None else math.log(known),
        "top1": None if known is None else 1 / known,
        "top5": None if known is None else min(1.0, 5 / known),
    }
    if metric in of_classes and run.task == "classify":
        return {"chance": of_classes[metric]}
    if metric == "loss":
        return {"chance": highest, "token entropy": entropy}
    if metric == "mlm_acc":
        guessing = None if highest is None else math.exp(-highest)
        return {"chance": guessing, "most frequent token": run.number("majority_accuracy")}
    others: dict[str, dict[str, float | None]] = {
        "online_knn_accuracy": {"chance": of_classes["top1"]},
        "online_token_entropy": {"token entropy": entropy},
        "data_wait_share": {"10 %": 0.1},
    }
    return others.get(metric, {})


def _of_point(chart: Chart, point: published.Point) -> float | None:
    values = {"loss": point.loss, "mlm_acc": point.accuracy, "grad_norm": point.grad_norm}
    return values.get(chart.metric)


def _band(chart: Chart, value: float | None) -> float:
    """How far a run may be off a published value; 0 where nothing is held against it."""
    shares = {"mlm_acc": published.ACCURACY_BAND * (value or 0.0)}
    return {"loss": published.LOSS_BAND, **shares}.get(chart.metric, 0.0)


def _has_lone_points(series: Series) -> bool:
    """Whether a line alone would leave points out, or show too few to look like a curve."""
    values = series.values
    around = zip((None, *values[:-1]), values, (*values[1:], None), strict=True)
    lone = any(
        here is not None and before is None and after is None for before, here, after in around
    )
    return lone or len(values) <= _FEW
