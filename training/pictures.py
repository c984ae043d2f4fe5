"""Pictures for people: grids of images and sheets of distillation targets."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dnnlib.atomic import atomic_write

SMALLEST_SIDE = 48  # pixels: smaller images are enlarged by a whole factor, or nobody could see them
PART_GAP = 14  # pixels between the parts of a row


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255 as EDM writes it: 127.5 x + 128, clipped, fraction dropped."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def tile(images: Tensor, columns: int, scale: int | None = None, gap: int = 0) -> Image.Image:
    """Lays out uint8 images [N, C, H, W] (C = 1 or 3) row by row, enlarged `scale` times without smoothing."""
    count, _, height, width = images.shape
    scale = scale or max(1, -(-SMALLEST_SIDE // max(height, width)))
    rows = -(-count // columns)
    pixels = images.cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    high, wide = height * scale + gap, width * scale + gap
    sheet = np.full([rows * high - gap, columns * wide - gap, 3], 255, dtype=np.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * high, index % columns * wide
        sheet[top : top + height * scale, left : left + width * scale] = image
    return Image.fromarray(sheet)


def save_png(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """Writes a PNG in one piece."""
    with atomic_write(path) as file:
        picture.save(file, format="PNG")


def labelled_rows(
    rows: Sequence[Tensor],
    labels: Sequence[str],
    title: str = "",
    headings: Sequence[str] = (),
    scale: int | None = None,
) -> Image.Image:
    """Rows of uint8 images [n, C, H, W], each with a few words to its left, under a title.

    headings: words above equal parts of the rows, such as three for rows that hold three kinds of images.
    """
    strips = [_strip(row, max(len(headings), 1), scale) for row in rows]
    font_size, line = 15, 26
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 12 + max(int(ruler.textlength(label, font_size=font_size)) for label in labels)
    top = 6 + line * (bool(title) + bool(headings))
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (left + width + 6, top + sum(strip.height + 6 for strip in strips)), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((6, 6), title, fill="black", font_size=font_size)
    for index, heading in enumerate(headings):
        place = (left + index * (width + PART_GAP) // len(headings), top - line)
        draw.text(place, heading, fill="black", font_size=font_size)
    for strip, label in zip(strips, labels, strict=True):
        draw.text((6, top + strip.height // 2 - font_size // 2 - 2), label, fill="black", font_size=font_size)
        sheet.paste(strip, (left, top))
        top += strip.height + 6
    return sheet


def _strip(row: Tensor, parts: int, scale: int | None) -> Image.Image:
    """A row of images in equal parts, with more room between the parts than within them."""
    pieces = [tile(part, columns=len(part), scale=scale, gap=2) for part in row.chunk(parts)]
    strip = Image.new("RGB", (sum(piece.width + PART_GAP for piece in pieces) - PART_GAP, pieces[0].height), "white")
    for index, piece in enumerate(pieces):
        strip.paste(piece, (sum(before.width + PART_GAP for before in pieces[:index]), 0))
    return strip
