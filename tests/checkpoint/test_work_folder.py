"""One process at a time writes a folder, and a folder is changed by one rename, whatever the moment it stops."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest
from xxhash import xxh3_128_hexdigest

import bitmill
from bitmill import files
from bitmill.checkpoint import reader, work_folder
from bitmill.checkpoint.contents import read_json
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.record import check_recordable, record_calibration, record_measurement
from bitmill.checkpoint.work_folder import FolderLock, WorkFolder, changed_folder, check_new, partial_folder
from bitmill.errors import CheckpointError, OutputError
from bitmill.kv.calibration_file import KVCalibration
from bitmill.kv.scheme import KV_METHODS
from bitmill.workflows.load import load_tokenizer
from helpers.moments import fill_disk, in_child, interrupt, killed_at, stopped_at
from helpers.workspace import snapshot


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch):
    """What a killed process wrote is there without; tests/integration/test_power_cut.py is about flushes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def measurement(seqlen: int = 16) -> dict:
    return {"text": "t", "split": "eval", "seqlen": seqlen, "windows": 2, "tokens": 30, "perplexity": 9.0}


def record(folder: Path, seqlen: int = 16) -> None:
    record_measurement(folder, measurement(seqlen))


def calibrate(folder: Path, files: dict | None = None) -> None:
    method = KV_METHODS.get("per_token")()
    kv = {"method": method.to_dict(), "bits_per_element": 4.5, "size_bytes": 0, "calibration": None}
    record_calibration(folder, KVCalibration(method, ()), kv, files)


def rewrite(folder: Path) -> None:
    """Change a folder as the others do, quicker."""
    with changed_folder(folder) as new:
        files.write_json(new / "report.json", {})
        files.write_text(new / "added", "words")


CHANGES = {"measurement": record, "calibration": calibrate}


@pytest.fixture(params=CHANGES)
def change(request):
    return CHANGES[request.param]


def changed(folder: Path, change, tmp_path: Path) -> dict[str, bytes]:
    """The bytes of a folder after a change."""
    other = shutil.copytree(folder, tmp_path / "other" / "out")
    change(other)
    return snapshot(other)


def test_unchanged_files_are_the_same(folder, change):
    shard = next(folder.glob("*.safetensors"))
    before, state = shard.stat().st_ino, snapshot(folder)
    change(folder)
    assert shard.stat().st_ino == before
    assert shard.stat().st_nlink == 1
    assert snapshot(folder) != state
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    open_checkpoint(folder)


@pytest.fixture
def small(tmp_path) -> Path:
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for name in ("shard", "report.json", "sub/file"):
        (folder / name).write_text(name)
    return folder


def check_killed(folder: Path, change, moments: range, tmp_path: Path) -> None:
    before, after = snapshot(folder), changed(folder, change, tmp_path)
    seen = []
    for moment in moments:
        here = shutil.copytree(folder, tmp_path / str(moment) / "out")
        if not killed_at(moment, lambda: change(here)):  # noqa: B023
            break
        seen.append(snapshot(here))
        assert seen[-1] in (before, after)
        change(here)  # what was left is in nobody's way
        assert snapshot(here) == after
        assert [path.name for path in here.parent.iterdir()] == ["out"]
    assert before in seen
    assert after in seen


def test_killed_after_every_step(small, tmp_path):
    check_killed(small, rewrite, range(1, 99), tmp_path)


def test_killed_while_recorded(folder, change, tmp_path):
    check_killed(folder, change, range(20, 99, 18), tmp_path)


@pytest.mark.parametrize("act", [interrupt, fill_disk])
def test_stopped_after_every_step(act, small, tmp_path):
    before, after = snapshot(small), changed(small, rewrite, tmp_path)
    for moment in range(1, 99):
        here = shutil.copytree(small, tmp_path / str(moment) / "out")
        with stopped_at(moment, act) as stop, suppress(KeyboardInterrupt, OutputError):
            rewrite(here)
        assert snapshot(here) in (before, after)
        if not stop.reached:
            break
        rewrite(here)
        assert snapshot(here) == after
        assert [path.name for path in here.parent.iterdir()] == ["out"]


