"""Data -> text that is safe to put on a page: escaping, visible tokens, JSON for `<script>`, sensible digits.

Everything that comes from data passes through here. Fragments are `markupsafe.Markup`, whose `format` escapes each
argument that is no Markup itself, so that forgetting to escape is not possible by accident.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup

__all__ = [
    "count",
    "duration",
    "inert",
    "interval",
    "join",
    "number",
    "percent",
    "percent_of",
    "plain",
    "replacement",
    "script_json",
    "signed",
    "target",
    "visible",
    "visible_token",
]

NBSP = "\u00a0"
MISSING = "n/a"
_CONTROLS = [
    "NUL",
    "SOH",
    "STX",
    "ETX",
    "EOT",
    "ENQ",
    "ACK",
    "BEL",
    "BS",
    "HT",
    "LF",
    "VT",
    "FF",
    "CR",
    "SO",
    "SI",
    "DLE",
    "DC1",
    "DC2",
    "DC3",
    "DC4",
    "NAK",
    "SYN",
    "ETB",
    "CAN",
    "EM",
    "SUB",
    "ESC",
    "FS",
    "GS",
    "RS",
    "US",
]
_NAMED = {"\n": "↵", "\t": "⇥", "\x7f": "⟨DEL⟩"}


def visible(text: object) -> str:
    r"""Return `text` with every invisible or direction-changing character as a visible symbol.

    A newline becomes ↵, a tab ⇥, another control character its name; what has none, lone surrogates and
    bidirectional overrides among them, becomes its number. Spaces stay. The Unicode pictures of control characters
    are not used: common fonts lack them.

    Example:
        >>> visible("a\nb\x00")
        'a↵b⟨NUL⟩'
        >>> visible("\u202e")
        '⟨U+202E⟩'
    """
    return "".join(_visible_character(character) for character in str(text))


def _visible_character(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if ord(character) < 0x20:
        return f"⟨{_CONTROLS[ord(character)]}⟩"
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} and character != "\u200d":
        return _number_of(character)
    return character


def interval(low: float | None, high: float | None) -> str:
    """Return an interval in words; one that the data do not close (None or infinite) has no end on that side.

    Example:
        >>> interval(0.25, 1.5), interval(0.25, None), interval(float("-inf"), 1.5)
        ('0.250 to 1.50', '0.250 or more', '1.50 or less')
    """
    ends = [None if end is None or not math.isfinite(end) else number(end) for end in (low, high)]
    if ends[0] is None:
        return "any value" if ends[1] is None else f"{ends[1]} or less"
    return f"{ends[0]} or more" if ends[1] is None else f"{ends[0]} to {ends[1]}"


def visible_token(token: object) -> str:
    r"""Return a token as token views show it: its spaces as ·, the rest as in `visible`; an empty token is ∅.

    Other spaces become their number, and so does what shows nothing by itself, such as a joiner or an accent.

    Example:
        >>> visible_token(" the\n"), visible_token("a\u00a0"), visible_token("\u200d")
        ('·the↵', 'a⟨U+00A0⟩', '⟨U+200D⟩')
    """
    text = visible(token)
    if all(character == "\u200d" or unicodedata.category(character) == "Mn" for character in text):
        return "".join(map(_number_of, text)) or "∅"
    shown = ("·" if character == " " else character for character in text)
    return "".join(_number_of(c) if unicodedata.category(c) == "Zs" else c for c in shown)


def _number_of(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"


def inert(token: object) -> str:
    r"""Return a visible token that a browser shows as the same text whether it is read as text or as HTML.

    CircuitsVis writes a token's box with `innerHTML` and its tooltip as text, so escaping would be right in one
    place only. A word joiner (U+2060, no width) after `<` and `&` is right in both: the HTML standard starts a
    tag or a character reference only if an ASCII letter, a digit or one of `/ ! ? #` comes next.

    Example:
        >>> inert("<b>") == "<\u2060b>"
        True
    """
    return visible_token(token).replace("<", "<\u2060").replace("&", "&\u2060")


def script_json(value: Any) -> Markup:
    r"""Return `value` as JSON that can stand inside a `<script>` element; NaN and infinity become null.

    Raises:
        TypeError: If `value` holds something JSON has no word for.

    Example:
        >>> print(script_json({"a": float("nan"), "b": "</script>"}))
        {"a":null,"b":"\u003c/script\u003e"}
    """
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def join(parts: Iterable[str], separator: str = "") -> Markup:
    """Join fragments; a part that is no Markup is escaped."""
    return Markup(separator).join(parts)


def _as_float(value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def number(value: object, digits: int = 3) -> str:
    """Return a number with `digits` significant digits, thousands separated, tiny and huge ones in powers of ten.

    Example:
        >>> number(0.69123), number(23.456), number(46080.4), number(0.0000123), number(2.683e12), number(float("nan"))
        ('0.691', '23.5', '46,080', '1.23e−05', '2.68e+12', 'n/a')
    """
    as_float = _as_float(value)
    if math.isnan(as_float):
        return MISSING
    if as_float == 0:
        return "0"
    size = math.floor(math.log10(abs(float(f"{as_float:.{digits - 1}e}"))))
    if not -4 <= size < 9:
        return f"{as_float:.{digits - 1}e}".replace("-", "−")
    return f"{as_float:,.{max(digits - 1 - size, 0)}f}".replace("-", "−")


def plain(value: object) -> str:
    """Return a round number, such as a tick or a target, without trailing zeros.

    Example:
        >>> plain(0.5), plain(100000.0), plain(1.0)
        ('0.5', '100,000', '1')
    """
    as_float = _as_float(value)
    if math.isnan(as_float):
        return MISSING
    text = f"{as_float:,.0f}" if abs(as_float) >= 1000 and as_float == round(as_float) else f"{as_float:.6g}"
    return text.replace("-", "−")


def count(value: object) -> str:
    """Return a whole number with its thousands separated.

    Example:
        >>> count(46080)
        '46,080'
    """
    as_float = _as_float(value)
    return MISSING if math.isnan(as_float) else f"{round(as_float):,}".replace("-", "−")


def percent(value: object, digits: int = 3) -> str:
    """Return a number that already is a percentage, with its unit."""
    text = number(value, digits)
    return text if text == MISSING else f"{text}{NBSP}%"


def target(value: object) -> str:
    r"""Return a percentage that a user chose, as short as it was written.

    Example:
        >>> target(1.0) == "1\u00a0%"
        True
    """
    return f"{plain(value)}{NBSP}%"


def percent_of(ratio: object, digits: int = 3) -> str:
    """Return a ratio of 0..1 as a percentage with its unit."""
    return percent(_as_float(ratio) * 100, digits)


def signed(value: object, digits: int = 3) -> str:
    """Return a percentage with its sign, as a change."""
    text = percent(value, digits)
    return text if text == MISSING or text.startswith("−") else f"+{text}"


def replacement(removed: Any) -> str:
    """Return what stands in for the removed neurons, in words."""
    words = {"mean": "their mean", "zero": "zero", "resample": "their value at a random other token"}
    return words.get(removed.replacement, visible(removed.replacement))


def duration(seconds: object) -> str:
    """Return a length of time as a reader says it.

    Example:
        >>> duration(12.34), duration(200), duration(7300)
        ('12.3 s', '3 min 20 s', '2 h 1 min')
    """
    as_float = _as_float(seconds)
    if math.isnan(as_float):
        return MISSING
    if as_float < 60:
        return f"{number(as_float)} s"
    minutes, rest = divmod(round(as_float), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
