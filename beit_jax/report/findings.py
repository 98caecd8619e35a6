"""What is wrong with a run, as far as its numbers tell, and what to do about it.

To add a rule is to write a function that takes a run and gives findings, and to add it to RULES.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence

from beit_jax.report import published
from beit_jax.report.reading import Run

PROBLEM, WARNING = "problem", "warning"
_WAITING = 0.1  # the share of time from which on the devices count as starved
_COLLAPSED = 0.5  # the share of the most frequent token
_FEW_CODES = 0.25  # of the codebook; DALL-E's and the quickstart's use more than half
_LARGEST_CHANCE = 100.0  # nats: ln of more tokens than there are atoms
_FEW_PREDICTED = 0.25  # of the codes that occur
_AT_CHANCE = 0.01  # the share by which a loss may be below ln(vocabulary) and count as it
_OVERFITTED = 1.02  # held-out loss at the end, against its lowest
_SAME_TOKENS = 1.01  # the ratio of two entropies of the same tokens, of other held-out images
_RECENT = 10  # a tenth of the points is "the end" of a curve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Something to look at.

    Attributes:
      level: PROBLEM or WARNING.
      run: its name.
      what: what the numbers say, a sentence.
      do: what to do, a sentence.
    """

    level: str
    run: str
    what: str
    do: str


def findings(run: Run) -> list[Finding]:
    """What the rules find, problems first."""
    found = [
        Finding(level=level, run=run.name, what=what, do=do)
        for rule in RULES
        for level, what, do in rule(run)
    ]
    return sorted(found, key=lambda each: each.level != PROBLEM)


def chance(run: Run) -> float | None:
    """The loss of a model that knows nothing, in nats: ln(vocabulary); None if it has no tokens."""
    stated = run.number("chance_loss")
    vocabulary = run.setting("tokenizer.vocabulary")
    if stated is not None and not 0 < stated < _LARGEST_CHANCE:  # not written by a run
        stated = None
    if stated is not None or run.task != "pretrain":
        return stated
    if not isinstance(vocabulary, int) or vocabulary < 1:
        return None
    return math.log(vocabulary)


def _nothing_logged(run: Run) -> Iterator[tuple[str, str, str]]:
    if not run.lines and not run.summary:
        yield (
            PROBLEM,
            "Nothing has been logged yet.",
            "A run logs its first line after config.run.log_every steps; until then its log says"
            " what it is doing.",
        )


def _not_finite(run: Run) -> Iterator[tuple[str, str, str]]:
    for name in ("loss", "grad_norm", "eval_loss"):
        series = run.series(name)
        gaps = [
            step for step, value in zip(series.steps, series.values, strict=True) if value is None
        ]
        if gaps:
            yield (
                PROBLEM,
                f"{name} was not finite at {len(gaps)} of {len(series.steps)} logged steps, first"
                f" at step {gaps[0]}.",
                "Lower config.optimizer.learning_rate or set config.optimizer.clip_norm, and look"
                " at the images of that time.",
            )


def _skipped(run: Run) -> Iterator[tuple[str, str, str]]:
    values = run.series("skipped").finite
    if values and values[-1][1] > 0:
        yield (
            WARNING,
            f"{values[-1][1]:.0f} updates were not finite and were left out.",
            "A few in a long run do no harm. If their number grows, lower the learning rate or set"
            " config.optimizer.clip_norm.",
        )


def _replaced(run: Run) -> Iterator[tuple[str, str, str]]:
    values = run.series("replaced_images").finite
    count = max((value for _, value in values), default=0.0)
    if count > 0:
        yield (
            WARNING,
            f"{count:.0f} images could not be read and were replaced by others.",
            "The log names the files: repair or remove them. config.data.max_bad_share says how"
            " many end the run.",
        )


