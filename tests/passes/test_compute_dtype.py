"""The dtype of a pass: by a trial on a CPU, where the model is large enough that it matters, unless it is asked for."""

import pytest
import torch

from moemerge.errors import RefusedError
from moemerge.passes import compute_dtype
from moemerge.passes.compute_dtype import choose_dtype, faster_dtype, find_compute

CPU = torch.device("cpu")
LARGE = ((768,), (576, 1536), (1536, 576), (192, 576))


def timings(**by_dtype: list[float]):
    """Times that are given for the products of each dtype in turn, the last one again and again."""
    left = {getattr(torch, name): iter(given) for name, given in by_dtype.items()}
    seen = []

    def seconds(dtype: torch.dtype, *size: int) -> float:
        seen.append((dtype, size))
        return next(left[dtype], by_dtype[str(dtype).removeprefix("torch.")][-1])

    return seconds, seen


@pytest.mark.parametrize(
    ("single", "half", "expected"),
    [
        ([2.3], [1.0], "bfloat16"),
        ([1.31], [1.0], "bfloat16"),
        ([1.29], [1.0], "float32"),
        ([1.0], [1.0], "float32"),
        ([1.0], [4.0], "float32"),
        # One slow moment of the machine decides nothing.
        ([9.0, 1.0], [1.0], "float32"),
        ([2.0], [9.0, 1.0], "bfloat16"),
        ([2.0], [9.0, 1.9, 1.0], "bfloat16"),
    ],
)
def test_the_trial_takes_bfloat16_where_it_is_clearly_faster(single, half, expected):
    seconds, seen = timings(float32=single, bfloat16=half)
    assert faster_dtype(576, 1024, seconds) == getattr(torch, expected)
    assert seen[:2] == [(torch.float32, (576, 1024)), (torch.bfloat16, (576, 1024))]  # in turns
    assert len(seen) == (4 if half == [4.0] else 10)  # a hopeless trial, of a CPU without such units, ends soon
    assert faster_dtype(576, 1024, seconds) == getattr(torch, expected)
    assert len(seen) <= 10  # and each is made once


def test_both_dtypes_are_timed_on_this_machine():
    assert all(compute_dtype._seconds_of_product(dtype, 64, 32) > 0 for dtype in (torch.float32, torch.bfloat16))
    assert faster_dtype(64, 32) in {torch.float32, torch.bfloat16}


def test_a_small_model_is_run_in_float32_without_a_trial(monkeypatch):
    tried = []
    monkeypatch.setattr(compute_dtype, "faster_dtype", lambda *size: tried.append(size) or torch.bfloat16)
    assert choose_dtype(CPU, "auto", [(64,), (128, 64), (2, 511, 512)]) == torch.float32
    assert choose_dtype(CPU, "auto", []) == torch.float32
    assert not tried
    assert choose_dtype(CPU, "auto", [(512, 512)]) == torch.bfloat16
    # A stack of experts by one of them, and long sides cut.
    assert choose_dtype(CPU, "auto", [*LARGE, (8, 14336, 900)]) == torch.bfloat16
    assert tried == [(512, 512), (1024, 900)]


def test_what_is_asked_for_is_taken_on_every_device_and_bfloat16_without_a_cpu():
    for device in (CPU, torch.device("cuda"), torch.device("mps")):
        for name in ("float32", "bfloat16"):
            assert choose_dtype(device, name, LARGE) == getattr(torch, name)
    assert choose_dtype(torch.device("cuda"), "auto", LARGE) == torch.bfloat16
    assert find_compute("cpu", "bfloat16", ()) == compute_dtype.Compute(CPU, torch.bfloat16)


def test_another_dtype_is_refused():
    with pytest.raises(RefusedError) as caught:
        find_compute("cpu", "float16", ())
    assert str(caught.value) == "compute_dtype: 'float16' is not one of auto, float32, bfloat16."
