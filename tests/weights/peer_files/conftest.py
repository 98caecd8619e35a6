"""The process of the peers, one for each worker of the tests."""

import importlib.util

import pytest

from tests.weights.peer_files.process import Peer


@pytest.fixture(scope="session")
def peer(tmp_path_factory):
    """A running process of the peers' libraries."""
    # Looked for and not imported: this process may hold TensorFlow.
    for library in ("torch", "timm", "transformers"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"the peer {library} is not installed")
    running = Peer(tmp_path_factory.mktemp("peer") / "log")
    yield running
    running.close()