def test_recorded_at_once(folder):
    lengths = range(16, 22)
    threads = [threading.Thread(target=record, args=(folder, seqlen)) for seqlen in lengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    measured = open_checkpoint(folder).report["measured"]
    assert sorted(entry["seqlen"] for entry in measured) == list(lengths)


def test_folder_changed_while_measured(folder):
    files_before = check_recordable(folder)
    calibrate(folder)
    with pytest.raises(CheckpointError, match="changed while it was measured"):
        record_measurement(folder, measurement(), files_before)
    record_measurement(folder, measurement(), check_recordable(folder))


def test_folder_changed_while_calibrated(folder):
    files_before = check_recordable(folder)
    calibrate(folder)
    with pytest.raises(CheckpointError, match="changed while it was measured"):
        calibrate(folder, files_before)
    calibrate(folder, check_recordable(folder))


def test_without_exchange(small, tmp_path, monkeypatch):
    """Where the system cannot exchange names there are two renames, and the next writer undoes the first."""
    before, after = snapshot(small), changed(small, rewrite, tmp_path)

    def missing(*names):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(files, "_exchange", missing)
    for moment in range(1, 99):
        here = shutil.copytree(small, tmp_path / str(moment) / "out")
        if not killed_at(moment, lambda: rewrite(here)):  # noqa: B023
            break
        if not here.exists():
            for read in (open_checkpoint, bitmill.load, load_tokenizer):
                with pytest.raises(CheckpointError, match=r"restore the earlier version.*mv .*partial/previous"):
                    read(here)
        with closing(WorkFolder(here)):
            assert snapshot(here) in (before, after)
    rewrite(small)
    assert snapshot(small) == after


def test_links_out_of_the_folder(folder, tmp_path):
    """The copy that is changed is one level deeper than the folder, where relative links would dangle."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes").write_text("words")
    (folder / "recipe.yaml").rename(tmp_path / "elsewhere" / "recipe.yaml")
    (folder / "recipe.yaml").symlink_to("../elsewhere/recipe.yaml")
    (folder / "more").symlink_to("../elsewhere")
    (folder / "self").symlink_to(".")
    (folder / "card").symlink_to("README.md")
    (folder / "nothing").symlink_to("../nothing")
    with changed_folder(folder) as new:
        open_checkpoint(new, digests="all")
        assert (new / "more" / "notes").read_text() == "words"
    open_checkpoint(folder, digests="all")
    assert (folder / "recipe.yaml").samefile(tmp_path / "elsewhere" / "recipe.yaml")
    assert (folder / "more").samefile(tmp_path / "elsewhere")
    assert os.readlink(folder / "card") == "README.md"
    assert os.readlink(folder / "nothing") == "../nothing"


def test_without_hard_links(folder, change, tmp_path, monkeypatch):
    after = changed(folder, change, tmp_path)

    def refuse(*names, **options):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    change(folder)
    assert snapshot(folder) == after


def test_through_a_link(folder, tmp_path, change):
    link = tmp_path / "latest"
    link.symlink_to(folder)
    change(link)
    assert link.is_symlink()
    assert snapshot(link) == snapshot(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "out"]


@pytest.mark.parametrize("below", ["", "sub"])
def test_current_folder_refused(folder, below, monkeypatch):
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder / below)
    with pytest.raises(OutputError, match="current folder"):
        record(folder)


def test_unfinished_run_kept(folder):
    work = partial_folder(folder)
    (work / "model").mkdir(parents=True)
    for name in ("lock", "journal.json", "model/shard"):
        (work / name).write_text("precious")
    with pytest.raises(OutputError, match="unfinished run"):
        record(folder)
    assert (work / "model" / "shard").exists()


# -- the lock -------------------------------------------------------------------------------------------------


def spoil_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def spoil_hard_link(path: Path, target: Path) -> None:
    os.link(target, path)


def spoil_fifo(path: Path, target: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [spoil_link, spoil_hard_link, spoil_fifo])
def test_lock_is_no_link(spoil, tmp_path):
    (tmp_path / "precious").write_text("bytes")
    (tmp_path / "work").mkdir()
    spoil(tmp_path / "work" / "lock", tmp_path / "precious")
    with pytest.raises(OutputError, match="link"):
        FolderLock(tmp_path / "work")
    assert (tmp_path / "precious").read_text() == "bytes"


@pytest.mark.parametrize("write", [files.write_text, lambda path, text: files.write_tensors(path, {})])
@pytest.mark.parametrize("name", ["file", "file.tmp"])
def test_links_are_not_written_through(write, name, tmp_path):
    (tmp_path / "precious").write_text("bytes")
    (tmp_path / name).symlink_to(tmp_path / "precious")
    write(tmp_path / "file", "words")
    assert (tmp_path / "precious").read_text() == "bytes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "precious"]
    assert not (tmp_path / "file").is_symlink()


def test_work_folder_is_no_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="no work folder"):
        WorkFolder(tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_folder_of_others_kept(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("words")
    with pytest.raises(OutputError, match="no work folder"):
        WorkFolder(tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").exists()


def test_second_process_names_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("bitmill.checkpoint.work_folder._START_S", 0.0)

    def second(message: str) -> None:
        for attempt in (lambda: check_new(tmp_path / "out"), lambda: WorkFolder(tmp_path / "out", 0.0)):
            with pytest.raises(OutputError, match=message) as caught:
                attempt()
            assert "delete" not in str(caught.value)

    with closing(WorkFolder(tmp_path / "out")):
        assert in_child(lambda: second(rf"Another process \({os.getppid()}\) is writing")) == 0
        (tmp_path / "out.partial" / "lock").write_bytes(b"\xff")
        second("Another process is writing")
    assert not (tmp_path / "out.partial").exists()


def test_dead_process_holds_nothing(tmp_path):
    def begin() -> None:
        WorkFolder(tmp_path / "out").model.mkdir()
        interrupt()

    assert in_child(begin) == 1
    check_new(tmp_path / "out")  # nothing in it could be resumed
    with closing(WorkFolder(tmp_path / "out")) as work:
        (work.path / "journal.json").write_text("{}")
    with pytest.raises(OutputError, match="--resume"):
        check_new(tmp_path / "out")


def test_lock_of_a_removed_folder(tmp_path):
    """Who waited for a lock file that is gone by then locks a new one."""
    first = WorkFolder(tmp_path / "out")
    waiting = threading.Thread(target=lambda: WorkFolder(tmp_path / "out", 9.0).close())
    waiting.start()
    first.remove()
    waiting.join(9)
    assert not waiting.is_alive()
    assert not (tmp_path / "out.partial").exists()


def test_work_folder_removed_meanwhile(tmp_path, monkeypatch):
    """A process that removes its work folder while another one locks it is in nobody's way."""
    opened = work_folder._open_lock
    removed = []

    def open_late(path: Path) -> int:
        if not removed:
            removed.append(path.parent.rmdir())
        return opened(path)

    monkeypatch.setattr(work_folder, "_open_lock", open_late)
    with closing(WorkFolder(tmp_path / "out", 9.0)) as work:
        assert work.path.exists()
    assert work_folder.is_work_folder(tmp_path / "gone")


def test_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(work_folder.fcntl, "flock", refuse)
    with pytest.raises(OutputError, match="cannot be written"):
        WorkFolder(tmp_path / "out", 0.0)
    check_new(tmp_path / "out")


def test_failed_change_leaves_folder(folder):
    before = snapshot(folder)
    with suppress(CheckpointError), changed_folder(folder) as new:
        (new / "report.json").unlink()
        raise CheckpointError("No.")
    assert snapshot(folder) == before
    assert not partial_folder(folder).exists()


def test_first_of_several_writers_wins(tmp_path):
    texts = [str(number) * 9999 for number in range(8)]
    threads = [threading.Thread(target=files.create_text, args=(tmp_path / "file", text)) for text in texts]
    for thread in threads:
        thread.start()
        thread.join()
    assert (tmp_path / "file").read_text() == texts[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_reader_sees_no_mixture(folder, monkeypatch):
    """A folder that is changed while it is opened is opened again."""
    seen = []

    def read(path: Path, name: str) -> dict:
        document = read_json(path, name)
        if not seen:
            seen.append(name)
            calibrate(folder)
        return document

    monkeypatch.setattr(reader, "read_json", read)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.report["kv"]["method"]
    assert checkpoint.record["kv.safetensors"]


def test_digests_of_a_folder_that_changes(folder, monkeypatch):
    """Digests of one folder are not compared with the files of the next."""
    compare, calls = reader.check_digests, []

    def change_first(path: Path, record: dict, but: tuple = ()) -> None:
        if not calls:
            with changed_folder(folder) as new:
                files.write_text(new / "recipe.yaml", (new / "recipe.yaml").read_text().swapcase())
                report = read_json(new, "report.json")
                report["files"]["recipe.yaml"] = files.file_record(new / "recipe.yaml")
                files.write_json(new / "report.json", report)
        calls.append(path)
        compare(path, record, but)

    monkeypatch.setattr(reader, "check_digests", change_first)
    open_checkpoint(folder, digests="all")
    assert len(calls) == 2


def test_folder_that_never_rests(folder, monkeypatch):
    numbers = iter(range(999))
    monkeypatch.setattr(reader, "_identity", lambda path: next(numbers))
    with pytest.raises(CheckpointError, match="was replaced 5 times"):
        open_checkpoint(folder)


@pytest.mark.parametrize("size", [0, 5, files._CHUNK_BYTES, files._CHUNK_BYTES + 7])
def test_digest_of_chunks(size, tmp_path):
    (tmp_path / "file").write_bytes(b"abcdefg" * (size // 7) + b"x" * (size % 7))
    assert files.xxh3(tmp_path / "file") == xxh3_128_hexdigest((tmp_path / "file").read_bytes())
