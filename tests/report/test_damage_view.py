"""The view of a damage: the numbers it was given, everything escaped, nothing missing where parts are."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from neuron_sparsity.damage import DamageResult
from neuron_sparsity.damage_tables import DecileDamage, LayerDamage, TokenDamage, TokenGroup
from neuron_sparsity.report import views
from tests.report.conftest import make_damage

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def found() -> DamageResult:
    damage = make_damage()
    token = TokenDamage(HOSTILE, ("<b>", "\u202e"), (" after",), 3, 17, HOSTILE, 1.0, 2.345, 0.5)
    return replace(
        damage,
        change=f"truncated {HOSTILE}",
        hurt=(token,),
        helped=(replace(token, difference=-1.75),),
        by_token=(TokenGroup("</td>", 5, 12, 0.25, 0.01, 0.3, 0.1),),
        by_decile=(DecileDamage(1, 51, 400, 0.01, None, None, 0.01),),
        layers=(damage.layers[0], LayerDamage(1, -0.002, None, None, -0.2)),
        corpus={"name": HOSTILE, "scored_tokens": 4088, "sha256": "0"},
    )


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        if tag not in ("img", "br", "line", "circle", "rect", "path", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "rect", "path", "polyline"):
            assert self.open.pop() == tag


def test_numbers_and_tokens_are_there_and_escaped(found: DamageResult) -> None:
    page = views.damage(found)
    for said in ("2.35", "−1.75", "52.3", "61", "4,088", "0.008", "layer 0 changed alone: 0.004", "0.25"):
        assert said in page, said
    assert HOSTILE not in page
    assert "</td>" not in page.replace("</td><td>", "").replace("</td></tr>", "")
    assert "\u202e" not in page
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert not parser.seen & {"script", "img", "b"}


def test_what_was_not_measured_is_said(found: DamageResult) -> None:
    page = views.damage(replace(found, layers=(), hurt=(), helped=(), by_token=(), top_percent_share=None))
    for said in ("Layers were not run", "Tokens hurt most: there is none", "No token occurs 8 times"):
        assert said in page
    assert "1 % hurt most carry" not in page
    with pytest.raises(ValueError, match="n_tokens must be >= 0"):
        views.damage(found, n_tokens=-1)


def test_as_many_tokens_as_asked_for(found: DamageResult) -> None:
    many = replace(found, hurt=found.hurt * 9, helped=())
    assert views.damage(many).count("<mark>") == 8
    assert views.damage(many, n_tokens=2).count("<mark>") == 2
