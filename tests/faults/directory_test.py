"""A run with a damaged or foreign file in its directory is refused by a line, or goes on whole."""

import pytest

from tests.faults import directory


def test_files_of_every_kind_of_damage(tmp_path):
    cases = [
        ("config.json", "another program's"),
        ("metrics.jsonl", "line without a step"),
        ("summary.json", "folder"),
        ("run.lock", "binary"),
    ]
    row = directory.try_all(cases, folder=tmp_path)
    assert row.failures == ()
    assert row.survived == row.tried == len(cases)
    assert row.note == "refused by one line 2, went on 2"


@pytest.mark.slow
def test_many_of_them(tmp_path):
    row = directory.soak(count=12, seed=1, folder=tmp_path)
    assert row.failures == ()
    assert row.survived == row.tried == 12


def test_a_lost_file_and_an_unexplained_end_are_failures(tmp_path, monkeypatch):
    def loses(values, *, workdir):
        path = directory.Path(workdir) / "summary.json"
        path.unlink(missing_ok=True)
        raise directory.ConfigError("--workdir: summary.json is not understood")

    (tmp_path / "summary.json").write_text("{}")
    monkeypatch.setattr(directory.jobs, "run", loses)
    with pytest.raises(AssertionError, match="replaced all the same"):
        directory.try_one(tmp_path, file="summary.json", damage="list")
    monkeypatch.setattr(directory.jobs, "run", lambda values, workdir: {"steps": 1})
    with pytest.raises(AssertionError):
        directory.try_one(tmp_path, file="summary.json", damage="list")
