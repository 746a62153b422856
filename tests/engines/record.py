"""Gather what engines answered into the package's record, `moemerge/formats/engines.json`.

    python -m tests.engines.record FOLDER [--accept]

Where a mixture that was right is so no longer, nothing is written, and what it is is printed, but for `--accept`.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from moemerge.engines import ENGINES
from moemerge.formats import MOE_FAMILIES, engines

RECORD: Final = Path(engines.__file__).with_name("engines.json")
_MOST: Final = 110
"""Characters of a message."""
_FOLDERS: Final = re.compile(r"(?<![\w.:/])/(?:\S*/)?(?=\S)")
"""Of a path its folders, of an address or a division nothing."""


def main(root: Path, target: Path = RECORD, *, accept: bool = False) -> int:
    """Write the record; gives the exit code."""
    found = _gather(root)
    lost = list(regressions(json.loads(target.read_text(encoding="utf-8")), found))
    sys.stdout.writelines(f"{line}\n" for line in lost)
    if lost and not accept:
        sys.stdout.write(f"{len(lost)} that were right are so no longer: not recorded. With --accept they are.\n")
        return 1
    target.write_text(_as_text(found), encoding="utf-8")
    return 0


def regressions(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What an engine computed rightly before and does not now: family, facts, engine, and what was found of it."""
    known = {}
    for family, rows in before["families"].items():
        for row in rows:  # one whose facts have other names by now is known by what is written
            known |= {(family, row["form"]): row, (family, *row["facts"]): row}
    for family, rows in now["families"].items():
        for row in rows:
            old = known.get((family, *row["facts"])) or known.get((family, row["form"])) or {}
            for engine in now["engines"]:
                if engine in old and engines.is_right(old[engine]) and not engines.is_right(row[engine]):
                    facts = ", ".join(row["facts"])
                    yield f"{family} ({facts}), {ENGINES[engine]}: {old[engine]} before, now {row[engine]}"


def _gather(root: Path) -> dict[str, Any]:
    """The record of what lies in a folder of cases."""
    told: dict[str, dict[str, str]] = {}
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
            if found["engine"] != told.get(engine, {"version": found["engine"]})["version"]:
                raise SystemExit(
                    f"{answer}: is of {found['engine']}, others of {told[engine]['version']}. Run it again."
                )
            told[engine] = {"version": found["engine"], "date": min(found["date"], told.get(engine, found)["date"])}
            row[engine] = _result(found)
        families[case["family"]].append(row)
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
