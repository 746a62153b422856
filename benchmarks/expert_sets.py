"""What benchmarks of routers share: a set of experts with their prompts and texts, and mixtures that need no router."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moemerge import plan_merge
from moemerge.config.loading import parse_config
from moemerge.config.schema import MergeConfig
from moemerge.dtypes import ComputeDtype, DType
from moemerge.evaluation.baselines import average, forced, uniform
from moemerge.evaluation.figures import ORACLE, UNIFORM
from moemerge.evaluation.model_runs import Runs
from moemerge.evaluation.runnable import MixtureModel, Runnable
from moemerge.routers.initialisation import init_routers
from moemerge.routers.request import PassOptions


@dataclass(frozen=True)
class ExpertSet:
    """Experts of one base, by name, with what routers may be made from."""

    base: str
    models: dict[str, str]
    texts: dict[str, str]
    """A file of text for each expert."""
    prompts: dict[str, list[str]]
    per_token: int = 2
    shared_weights: str = "base"
    seed: int = 0
    """Of random rows, and of the choice of documents."""

    def config(self, mode: str, given: str, **router: object) -> MergeConfig:
        """Describe a merge whose routers are given `prompts`, `texts`, `unsorted` texts, or nothing."""
        experts = []
        for name, model in self.models.items():
            expert: dict[str, object] = {"source_model": model}
            if given == "prompts":
                expert["positive_prompts"] = self.prompts[name]
            if given == "texts":
                expert["positive_texts"] = self.texts[name]
            experts.append(expert)
        if given == "unsorted":
            router["calibration_texts"] = [self.texts[name] for name in self.models]
        document: dict[str, Any] = {
            "base_model": self.base,
            "gate_mode": mode,
            "experts": experts,
            "experts_per_token": self.per_token,
            "shared_weights": self.shared_weights,
            "dtype": "bfloat16",
            **({"router": router} if router else {}),
        }
        return parse_config(json.dumps(document))

    def rows(
        self, config: MergeConfig, dtype: DType = "bfloat16", compute_dtype: ComputeDtype = "float32"
    ) -> tuple[dict[int, torch.Tensor], float]:
        """By layer the rows (expert, hidden), as a merge stores them, and the seconds that they took."""
        plan = plan_merge(config)
        start = time.perf_counter()
        request = replace(plan.router_request, dtype=dtype)
        options = PassOptions("cpu", compute_dtype)
        routers = init_routers(request, options, seed=self.seed, progress=lambda *_: None)
        seconds = time.perf_counter() - start
        stored: torch.dtype = getattr(torch, dtype)
        return {
            layer: torch.frombuffer(bytearray(data), dtype=stored).float().reshape(len(self.models), -1)
            for layer, data in routers.rows.items()
        }, seconds


def run_baseline(name: str, runs: Runs, mixture: MixtureModel, experts: Sequence[Runnable] = ()) -> None:
    """Run the uniform mixture, the label oracle or the experts' weight average; nothing where there is none."""
    if name == ORACLE:
        for place in range(len(mixture.experts)):
            runs.run(name, forced(mixture, place), domains=[place])
        return
    made = uniform(mixture) if name == UNIFORM else average(name, experts)
    if isinstance(made, Runnable):
        runs.run(name, made)
