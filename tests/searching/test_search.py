"""`moemerge search`: the same choice for the same seed, as good as it says, and nothing computed twice."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from moemerge import evaluate, load_config, merge, plan_merge
from moemerge.checkpoint.header import TensorInfo
from moemerge.config.loading import parse_config
from moemerge.errors import IncompatibleError, RefusedError
from moemerge.evaluation import runnable
from moemerge.evaluation.domain_texts import TextReader
from moemerge.evaluation.evaluator import read_domains
from moemerge.evaluation.figures import MERGED
from moemerge.evaluation.runnable import open_mixture
from moemerge.evaluation.running import run_model
from moemerge.evaluation.settings import EvaluationSettings
from moemerge.evaluation.text_pass import TextPass
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window
from moemerge.routers import kept_states, ridge
from moemerge.routers.initialisation import init_routers
from moemerge.routers.request import PassOptions
from moemerge.searching.chosen_config import chosen_text
from moemerge.searching.dividing import divide
from moemerge.searching.searcher import search
from moemerge.searching.settings import SearchSettings
from moemerge.searching.texts import SearchTexts
from moemerge.searching.trying import Candidate, bench
from tests.support.recipes import OPEN, RECIPE, data, written

SETTINGS = SearchSettings(trials=8, tokens=200, window=20, compute_dtype="float32")


def counting(patch, module, name):
    """Counts the calls of a function, by the tensor that it is called with if it is one."""
    calls, work = Counter(), getattr(module, name)

    def counted(*arguments, **keys):
        tensor = arguments[0] if isinstance(arguments[0], TensorInfo) else None
        calls[tensor and (tensor.name, tensor.dtype, str(tensor.path), tensor.start)] += 1
        return work(*arguments, **keys)

    patch.setattr(module, name, counted)
    return calls


def counted_loads(patch):
    """Collects the names of the tensors at each loading of some into a model."""
    calls, load = [], TextPass.load

    def noted(self, tensors):
        calls.append(list(tensors))
        load(self, tensors)

    patch.setattr(TextPass, "load", noted)
    return calls


@pytest.fixture(scope="module")
def found(world):
    """A search by all text of two domains, and how often a base was run and rows were fitted for it."""
    with pytest.MonkeyPatch.context() as patch:
        passes = counting(patch, kept_states, "capture_router_inputs")
        fits = counting(patch, ridge, "regress")
        result = search(written(world), data(world), SETTINGS, test={"code": data(world)["code"]})
    return result, passes.total(), fits.total()


def test_all_recipes_are_tried_where_they_are_few(found):
    result = found[0]
    values = [tuple(trial.values.values()) for trial in result.trials]
    assert values == [(mode, n, shared) for mode in ("ridge", "hidden") for n in "21" for shared in ("base", "average")]
    tokens = sorted({trial.tokens for trial in result.trials})
    complete = {trial.number: trial.loss for trial in result.trials if trial.complete}
    assert [trial.tokens == tokens[-1] for trial in result.trials] == [trial.complete for trial in result.trials]
    assert len(tokens) == 3
    assert len(complete) == 1
    assert result.chosen == result.front[0] == min(complete, key=complete.get)


def config(world, **keys):
    """One of the recipes as a config, of the first options unless others are named."""
    first = {"gate_mode": "ridge", "experts_per_token": 2, "shared_weights": "base"}
    return parse_config(yaml.safe_dump({**RECIPE, **first, **keys}), folder=world)


def test_bases_are_run_and_rows_are_fitted_once_for_all_recipes(found, world, monkeypatch):
    _, passes, fits = found
    alone = counting(monkeypatch, ridge, "regress")
    for method in ("base", "average"):
        request = plan_merge(config(world, shared_weights=method)).router_request
        init_routers(request, PassOptions("cpu", "float32"), seed=0)
    assert (passes, fits) == (2, alone.total())


def test_routers_are_those_of_a_merge_without_a_report(world):
    made = config(world, gate_mode="combined")
    compute, options = Compute(torch.device("cpu"), torch.float32), PassOptions("cpu", "float32")
    with bench(compute, options, lambda *_: None) as worker:
        (routers,) = worker.make_routers([Candidate(0, made)])
    merged = init_routers(plan_merge(made).router_request, options, seed=0)
    assert routers.rows == merged.rows
    assert (len(routers.report.layers), len(merged.report.layers)) == (0, len(merged.rows))


def test_recipes_that_run_together_read_what_they_share_once(world, monkeypatch):
    compute = Compute(torch.device("cpu"), torch.float32)
    made = [config(world, shared_weights="average", experts_per_token=count, gate_mode="random") for count in (1, 2)]
    made.append(made[0].model_copy(update={"dtype": "float32"}))
    with bench(compute, PassOptions(), lambda *_: None) as worker:
        candidates = [Candidate(number, made) for number, made in enumerate(made)]
        routers = worker.make_routers(candidates)
        ready = [replace(one, routers=rows) for one, rows in zip(candidates, routers, strict=True)]
        read = counting(monkeypatch, runnable, "read_into")
        window = Window(0, tuple(range(3, 23)), (False, *[True] * 19))
        loaded = counted_loads(monkeypatch)
        losses = worker.losses(ready, [window])
        # The second has all weights of the first, and the third has none of them, being of another dtype.
        layers = [names for names in loaded if any(name.startswith("model.layers.0.") for name in names)]
        assert [bool(names) for names in layers] == [True, True]
        assert sorted(layers[0]) == sorted(layers[1])
        assert set(read.values()) == {1}
        assert len(read) == 2 * len(plan_merge(made[0]).outputs)  # in two dtypes
        assert [worker.losses([one], [window]) for one in ready] == [[one] for one in losses]


def test_the_chosen_config_merges_to_a_model_of_the_loss_that_was_found(found, world, tmp_path):
    result = found[0]
    (tmp_path / "best.yaml").write_text(chosen_text(result, tmp_path))
    merge(plan_merge(load_config(tmp_path / "best.yaml")), tmp_path / "out")
    trial = result.trials[result.chosen]
    plan, documents = plan_merge(load_config(tmp_path / "best.yaml")), read_domains(data(world))
    parts = divide(documents, {"code": documents["code"]}, SETTINGS.seed)
    texts = SearchTexts.read_by(TextReader(plan.base_folder, plan.config.expert_names, 200, 20), *parts)
    compute = Compute(torch.device("cpu"), torch.float32)
    losses = run_model(open_mixture(tmp_path / "out").runnable, texts.searched.windows, compute)
    assert texts.by_domain(dict(enumerate(losses.tolist()))) == pytest.approx(list(trial.losses.values()), abs=1e-6)
    settings = EvaluationSettings(tokens=200, window=20, compute_dtype="float32")
    again = evaluate(tmp_path / "out", {"code": data(world)["code"]}, settings).losses[MERGED]["code"]
    held_out = result.held_out.losses["code"]
    assert (held_out.value, held_out.low, held_out.high) == pytest.approx(
        (again.value, again.low, again.high), abs=1e-6
    )


@pytest.fixture(scope="module")
def drawn(world):
    """A recipe without end, and what a search of it found by two costs."""
    pytest.importorskip("optuna")
    settings = replace(SETTINGS, trials=10, objective="worst", cost="active")
    return settings, search(written(world, OPEN), data(world), settings)


def test_the_same_seed_finds_the_same(world, drawn):
    settings, result = drawn
    assert search(written(world, OPEN), data(world), settings) == result
    other = search(written(world, OPEN), data(world), replace(settings, seed=1, trials=3))
    assert other.trials[0].values == result.trials[0].values  # the first options
    assert other.trials[1].values != result.trials[1].values
    assert len({str(trial.values) for trial in result.trials}) == 10


def test_the_front_has_the_recipes_that_none_beats(drawn):
    _, result = drawn
    costs = {t.number: (round(t.worst, 5), t.active_parameters) for t in result.trials if t.complete}
    beaten = {
        number
        for number, (worst, active) in costs.items()
        for other in costs.values()
        if other != (worst, active) and other[0] <= worst and other[1] <= active
    }
    assert set(result.front) == costs.keys() - beaten
    assert costs[result.chosen][0] == min(worst for worst, _ in costs.values())


def test_without_optuna_a_search_says_what_it_needs(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RefusedError) as refused:
        search(written(world, OPEN), data(world), SETTINGS)
    assert str(refused.value) == (
        "to choose recipes, optuna is needed: pip install 'moemerge[search]'. Without it, a search tries all recipes, "
        "where there are no more than --trials, and the recipe has no ranges."
    )


def test_ray_is_asked_for_where_it_is_missing(world, monkeypatch, run):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RefusedError) as refused:
        search(written(world), data(world), replace(SETTINGS, ray="local"))
    assert str(refused.value) == "--ray: ray is needed: pip install 'moemerge[ray]'."
    options = ["-o", "-", f"--data=code={data(world)['code'][0]}", "--workers=2"]
    assert run("search", written(world), *options)[::2] == (
        2,
        "error: --workers: needs --ray. Add `--ray local` for processes on this machine.\n",
    )


def test_recipes_that_cannot_be_made_or_run_are_named_and_the_others_tried(world):
    huge = [RECIPE["experts"][0], {**RECIPE["experts"][1], "residual_scale": [1, 3e38]}, RECIPE["experts"][2]]
    keys = {"gate_mode": "random", "experts_per_token": 2, "shared_weights": "base", "router": {}}
    experts = [{key: value for key, value in one.items() if key != "positive_texts"} for one in huge]
    recipe = written(world, architecture=["mixtral", "jetmoe"], experts=experts, **keys)
    result = search(recipe, data(world), SETTINGS)
    failures = [trial.failure.partition(";")[0] for trial in result.trials]
    overflow = (
        "its numbers overflow in layer 0, whose weights are finite: they grow beyond 3.4e+38, the largest that float32 "
        "holds."
    )
    unknown = "architecture: 'jetmoe' is not an output family"
    assert failures == [
        "",
        unknown,
        f"trial 2: {overflow}",
        unknown,
    ]
    assert (result.chosen, result.held_out.against_first) == (0, None)
    experts[1]["residual_scale"] = [3e38, 2.9e38]
    recipe = written(world, experts=experts, **keys)
    with pytest.raises(IncompatibleError) as refused:
        search(recipe, data(world), SETTINGS)
    assert str(refused.value).splitlines() == [
        f"{recipe}: none of its merges could be tried:",
        f"  - trial 0: {overflow}",
        f"  - trial 1: {overflow}",
    ]


def test_models_that_are_not_there_are_named_with_the_recipe_s_lines(world, run):
    experts = [*RECIPE["experts"][:2], {**RECIPE["experts"][2], "source_model": str(world / "proze")}]
    recipe = written(world, experts=experts)
    line = next(n for n, text in enumerate(recipe.read_text().splitlines(), 1) if "proze" in text)
    code, _, errors = run("search", recipe, "-o", "-", f"--data=code={data(world)['code'][0]}")
    head, problem = errors.splitlines()[:2]
    assert (code, head) == (2, f"error: {recipe}: 1 problem:")
    assert problem.startswith(f"  - line {line}: experts[2].source_model: {world / 'proze'}: there is no such folder")


@pytest.mark.parametrize(
    ("given", "test", "message"),
    [
        (
            ["code"],
            ["french"],
            "--test french=: there is no --data french= to search by.",
        ),
        (
            ["short"],
            [],
            "--data short=: is one document, and a search needs two: one to search by, and one to judge by that it did "
            "not see. Separate documents by lines `<|document|>`, or name other text: --test short=PATH.",
        ),
    ],
)
def test_text_that_cannot_be_held_out_is_refused(world, given, test, message):
    (world / "short.test.txt").write_text("The quick brown fox.")
    paths = {name: [str(world / f"{name}.test.txt")] for name in (*given, *test)}
    with pytest.raises(RefusedError) as refused:
        search(written(world), {n: paths[n] for n in given}, SETTINGS, test={n: paths[n] for n in test})
    assert str(refused.value) == message


def test_the_command_prints_a_table_and_writes_a_config(world, tmp_path, run):
    options = [f"--data={name}={paths[0]}" for name, paths in data(world).items()]
    options += ["--max-tokens=60", "--window=20", "--compute-dtype=float32", "--cost=bytes"]
    recipe = written(world, gate_mode="ridge", shared_weights="base")
    best = tmp_path / "best.yaml"
    code, shown, errors = run("search", recipe, *options, "-o", best)
    assert (code, errors.splitlines()[-2:]) == (0, [f"{best}: written. Next:", f"  moemerge {best} merged/"])
    lines = shown.splitlines()
    assert lines[1].split() == ["trial", "loss", "worst", "size", "active", "tokens", "experts_per_token"]
    assert {line.split()[0] for line in lines[2:4]} in ({"0*", "1"}, {"0", "1*"})
    assert "On held-out text, which the search did not see:" in lines
    assert lines[-1] == (
        "Too few to be sure of code, french: intervals need 5 documents. --max-tokens reads more, if there are more, and "
        "--test names more."
    )
    chosen = load_config(best)
    assert chosen.experts[0].source_model.endswith("/code")
    assert best.read_text().startswith("# Chosen by `moemerge search` from 2 merges of recipe.yaml, by the mean loss\n")
    assert run("search", recipe, *options, "-o", best)[::2] == (
        2,
        f"error: {best}: is there already. Name another file with -o, or pass --overwrite.\n",
    )
    assert run("search", recipe, *options, "-o", recipe, "--overwrite")[::2] == (
        2,
        f"error: {recipe}: is the recipe. Name another file with -o.\n",
    )
    code, shown, _ = run("search", recipe, *options, "-o", "-", "--json")
    facts = json.loads(shown)
    assert load_config(yaml.safe_load(facts["config"])).experts_per_token == chosen.experts_per_token
    assert [trial["values"] for trial in facts["trials"]] == [{"experts_per_token": n} for n in ("2", "1")]


def test_a_wrong_recipe_is_refused_without_pytorch(world):
    recipe = written(world, gate_mode=["ridge", "rigde"])
    code = (
        "import sys\nfrom moemerge.cli import main\ntry:\n    main()\nfinally:\n"
        "    assert not {'torch', 'transformers', 'optuna', 'ray'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "search", str(recipe), f"--data=code={world / 'code.test.txt'}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("rigde")) == (2, 1)
