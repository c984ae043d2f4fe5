"""Image files as arrays, by Pillow: which formats are read, and what becomes of depth, alpha and EXIF orientation."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Mapping

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dnnlib.errors import UserError
from dnnlib.util import count

# All that is ever opened, the commonest first. Pillow knows more formats, some of which start other programs (EPS) or
# open whatever they wrap (IPTC).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
REMARKS = {  # what `decode_image` did with an image, or noticed
    "turned": "turned upright, as the EXIF orientation asks",
    "transparent": "with transparent pixels, put on black",
    "frames": "with several frames or pages, of which the first is taken",
}


def encode_png(pixels: np.ndarray, **options: int) -> bytes:
    """uint8 [H, W, C], C = 1 or 3, as an 8-bit PNG; options: Pillow's."""
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, format="PNG", **options)
    return file.getvalue()


def decode_image(data: bytes, where: str, found: list[str] | None = None) -> np.ndarray:
    """An image file -> uint8 [H, W, C], C = 1 for grey and 3 for everything else.

    Colours are converted to RGB, transparency is put on black, 16-bit grey is scaled to 8 bits, of several frames or
    pages the first is taken, and EXIF orientation is applied. Which of REMARKS hold is appended to `found`. Raises
    UserError, naming `where`.
    """
    found = [] if found is None else found
    try:
        with Image.open(io.BytesIO(data), formats=image_formats()[1]) as image:
            if _is_turned(image):
                ImageOps.exif_transpose(image, in_place=True)
                found.append("turned")
            pixels, is_transparent = _as_uint8(image)
            if is_transparent:
                found.append("transparent")
            with contextlib.suppress(Exception):  # damage after the first frame
                if getattr(image, "is_animated", False):
                    found.append("frames")
    except MemoryError:
        raise
    except Image.UnidentifiedImageError as exc:
        raise UserError(f"{where} is not an image of a kind that is read: {', '.join(image_formats()[1])}") from exc
    except Image.DecompressionBombError as exc:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(
            f"{where} has more than the {limit:,} pixels that Pillow allows: make it smaller first"
        ) from exc
    except Exception as exc:  # damage shows in many ways: OSError, SyntaxError, ValueError, zlib.error, struct.error
        raise UserError(f"{where} can't be decoded: {exc}") from exc
    return pixels


def _is_turned(image: Image.Image) -> bool:
    with contextlib.suppress(Exception):  # damaged EXIF data do not spoil the picture
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    return False


def _as_uint8(image: Image.Image) -> tuple[np.ndarray, bool]:
    """uint8 [H, W, C], and whether a pixel was transparent."""
    if image.mode == "F":
        raise ValueError("it has floating-point values, whose range is unknown")
    image.load()
    is_transparent = False
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion to 8 bits would clip instead of scaling
        deep = np.asarray(image).astype(np.int32)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("its grey values don't fit 16 bits, so their range is unknown")
        holes = deep == image.info.get("transparency", -1)
        pixels = np.where(holes, 0, (deep + 128) // 257).astype(np.uint8)
        is_transparent = bool(holes.any())
    else:
        mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        if image.has_transparency_data:
            image = image.convert({"La": "LA"}.get(image.mode, image.mode)).convert("RGBA")
            is_transparent = image.getchannel("A").getextrema()[0] != 255
            if is_transparent:
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        pixels = np.array(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(image.height, image.width, -1), is_transparent


def describe_remarks(remarks: Mapping[str, int]) -> list[str]:
    """'12 images turned upright, ...', a line for each of REMARKS that holds for some."""
    return [f"{count(remarks[name], 'image')} {text}" for name, text in REMARKS.items() if remarks.get(name)]


@functools.lru_cache(maxsize=1)
def image_formats() -> tuple[frozenset[str], tuple[str, ...]]:
    """File endings (lower case, with dot) and the names of the formats that are read."""
    warnings.filterwarnings("ignore", module="PIL")  # about odd files: what matters is an error
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # likewise
    endings = Image.registered_extensions()  # loads Pillow's plugins
    formats = tuple(name for name in FORMATS if name in endings.values())
    known = {*formats, "MPO"}  # several pictures in one JPEG file, opened as JPEG
    return frozenset(ending for ending, name in endings.items() if name in known), formats