def _starved(run: Run) -> Iterator[tuple[str, str, str]]:
    # The first line has the filling of the pipeline in it.
    shares = [value for _, value in run.series("data_wait_share").finite[1:]]
    if shares and statistics.median(shares) > _WAITING:
        yield (
            WARNING,
            f"The devices wait for images {statistics.median(shares):.0%} of the time (median).",
            "Store the images smaller with `beit-jax prepare`, add hosts with `beit-jax service`,"
            " or raise config.data.workers.",
        )


def _broken_tokens(run: Run) -> Iterator[tuple[str, str, str]]:
    majority, entropy = run.number("majority_accuracy"), run.number("token_entropy")
    used, vocabulary = run.number("codes_used"), run.setting("tokenizer.vocabulary")
    highest = chance(run)
    if majority is not None and majority > _COLLAPSED:
        yield (
            PROBLEM,
            f"One token is {majority:.0%} of all: the codebook has collapsed.",
            "There is nothing to learn from these tokens. Check config.data.normalization and the"
            " image size that the tokenizer was trained with, or train it again.",
        )
    elif entropy is not None and highest is not None and entropy > 0.99 * highest:
        yield (
            PROBLEM,
            f"Every token is about as frequent as any other (entropy {entropy:.2f} of at most"
            f" {highest:.2f} nats), as with random weights.",
            "Check config.tokenizer.path, and look at reconstruction.png.",
        )
    few = isinstance(vocabulary, int) and used is not None and used < _FEW_CODES * vocabulary
    if few and run.task == "pretrain":
        yield (
            WARNING,
            f"{used:.0f} of {vocabulary} codes occur in the held-out images"
            + ("." if majority is None else f", and one is {majority:.0%} of all."),
            "The loss can't be compared with published ones. If the images are varied, the"
            " tokenizer was trained on others or has collapsed in part.",
        )


def _collapsing_tokenizer(run: Run) -> Iterator[tuple[str, str, str]]:
    vocabulary = run.setting("tokenizer.vocabulary")
    values = run.series("eval_code_perplexity").finite or run.series("code_perplexity").finite
    if run.task != "tokenizer" or not values or not isinstance(vocabulary, int):
        return
    if values[-1][1] < _FEW_CODES * vocabulary:
        yield (
            WARNING,
            f"The code perplexity is {values[-1][1]:.4g} of {vocabulary}: a small part of the"
            " codebook does all the work.",
            "Train longer, look at the reconstructions, and lower the vocabulary if they are good.",
        )


def _predicts_few(run: Run) -> Iterator[tuple[str, str, str]]:
    shares = run.series("online_codes_share").finite
    used, vocabulary = run.number("codes_used"), run.setting("tokenizer.vocabulary")
    if not (shares and used and isinstance(vocabulary, int)):
        return
    predicted = shares[-1][1] * vocabulary
    if predicted < _FEW_PREDICTED * used:
        yield (
            WARNING,
            f"The model predicts {predicted:.0f} codes; {used:.0f} occur.",
            "Early in a run it is so. Later, it has learnt which tokens are frequent and little"
            " else: train longer.",
        )


def _worse_than_before(run: Run) -> Iterator[tuple[str, str, str]]:
    values = run.series("online_rankme").finite
    if len(values) >= 3 and values[-1][1] < 0.5 * max(value for _, value in values):
        yield (
            WARNING,
            f"RankMe is {values[-1][1]:.4g}, less than half of what it was: the features collapse.",
            "Look at the k-NN accuracy and at an earlier checkpoint.",
        )


def comparisons(runs: Sequence[Run]) -> list[Finding]:
    """What is to be known before runs of one task are compared."""
    entropies = {run.name: run.number("token_entropy") for run in runs if run.task == "pretrain"}
    known = {name: value for name, value in entropies.items() if value}
    if len(known) < 2 or max(known.values()) <= _SAME_TOKENS * min(known.values()):
        return []
    gains = []
    for run in runs:
        held_out = run.series("eval_loss").finite or run.series("loss").finite
        if run.name in known and held_out:
            gains.append(f"{run.name} {known[run.name] - held_out[-1][1]:.3f}")
    what = "The tokens of these runs differ: their losses and accuracies can't be compared."
    if gains:
        what += f" Nats below the token entropy: {', '.join(gains)}."
    return [
        Finding(
            level=WARNING,
            run=" and ".join(known) if len(known) == 2 else f"{len(known)} runs",
            what=what,
            do="Compare what the features are worth, with the k-NN accuracy or a probe.",
        )
    ]


