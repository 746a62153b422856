"""What is said of engines is what was measured: the record, and what is concluded from it."""

import json
from pathlib import Path

import pytest

from moemerge.engines import ENGINES
from moemerge.formats import MOE_FAMILIES, engines
from moemerge.formats.engines import TOLERANCE, readings, trouble_of
from tests.engines.cases import cases

RECORD = json.loads(Path(engines.__file__).with_name("engines.json").read_text())
ROWS = [(family, row) for family, rows in RECORD["families"].items() for row in rows]


def test_every_kind_of_mixture_is_in_the_record_as_it_is_written_now():
    made = {(case.family, case.facts): case.form for case in reversed(list(cases()))}
    assert {(family, frozenset(row["facts"])): row["form"] for family, row in ROWS} == made
    assert set(RECORD["families"]) == set(MOE_FAMILIES)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_concluded_is_what_was_measured(engine):
    measured = [(family, frozenset(row["facts"]), row[engine]) for family, row in ROWS if engine in row]
    assert len(measured) > 100
    for family, facts, found in measured:
        trouble = trouble_of(engine, family, facts)
        right = isinstance(found, float) and found <= TOLERANCE
        assert (trouble is None) == right, (family, sorted(facts), found)
        if isinstance(found, float) and not right:
            assert trouble.apart >= found
        assert right or trouble.words


def test_every_engine_is_right_with_something_and_wrong_with_something():
    for engine in ENGINES:
        found = [reading.troubles for reading in readings()[engine].values()]
        assert any(not troubles for troubles in found) or any(
            trouble.facts for troubles in found for trouble in troubles
        )
        assert any(troubles for troubles in found)
