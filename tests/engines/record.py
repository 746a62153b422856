"""Gather what engines answered into the package's record, `moemerge/families/engines.json`.

    python -m tests.engines.record FOLDER [--accept]

Where a mixture that was right is so no longer, or is no longer tried, nothing is written, and what it is is printed, but
for `--accept`. Where one of `cases` was not tried, nothing is ever written.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from moemerge.engines import ENGINES
from moemerge.families import engines
from moemerge.families.selection import MOE_FAMILIES
from tests.engines.cases import cases

RECORD: Final = Path(engines.__file__).with_name("engines.json")
_MOST: Final = 110
"""Characters of a message."""
_FOLDERS: Final = re.compile(r"(?<![\w.:/])/(?:\S*/)?(?=\S)")
"""Of a path its folders, of an address or a division nothing."""


def main(root: Path, target: Path = RECORD, *, accept: bool = False) -> int:
    """Write the record; gives the exit code."""
    found = _gather(root)
    missing = list(_missing(found))
    sys.stdout.writelines(f"{line}\n" for line in missing)
    if missing:
        sys.stdout.write(f"{len(missing)} were not tried: not recorded. Run tests.engines.make, then every engine.\n")
        return 1
    lost = list(regressions(json.loads(target.read_text(encoding="utf-8")), found))
    sys.stdout.writelines(f"{line}\n" for line in lost)
    if lost and not accept:
        sys.stdout.write(f"{len(lost)} that were right are so no longer: not recorded. With --accept they are.\n")
        return 1
    target.write_text(_as_text(found), encoding="utf-8")
    return 0


def _missing(found: dict[str, Any]) -> Iterator[str]:
    """Family and facts of the mixtures that are to be tried and are not in the record."""
    tried = {(family, *row["facts"]) for family, rows in found["families"].items() for row in rows}
    for family, *facts in dict.fromkeys((case.family, *sorted(case.facts)) for case in cases()):
        if (family, *facts) not in tried:
            yield f"{family} ({', '.join(facts)})"


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
                    if not engines.is_right(row[engine]):
                        facts = ", ".join(row["facts"])
                        yield f"{family} ({facts}), {ENGINES[engine]}: {old[engine]} before, now {row[engine]}"


def _successors(
    old: dict[str, Any], rows: list[dict[str, Any]], new_rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The new rows for an old one: of the same facts, or where these have other names now, those of the same form."""
    if same := [row for row in new_rows if row["facts"] == old["facts"]]:
        return same
    known = [row["facts"] for row in rows]
    return [row for row in new_rows if row["form"] == old["form"] and row["facts"] not in known]


def _gather(root: Path) -> dict[str, Any]:
    """The record of what lies in a folder of cases."""
    told: dict[str, dict[str, str]] = {}
    makers: dict[str, str] = {}
    references: set[str] = set()
    families: dict[str, list[dict[str, Any]]] = {family: [] for family in MOE_FAMILIES}
    for path in sorted(root.glob("*/case.json")):
        case = json.loads(path.read_text())
        references.add(case["reference"])
        row = {"facts": case["facts"], "form": case["form"]}
        for engine in ENGINES:
            answer = path.with_name(f"{engine}.answer.json")
            if not answer.exists():
                raise SystemExit(f"{answer}: is missing. Run this engine.")
            found = json.loads(answer.read_text())
            maker = found["engine"] + (f" with files of code {found['made_by']}" if "made_by" in found else "")
            if maker != makers.setdefault(engine, maker):
                raise SystemExit(f"{answer}: is of {maker}, others of {makers[engine]}. Run this engine again.")
            told[engine] = {"version": found["engine"], "date": min(found["date"], told.get(engine, found)["date"])}
            row[engine] = _result(found)
        families[case["family"]].append(row)
    if len(references) != 1:
        computed = ", ".join(sorted(references)) or "none"
        raise SystemExit(
            f"{root}: expected cases computed by one transformers, found {computed}. Run tests.engines.make."
        )
    (reference,) = references
    rows_of = {family: rows for family, rows in families.items() if rows}
    return {"reference": reference, "engines": {name: told[name] for name in ENGINES}, "families": rows_of}


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
    sys.exit(main(Path(sys.argv[1]), accept="--accept" in sys.argv))
