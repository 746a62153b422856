"""Gather what engines answered into the package's record, `moemerge/families/engines.json`.

    python -m tests.engines.record FOLDER [--new] [--accept]

With --new, what the record has of other mixtures stays, and so does what it has of engines that were not run, if all are
of the versions that it names. Where a mixture that was right is so no longer, or is no longer tried, nothing is written,
and what it is is printed, but for `--accept`. Where one of `cases` was not tried, nothing is ever written.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from moemerge.engines import ENGINES
from moemerge.families import engines
from moemerge.families.multimodal import VISION_MIXTURES
from moemerge.families.selection import MOE_FAMILIES
from tests.engines.cases import tried

RECORD: Final = Path(engines.__file__).with_name("engines.json")
_MOST: Final = 110
"""Characters of a message."""
_FOLDERS: Final = re.compile(r"(?<![\w.:/])/(?:\S*/)?(?=\S)")
"""Of a path its folders, of an address or a division nothing."""


def recorded() -> set[tuple[str, frozenset[str], str]]:
    """Family, facts and form of what the record has of every engine."""
    families = json.loads(RECORD.read_text(encoding="utf-8"))["families"]
    return {
        (family, frozenset(row["facts"]), row["form"])
        for family, rows in families.items()
        for row in rows
        if row.keys() >= {*ENGINES}
    }


def main(root: Path, target: Path = RECORD, *, only_new: bool = False, accept: bool = False) -> int:
    """Write the record; gives the exit code."""
    before = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    found = _gather(root, before if only_new else {})
    missing = list(_missing(found))
    sys.stdout.writelines(f"{line}\n" for line in missing)
    if missing:
        sys.stdout.write(f"{len(missing)} were not tried: not recorded. Run tests.engines.make, then every engine.\n")
        return 1
    lost = list(regressions(before, found))
    sys.stdout.writelines(f"{line}\n" for line in lost)
    if lost and not accept:
        sys.stdout.write(f"{len(lost)} that were right are so no longer: not recorded. With --accept they are.\n")
        return 1
    target.write_text(_as_text(found), encoding="utf-8")
    return 0


def _missing(found: dict[str, Any]) -> Iterator[str]:
    """Family and facts of the mixtures that are to be tried and are not in the record."""
    known = {(family, *row["facts"]) for family, rows in found["families"].items() for row in rows}
    for case, is_new in tried():
        facts = sorted(case.facts)
        if is_new and (case.family, *facts) not in known:
            yield f"{case.family} ({', '.join(facts)})"


def regressions(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What an engine computed rightly before and does not now: family, facts, engine, and what was found of it."""
    for family, rows in before["families"].items():
        new_rows = now["families"].get(family, [])
        for old in rows:
            right = [name for name in now["engines"] if name in old and engines.is_right(old[name])]
            successors = _successors(old, rows, new_rows)
            if right and not successors:
                named = ", ".join(ENGINES[engine] for engine in right)
                yield f"{family} ({', '.join(old['facts'])}), {named}: right before, now not tried"
            for row in successors:
                for engine in right:
                    if not engines.is_right(found := row.get(engine, "not tried")):
                        facts = ", ".join(row["facts"])
                        yield f"{family} ({facts}), {ENGINES[engine]}: {old[engine]} before, now {found}"