def _learns_nothing(run: Run) -> Iterator[tuple[str, str, str]]:
    warmup = run.setting("optimizer.warmup_steps")
    entropy, highest = run.number("token_entropy"), chance(run)
    points = run.series("loss").finite
    if run.task != "pretrain" or not points or highest is None or not isinstance(warmup, int):
        return
    after = [value for step, value in points if step >= 2 * warmup]
    if not after:
        return
    end = statistics.median(after[-max(1, len(after) // _RECENT) :])
    if end > (1 - _AT_CHANCE) * highest:
        yield (
            PROBLEM,
            f"The loss, {end:.4g}, is still that of guessing, {highest:.4g}.",
            "Nothing is updated: check config.optimizer.learning_rate, and the count of skipped"
            " updates.",
        )
    elif entropy is not None and end > entropy:
        yield (
            PROBLEM,
            f"The loss, {end:.4g}, is above the token entropy, {entropy:.4g}: of the images nothing"
            " has been learnt.",
            "Look at first_batch.png: are the pixels and the masks right? If they are, raise the"
            " learning rate or train longer.",
        )


def _off_the_band(run: Run) -> Iterator[tuple[str, str, str]]:
    for step, point in published.points_for(run):
        for name, expected, band in (
            ("loss", point.loss, published.LOSS_BAND),
            ("mlm_acc", point.accuracy, published.ACCURACY_BAND * point.accuracy),
        ):
            near = [
                value
                for at, value in run.series(name).finite
                if abs(at - step) <= 0.02 * step  # single batches are noisy
            ]
            if near and abs(statistics.median(near) - expected) > band:
                yield (
                    WARNING,
                    f"{name} at epoch {point.epoch} is {statistics.median(near):.4g}; a published"
                    f" run of this recipe had {expected:.4g} ({point.source}).",
                    "Compare the resolved config with the recipe's, the tokenizer's file with its"
                    " published sum, and the effective batch size.",
                )


def _overfitted(run: Run) -> Iterator[tuple[str, str, str]]:
    points = run.series("eval_loss").finite
    if len(points) < 3:
        return
    step, lowest = min(points, key=lambda each: each[1])
    last = points[-1][1]
    if lowest > 0 and last > _OVERFITTED * lowest:
        yield (
            WARNING,
            f"The held-out loss was lowest at step {step} ({lowest:.4g}) and is {last:.4g} now.",
            "Too many epochs for so few images: train shorter, add images, or regularise more.",
        )


def _features_stand_still(run: Run) -> Iterator[tuple[str, str, str]]:
    for name in run.metrics:
        if not (name.startswith("online_") and "knn" in name):
            continue
        points = run.series(name).finite
        if len(points) >= 3 and points[-1][1] <= points[0][1]:
            yield (
                WARNING,
                f"{name} is {points[-1][1]:.1%}, no better than at its start, {points[0][1]:.1%}.",
                "The loss may still fall: look at whether the labels have to do with what is in the"
                " images, and try another block.",
            )


def _unreadable(run: Run) -> Iterator[tuple[str, str, str]]:
    for remark in run.remarks:
        yield WARNING, f"{remark}.", "The rest of the report is made without it."


RULES: tuple[Callable[[Run], Iterator[tuple[str, str, str]]], ...] = (
    _nothing_logged,
    _not_finite,
    _broken_tokens,
    _collapsing_tokenizer,
    _predicts_few,
    _worse_than_before,
    _learns_nothing,
    _off_the_band,
    _starved,
    _skipped,
    _replaced,
    _overfitted,
    _features_stand_still,
    _unreadable,
)
