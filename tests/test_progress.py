"""Tasks that progress is reported of."""

from typing import get_args

from moemerge.progress import UNITS, Stage, Task, Unit


def test_each_stage_has_a_unit():
    assert tuple(UNITS) == get_args(Stage)
    assert {*UNITS.values(), Task("losses", in_parts=True).unit} == set(get_args(Unit))


def test_a_task_is_its_stage_and_whom_it_is_about():
    assert (str(Task("weights")), Task("weights").unit) == ("weights", "bytes")
    assert (str(Task("text", "code")), Task("text", "code").unit) == ("text of code", "tokens")
