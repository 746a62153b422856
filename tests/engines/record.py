"""Gather what engines answered into the package's record, `moemerge/formats/engines.json`.

python -m tests.engines.record FOLDER
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, Final

from moemerge.engines import ENGINES
from moemerge.formats import MOE_FAMILIES, engines

_MOST: Final = 110
"""Characters of a message."""


def main(root: Path) -> None:
    """Write the record."""
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
                continue
            found = json.loads(answer.read_text())
            if found["engine"] != told.get(engine, {"version": found["engine"]})["version"]:
                raise SystemExit(
                    f"{answer}: is of {found['engine']}, others of {told[engine]['version']}. Run it again."
                )
            told[engine] = {"version": found["engine"], "date": min(found["date"], told.get(engine, found)["date"])}
            row[engine] = _result(found)
        families[case["family"]].append(row)
    lines = [
        f"    {json.dumps(family)}: [\n      " + ",\n      ".join(map(json.dumps, rows)) + "\n    ]"
        for family, rows in families.items()
        if rows
    ]
    (reference,) = references
    head = json.dumps({"reference": reference, "engines": told}, indent=2)[:-2]
    target = Path(engines.__file__).with_name("engines.json")
    target.write_text(f'{head},\n  "families": {{\n' + ",\n".join(lines) + "\n  }\n}\n", encoding="utf-8")


def _result(found: dict[str, Any]) -> float | str:
    """How far log-probabilities are apart, or why that is not all."""
    if "fails" in found:
        sentence = " ".join(found["fails"].removeprefix("RuntimeError: ").split()).split(". ")[0]
        told = re.sub(r"\S*/", "", sentence)
        return told if len(told) <= _MOST else told[:_MOST].rsplit(" ", 1)[0] + " ..."
    if found["apart"] is None:
        return engines.NAN
    if found["apart"] <= engines.TOLERANCE and not found["generates"]:
        return "generates other tokens than it computes for a whole text"
    return float(found["apart"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
