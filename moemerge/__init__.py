"""moemerge builds frankenMoE models: the FFNs of dense experts, stacked behind routers.

    config = load_config("merge.yaml")
    plan = plan_merge(config)
    report = merge(plan, "out/")

docs/python.md has a program for each function. All but errors are imported at their first use: `moemerge --help` needs
none of them, and no import needs torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moemerge.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    DamagedModelError,
    IncompatibleError,
    MoemergeError,
    NoSuchModelError,
    OutputError,
    PublishError,
    RefusedError,
    RouterError,
    SourceError,
    TooLargeError,
)

if TYPE_CHECKING:
    from moemerge.checks.files import Difference
    from moemerge.checks.inspection import Inspection
    from moemerge.checks.inspection import inspect_checkpoint as inspect
    from moemerge.checks.verification import Verification
    from moemerge.checks.verification import verify_merge as verify
    from moemerge.config.loading import load_config
    from moemerge.config.schema import MergeConfig
    from moemerge.editing.editor import EditOptions, edit
    from moemerge.editing.plan import EditPlan
    from moemerge.editing.planner import plan_edit
    from moemerge.evaluation.evaluator import evaluate
    from moemerge.evaluation.figures import Estimate, Evaluation
    from moemerge.evaluation.routes.traced import Routes, TracedText
    from moemerge.evaluation.routes.tracer import trace_routes
    from moemerge.evaluation.settings import EvaluationSettings, TraceSettings
    from moemerge.merging.merger import merge
    from moemerge.merging.options import MergeOptions
    from moemerge.planning.options import PlanOptions
    from moemerge.planning.plan import MergePlan
    from moemerge.planning.planner import plan_merge
    from moemerge.publish.pushing import push
    from moemerge.routers.report import RoutingReport
    from moemerge.searching.results import SearchResult
    from moemerge.searching.searcher import search
    from moemerge.searching.settings import SearchSettings
    from moemerge.tuning.settings import Settings as TuningSettings
    from moemerge.tuning.settings import TuningResult
    from moemerge.tuning.tuner import tune

    __version__: str

__all__ = [
    "BusyError",
    "CheckpointError",
    "ConfigError",
    "DamagedModelError",
    "Difference",
    "EditOptions",
    "EditPlan",
    "Estimate",
    "Evaluation",
    "EvaluationSettings",
    "IncompatibleError",
    "Inspection",
    "MergeConfig",
    "MergeOptions",
    "MergePlan",
    "MoemergeError",
    "NoSuchModelError",
    "OutputError",
    "PlanOptions",
    "PublishError",
    "RefusedError",
    "RouterError",
    "Routes",
    "RoutingReport",
    "SearchResult",
    "SearchSettings",
    "SourceError",
    "TooLargeError",
    "TraceSettings",
    "TracedText",
    "TuningResult",
    "TuningSettings",
    "Verification",
    "__version__",
    "edit",
    "evaluate",
    "inspect",
    "load_config",
    "merge",
    "plan_edit",
    "plan_merge",
    "push",
    "search",
    "trace_routes",
    "tune",
    "verify",
]

_HOMES = {
    "Difference": "checks.files:Difference",
    "EditOptions": "editing.editor:EditOptions",
    "EditPlan": "editing.plan:EditPlan",
    "Estimate": "evaluation.figures:Estimate",
    "Evaluation": "evaluation.figures:Evaluation",
    "EvaluationSettings": "evaluation.settings:EvaluationSettings",
    "Inspection": "checks.inspection:Inspection",
    "MergeConfig": "config.schema:MergeConfig",
    "MergeOptions": "merging.options:MergeOptions",
    "MergePlan": "planning.plan:MergePlan",
    "PlanOptions": "planning.options:PlanOptions",
    "Routes": "evaluation.routes.traced:Routes",
    "RoutingReport": "routers.report:RoutingReport",
    "SearchResult": "searching.results:SearchResult",
    "SearchSettings": "searching.settings:SearchSettings",
    "TraceSettings": "evaluation.settings:TraceSettings",
    "TracedText": "evaluation.routes.traced:TracedText",
    "TuningResult": "tuning.settings:TuningResult",
    "TuningSettings": "tuning.settings:Settings",
    "Verification": "checks.verification:Verification",
    "edit": "editing.editor:edit",
    "evaluate": "evaluation.evaluator:evaluate",
    "inspect": "checks.inspection:inspect_checkpoint",
    "load_config": "config.loading:load_config",
    "merge": "merging.merger:merge",
    "plan_edit": "editing.planner:plan_edit",
    "plan_merge": "planning.planner:plan_merge",
    "push": "publish.pushing:push",
    "search": "searching.searcher:search",
    "trace_routes": "evaluation.routes.tracer:trace_routes",
    "tune": "tuning.tuner:tune",
    "verify": "checks.verification:verify_merge",
}
"""Public names that are imported at their first use: their module, and what they are called there."""

# Hidden from type checkers, so that they know of no names but those above.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("moemerge")
        if name in _HOMES:
            module, _, attribute = _HOMES[name].partition(":")
            return getattr(import_module(f"moemerge.{module}"), attribute)
        raise AttributeError(f"module 'moemerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
