import shutil
from pathlib import Path

import pytest
import torch

from bitmill.recipes.method import build_recipe
from bitmill.workflows.comparison import run
from helpers.comparisons import in_this_process
from helpers.hostile import write_files
from helpers.workspace import Workspace, build_workspace


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_progress(monkeypatch):
    """On a busy machine even tiny work lasts long enough to report progress; stderr is checked here."""
    monkeypatch.setattr("bitmill.progress.terminal.SHOW_AFTER_S", 3600.0)


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Workspace:
    """Shared; not to be changed."""
    return build_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def workspace(built, tmp_path, monkeypatch) -> Workspace:
    """A copy to spoil, and the current folder."""
    monkeypatch.chdir(tmp_path)
    return built.copy(tmp_path)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run.run_grid, "__kwdefaults__", {**run.run_grid.__kwdefaults__, "run": in_this_process})


@pytest.fixture
def broken(workspace) -> Path:
    """A recipe that cannot be carried out: nothing would be quantized."""
    path = workspace.root / "broken.yaml"
    text = build_recipe("rtn").to_yaml()
    path.write_text(text.replace("name: rtn", "name: broken").replace("ignore: []", "ignore: ['*']"))
    return path


@pytest.fixture(scope="module")
def pristine(built, tmp_path_factory) -> Path:
    """The workspace with hostile files, for tests of bad arguments."""
    folder = tmp_path_factory.mktemp("hostile") / "pristine"
    shutil.copytree(built.root, folder)
    write_files(folder)
    return folder
