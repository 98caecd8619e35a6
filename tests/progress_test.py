"""One changing line on a terminal, few lines in a log, silence for what is quick."""

import io
import time

import pytest

from beit_jax import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (
            Terminal(),
            "\r\033[K[#####...............] reading: 25/100 images, 5.0 images/s, 15 s",
        ),
        (io.StringIO(), "reading: 80/100 images, 2.0 images/s, 10 s left\n"),
    ],
)
def test_counts(monkeypatch, stream, expected):
    clock = iter([0.0, 0.1, 5.0, 40.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(progress.sys, "stderr", stream)
    counter = progress.Progress(100, doing="reading")
    for done in (1, 25, 80):
        counter.update(done)
    counter.finish()
    assert expected in stream.getvalue()
    assert stream.getvalue().count("\n") == expected.count("\n")
    assert "1/100" not in stream.getvalue()
    if stream.isatty():
        assert stream.getvalue().endswith("\r\033[K")


def test_over_gives_every_item_and_counts_its_size(monkeypatch):
    clock = iter([0.0, 31.0, 62.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(progress.sys, "stderr", stream := io.StringIO())
    assert list(progress.over([[1, 2], [3]], unit="files", size=len)) == [[1, 2], [3]]
    assert stream.getvalue() == "2 files, 0.1 files/s\n3 files, 0.0 files/s\n"


def test_what_is_not_shown_says_nothing(monkeypatch):
    monkeypatch.setattr(progress, "_LOG_EVERY", 0.0)
    monkeypatch.setattr(progress.sys, "stderr", stream := io.StringIO())
    list(progress.over(range(3), shown=False))
    with progress.waiting("compiling", shown=False):
        time.sleep(0.01)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_waiting_says_how_long_and_ends_with_an_error(monkeypatch, stream):
    monkeypatch.setattr(progress, "_LOG_EVERY", 0.01)
    monkeypatch.setattr(progress, "_PATIENCE", 0.01)
    monkeypatch.setattr(progress.sys, "stderr", stream)

    def fail():
        deadline = time.monotonic() + 10
        while "so far" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), progress.waiting("compiling"):
        fail()
    said = stream.getvalue()
    assert "compiling: 0 s so far" in said
    assert said.endswith("\r\033[K" if stream.isatty() else "\n")
    time.sleep(0.03)
    assert stream.getvalue() == said  # the thread has ended
