"""The verdict in words: which alpha to ship, how sure that is, and when there is nothing to ship."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sharpscope.errors import SharpscopeError
from sharpscope.recipe import Recipe
from sharpscope.report.choices import best_recipe, searched
from sharpscope.report.curves import accuracy, mean_ood
from sharpscope.report.words import alpha_text, count, interval, layer_label, listed, measure_name, p_text, points
from sharpscope.result import ScanResult
from sharpscope.stragglers.paired import Difference, difference, mean_difference
from sharpscope.stragglers.recommendation import Recommendation
from sharpscope.stragglers.wording import BEYOND, NOT_ENOUGH, STRAGGLER
from sharpscope.table import MODEL

MEAN_OOD = "mean OOD"
ENDS = {"zero-shot": 0.0, "fine-tuned": 1.0}
CHOOSING = "on the images for choosing"
RELATION = {1: "better than", 0: "not distinguishable from", -1: "worse than"}


@dataclass(frozen=True)
class Comparison:
    """One split: accuracies over all its images (fractions), paired changes of the recommended alpha against each end.

    A change is None where the recommended alpha is that end itself.
    """

    split: str
    role: str
    accuracy: dict[str, float]
    change: dict[str, Difference | None]


@dataclass(frozen=True)
class Verdict:
    """What the report says first.

    Attributes
    ----------
    headline
        One sentence: what to ship.
    level
        ``"good"`` (better than both ends), ``"open"`` (undecided) or ``"warn"`` (failure, or nothing to judge by).
    reasons
        Sentences in order of weight.
    recommendation
        None if no recommendation could be made; the headline then says why.
    table
        ID first, then each OOD set, then their mean.
    """

    headline: str
    level: str
    reasons: tuple[str, ...]
    recommendation: Recommendation | None
    table: tuple[Comparison, ...]


def verdict(result: ScanResult) -> Verdict:
    """Return the verdict on a scan; it never raises for a scan that cannot be judged, it says so."""
    try:
        advice = result.recommend()
    except SharpscopeError as trouble:
        return Verdict(f"No recommendation: {trouble.problem}.", "warn", (f"Way out: {trouble.fix}.",), None, ())
    failure = failure_of_interpolation(result)
    return Verdict(
        headline=_headline(result, advice, _target(result, advice)),
        level=_level(result, advice, failure),
        reasons=tuple(_reasons(result, advice, failure)),
        recommendation=advice,
        table=tuple(_comparisons(result, advice)),
    )


def _target(result: ScanResult, advice: Recommendation) -> str:
    return MEAN_OOD if advice.chosen_by == "ood" else result.id_split


def _headline(result: ScanResult, advice: Recommendation, target: str) -> str:
    where = "on the OOD sets" if advice.chosen_by == "ood" else "on the ID set"
    signs = {name: advice.versus[name][target].sign for name, end in ENDS.items() if end != advice.alpha}
    end = next((name for name, end in ENDS.items() if end == advice.alpha), None)
    if -1 not in signs.values() and end and not _inner(result):
        named = f"{end} model (alpha {alpha_text(advice.alpha)})"
        return f"Of the two ends, all that was scanned, the {named}: the other scored no higher {where}, {CHOOSING}."
    if -1 not in signs.values() and advice.alpha == ENDS["zero-shot"]:
        return f"Keep the zero-shot model (alpha 0): no other point of the path scored higher {where}, {CHOOSING}."
    if -1 not in signs.values() and advice.alpha == ENDS["fine-tuned"]:
        return f"Ship the fine-tuned model as it is (alpha 1): no mix with zero-shot scored higher {where}, {CHOOSING}."
    named = f"alpha {alpha_text(advice.alpha)}"
    if set(signs.values()) == {1}:
        return f"Ship {named}: {where} it is better than both the zero-shot and the fine-tuned model."
    if set(signs.values()) == {0}:
        return f"No clear winner: {named} scored best {where}, but these images cannot tell it from either end."
    relations = listed(f"{RELATION[sign]} the {name} model" for name, sign in signs.items())
    start = "Doubtful choice" if -1 in signs.values() else "Lean to"
    return f"{start} {named}: {where} it is {relations}."


def _level(result: ScanResult, advice: Recommendation, failure: str | None) -> str:
    if not _inner(result):
        return "open"
    if not result.ood_splits or (failure and failure.startswith("Failure")):
        return "warn"
    signs = [advice.versus[name][MEAN_OOD].sign for name, end in ENDS.items() if end != advice.alpha]
    return "good" if all(sign > 0 for sign in signs) else "open"


def _inner(result: ScanResult) -> list[float]:
    return sorted({alpha for alpha, _ in result.correct if 0 < alpha < 1})


def failure_of_interpolation(result: ScanResult) -> str | None:
    """Return the sentence to say if no alpha strictly between the ends (shows itself to) beat zero-shot on OOD.

    The best of the inner alphas is judged on the images it was picked by, which flatters it: when even that
    does not lift its paired interval off zero, "not shown" is safe to say.
    """
    inner = _inner(result)
    if not result.ood_splits or not inner:
        return None
    best = max(inner, key=mean_ood(result).at)
    correct = result.correct
    gap = mean_difference([difference(correct[best, s], correct[0.0, s]) for s in result.ood_splits])
    numbers = f"alpha {alpha_text(best)}: {points(gap.value)} points (95 % interval {interval(gap)})"
    if gap.value <= 0:
        return (
            f"Failure of interpolation: none of the {count(len(inner), 'alpha')} between the ends beats zero-shot "
            f"on the OOD sets. The best of them is {numbers}{'' if gap.sign else ', too few images to be sure'}."
        )
    if gap.sign <= 0:
        return f"No alpha between the ends is shown to beat zero-shot on the OOD sets. The best of them is {numbers}."
    return None


def _reasons(result: ScanResult, advice: Recommendation, failure: str | None) -> Iterator[str]:
    if failure:
        yield failure
    if not result.ood_splits:
        yield (
            "No OOD set was given: alpha was chosen by ID accuracy, and this report says nothing about robustness "
            "under shift. Name at least one OOD set to have it judged."
        )
    if not _inner(result):
        yield "No alpha between the ends was scanned: whether a mix would do better is not known."
    for name, end in ENDS.items():
        if advice.alpha != end:
            yield _against(name, advice, result.id_split)
    yield _ties(advice)
    if searched(result):
        yield per_layer_sentence(result)


def _against(name: str, advice: Recommendation, id_split: str) -> str:
    found = advice.versus[name]
    parts = []
    if MEAN_OOD in found:
        parts.append(f"mean OOD accuracy {points(found[MEAN_OOD].value)} points ({interval(found[MEAN_OOD])})")
    parts.append(f"ID accuracy {points(found[id_split].value)} points ({interval(found[id_split])})")
    return f"Against the {name} model: {', '.join(parts)}."


def _ties(advice: Recommendation) -> str:
    others = [alpha_text(alpha) for alpha in advice.ties if alpha != advice.alpha]
    if not others:
        return f"Every other alpha is distinguishable from {alpha_text(advice.alpha)} on these images."
    return f"Not distinguishable from alpha {alpha_text(advice.alpha)} on these images: alpha {listed(others)}."


def per_layer_sentence(result: ScanResult) -> str:
    """Return whether the best recipe tried beats the best uniform alpha, on images that neither was chosen on."""
    advice, recipe, gap = best_recipe(result)
    if recipe == Recipe.uniform(advice.alpha):
        return f"An alpha per layer: no recipe tried scored higher than the uniform alpha {CHOOSING}."
    word = {1: "better", 0: "not shown to be better", -1: "worse"}[gap.sign]
    where = "mean OOD" if advice.chosen_by == "ood" else "ID"
    return (
        f"An alpha per layer: the best recipe tried is {word}, {where} accuracy {points(gap.value)} points "
        f"({interval(gap)}) against uniform alpha {alpha_text(advice.alpha)}."
    )


def _comparisons(result: ScanResult, advice: Recommendation) -> Iterator[Comparison]:
    named = [(result.id_split, "ID"), *((split, "OOD") for split in result.ood_splits)]
    if len(result.ood_splits) > 1:
        named.append((MEAN_OOD, "mean"))
    for split, role in named:
        curve = mean_ood(result) if role == "mean" else accuracy(result, split)
        places = {"zero-shot": 0.0, "recommended": advice.alpha, "fine-tuned": 1.0}
        changes = {name: advice.versus[name][split] if advice.alpha != end else None for name, end in ENDS.items()}
        yield Comparison(split, role, {name: curve.at(alpha) for name, alpha in places.items()}, changes)


def co_moving(result: ScanResult) -> str:
    """Return the sentence on layers whose sharpness runs with the OOD error: the strongest that can be said."""
    if not result.ood_splits:
        return "Which layers co-move with the OOD error is not known: no OOD set was given."
    if result.stragglers.empty:
        return "Which layers co-move with the OOD error is not known: no sharpness was measured."
    table = result.stragglers[result.stragglers["layer"] != MODEL]
    for rung, sentence in _RUNGS.items():
        found = table[table["verdict"] == rung]
        if not found.empty:
            first, number = found.iloc[0], found["layer"].nunique()
            place = f"{layer_label(str(first['layer']))} (tau {first['tau']:.2f}, "
            place += f"{measure_name(str(first['measure']))}, family-wise p {p_text(float(first['p_family']))})"
            return sentence.format(layers=count(number, "layer"), s="s" if number == 1 else "", most=place)
    return f"No layer was found to co-move with the OOD error{_undecided(list(table['verdict']))}."


_RUNGS = {
    STRAGGLER: "{layers} stand{s} out as straggler, first {most}: sharpness runs with the OOD error beyond chance, and "
    "moving this layer alone shows that its fine-tuned weights harm OOD accuracy.",
    BEYOND: "{layers} co-move{s} with the OOD error beyond chance, first {most}. Co-moving is not a cause: moving that "
    "layer alone did not show that its fine-tuned weights harm OOD accuracy.",
    "co-moves": "{layers} co-move{s} with the OOD error, first {most}, but no more than chance would "
    "on a path like this.",
}


def _undecided(verdicts: Sequence[str]) -> str:
    open_ones = sum(verdict.startswith(("undecided", NOT_ENOUGH)) for verdict in verdicts)
    return f"; {open_ones} of {len(verdicts)} comparisons are undecided" if open_ones else ""
