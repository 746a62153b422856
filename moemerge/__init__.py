"""moemerge builds frankenMoE models: the FFNs of dense experts, stacked behind routers.

    config = load_config("merge.yaml")
    plan = plan_merge(config)
    report = merge(plan, "out/")

Importing this package imports neither torch nor transformers.
"""

from moemerge.config import MergeConfig, load_config
from moemerge.errors import MoemergeError
from moemerge.merge import merge
from moemerge.plan import MergePlan, plan_merge

__all__ = ["MergeConfig", "MergePlan", "MoemergeError", "load_config", "merge", "plan_merge"]
