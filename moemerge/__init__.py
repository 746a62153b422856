"""moemerge builds frankenMoE models: the FFNs of dense experts, stacked behind routers.

    config = load_config("merge.yaml")
    plan = plan_merge(config)
    report = merge(plan, "out/")

Names are imported at their first use: `moemerge --help` needs none of them, and no import needs torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moemerge.config.schema import MergeConfig, load_config
    from moemerge.errors import MoemergeError
    from moemerge.merging.checkpoint import merge
    from moemerge.planning.plan import MergePlan
    from moemerge.planning.planner import plan_merge

__all__ = ["MergeConfig", "MergePlan", "MoemergeError", "load_config", "merge", "plan_merge"]

_HOMES = {
    "MergeConfig": "config.schema",
    "MergePlan": "planning.plan",
    "MoemergeError": "errors",
    "load_config": "config.schema",
    "merge": "merging.checkpoint",
    "plan_merge": "planning.planner",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"moemerge.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moemerge' has no attribute {name!r}")