def _successors(
    old: dict[str, Any], rows: list[dict[str, Any]], new_rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The new rows for an old one: of the same facts, or where these have other names now, those of the same form."""
    if same := [row for row in new_rows if row["facts"] == old["facts"]]:
        return same
    known = [row["facts"] for row in rows]
    return [row for row in new_rows if row["form"] == old["form"] and row["facts"] not in known]


def _gather(root: Path, before: dict[str, Any]) -> dict[str, Any]:
    """The record of what lies in a folder of cases, and of what was recorded before of others."""
    told: dict[str, dict[str, str]] = dict(before.get("engines", {}))
    makers: dict[str, str] = {}
    references: set[str] = {before["reference"]} if before else set()
    families = _kept(before)
    for path, case in _read_cases(root):
        references.add(case["reference"])
        row = {"facts": case["facts"], "form": case["form"]}
        rows, key = families[case["family"]], tuple(case["facts"])
        for engine in ENGINES:
            answer = path.with_name(f"{engine}.answer.json")
            if not answer.exists():
                if not before:
                    raise SystemExit(f"{answer}: is missing. Run this engine.")
                row |= {engine: rows[key][engine]} if engine in rows.get(key, {}) else {}
                continue
            found = json.loads(answer.read_text())
            maker = found["engine"] + (f" with files of code {found['made_by']}" if "made_by" in found else "")
            if maker != makers.setdefault(engine, maker):
                raise SystemExit(f"{answer}: is of {maker}, others of {makers[engine]}. Run this engine again.")
            told[engine] = _dated(answer, found, told.get(engine))
            row[engine] = _result(found)
        if case["form"]:
            rows[key] = row
        elif key in rows:
            rows[key] |= {
                engine: max(rows[key].get(engine, row[engine]), row[engine], key=_how_bad)
                for engine in ENGINES
                if engine in row
            }
    if len(references) != 1:
        computed = ", ".join(sorted(references)) or "none"
        raise SystemExit(
            f"{root}: expected cases computed by one transformers, found {computed}. Run tests.engines.make."
        )
    (reference,) = references
    rows_of = {family: list(rows.values()) for family, rows in families.items() if rows}
    return {"reference": reference, "engines": {name: told[name] for name in ENGINES}, "families": rows_of}


def _kept(before: dict[str, Any]) -> dict[str, dict[tuple[str, ...], dict[str, Any]]]:
    """The rows of each family that the record has and that are made so now, by their facts."""
    now = {(case.family, *sorted(case.facts), case.form) for case, is_new in tried() if is_new}
    rows = before.get("families", {})
    return {
        family: {
            tuple(row["facts"]): row for row in rows.get(family, []) if (family, *row["facts"], row["form"]) in now
        }
        for family in (*MOE_FAMILIES, *(mixture.model_type for mixture in VISION_MIXTURES.values()))
    }


def _read_cases(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the cases of a folder: last those whose facts are others' too, which have no form of their own."""
    found = [(path, json.loads(path.read_text())) for path in sorted(root.glob("*/case.json"))]
    yield from sorted(found, key=lambda case: case[1]["form"] is None)


def _dated(answer: Path, found: dict[str, Any], before: dict[str, str] | None) -> dict[str, str]:
    """Version of an engine, with the first and the last day on which it was asked."""
    version, date = found["engine"], found["date"]
    if before and before["version"] != version:
        raise SystemExit(f"{answer}: is of {version}, the record of {before['version']}. Run every case without --new.")
    days = sorted({date, *(before[key] for key in ("date", "last_date") if before and key in before)})
    return {"version": version, "date": days[0]} | ({"last_date": days[-1]} if len(days) > 1 else {})


def _how_bad(found: float | str) -> tuple[bool, bool, float]:
    """What is worse is larger: something else without a word, then a failure, then what is right."""
    number = math.inf if found == engines.NAN else found
    is_number = isinstance(number, float)
    return not engines.is_right(number), is_number, number if is_number else 0.0


def _as_text(record: dict[str, Any]) -> str:
    """The record as JSON, a line for each mixture."""
    lines = [
        f"    {json.dumps(family)}: [\n      " + ",\n      ".join(map(json.dumps, rows)) + "\n    ]"
        for family, rows in record["families"].items()
    ]
    head = json.dumps({key: record[key] for key in ("reference", "engines")}, indent=2)[:-2]
    return f'{head},\n  "families": {{\n' + ",\n".join(lines) + "\n  }\n}\n"


def _result(found: dict[str, Any]) -> float | str:
    """How far log-probabilities are apart, or why that is not all."""
    if "fails" in found:
        sentence = " ".join(found["fails"].removeprefix("RuntimeError: ").split()).split(". ")[0]
        told = _FOLDERS.sub("", sentence)
        return told if len(told) <= _MOST else told[:_MOST].rsplit(" ", 1)[0] + " ..."
    if found["apart"] is None:
        return engines.NAN
    if found["apart"] <= engines.TOLERANCE and not found["generates"]:
        return "generates other tokens than it computes for a whole text"
    return float(found["apart"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), only_new="--new" in sys.argv, accept="--accept" in sys.argv))
