"""What ends a text, and how its tokens are chosen, by a model's own settings."""

import json
import shutil

import pytest
import torch

from moemerge.errors import CheckpointError, RefusedError
from moemerge.passes.generating import Sampling, generate_tokens, stop_tokens
from tests.support.models import edit_json, load, tokenizer

IDS = [5, 6, 7, 8]


@pytest.fixture
def folder(tmp_path, llamas):
    return shutil.copytree(llamas[0], tmp_path / "model")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": 1e-45}, "temperature: expected 0, which takes the most likely token, or a number from 1e-06, found 1e-45."),
        ({"temperature": float("nan")}, "temperature: expected 0, which takes the most likely token, or a number from 1e-06, found nan."),
        ({"temperature": float("inf")}, "temperature: expected 0, which takes the most likely token, or a number from 1e-06, found inf."),
        ({"top_p": float("nan")}, "top_p: expected a number from 0 to 1, found nan."),
        ({"seed": 2**64}, "seed: expected a whole number from 0 to 18446744073709551615, found 18446744073709551616."),
        ({"seed": -1}, "seed: expected a whole number from 0 to 18446744073709551615, found -1."),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_used_are_refused(keys, message):
    with pytest.raises(RefusedError) as refused:
        Sampling(**keys)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "sampling", [Sampling(4, 1e-6), Sampling(4, 1e6), Sampling(4, 1.0, 0.0), Sampling(4, 1.0, seed=2**64 - 1)]
)
def test_the_last_numbers_that_are_taken_can_be_used(folder, sampling):
    (added,) = generate_tokens(load(folder), [IDS], sampling, folder=folder, stops=[])
    assert len(added) == 4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("top_k", "x", "expected a whole number from 0, found 'x'"),
        ("top_k", -1, "expected a whole number from 0, found -1"),
        ("top_k", True, "expected a whole number from 0, found True"),
        ("repetition_penalty", 0, "expected a number from 0.01 to 100, found 0"),
        ("repetition_penalty", 1e-45, "expected a number from 0.01 to 100, found 1e-45"),
        ("min_p", 5, "expected a number from 0 to 1, found 5"),
    ],
)
def test_a_models_settings_that_cannot_be_used_are_refused(folder, key, value, message):
    (folder / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError) as damaged:
        generate_tokens(load_without_settings(folder), [IDS], Sampling(4, 1.0), folder=folder, stops=[])
    path = folder / "generation_config.json"
    assert str(damaged.value) == f"{path}: {key}: {message}. Correct it, or take it out."


@pytest.mark.parametrize("own", [{"repetition_penalty": 2}, {"repetition_penalty": 0.01, "min_p": 1, "top_k": 0}])
def test_whole_numbers_do_for_a_models_settings(folder, own):
    (folder / "generation_config.json").write_text(json.dumps(own))
    (added,) = generate_tokens(load_without_settings(folder), [IDS], Sampling(4, 1e-6), folder=folder, stops=[])
    assert len(added) == 4


def load_without_settings(folder):
    """The model of a folder, as if it had no settings; transformers may refuse them when it loads the model."""
    (folder / "generation_config.json").rename(folder / "aside")
    try:
        return load(folder)
    finally:
        (folder / "aside").rename(folder / "generation_config.json")


def test_a_start_in_a_batch_is_continued_as_if_it_were_alone(folder):
    edit_json(folder / "generation_config.json", repetition_penalty=5.0)
    model, starts = load(folder), [IDS, IDS[:2], [9, 4, 4]]
    together = generate_tokens(model, starts, Sampling(6), folder=folder, stops=[])
    alone = [generate_tokens(model, [start], Sampling(6), folder=folder, stops=[])[0] for start in starts]
    assert together == alone
    keys = {"repetition_penalty": 1.0, "do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    assert together[0] != model.generate(torch.tensor([IDS]), **keys)[0, 4:].tolist()
    ends = [alone[1][0]]  # what pads the batch is not met again, so that this token is chosen as before
    assert generate_tokens(model, starts, Sampling(6), folder=folder, stops=ends)[1] == []


def test_a_text_ends_before_a_token_that_ends_it(folder):
    model = load(folder)
    (whole,) = generate_tokens(model, [IDS], Sampling(6), folder=folder, stops=[])
    came = []
    (short,) = generate_tokens(model, [IDS], Sampling(6), folder=folder, stops=[whole[3]], on_token=came.append)
    assert short == whole[: whole.index(whole[3])]
    assert came == [*short, whole[3]]


@pytest.mark.parametrize("as_object", [False, True])
def test_the_end_tokens_of_a_model_are_those_of_all_its_files(folder, as_object):
    end = tokenizer().convert_ids_to_tokens(20)
    edit_json(folder / "generation_config.json", eos_token_id=[7, 9])
    edit_json(folder / "tokenizer_config.json", eos_token={"content": end} if as_object else end)
    own = tokenizer().eos_token_id  # of the tokenizer that is used, which is another model's
    assert stop_tokens(folder, {"eos_token_id": 11}, tokenizer()) == sorted({7, 9, 11, own, 20})
