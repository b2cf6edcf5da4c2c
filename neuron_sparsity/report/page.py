"""Fragments -> one file that opens offline.

The page carries its style sheet, its pictures and the CircuitsVis bundle, once. Its content security policy forbids
every request and every script but those it was built with, named by their SHA-256: even markup that slipped through
escaping could neither run nor call home.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.report import views
from neuron_sparsity.report._classes import layer_labels
from neuron_sparsity.report._fragments import note
from neuron_sparsity.report._text import join, visible
from neuron_sparsity.typed import expect

if TYPE_CHECKING:
    from neuron_sparsity.ablation import AblationResult
    from neuron_sparsity.damage import DamageResult
    from neuron_sparsity.pareto import ParetoResult
    from neuron_sparsity.recorder import NeuronStatistics
    from neuron_sparsity.saliency import NeuronSaliency
    from neuron_sparsity.sparsity import SparsityResult, TokenActivity

__all__ = ["Report", "Section", "build", "render"]

_ASSETS = Path(__file__).parent / "assets"
_NO_RESULT = Markup(
    "Not measured here: <code>ns.cett_ppl_sparsity(model, corpus)</code> or <code>neuron-sparsity sparsity</code> "
    "measures it."
)
_NO_REMOVAL = Markup(
    "Not measured here: <code>ns.removable_neurons(model, corpus, ranking)</code> or "
    "<code>neuron-sparsity ablate</code> measures it."
)
_NO_PASSAGE = Markup(
    "No passage was recorded: <code>neuron-sparsity report</code> or "
    "<code>ns.token_activity(model, corpus, result)</code> records one, and <code>ns.report</code> takes it as "
    "<code>passage</code>."
)


@dataclass(frozen=True)
class Section:
    """A section of the page: its anchor, its title, the question it answers, and its fragments."""

    anchor: str
    title: str
    lead: str
    fragments: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """A finished report.

    Attributes:
        html: The whole page, one document without outside references.
        title: Its title.
    """

    html: str
    title: str

    def save(self, path: str | Path) -> Path:
        """Write the page to `path` in one step, so that a reader never meets half a file, and return the path.

        Raises:
            OSError: If the folder cannot be written.
            RunFolderError: If the folder does not exist.
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise RunFolderError(f"folder {target.parent} does not exist; make it, or save the page elsewhere")
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(self.html)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return target

    def _repr_html_(self) -> str:
        """Return the page in a frame of its own, so that a notebook's styles and the page's leave each other alone."""
        frame = (
            '<iframe srcdoc="{}" title="{}" sandbox="allow-scripts" style="width:100%;height:800px;border:0"></iframe>'
        )
        return frame.format(escape(self.html), escape(self.title))


def build(
    stats: NeuronStatistics,
    result: SparsityResult | None = None,
    removed: AblationResult | None = None,
    *,
    passage: TokenActivity | None = None,
    pareto: ParetoResult | None = None,
    damage: DamageResult | None = None,
    saliency: NeuronSaliency | None = None,
    atlas: Any = None,
    neurons: Iterable[tuple[int, int]] = (),
    title: str | None = None,
) -> Report:
    """Return the report of a run; see `neuron_sparsity.report.report`."""
    _require_parts(
        stats=stats, result=result, removed=removed, passage=passage, pareto=pareto, damage=damage, saliency=saliency,
        atlas=atlas,
    )  # fmt: skip
    _require_one_model(stats, result, removed, pareto, damage, saliency, atlas if hasattr(atlas, "model") else None)
    name = visible(title if title is not None else f"MLP neurons of {stats.model.name}")
    sections = [
        _summary(stats, result, removed),
        _how_sparse(result),
        _where(result, passage, layer_labels(stats)),
        *_by_rule(pareto),
        _which(
            stats, result, views.neuron_table(stats, result, removed, saliency=saliency, atlas=atlas, neurons=neurons)
        ),
        _what_can_go(stats, removed),
        *_at_what_cost(damage),
        _how_measured(stats, result, removed),
    ]
    return Report(html=render(sections, title=name), title=name)


_PARTS = {
    "stats": ("NeuronStatistics",),
    "result": ("SparsityResult",),
    "removed": ("AblationResult",),
    "passage": ("TokenActivity",),
    "pareto": ("ParetoResult",),
    "damage": ("DamageResult",),
    "saliency": ("NeuronSaliency",),
    "atlas": ("Atlas", "DataFrame"),
}


def _require_parts(**parts: Any) -> None:
    """Refuse what is of another class than its argument, naming the argument that takes it."""
    for name, part in parts.items():
        if part is None and name != "stats":
            continue
        place = next((other for other, kinds in _PARTS.items() if type(part).__name__ in kinds), name)
        expect(name, part, *_PARTS[name], instead="" if place == name else f"give it as {place}=")


