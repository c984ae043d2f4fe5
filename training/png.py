"""The PNG files that data sets are full of, decoded many at a time.

Opening a small image with Pillow takes several times as long as decompressing it, and with several threads Python's own
lock makes that worse. Here the chunks of the plainest kind of PNG (8 bits, grey or RGB, not interlaced, which is what
dataset_tool.py and generate.py write) are found by hand, and Pillow's decoder gets the rows of all images as one tall
image. Whatever is unusual or damaged is left to Pillow as a whole.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PIXELS = 1 << 24  # of one image or of several together: Pillow's own limits hold for larger ones

_MODES = {0: ("L", 1), 2: ("RGB", 3)}  # by PNG's colour type: Pillow's name, bytes of a pixel
_IHDR = struct.Struct(">8sI4sIIBBBBB")
_CHUNK = struct.Struct(">I4s")
_CRC = struct.Struct(">I")


def decode_plain(files: Sequence[bytes]) -> np.ndarray | None:
    """uint8 [N, H, W, C] of N >= 1 files; None unless all are whole, plain PNG files of one size and kind."""
    try:
        headers = {_header(data) for data in files}
        header = headers.pop()
        if header is None or headers:
            return None
        width, height, colour = header
        mode, channels = _MODES[colour]
        if not 0 < width * (height + 1) * len(files) <= MAX_PIXELS:
            return None
        length = height * (1 + width * channels)  # a row begins with the number of its filter
        rows = [_inflate(_image_data(data), length) for data in files]
        # Filters refer to the row above, which is zero for the first row of an image: hence a blank row before each.
        blank = bytes(1 + width * channels)
        stream = zlib.compress(blank + blank.join(rows), level=0)
        tall = Image.frombytes(mode, (width, (height + 1) * len(files)), stream, "zip", mode)
    except (struct.error, ValueError, KeyError, OSError, zlib.error):
        return None
    pixels = np.frombuffer(tall.tobytes(), dtype=np.uint8)
    return pixels.reshape(len(files), height + 1, width, channels)[:, 1:]


def _header(data: bytes) -> tuple[int, int, int] | None:
    """(width, height, colour type); None for anything but a plain PNG file."""
    signature, length, kind, width, height, depth, colour, *ways = _IHDR.unpack_from(data)
    plain = signature == SIGNATURE and length == 13 and kind == b"IHDR" and depth == 8 and ways == [0, 0, 0]
    return (width, height, colour) if plain else None


def _image_data(data: bytes) -> bytes:
    """The compressed pixels. Raises ValueError unless every chunk is whole, and of a kind that does not alter them."""
    parts: list[bytes] = []
    position = len(SIGNATURE)
    while True:
        length, kind = _CHUNK.unpack_from(data, position)
        end = position + _CHUNK.size + length
        if zlib.crc32(data[position + 4 : end]) != _CRC.unpack_from(data, end)[0]:
            raise ValueError("a chunk is damaged")
        if kind == b"IDAT":
            parts.append(data[position + _CHUNK.size : end])
        elif kind == b"IEND":
            return parts[0] if len(parts) == 1 else b"".join(parts)
        elif kind == b"acTL":
            raise ValueError("an animation")
        position = end + _CRC.size


def _inflate(compressed: bytes, length: int) -> bytes:
    """Exactly `length` bytes. Raises ValueError for a stream that holds less or more, whatever it claims."""
    stream = zlib.decompressobj()
    rows = stream.decompress(compressed, length)
    if len(rows) != length or (not stream.eof and (stream.decompress(stream.unconsumed_tail, 1) or not stream.eof)):
        raise ValueError("not the number of pixels that the header says")
    return rows
