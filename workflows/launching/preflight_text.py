"""Findings of a preflight as people read them: one line each, a hint below what did not pass."""

from __future__ import annotations

from collections.abc import Sequence

from infra.preflight import Finding
from infra.secrets import mask
from workflows.tables import aligned


def preflight_text(findings: Sequence[Finding]) -> str:
    """A table in the order of the checks, and hints."""
    rows = [
        [finding.verdict, finding.check, finding.where, " ".join(mask(finding.what).split())] for finding in findings
    ]
    lines = []
    for line, finding in zip(aligned(rows).splitlines(), findings, strict=True):
        lines.append(line)
        if finding.verdict != "pass" and finding.hint:
            lines.append(f"      hint: {mask(finding.hint)}")
    return "\n".join(lines)