def _require_one_model(stats: Any, *others: Any) -> None:
    for other in others:
        if other is None:
            continue
        for field in ("fingerprint", "n_layers", "d_mlp"):
            ours, theirs = getattr(stats.model, field, None), getattr(other.model, field, None)
            if ours and theirs and ours != theirs:
                raise ValueError(
                    f"the statistics and the {type(other).__name__} come from different models: {field} {ours} and "
                    f"{theirs}; measure both on one model"
                )


def _summary(stats: NeuronStatistics, result: SparsityResult | None, removed: AblationResult | None) -> Section:
    missing = [name for name, part in (("sparsity", result), ("removable neurons", removed)) if part is None]
    remark = (
        (note(f"Not part of this run: {' and '.join(missing)}. The sections below say how to measure them."),)
        if missing
        else ()
    )
    return Section("summary", "Summary", "", (views.summary(stats, result, removed), *remark))


def _how_sparse(result: SparsityResult | None) -> Section:
    lead = "How many neurons may stay inactive, token by token, before perplexity rises."
    fragments = (note(_NO_RESULT),) if result is None else (views.activation_curve(result), views.cett_curves(result))
    return Section("sparse", "How sparse is it?", lead, fragments)


def _passage(passage: TokenActivity | None, layers: list[int]) -> list[str]:
    if passage is None:
        return [note(_NO_PASSAGE)]
    return [views.passage_map(passage, layers=layers), views.passage_tokens(passage)]


def _where(result: SparsityResult | None, passage: TokenActivity | None, layers: list[int]) -> Section:
    fragments: list[str] = (
        [note(_NO_RESULT)]
        if result is None
        else [views.layer_ratios(result), views.layer_thresholds(result), views.layer_table(result)]
    )
    fragments += _passage(passage, layers)
    return Section(
        "where", "Where?", "How activity spreads over layers and over the tokens of a passage.", tuple(fragments)
    )


def _by_rule(pareto: ParetoResult | None) -> list[Section]:
    """Only where it was measured: it costs a hundred passes, and most runs do without."""
    if pareto is None:
        return []
    lead = "What each rule of activation sparsity needs to stay active, by one and the same perplexity code."
    return [Section("rules", "By which rule?", lead, (views.pareto_curves(pareto), views.pareto_table(pareto)))]


def _which(stats: NeuronStatistics, result: SparsityResult | None, table: str) -> Section:
    lead = "Every neuron: how often it is active, how much it contributes, and what drives it. A row opens its neuron."
    first, *after = (view(stats, result) for view in (views.neuron_map, views.class_counts, views.neuron_examples))
    return Section("which", "Which neurons?", lead, (first, table, *after))


def _what_can_go(stats: NeuronStatistics, removed: AblationResult | None) -> Section:
    lead = "The largest set of neurons that can be replaced on every token before perplexity rises to the target."
    if removed is not None and not removed.resolved:
        lead = (
            "The largest set that was found of neurons that can be replaced on every token before perplexity rises to "
            "the target; whether it is the largest was not settled."
        )
    if removed is None:
        return Section("removable", "What can go?", lead, (note(_NO_REMOVAL),))
    parts = (views.removal_verdict(removed), views.removal_curve(removed), views.removable_layers(stats, removed))
    return Section("removable", "What can go?", lead, parts)


def _at_what_cost(damage: DamageResult | None) -> list[Section]:
    """Only where it was measured: it costs a pass a layer."""
    if damage is None:
        return []
    lead = f"Which tokens pay, and in which layers: {visible(damage.change)}."
    return [Section("damage", "At what cost?", lead, (views.damage(damage),))]


def _how_measured(stats: NeuronStatistics, result: SparsityResult | None, removed: AblationResult | None) -> Section:
    lead = "What every number of this page rests on."
    return Section(
        "measured", "How it was measured", lead, (views.measured(stats, result, removed), views.definitions())
    )


def render(sections: list[Section], *, title: str) -> str:
    """Return a whole page of sections, whose fragments are markup already; everything else is escaped.

    Args:
        sections: In the order of the page.
        title: Title of the page.
    """
    bundle, boot = views.scripts()
    table = (_ASSETS / "neurons.js").read_text(encoding="utf-8").strip()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    bodies = [(section, join(Markup(fragment) for fragment in section.fragments)) for section in sections]
    page = environment.get_template("page.html.j2")
    uses_widgets = any("data-widget=" in body for _, body in bodies)
    used = [bundle, boot] if uses_widgets else [boot]
    used += [table] if any("data-neurons" in body for _, body in bodies) else []
    return page.render(
        title=title,
        sections=bodies,
        style=Markup((_ASSETS / "style.css").read_text(encoding="utf-8")),
        scripts=[Markup(source) for source in used],
        policy=Markup(" ").join(Markup("'sha256-{}'").format(_digest(source)) for source in used),
    )


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode("utf-8")).digest()).decode("ascii")
