"""Pictures of a folder: labels, parts that stay as they are, and one sentence for every bad file."""

from __future__ import annotations

import pytest
import torch

from bitmill.data.pictures import PictureWindows, checked_pictures
from bitmill.errors import CalibrationError

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def processor():
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 8, "width": 8})


@pytest.fixture
def folder(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(20):
            Image.new("RGB", (9, 7), (number, 2, 3)).save(tmp_path / label / f"{number}.png")
    return tmp_path


def test_parts_are_disjoint_and_stay_as_they_are(folder, processor):
    windows = PictureWindows(str(folder), processor)
    parts = [windows.domains(split, 0, None) for split in ("eval", "choose", "calib")]
    assert sum(sum(part.values()) for part in parts) == 40
    before = windows._part("eval")
    Image.new("RGB", (9, 7)).save(folder / "cat" / "new.png")
    after = PictureWindows(str(folder), processor)._part("eval")
    assert set(before["cat"]) <= set(after["cat"])


def test_pictures_of_every_label_are_held_out(folder, processor):
    windows = PictureWindows(str(folder), processor)
    counts = windows.domains("all", 0, 7)
    assert counts == {"cat": 4, "dog": 3}
    pictures = windows.held_out("all", 0, 7)
    assert pictures.shape == (7, 3, 8, 8)
    assert torch.equal(windows.calibration(5, 0, 3), windows.calibration(5, 0, 3))
    with pytest.raises(CalibrationError, match="pictures to calibrate on"):
        windows.calibration(41, 0, 0)


def test_pictures_without_subfolders_have_no_labels(tmp_path, processor):
    Image.new("RGB", (9, 7)).save(tmp_path / "one.png")
    (tmp_path / "README.txt").write_text("no picture", encoding="utf-8")
    windows = PictureWindows(str(tmp_path), processor)
    assert windows.domains("all", 0, None) == {}
    assert windows.held_out("all", 0, None).shape[0] == 1


@pytest.mark.parametrize(
    ("mode", "size", "name"),
    [
        ("L", (5, 5), "grey.png"),
        ("CMYK", (5, 5), "print.jpg"),
        ("RGBA", (5, 5), "alpha.png"),
        ("P", (5, 5), "palette.gif"),
        ("I;16", (5, 5), "deep.png"),
        ("1", (5, 5), "bits.png"),
        ("RGB", (1, 1), "dot.png"),
    ],
)
def test_other_kinds_of_pictures_are_converted(mode, size, name, tmp_path, processor):
    Image.new(mode, size).save(tmp_path / name)
    assert PictureWindows(str(tmp_path), processor).held_out("all", 0, None).shape == (1, 3, 8, 8)


def test_the_first_frame_of_several_is_read(tmp_path, processor):
    frames = [Image.new("RGB", (5, 5), (value, 0, 0)) for value in (255, 0)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    moving, still = PictureWindows(str(tmp_path), processor).read(sorted(tmp_path.glob("*.gif")))
    assert torch.equal(moving, still)


def test_bad_files_are_named(tmp_path, processor):
    def refused(name: str) -> str:
        with pytest.raises(CalibrationError) as error:
            PictureWindows(str(tmp_path), processor).held_out("all", 0, None)
        (tmp_path / name).unlink()
        return str(error.value)

    (tmp_path / "text.png").write_text("hello", encoding="utf-8")
    assert "text.png holds no picture" in refused("text.png")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 255, (50, 50, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    assert "cut.png holds no picture" in refused("cut.png")
    Image.new("RGB", (20_000, 3)).save(tmp_path / "wide.png")
    assert "20000 x 3 pixels" in refused("wide.png")
    (tmp_path / "empty.jpg").touch()
    assert "empty.jpg holds no picture" in refused("empty.jpg")


@pytest.mark.parametrize("source", ["pydoc", ("one", "two")])
def test_a_text_is_no_folder(source, processor):
    with pytest.raises(CalibrationError, match="reads pictures"):
        PictureWindows(source, processor)


def test_a_folder_without_pictures(tmp_path, processor):
    with pytest.raises(CalibrationError, match="holds no picture"):
        PictureWindows(str(tmp_path), processor)


@pytest.mark.parametrize(
    "pictures",
    [torch.zeros(2, 3), torch.zeros(1, 3, 4, 4, dtype=torch.int64), torch.full((1, 3, 4, 4), torch.nan)],
)
def test_tensors_that_are_no_pictures(pictures):
    with pytest.raises(CalibrationError):
        checked_pictures(pictures)
