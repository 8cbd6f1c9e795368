"""The comparison as Markdown."""

from __future__ import annotations

from tools.upgrade.compare import BODY, BREAKS, ELSEWHERE, GONE, MOVED, NEW, SIGNATURE, Change
from tools.upgrade.manifest import Manifest

TITLES = {
    GONE: "Gone",
    MOVED: "Moved away from where we look",
    BREAKS: "Our code no longer fits",
    NEW: "Names that are now vLLM's too",
    ELSEWHERE: "Moved, and our code knows, or only takes it for granted",
    SIGNATURE: "Signature changed, our code still fits",
    BODY: "Body changed, of what we override or take for granted: read again",
}


def report(base: str, name: str, manifest: Manifest, changes: list[Change]) -> str:
    """Of a vLLM ``name`` against the manifest of ``base``."""
    changed = {change.place for change in changes}
    same = sum(place not in changed for place in manifest)
    lines = [f"# vLLM {name} against {base}", "", f"{len(manifest)} interfaces are used; {same} are unchanged.", ""]
    lines += ["| change | count |", "|---|---|"]
    lines += [f"| {title} | {sum(change.kind == kind for change in changes)} |" for kind, title in TITLES.items()]
    for kind, title in TITLES.items():
        mine = [change for change in changes if change.kind == kind]
        if not mine:
            continue
        lines += ["", f"## {title}", ""]
        for change in mine:
            where = ", ".join(change.interface.where)
            how = ", ".join(change.interface.how)
            lines.append(f"- `{change.place}` ({how}{'; ' + where if where else ''}): {change.told}")
    return "\n".join(lines) + "\n"
