"""No row of the table is wrong in silence.

A file that is accepted gives its library's numbers, and comes back from a round trip through
import and export bit for bit; one that is refused is refused in one line and leaves nothing behind.
"""

import functools
import json
import pathlib
import re

import jax
import numpy as np
import pytest

import beit_jax
from beit_jax.config import ConfigError
from beit_jax.weights.__main__ import main
from tests.weights.peer_files.row import TOLERANCE, Accepted, Refused
from tests.weights.peer_files.table import ROWS

FACTS = ("heads", "layer_norm_epsilon", "normalization", "activation", "pooling")
# Fields of a Hugging Face config that no encoder, token head or classifier reads.
NOT_KEPT = (
    "add_fpn",
    "auxiliary_channels",
    "auxiliary_concat_input",
    "auxiliary_loss_weight",
    "auxiliary_num_convs",
    "initializer_range",
    "out_features",
    "out_indices",
    "pool_scales",
    "reshape_hidden_states",
    "semantic_loss_ignore_index",
    "stage_names",
    "use_auxiliary_head",
)
_LABELS = ("num_labels", "id2label", "label2id", "problem_type")
NOT_KEPT_OF = {
    "classify": ("vocab_size",),
    "pretrain": _LABELS,
    "encoder": ("vocab_size", *_LABELS),
    "segment": ("vocab_size",),
    # A UperNet's, which says again of itself what the whole says.
    "backbone": ("vocab_size", "architectures", "dtype", *_LABELS),
}
# But for these, which a segmentation model's head does read.
KEPT_OF = {("backbone", "add_fpn"), ("backbone", "out_indices")} | {
    ("segment", name)
    for name in NOT_KEPT
    if name.startswith("auxiliary_") or name in ("out_indices", "pool_scales", "use_auxiliary_head")
}
SUFFIXES = {"hugging_face": "", "hugging_face_beit": "", "timm": ".safetensors", "unilm": ".pth"}


def rows(kind: type) -> list:
    """The rows of one outcome, those outside of the fast part marked."""
    return [
        pytest.param(row, id=row.name, marks=() if row.fast else pytest.mark.slow)
        for row in ROWS.values()
        if isinstance(row.outcome, kind)
    ]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """A command in this process: its exit code, stdout and stderr."""
    capsys.readouterr()
    code = main(list(arguments))
    output = capsys.readouterr()
    return code, output.out, output.err


def imported(capsys, path: str, output: pathlib.Path, *flags: str) -> str:
    """Imports a file that must be accepted; returns what was printed."""
    code, out, err = run(capsys, "import", path, "--output", str(output), *flags)
    assert not err, err
    assert code == 0
    return out


def guessed(report: str) -> set[str]:
    """The facts that a report names as guessed."""
    facts = set(re.findall(r"^guessed: (\w+)", report, re.MULTILINE))
    assert facts <= set(FACTS)
    return facts


@functools.cache
def jitted(functions, masked: bool):
    """Models of the same sizes share their functions, so that few rows compile anything."""
    if masked:
        return jax.jit(lambda params, pixels, mask: functions.apply(params, pixels, mask=mask))
    return jax.jit(functions.apply)


def output_of(path: pathlib.Path, *, kind: str, expected) -> np.ndarray:
    """What our model gives for the peer's pixels: logits, or the tokens of an encoder."""
    if kind == "segment":
        segmenter = beit_jax.load_segmenter(path, dtype="float32")
        function = jitted(segmenter.functions, masked=False)
        pixels = expected["pixels"]
        return np.asarray(function(segmenter.params, pixels, variables=segmenter.variables))
    load = {
        "classify": beit_jax.load_classifier,
        "pretrain": beit_jax.load_masked_image_model,
        "encoder": beit_jax.load_encoder,
    }[kind]
    model = load(path, dtype="float32")
    masks = (expected["mask"],) if kind == "pretrain" else ()
    return np.asarray(
        jitted(model.functions, kind == "pretrain")(model.params, expected["pixels"], *masks)
    )


def relative_error(actual, expected) -> float:
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("row", rows(Accepted))
def test_accepted(row, peer, tmp_path, capsys, record_property):
    outcome = row.outcome
    built = peer.ask("build", row=row.name, folder=str(tmp_path))
    expected = np.load(built["expected"])
    native = tmp_path / "native"
    report = imported(capsys, built["path"], native, *outcome.flags)
    expected_guesses = {*outcome.guessed}
    if built["kind"] == "classify" and "activation" in expected_guesses:
        expected_guesses.add("pooling")
    assert guessed(report) == expected_guesses, report
    for pattern in outcome.says:
        assert re.search(pattern, report), report
    for name in outcome.lost:
        assert name in report
    error = relative_error(
        output_of(native, kind=built["kind"], expected=expected), expected["output"]
    )
    if outcome.wrong:
        assert error > 10 * TOLERANCE, "the guess is right, so the row proves nothing"
        if not outcome.right_flags:  # no flag can say it: the file is another model's
            return
        native = tmp_path / "right"
        imported(capsys, built["path"], native, *outcome.flags, *outcome.right_flags)
        error = relative_error(
            output_of(native, kind=built["kind"], expected=expected), expected["output"]
        )
    assert error <= TOLERANCE
    record_property("relative_error", error)  # `--junitxml` keeps it
    if outcome.format:
        round_trip(row, peer, tmp_path, capsys, native=native, built=built)


