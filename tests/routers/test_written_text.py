"""Text that experts write from their prompts, for the routers to be fitted to."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers

from moemerge import load_config, merge, plan_merge
from moemerge.errors import ConfigError, IncompatibleError
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.generating import Sampling, generate_tokens
from moemerge.progress import Task
from moemerge.routers import written_text
from moemerge.routers.initialisation import init_routers
from moemerge.routers.pass_inputs import PassRequest
from moemerge.routers.prompts import encode_prompts
from moemerge.routers.written_text import add_written_text
from tests.passes.test_passes import IS_V4, in_words_of_4, is_known, request
from tests.support.families import DENSE
from tests.support.models import edit_json, load, make_model, tokenizer

PROMPTS = (["The quick fox", "A lazy dog"], ["def main(): pass"], ["Le chat dort", "la nuit tombe"])


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(written_text, "SEQUENCES", 6)
    monkeypatch.setattr(written_text, "NEW_TOKENS", 7)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    return [str(make_model(root / "base", 0)), *(str(make_model(root / f"e{n}", n, tuned_from=0)) for n in (1, 2, 3))]


def plan_of(models, calibration="generate", **keys):
    experts = [{"source_model": model, "positive_prompts": PROMPTS[number]} for number, model in enumerate(models[1:])]
    experts[0] |= keys.pop("first", {})
    settings = {"router": {"calibration": calibration}} if calibration else {}
    return plan_merge(load_config({"base_model": models[0], "experts": experts, **settings, **keys}))


def rows(plan):
    made = init_routers(plan.router_request, seed=0, progress=lambda *_: None)
    return b"".join(made.rows.values()), made.report


def written_in(plan):
    prompts = encode_prompts(plan.base_folder, plan.config, 128, 0)
    asked = PassRequest(
        plan.parts.base,
        plan.mixture,
        plan.family.scoring,
        prompts,
        Compute(torch.device("cpu"), torch.float32),
        plan.config.router,
        plan.experts,
    )
    made = add_written_text(asked, plan.router_request, 0, lambda *_: None).prompts
    assert made[: len(prompts)] == prompts
    return prompts, made[len(prompts) :]


@pytest.mark.parametrize("name", DENSE)
def test_every_family_writes_what_the_whole_model_samples(tmp_path, name):
    model_type, sizes = DENSE[name]
    if not is_known(model_type):
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    if IS_V4 and name == "phi3, longrope":
        pytest.skip("transformers 4 makes its cache anew where a sequence outgrows the original context, if told of it")
    folder = make_model(tmp_path / "base", 1, model_type, **(in_words_of_4(sizes) if IS_V4 else sizes))
    asked = request(folder, (0, 1, 2))
    starts = [prompt.ids for prompt in asked.prompts if len(prompt.ids) > 1] * 2
    model = written_text._streamed(asked.base, asked.compute, lambda _: None)
    found = generate_tokens(model, starts, Sampling(7, 1.0, 0.95, seed=5), folder=folder, stops=[2])
    longest = max(map(len, starts))
    whole = load(folder)
    torch.manual_seed(5)
    ids = torch.tensor([[0] * (longest - len(start)) + list(start) for start in starts])
    expected = whole.generate(
        input_ids=ids, attention_mask=(ids != 0).long(), do_sample=True, temperature=1.0, top_k=0, top_p=0.95,
        max_new_tokens=7, pad_token_id=0,
    )[:, longest:].tolist()  # fmt: skip
    assert found == [row[: row.index(2)] if 2 in row else row for row in expected]


def test_experts_continue_their_prompts_in_turn_and_only_new_tokens_count(models):
    prompts, written = written_in(plan_of(models))
    for expert in range(3):
        own = [prompt for prompt in prompts if prompt.expert == expert and prompt.positive]
        texts = [prompt for prompt in written if prompt.expert == expert]
        assert 0 < len(texts) <= 6
        for text in texts:
            start = next(prompt.ids for prompt in own if text.ids[: len(prompt.ids)] == prompt.ids)
            assert not any(text.counted[: len(start)])
            assert 0 < sum(text.counted) <= 7
            assert text.document == next(prompt.document for prompt in own if prompt.ids == start)


@pytest.mark.parametrize("mode", ["auto", "ridge", "logistic", "hidden"])
def test_routers_are_fitted_to_what_was_written_and_the_same_each_time(models, mode):
    plan = plan_of(models, gate_mode=mode)
    made, report = rows(plan)
    assert made == rows(plan)[0]
    assert made != rows(plan_of(models, None, gate_mode=mode))[0]
    assert report.writers == {0, 1, 2}
    assert report.held_out is None or "e1 " in report.on_unseen_text()


def test_an_expert_ends_where_its_own_files_say(models, tmp_path):
    """As chat fine-tunes do, whose `generation_config.json` or tokenizer alone names the end of a turn."""
    folders = [str(shutil.copytree(model, tmp_path / str(number))) for number, model in enumerate(models)]
    plan = plan_of(folders)
    tokens = [text.ids[-7:] for text in written_in(plan)[1] if sum(text.counted) == 7]
    third = tokens[0][2]
    for file, keys in (
        ("generation_config.json", {"eos_token_id": [2, third]}),
        ("tokenizer_config.json", {"eos_token": tokenizer().convert_ids_to_tokens(third)}),
    ):
        kept = Path(folders[1], file).read_text()
        edit_json(Path(folders[1], file), **keys)
        written = [text for text in written_in(plan)[1] if text.expert == 0]
        Path(folders[1], file).write_text(kept)
        new = [token for text in written for token, own in zip(text.ids, text.counted, strict=True) if own]
        assert new
        assert third not in new


def test_an_expert_writes_with_its_own_penalty(models, tmp_path):
    folders = [str(shutil.copytree(model, tmp_path / str(number))) for number, model in enumerate(models)]
    before = written_in(plan_of(folders))[1]
    edit_json(Path(folders[1], "generation_config.json"), repetition_penalty=50.0)
    after = written_in(plan_of(folders))[1]
    assert [text for text in after if text.expert] == [text for text in before if text.expert]
    assert after != before


def test_folded_norms_are_taken_back_before_an_expert_writes(models):
    assert written_in(plan_of(models, fold_norms=True))[1] == written_in(plan_of(models))[1]


def test_only_the_beginning_of_a_long_prompt_is_continued(models):
    long = "The quick fox jumps over the lazy dog. " * 12 + "The quick"
    prompts, written = written_in(plan_of(models, first={"positive_prompts": [long]}))
    ids = next(prompt.ids for prompt in prompts if prompt.expert == 0)
    assert len(ids) > 121
    for text in (text for text in written if text.expert == 0):
        assert text.ids[:121] == ids[:121]
        assert len(text.ids) <= 128
        assert not any(text.counted[:121])


def test_a_chat_is_continued_where_the_answer_begins(models, tmp_path):
    template = (
        "{% for m in messages %}<s>{{ m.role[:1] }}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>a{% endif %}"
    )
    folders = [shutil.copytree(model, tmp_path / str(number)) for number, model in enumerate(models)]
    for folder in folders:
        (folder / "chat_template.jinja").write_text(template)
    chat = {"messages": [{"role": "user", "content": "The fox"}, {"role": "assistant", "content": "jumps"}]}
    plan = plan_of([str(folder) for folder in folders], first={"positive_prompts": [chat]})
    _, written = written_in(plan)
    encode = tokenizer()
    start = encode("<s>uThe fox</s><s>a", add_special_tokens=False)["input_ids"]
    own = [text for text in written if text.expert == 0]
    assert own
    assert all(list(text.ids[: len(start)]) == start for text in own)
    assert all(any(text.counted[len(start) :]) and not any(text.counted[: len(start)]) for text in own)


def test_progress_names_who_writes_and_counts_tokens(models):
    steps = []
    init_routers(plan_of(models).router_request, seed=0, progress=lambda *step: steps.append(step))
    assert steps[-3:] == [(Task("routers"), done, 3) for done in (1, 2, 3)]
    tokens = steps[:-3]
    assert {(task.stage, task.unit, total) for task, _, total in tokens} == {("text", "tokens", 7)}
    told = [(task.name, done) for task, done, _ in tokens]
    assert told == sorted(told)
    assert {*told} >= {(name, done) for name in ("e1", "e2", "e3") for done in (0, 1, 7)}


def test_a_merge_tells_writing_from_routers(models, tmp_path):
    stages = []
    merge(plan_of(models), tmp_path / "out", progress=lambda task, *_: stages.append(str(task)))
    assert list(dict.fromkeys(stages)) == ["weights", "text of e1", "text of e2", "text of e3", "routers"]


def test_an_expert_with_texts_does_not_write(models, tmp_path):
    (tmp_path / "text.txt").write_text("The dog and the fox\n<|document|>\nA fox and a dog")
    plan = plan_of(models, first={"positive_texts": str(tmp_path / "text.txt")})
    assert plan.config.writers == [1, 2]
    assert {prompt.expert for prompt in written_in(plan)[1]} == {1, 2}
    assert any("2 experts write 64 sequences of up to 64 tokens" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"gate_mode": "delta"}, "gate_mode delta does not use it; hidden, combined, ridge, logistic do"),
        ({"gate_mode": "mergekit_hidden"}, "does not use it"),
    ],
)
def test_methods_that_read_no_such_text_refuse_it(models, keys, said):
    with pytest.raises(ConfigError, match=said):
        plan_of(models, **keys)


def test_without_prompts_there_is_nothing_to_continue(models):
    experts = [{"source_model": model} for model in models[1:]]
    with pytest.raises(ConfigError, match=r"router.calibration: .*no expert has prompts alone"):
        load_config({"base_model": models[0], "experts": experts, "router": {"calibration": "generate"}})


def test_another_vocabulary_is_refused(models, tmp_path):
    other = str(make_model(tmp_path / "other", 5, tuned_from=0, vocab_size=170))
    with pytest.raises(IncompatibleError, match="vocabulary of 170 tokens, the base model 160"):
        plan_of([*models[:3], other])
