"""Find the licence of a merged model: the strictest of its sources', where one of them contains the others.

This is no legal advice: it finds the cases in which practice agrees, and refuses to guess in all others.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Final

from moemerge.errors import RefusedError

# From lenient to strict, by the Hub's identifiers (https://huggingface.co/docs/hub/repositories-licenses): a work with
# parts under one licence may as a whole be under any later one, if the notices of its parts are kept.
_CHAINS: Final = (
    # Each requires all that those before it require: nothing, notices, no use of names, a patent clause.
    ("wtfpl", "unlicense", "pddl", "cc0-1.0", "isc", "mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0"),
    # GNU's list (https://www.gnu.org/licenses/license-list.html): Apache 2.0 fits version 3 alone; LGPL 2.1, section 3;
    # MPL 2.0, section 3.3. The Hub's "gpl-2.0" does not say "or later", so nothing is above it.
    ("bsd-3-clause", "lgpl-2.1", "gpl-2.0"),
    ("lgpl-2.1", "gpl-3.0"),
    ("apache-2.0", "mpl-2.0", "lgpl-3.0", "gpl-3.0", "agpl-3.0"),
    # Creative Commons' chart of adapters' licences (https://creativecommons.org/faq/#can-i-combine-material-under-different-creative-commons-licenses-in-my-work)
    # and its list of compatible licences, in which BY-SA 4.0 leads to GPL 3. Apache 2.0, section 4, allows other terms
    # for the whole.
    ("apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "gpl-3.0"),
    ("cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    ("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
    ("cc-by-sa-3.0", "cc-by-sa-4.0"),
    ("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"),
    ("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    # Licences with terms of their own, which have to be passed on. Each version of Llama has its own agreement.
    *(
        ("apache-2.0", terms)
        for terms in (
            "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "openrail", "openrail++",
            "bigscience-openrail-m", "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "creativeml-openrail-m",
        )
    ),
)  # fmt: skip
_UNNAMED: Final = "other"


def strictest(licences: Mapping[str, str | None]) -> str:
    """Find the licence of what is made of all sources: the one of theirs that contains all others.

    Args:
        licences: each source's licence in lower case, as the Hub calls it or `other NAME LINK`, or None.

    Raises:
        RefusedError: one is missing, forbids derivatives, or there is no order between two; names every source's.
    """
    found = sorted({licence for licence in licences.values() if licence})
    if lacking := [source for source, licence in licences.items() if not licence]:
        raise _refusal(f"{lacking[0]} has none in its model card", licences)
    if forbidding := [licence for licence in found if re.search(r"\bnd\b", licence)]:
        raise _refusal(f"{forbidding[0]} forbids to share what is made of it", licences)
    if len(licences) > 1 and _UNNAMED in found:
        raise _refusal(f"{_UNNAMED!r} without a name may be any licence", licences)
    for licence in found:
        if all(other == licence or licence in _above(other) for other in found):
            return licence
    first, second = next((a, b) for a in found for b in found if a < b and b not in _above(a) and a not in _above(b))
    raise _refusal(f"neither {first} nor {second} contains the other", licences)


def _above(licence: str) -> set[str]:
    """Every stricter licence that contains this one."""
    found: set[str] = set()
    reached = {licence}
    while reached:
        reached = {stricter for chain in _CHAINS for lenient, stricter in pairwise(chain) if lenient in reached} - found
        found |= reached
    return found


def _refusal(reason: str, licences: Mapping[str, str | None]) -> RefusedError:
    lines = [f"  - {source}: {licence or 'none'}" for source, licence in licences.items()]
    return RefusedError(
        "\n".join(
            [
                f"the sources' licences do not say which one the merged model has: {reason}.",
                *lines,
                "Read their terms, then name the merged model's with --license NAME.",
            ]
        )
    )