def round_trip(row, peer, tmp_path, capsys, *, native, built) -> None:
    """Exports to the format the file came in; the printed line must load it in the peer."""
    outcome = row.outcome
    again = tmp_path / f"again{SUFFIXES[outcome.format]}"
    code, out, err = run(
        capsys, "export", str(native), "--format", outcome.format, "--output", str(again)
    )
    assert not err, err
    assert code == 0
    [line] = re.findall(r"load it with\n  (.+)", out)
    answer = peer.ask("again", row=row.name, line=line, path=str(again))
    assert outcome.copies or not answer["tensors"], answer["tensors"]
    assert answer["error"] is None or answer["error"] <= TOLERANCE
    different = unexplained(answer["config"], outcome, kind=built["kind"])
    assert not different, different
    for name in outcome.data:
        assert answer["data"]["export"].get(name) == answer["data"]["peer"].get(name), name
    if outcome.format.startswith("hugging_face"):
        same_preprocessor(tmp_path / "model", again)


def unexplained(differences, outcome, *, kind: str) -> list:
    """Fields of a Hugging Face config that a round trip changed, and should not have.

    A difference is `[field, the peer's value, ours]`.
    """
    bad = []
    for field, theirs, ours in differences:
        if field in (*NOT_KEPT, *NOT_KEPT_OF.get(kind, ())) and (kind, field) not in KEPT_OF:
            continue
        if field == "backbone_config":
            inner = [(name, value, ours.get(name)) for name, value in theirs.items()]
            inner = [it for it in inner if it[1] != it[2]]
            bad += unexplained(inner, outcome, kind="backbone")
            continue
        if outcome.renamed and field in ("model_type", "architectures"):
            continue
        if dict(outcome.changed).get(field, _MISSING) == ours:
            continue
        # The published configs' 1e-12 is read as what the models were trained with.
        if field == "layer_norm_eps" and (theirs, ours) == (1e-12, 1e-6):
            continue
        if isinstance(theirs, list) and theirs == [ours, ours]:  # a square size
            continue
        bad.append((field, theirs, ours))
    return bad


_MISSING = object()


def same_preprocessor(before: pathlib.Path, after: pathlib.Path) -> None:
    """Every setting of the image processor is as it was."""
    name = "preprocessor_config.json"
    if not (before / name).exists():
        return
    theirs, ours = (json.loads((folder / name).read_text()) for folder in (before, after))
    different = [
        (key, theirs[key], ours.get(key)) for key in theirs if ours.get(key) != theirs[key]
    ]
    assert not different, different


@pytest.mark.parametrize("row", rows(Refused))
def test_refused(row, peer, tmp_path, capsys):
    outcome = row.outcome
    path = peer.ask("build", row=row.name, folder=str(tmp_path))["path"]
    before = sorted(tmp_path.rglob("*"))
    for command in (
        ["import", path, "--output", str(tmp_path / "native")],
        ["export", path, "--output", str(tmp_path / "out.pth"), "--format", "unilm"],
    ):
        code, _, err = run(capsys, *command, *outcome.flags)
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1, "the error is one line"
        assert re.search(outcome.line, err), err
        assert outcome.hint or "--allow" not in err
        assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"
    # Listing names and shapes is allowed; it must not fail otherwise than in one line.
    code, out, err = run(capsys, "inspect", path)
    assert (code == 0 and out) or (code == 2 and err.startswith("error: ") and err.count("\n") == 1)
    if not outcome.flags:
        with pytest.raises(ConfigError, match=outcome.line) as error:
            beit_jax.load_encoder(path)
        assert "\n" not in str(error.value)


def test_the_files_of_the_page_are_in_the_table():
    """Every class, suffix and file that docs/weights.md calls taken is in an accepted row."""
    page = pathlib.Path(__file__).parents[3] / "docs/weights.md"
    [section] = re.findall(r"### Which files are taken\n(.*?)\n###", page.read_text(), re.DOTALL)
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(lines) >= 3
    # Names of rows, and the classes and names of models that they are built of.
    rows = [
        f"{row.name} {getattr(row.build, 'keywords', {})}"
        for row in ROWS.values()
        if isinstance(row.outcome, Accepted)
    ]
    for line in lines:
        for named in re.findall(r"`([^`]+)`", line.split("|")[1]):
            stem = named.strip("_*…").removeprefix(".")
            assert any(stem in row for row in rows), named


def test_the_table_is_whole():
    """At least 60 rows, of both outcomes and in every container."""
    accepted = [row for row in ROWS.values() if isinstance(row.outcome, Accepted)]
    assert len(ROWS) >= 60
    assert len(accepted) >= 60
    assert len(ROWS) - len(accepted) >= 60
