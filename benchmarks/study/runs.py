"""Which models are fine-tuned from each base: the two pools of PLAN.md, and what H4 needs besides."""

from dataclasses import asdict, dataclass, replace

RATES, SEEDS, PROBE = (3e-4, 1e-3, 3e-3, 1e-2), (0, 1), 100
TARGETS = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)  # of the clean training loss that pool B is matched at


@dataclass(frozen=True)
class Run:
    """One fine-tune. Pool A is taken at its end, pool B where its training loss meets the target; C serves H4 alone."""

    pool: str
    setting: str
    seed: int
    method: str = "AdamW"  # or L2-SP, SPD, LP-FT, SAM
    rate: float = 1e-3
    renderings: int = 16
    steps: int = 400
    smoothing: float = 0.0
    decay: float = 0.01
    augmented: bool = False

    @property
    def probe(self) -> int:
        """Steps on the visual projection alone, before the others."""
        return PROBE if self.method == "LP-FT" else 0

    @property
    def facts(self) -> dict[str, object]:
        """The run as columns."""
        return asdict(self)


VARIED: tuple[tuple[str, dict], ...] = (
    ("plain", {}),
    ("augmented", {"augmented": True}),
    ("smoothing .1", {"smoothing": 0.1}),
    ("decay 1", {"decay": 1.0}),
    ("1 rendering", {"renderings": 1}),
    ("200 steps", {"steps": 200}),
    ("600 steps", {"steps": 600}),
    ("L2-SP", {"method": "L2-SP"}),
    ("SPD", {"method": "SPD"}),
    ("LP-FT", {"method": "LP-FT"}),
    ("SAM", {"method": "SAM"}),
)


def runs() -> list[Run]:
    """Return the fine-tunes of one base; augmented and SAM runs last, each together."""
    pool_a = [
        Run("A", f"rate {rate:g}, {k}", s, rate=rate, renderings=k) for rate in RATES for k in (1, 16) for s in SEEDS
    ]
    pool_b = [replace(Run("B", name, s), **change) for name, change in VARIED for s in SEEDS]
    extra = [Run("C", f"{method} 3e-3", s, method=method, rate=3e-3) for method in ("L2-SP", "SPD") for s in SEEDS]
    return sorted([*pool_a, *pool_b, *extra], key=lambda run: (run.augmented, run.method == "SAM"))
