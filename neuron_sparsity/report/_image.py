"""A matrix -> a small PNG as a data URI, in cividis, a colour map that colour-blind readers read as well.

Written with zlib alone: the pixels of a palette image are the quantised values themselves, one byte each.
"""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["CIVIDIS", "NEVER_COLOUR", "colour", "gradient", "png_data_uri"]

# Ten evenly spaced colours of cividis (Nuñez, Anderton, Renslow 2018); straight lines join them.
CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")
NEVER_COLOUR = "#d9480f"
_LEVELS = 254  # palette entry 255 is the colour of what is marked, 254 that of what is unknown
_MARKED, _UNKNOWN = 255, 254


def _rgb(colour_text: str) -> tuple[int, int, int]:
    return int(colour_text[1:3], 16), int(colour_text[3:5], 16), int(colour_text[5:7], 16)


def colour(share: float) -> str:
    """Return the cividis colour of `share` in 0..1, as `#rrggbb`."""
    anchors = np.array([_rgb(anchor) for anchor in CIVIDIS], dtype=float)
    at = float(np.clip(share, 0.0, 1.0)) * (len(anchors) - 1)
    low = min(int(at), len(anchors) - 2)
    mixed = anchors[low] + (anchors[low + 1] - anchors[low]) * (at - low)
    red, green, blue = (round(channel) for channel in mixed.tolist())
    return f"#{red:02x}{green:02x}{blue:02x}"


def gradient() -> str:
    """Return the CSS colour stops of a legend bar, from low to high."""
    return ",".join(CIVIDIS)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_data_uri(
    values: NDArray[np.floating], *, low: float, high: float, marked: NDArray[np.bool_] | None = None
) -> str:
    """Return `values` [row, column] as `data:image/png;base64,...`, one pixel a value.

    Args:
        values: What is drawn; NaN and infinity are drawn grey.
        low: Value of the darkest colour.
        high: Value of the brightest colour; > `low`.
        marked: True where the pixel takes the colour `NEVER_COLOUR` instead.

    Raises:
        ValueError: If `values` is no matrix, is empty, or `high` is not above `low`.
    """
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values must be a matrix with at least one element, got shape {values.shape}")
    if not high > low:
        raise ValueError(f"high must be above low, got low={low}, high={high}")
    finite = np.isfinite(values)
    share = np.clip((np.where(finite, values, low) - low) / (high - low), 0.0, 1.0)
    pixels = np.round(share * (_LEVELS - 1)).astype(np.uint8)
    pixels[~finite] = _UNKNOWN
    if marked is not None:
        pixels[marked] = _MARKED
    palette = [_rgb(colour(level / (_LEVELS - 1))) for level in range(_LEVELS)] + [(128, 128, 128), _rgb(NEVER_COLOUR)]
    rows, columns = pixels.shape
    scanlines = np.concatenate([np.zeros((rows, 1), np.uint8), pixels], axis=1).tobytes()
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            _chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", bytes(channel for entry in palette for channel in entry)),
            _chunk(b"IDAT", zlib.compress(scanlines, 9)),
            _chunk(b"IEND", b""),
        )
    )
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
