"""What comes from data becomes text that cannot do anything."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_sparsity.report._text import (
    count,
    duration,
    inert,
    number,
    percent,
    percent_of,
    script_json,
    signed,
    visible,
)

HOSTILE = "</script><img src=x onerror=alert(1)>"


def test_script_json_cannot_close_its_element() -> None:
    text = script_json({"tokens": [HOSTILE, "<!--", "&amp;", "\u2028\u2029"]})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text)["tokens"] == [HOSTILE, "<!--", "&amp;", "\u2028\u2029"]


@given(st.recursive(st.text() | st.floats() | st.integers() | st.none(), st.lists, max_leaves=8))
def test_script_json_is_valid_json_whatever_it_holds(value: object) -> None:
    text = script_json(value)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert not set("<>&") & set(text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(value: float) -> None:
    assert script_json([1.5, value, {"a": (value,)}]) == '[1.5,null,{"a":[null]}]'


def test_script_json_refuses_what_json_has_no_word_for() -> None:
    with pytest.raises(TypeError):
        script_json({"a": object()})


@given(st.text())
def test_no_character_of_a_token_stays_invisible_or_turns_the_text(token: str) -> None:
    shown = visible(token)
    assert not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 or 0x202A <= ord(c) <= 0x202E for c in shown)
    shown.encode("utf-8")


@given(st.text(alphabet="<>&!/?#abcscript\x00 \n", max_size=12))
def test_an_inert_token_is_text_even_as_html(token: str) -> None:
    shown = inert(token)
    assert "<" not in shown.replace("<\u2060", "")
    assert "&" not in shown.replace("&\u2060", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.69123, "0.691"), (1.02, "1.02"), (0, "0"), (99.97, "100"), (-0.5, "−0.500"), (46080, "46,080"), (None, "n/a")],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(8.07e-6, "+8.07e−06"), (-8.07e-6, "−8.07e−06"), (-0.5, "−0.500")])
def test_a_change_has_one_sign_and_one_minus(value: float, text: str) -> None:
    assert signed(value) == f"{text}\u00a0%"
    assert "-" not in number(value)


def test_units() -> None:
    assert percent(1.02) == "1.02\u00a0%"
    assert percent_of(0.0102) == "1.02\u00a0%"
    assert count(46_080) == "46,080"
    assert duration(3599.9) == "1 h 0 min"
    assert percent(math.nan) == duration(None) == count(math.inf) == "n/a"
