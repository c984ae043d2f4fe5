import numpy as np
import torch
from PIL import Image

from helpers import golden
from training import pictures


def test_golden_uint8():
    data = golden("to_uint8.npz")
    assert np.array_equal(pictures.to_uint8(torch.from_numpy(data["x"])).numpy(), data["u8"])


def test_tile_places_every_image_enlarged(tmp_path):
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 1, 8, 8) * 40
    sheet = np.asarray(pictures.tile(images, columns=3, gap=2))
    assert sheet.shape == (2 * 50 - 2, 3 * 50 - 2, 3)
    for index in range(5):
        top, left = index // 3 * 50, index % 3 * 50
        assert (sheet[top : top + 48, left : left + 48] == index * 40).all()
    assert (sheet[50:, 100:] == 255).all() and (sheet[:, 48:50] == 255).all()


def test_rows_with_words_are_a_readable_png(tmp_path):
    rows = [torch.zeros(6, 3, 32, 32, dtype=torch.uint8)] * 2
    sheet = pictures.labelled_rows(rows, ["80 -> 16", "16 -> 0"], "A title", ["in", "target", "answer"])
    pictures.save_png(tmp_path / "sheet.png", sheet)
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert (pixels[:58] < 128).any(), "the words are there"
    assert (pixels == 0).sum() >= 12 * 64 * 64
