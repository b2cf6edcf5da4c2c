"""Arrays -> one base64 text that a page carries: quantised, byte planes apart, deflated; `assets/neurons.js` reads it.

The layout, little-endian: the length of a JSON header (uint32), the header, then the sections that it names with type,
number of values and offset. A section of k-byte values holds all first bytes, then all second bytes, and so on: bytes
of one place are alike, which deflate makes use of. The whole is one zlib stream, which browsers name "deflate".
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Packed", "asinh_codes", "log_codes", "unpack"]

MISSING = 65_535
_TYPES: dict[str, np.dtype[Any]] = {kind: np.dtype(f"<{kind}") for kind in ("u1", "u2", "u4")}


class Packed:
    """Sections under construction, and the header that describes them."""

    def __init__(self) -> None:
        self.header: dict[str, Any] = {"sections": {}}
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, name: str, values: NDArray[Any], kind: str) -> None:
        """Add a section of unsigned integers of 1, 2 or 4 bytes ("u1", "u2", "u4"), flattened in C order.

        Raises:
            ValueError: If a value does not fit.
        """
        flat = np.ascontiguousarray(values).ravel()
        if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < 1 << (8 * int(kind[1])):
            raise ValueError(f"{name} has values outside {kind}: {flat.min()} to {flat.max()}")
        planes = flat.astype(_TYPES[kind]).view(np.uint8).reshape(-1, int(kind[1])).T
        self.header["sections"][name] = {"type": kind, "length": int(flat.size), "offset": self._size}
        self._parts.append(planes.tobytes())
        self._size += planes.size

    def text(self) -> str:
        """Return everything as base64."""
        header = json.dumps(self.header, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")
        stream = zlib.compressobj(6)
        parts = [struct.pack("<I", len(header)), header, *self._parts]
        packed = b"".join([*(stream.compress(part) for part in parts), stream.flush()])
        return base64.b64encode(packed).decode("ascii")


def unpack(text: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the header and the sections of what `Packed.text` returned: what the page's script sees.

    Example:
        >>> packed = Packed()
        >>> packed.add("count", np.array([1, 300]), "u2")
        >>> unpack(packed.text())[1]["count"].tolist()
        [1, 300]
    """
    data = zlib.decompress(base64.b64decode(text))
    (length,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + length])
    found = {}
    for name, section in header["sections"].items():
        width, start = int(section["type"][1]), 4 + length + section["offset"]
        planes = np.frombuffer(data, np.uint8, section["length"] * width, start).reshape(width, -1)
        found[name] = np.ascontiguousarray(planes.T).view(_TYPES[section["type"]]).ravel()
    return header, found


def log_codes(values: NDArray[np.floating], levels: int) -> tuple[NDArray[np.uint16], float, float]:
    """Return 16-bit codes of values >= 0, evenly apart in their logarithm, and the lowest and highest of these.

    Code 0 is the value 0, 65535 is none (NaN, infinite); code k of 1..65534 stands for
    `exp(low + (k - 1) / 65533 * (high - low))`. With fewer levels, codes are further apart and pack better.

    Args:
        values: Any shape.
        levels: How many different codes are used.

    Raises:
        ValueError: If a value is negative.

    Example:
        >>> codes, low, high = log_codes(np.array([0.0, 1.0, 10.0, 1000.0, np.nan]), 65_534)
        >>> codes.tolist(), low, round(high, 4)
        ([0, 1, 21845, 65534, 65535], 0.0, 6.9078)
    """
    finite = np.isfinite(values)
    if (values[finite] < 0).any():
        raise ValueError("a logarithmic scale needs values >= 0")
    positive = finite & (values > 0)
    logs = np.log(values, out=np.zeros(values.shape), where=positive)
    low = float(logs[positive].min()) if positive.any() else 0.0
    high = float(logs[positive].max()) if positive.any() else 0.0
    codes = 1 + _steps((logs - low) / ((high - low) or 1.0), levels)
    return np.where(positive, codes, np.where(finite, 0, MISSING)).astype(np.uint16), low, high


def asinh_codes(values: NDArray[np.floating], levels: int) -> tuple[NDArray[np.uint16], float, float, float]:
    """Return 16-bit codes of values of either sign, the lowest and highest on their scale, and its step.

    Code k of 1..65534 stands for `step * sinh(low + (k - 1) / 65533 * (high - low))`, linear within about a step of
    zero and logarithmic beyond; 65535 is none. A step is 1e-8 of the largest magnitude.

    Example:
        >>> codes, low, high, step = asinh_codes(np.array([-2.0, 0.002, 2.0, np.inf]), 65_534)
        >>> codes.tolist(), float(f"{step * np.sinh(high):.4g}")
        ([1, 53692, 65534, 65535], 2.0)
    """
    finite = np.isfinite(values)
    known = np.where(finite, values, 0.0)
    step = 1e-8 * float(np.abs(known).max(initial=0.0)) or 1.0
    scaled = np.arcsinh(known / step)
    low = float(scaled[finite].min()) if finite.any() else 0.0
    high = float(scaled[finite].max()) if finite.any() else 0.0
    codes = 1 + _steps((scaled - low) / ((high - low) or 1.0), levels)
    return np.where(finite, codes, MISSING).astype(np.uint16), low, high, step


def _steps(share: NDArray[np.floating], levels: int) -> NDArray[np.int64]:
    """Return the share of 0..1 as a whole number of 0..65533, one of `levels` of them."""
    step = 65_533 / (levels - 1)
    return np.rint(np.rint(np.clip(share, 0.0, 1.0) * (levels - 1)) * step).astype(np.int64)
