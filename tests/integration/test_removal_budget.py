"""What a search may cost when more is asked for, and what is said of text that was seen before."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from neuron_sparsity import AblationResult, ablation, confirmation, removable_neurons, removable_sets, removal
from neuron_sparsity.ablation import PARTIAL
from neuron_sparsity.adapter import attach
from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.ranking import rank
from neuron_sparsity.recorder import record

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def case(tiny_model: Any, own_windows: Any) -> SimpleNamespace:
    adapter = attach(tiny_model("gpt2"))
    windows = own_windows(adapter.model, 32)
    ranking = rank(record(adapter, windows))

    def search(p_percent: float = 5.0, text: Any = windows, **options: Any) -> AblationResult:
        return removable_neurons(adapter, text, ranking, p_percent=p_percent, **options)

    return SimpleNamespace(adapter=adapter, windows=windows, ranking=ranking, search=search)


@pytest.mark.parametrize("order", [(20.0, 5.0, 1.0), (1.0, 5.0, 20.0)], ids=["falling", "rising"])
def test_passes_of_another_p_are_used_and_take_nothing_from_this_one(
    case: SimpleNamespace, order: tuple[float, ...], tmp_path: Any
) -> None:
    before = 0.0
    for p in order:
        kept, fresh = case.search(p, folder=tmp_path), case.search(p)
        assert kept.n_removable >= 0.9 * fresh.n_removable, p
        assert kept.ppl_increase_percent <= p
        assert kept.cost["forward_passes"] - before <= 10
        assert kept.cost["forward_passes"] - before < fresh.cost["forward_passes"] or not before
        before = kept.cost["forward_passes"]


def test_an_interrupted_search_after_another_p_ends_as_an_uninterrupted_one(
    case: SimpleNamespace, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.search(20.0, folder=tmp_path / "whole")
    kept = (tmp_path / "whole" / PARTIAL).read_text()
    expected = case.search(1.0, folder=tmp_path / "whole")
    calls, original = [], removal.token_losses

    def interrupted(*arguments: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) in (3, 6):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    (tmp_path / "part").mkdir()
    (tmp_path / "part" / PARTIAL).write_text(kept)
    monkeypatch.setattr(removal, "token_losses", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            case.search(1.0, folder=tmp_path / "part")
    found = case.search(1.0, folder=tmp_path / "part")
    assert (found.curve, found.control, found.heldout) == (expected.curve, expected.control, expected.heldout)
    assert found.cost["forward_passes"] == expected.cost["forward_passes"]
    data = json.loads((tmp_path / "part" / PARTIAL).read_text())
    del data["begun"]["passes"]
    (tmp_path / "part" / PARTIAL).write_text(json.dumps(data))
    with pytest.raises(RunFolderError, match=r"ablation.partial.json is damaged"):
        case.search(1.0, folder=tmp_path / "part")


@pytest.mark.parametrize(("n_controls", "n_heldout"), [(30, 16), (3, 26), (0, 26)])
def test_more_controls_and_more_heldout_text_come_on_top(
    case: SimpleNamespace, n_controls: int, n_heldout: int
) -> None:
    heldout, text = (case.windows._pick(list(part), "a part") for part in (range(n_heldout), range(n_heldout, 32)))
    usual = case.search(text=text, heldout=case.windows._pick([0, 1], "two windows"), n_controls=0)
    found = case.search(text=text, heldout=heldout, n_controls=n_controls)
    assert found.n_removable >= 0.9 * usual.n_removable > 0
    assert (found.control or {"seeds": []})["seeds"] == list(range(n_controls))
    share = heldout.n_tokens / text.n_tokens
    assert found.cost["forward_passes"] <= max(10, 5 + n_controls / 4 + 4 * share) + 1e-9


def test_a_search_that_found_nothing_spends_what_was_kept_for_shorter_sets(
    case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "_MAX_PASSES", (0.0, 0.0))
    monkeypatch.setattr(ablation, "_LEAST_SEARCH", (1.9, 0.0))  # the dense pass, and no room for another
    found = case.search()
    assert found.n_removable > 0
    assert not found.resolved
    assert found.heldout["holding_tried"] < 2  # what they would have cost went to the search
    shares = found.heldout["corpus"]["n_tokens"] / found.corpus["n_tokens"]
    assert found.cost["forward_passes"] <= 1.9 + 3 / 4 + 4 * shares


def test_heldout_text_that_was_searched_is_refused(case: SimpleNamespace) -> None:
    for heldout in (case.windows, case.windows._pick([3], "one of them")):
        with pytest.raises(ValueError, match="heldout holds nothing but windows that are searched too"):
            case.search(heldout=heldout)


def test_heldout_text_that_shares_runs_with_the_searched_one_is_said_to(
    case: SimpleNamespace, own_windows: Any
) -> None:
    other = own_windows(case.adapter.model, 4, seed=5)
    found = case.search(heldout=other).heldout
    assert (found["unseen_in_search"], found["unseen_by_ranking"]) == (True, True)
    other.tokens[2, :20] = case.windows.tokens[7, 5:25]
    found = case.search(heldout=other).heldout
    assert (found["unseen_in_search"], found["unseen_by_ranking"]) == (False, False)
    other.tokens[2] = case.windows.tokens[7]  # a page that comes twice is no reason to refuse the rest
    assert not case.search(heldout=other).heldout["unseen_in_search"]


def test_on_few_windows_nothing_is_said_to_hold(case: SimpleNamespace) -> None:
    heldout, text = (case.windows._pick(list(part), "a part") for part in (range(4), range(4, 32)))
    found = [case.search(p, text=text, heldout=heldout).heldout for p in (1.0, 20.0)]
    assert {one["verdict"] for one in found} <= {"not refuted", "fails"}
    for p, one in zip((1.0, 20.0), found, strict=True):
        assert (one["interval"], one["holds"], one["holding"], one["holding_tried"]) == (None, False, None, 0)
        assert (one["verdict"] == "fails") == (one["ppl_increase_percent"] > p)


def test_a_set_that_holds_is_looked_for_more_than_once(case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals shrink less than the rise does: the first shorter set may not hold either."""
    tried: list[int] = []
    original = confirmation._on

    def stubborn(removals: Any, text: str, n: int, p_percent: float) -> dict[str, Any]:
        tried.append(n)
        found = original(removals, text, n, p_percent)
        ends = [-1.0, 2 * p_percent] if len(tried) < 3 else [-1.0, p_percent]
        return found | {"holds": len(tried) > 2, "interval": ends, "verdict": "made up"}

    monkeypatch.setattr(confirmation, "_on", stubborn)
    found = case.search()
    assert tried[1] < 0.9 * tried[0]
    assert tried[2] == tried[1] // 2
    assert found.heldout["holding"]["n_removable"] == tried[2]
    assert found.heldout["holding_tried"] == 2
    assert found.cost["forward_passes"] <= 10
    tried.clear()
    removable_sets(case.adapter, case.windows, case.ranking, p_percents=(2.0, 20.0))
    assert len(tried) >= 4
