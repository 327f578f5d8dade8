"""What may be the name of an event type, and what was meant by one that is not known.

A name is a code of every log that it ever came into: one that nobody can read or type is never found again.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def unclean(name: str) -> str | None:
    """Why this cannot be an event type, as the end of a sentence; None where it can."""
    if not name.strip():
        return "is blank; send a name such as click"
    if name != name.strip():
        return "begins or ends with white space; send the name alone"
    if not name.isprintable():
        return "holds characters that cannot be shown, such as control characters; send a name of printable ones"
    return None


def unknown(name: str, known: Sequence[str]) -> str:
    """What to say of a name that is none of the declared ones, as the end of a sentence."""
    near = difflib.get_close_matches(name.lower(), known, 1)
    meant = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
    return f"is not among data.events; {meant}"
