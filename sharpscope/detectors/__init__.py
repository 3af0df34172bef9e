"""Detectors judge a finished scan; a gate asks several. Needs no torch.

A detector is anything that takes a result and returns a :class:`Finding`. One of your own takes ten lines:

>>> from dataclasses import dataclass
>>> from sharpscope.detectors import Finding
>>> @dataclass(frozen=True)
... class Seconds:
...     '''Judges how long the scan took.'''
...
...     limit: float
...
...     def __call__(self, result):
...         found = result.meta["cost"]["seconds"]
...         verdict = "pass" if found <= self.limit else "fail"
...         return Finding("seconds", verdict, found, (found, found), f"{found:g} s, limit {self.limit:g}")

It works beside the built-in ones:

>>> from types import SimpleNamespace
>>> from sharpscope import check
>>> result = SimpleNamespace(meta={"cost": {"seconds": 40.0}, "measures": {}})  # or sharpscope.open("runs/scan")
>>> check(result, [Seconds(limit=60)])
passed     1 Seconds: 40 s, limit 60
Gate passed: 1 passed of 1 rule.

Named in a file of rules, ``detector = "seconds"`` and ``limit = 60``, once its package says in pyproject.toml:

.. code-block:: toml

    [project.entry-points."sharpscope.detectors"]
    seconds = "my_package:Seconds"
"""

from sharpscope.detectors.barrier import BarrierDetector
from sharpscope.detectors.evaluation import EvaluationDetector, OODRegression
from sharpscope.detectors.findings import Detector, Finding, Limits, limits
from sharpscope.detectors.gate import Checked, GateResult, check
from sharpscope.detectors.layers import SharpnessDetector, StragglerDetector
from sharpscope.detectors.rules import Rule, Rules, read_rules, rules_from
from sharpscope.detectors.scan import MeasuredDetector, RecommendedAlphaDetector

__all__ = [
    "BarrierDetector",
    "Checked",
    "Detector",
    "EvaluationDetector",
    "Finding",
    "GateResult",
    "Limits",
    "MeasuredDetector",
    "OODRegression",
    "RecommendedAlphaDetector",
    "Rule",
    "Rules",
    "SharpnessDetector",
    "StragglerDetector",
    "check",
    "limits",
    "read_rules",
    "rules_from",
]
