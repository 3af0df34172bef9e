"""Optimisers that stay near a pre-trained model, the log of what they held back, and callbacks for training loops.

Names are loaded at first use: reading a log needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharpscope.optim.activity import read_audit, sentence
    from sharpscope.optim.adam_spd import AdamSPD
    from sharpscope.optim.audit import AuditLog
    from sharpscope.optim.baselines import SAM, AdamL2SP, AdamRadius, probing
    from sharpscope.optim.plain import audited
    from sharpscope.optim.sgd_spd import SGDSPD

_HOMES = {
    "AdamL2SP": "baselines",
    "AdamRadius": "baselines",
    "AdamSPD": "adam_spd",
    "AuditLog": "audit",
    "SAM": "baselines",
    "SGDSPD": "sgd_spd",
    "audited": "plain",
    "probing": "baselines",
    "read_audit": "activity",
    "sentence": "activity",
}

__all__ = [
    "SAM",
    "SGDSPD",
    "AdamL2SP",
    "AdamRadius",
    "AdamSPD",
    "AuditLog",
    "audited",
    "probing",
    "read_audit",
    "sentence",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sharpscope.optim' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sharpscope.optim.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
