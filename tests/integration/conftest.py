import pytest
import torch
from world import World, build_world


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_progress(monkeypatch):
    """On a busy machine even tiny work lasts long enough to report progress; stderr is checked here."""
    monkeypatch.setattr("bitmill.cli.progress.PATIENCE_S", 3600.0)


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> World:
    """Shared; not to be changed."""
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(built, tmp_path, monkeypatch) -> World:
    """A copy to spoil, and the current folder."""
    monkeypatch.chdir(tmp_path)
    return built.copy(tmp_path)
