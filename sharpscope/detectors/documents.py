"""A gate's result as JUnit XML, JSON and markdown."""

from __future__ import annotations

import json
import math
import re
from html import escape
from xml.etree import ElementTree

from sharpscope._version import __version__
from sharpscope.detectors.gate import Checked, GateResult

SUITE = "sharpscope check"
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SIGN = {"passed": "✅", "warned": "⚠️", "failed": "❌", "unmeasured": "❔"}


def junit(gate: GateResult) -> str:
    """Return JUnit XML, one test case a rule: failed is a failure, unmeasured an error, warned is skipped."""
    kinds = [check.outcome for check in gate.checks]
    counts = {
        "tests": str(len(kinds)),
        "failures": str(kinds.count("failed")),
        "errors": str(kinds.count("unmeasured")),
        "time": "0",
    }
    root = ElementTree.Element("testsuites", {"name": SUITE, **counts})
    skipped = {"skipped": str(kinds.count("warned"))}
    suite = ElementTree.SubElement(root, "testsuite", {"name": SUITE, **counts, **skipped})
    for check in gate.checks:
        _case(suite, check)
    ElementTree.indent(root)
    body = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}\n'


def _case(suite: ElementTree.Element, check: Checked) -> None:
    names = {"classname": f"sharpscope.{check.finding.detector}", "name": check.rule.id, "time": "0"}
    case = ElementTree.SubElement(suite, "testcase", {key: _clean(value) for key, value in names.items()})
    reason = _clean(check.finding.reason)
    if check.outcome == "passed":
        ElementTree.SubElement(case, "system-out").text = reason
        return
    tag = {"failed": "failure", "unmeasured": "error", "warned": "skipped"}[check.outcome]
    facts = {"message": f"{check.finding.verdict}: {reason}"}
    if tag != "skipped":
        facts["type"] = check.finding.verdict
    ElementTree.SubElement(case, tag, facts)


def _clean(text: str) -> str:
    """Return the text without the characters that no XML may hold."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def as_json(gate: GateResult) -> str:
    """Return everything as JSON; a number that is none is null, an infinite end of an interval too."""
    rules = [
        {
            "id": check.rule.id,
            "outcome": check.outcome,
            "severity": check.rule.severity,
            "detector": check.finding.detector,
            "verdict": check.finding.verdict,
            "score": _number(check.finding.score),
            "interval": [_number(end) for end in check.finding.interval],
            "needed": check.finding.needed,
            "reason": check.finding.reason,
        }
        for check in gate.checks
    ]
    found = {
        "sharpscope": __version__,
        "passed": gate.passed,
        "exit_code": gate.exit_code,
        "undecided": gate.undecided,
        "rules": rules,
    }
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def markdown(gate: GateResult) -> str:
    """Return a heading and a table, for a comment on a pull request or a step summary."""
    lines = [f"### {gate.headline}", "", "| | rule | verdict | why |", "|---|---|---|---|"]
    for check in gate.checks:
        cells = (check.rule.id, check.finding.verdict, check.finding.reason)
        lines.append(f"| {_SIGN[check.outcome]} | {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Return the text as it is to be read: no markup, no new cell, no line break."""
    flat = " ".join(_clean(text).split())
    return re.sub(r"([\\`*_\[\]|~#@])", r"\\\1", escape(flat, quote=False))
