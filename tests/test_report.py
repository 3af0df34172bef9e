"""The report says what was planted, in words, figures and a page that stands on its own."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from planted import ALPHAS, HOSTILE, LAYERS, SINGLE, STRAGGLER, UNUSED, planted

from sharpscope.detectors import Finding
from sharpscope.errors import OutputError, UsageError
from sharpscope.optim.activity import COLUMNS
from sharpscope.report import answers
from sharpscope.report.exhibits import exhibits
from sharpscope.report.page import render, write
from sharpscope.report.tables import provenance
from sharpscope.report.verdict import co_moving, verdict
from sharpscope.report.words import MINUS, interval, points
from sharpscope.result import ScanResult
from sharpscope.stragglers.paired import Difference
from sharpscope.stragglers.recommendation import halves
from sharpscope.summary import as_html, as_text
from sharpscope.table import MODEL, Cell, Row, cell_key

SMALL = {"alphas": (0.0, 0.1, 0.5, 1.0), "measures": ("trace", "lambda_max")}
CASES = {
    "full": {},
    "studied": {**SMALL, "alphas": ALPHAS, "studied": True},
    "failure": {**SMALL, "failure": True},
    "two ends only": {**SMALL, "alphas": (0.0, 1.0)},
    "no OOD": {**SMALL, "ood": ()},
    "nothing converged": {**SMALL, "converged": False},
    "no curvature": {**SMALL, "measures": ()},
    "few images": {**SMALL, "n": 8},
    "no end point": {**SMALL, "alphas": (0.0, 0.25, 0.5)},
}
RESULTS = {name: planted(**how) for name, how in CASES.items()}
FULL = RESULTS["full"]

every_case = pytest.mark.parametrize("case", CASES)


class Page(HTMLParser):
    """Ids, visible text, tags and attribute values of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._silent = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self._silent = tag in ("script", "style")
        self.ids += [found["id"]] if found.get("id") else []

    def handle_data(self, data: str) -> None:
        self.texts += [] if self._silent else [data]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace("\xa0", " ").split())


@cache
def source(case: str) -> str:
    return render(RESULTS[case])


@cache
def page(case: str) -> Page:
    return Page(source(case))


# ---------------------------------------------------------------- words


def test_the_verdict_ships_the_planted_optimum() -> None:
    found = verdict(FULL)
    assert found.level == "good"
    assert found.headline.startswith(
        "Ship alpha 0.4: on the OOD sets it is better than both the zero-shot and the fine-"
    )


def test_a_failure_of_interpolation_is_said_first() -> None:
    found = verdict(RESULTS["failure"])
    assert found.level == "warn"
    assert found.headline.startswith("Keep the zero-shot model")
    assert found.reasons[0].startswith(
        "Failure of interpolation: none of the 2 alphas between the ends beats zero-shot"
    )
    assert "alpha 0.1: −2.0 points" in found.reasons[0]  # planted: 0.2 of accuracy lost per unit of alpha


def judged(right: dict[float, tuple[int, int]], images: int = 400) -> ScanResult:
    """A scan that has so many of each half of the images right at each alpha; the first half chooses."""
    first, second = halves(images, 0)
    cells = []
    for alpha, counts in right.items():
        correct = np.zeros(images, bool)
        for half, count in zip((first, second), counts, strict=True):
            correct[half[:count]] = True
        examples = {"correct": correct, "confidence": np.full(images, 0.7), "loss": np.where(correct, 0.5, 2.0)}
        for split in ("id", "shift"):
            row = Row(alpha, MODEL, split, "accuracy", float(correct.mean()), 0.02, images, True)
            cells.append(Cell(cell_key(alpha, split, "evaluation"), (row,), examples))
    splits = {"id": {"role": "id", "n": images}, "shift": {"role": "ood", "n": images}}
    meta = {"alphas": list(right), "measures": {}, "layers": {}, "seed": 0, "plan": {}, "splits": splits}
    return ScanResult(cells, meta)


def test_an_end_that_the_other_half_of_the_images_contradicts_is_a_doubtful_choice() -> None:
    found = verdict(judged({0.0: (120, 80), 0.5: (116, 130), 1.0: (118, 140)}))
    assert found.headline == "Doubtful choice alpha 0: on the OOD sets it is worse than the fine-tuned model."
    sure = verdict(judged({0.0: (120, 120), 0.5: (116, 116), 1.0: (80, 80)}))
    assert sure.headline == (
        "Keep the zero-shot model (alpha 0): no other point of the path scored higher on the OOD sets, "
        "on the images for choosing."
    )


def test_a_scan_of_the_ends_alone_says_nothing_about_mixes() -> None:
    assert verdict(judged({0.0: (80, 80), 1.0: (120, 120)})).headline == (
        "Of the two ends, all that was scanned, the fine-tuned model (alpha 1): the other scored no higher on the OOD "
        "sets, on the images for choosing."
    )


def test_without_ood_sets_nothing_is_said_about_robustness() -> None:
    found = verdict(RESULTS["no OOD"])
    assert found.level == "warn"
    assert any("says nothing about robustness" in reason for reason in found.reasons)


def test_two_ends_only_leave_the_mix_open() -> None:
    found = verdict(RESULTS["two ends only"])
    assert found.level == "open"
    assert any("No alpha between the ends was scanned" in reason for reason in found.reasons)


def test_few_images_name_no_winner_that_they_cannot_show() -> None:
    assert verdict(RESULTS["few images"]).level != "good"


def test_a_path_without_an_end_says_why_there_is_no_recommendation() -> None:
    found = verdict(RESULTS["no end point"])
    assert found.recommendation is None
    assert found.headline.startswith("No recommendation: alphas [0.0, 0.25, 0.5] lack an end point")


def test_an_end_that_was_not_scanned_is_left_out_of_the_answers() -> None:
    result = planted((0.5,), unmeasured=())
    assert answers.path_answer(result, verdict(result)) == (
        "Mean OOD accuracy over all images is highest at alpha 0.5 with 61.5\N{NO-BREAK SPACE}%."
    )
    assert answers.plane_answer(result, verdict(result)) == (
        "The path passes 82.0\N{NO-BREAK SPACE}% ID and 61.5\N{NO-BREAK SPACE}% mean OOD at alpha 0.5."
    )
    assert answers.pareto_answer(result).startswith("1 mix tried: ")
    ends = planted((0.0, 0.25), measures=("trace",), unmeasured=())
    assert " at alpha 0, " in answers.plane_answer(ends, verdict(ends))
    assert "unknown" not in answers.plane_answer(ends, verdict(ends)) + answers.path_answer(ends, verdict(ends))


def test_only_the_planted_straggler_is_named_and_no_more_is_said_than_chance_allows() -> None:
    # Eleven points of one valley are worth two or three: on such a path nothing is beyond chance.
    sentence = co_moving(FULL)
    assert sentence.startswith(f"1 layer co-moves with the OOD error, first {STRAGGLER} (tau 1.00")
    assert sentence.endswith("but no more than chance would on a path like this.")


@pytest.mark.parametrize(
    ("rung", "words"),
    [
        ("straggler", "1 layer stands out as straggler, first visual.block.02"),
        ("co-moves beyond the null", "1 layer co-moves with the OOD error beyond chance, first visual.block.02"),
        ("does not co-move", "No layer was found to co-move"),
    ],
)
def test_each_rung_of_the_ladder_has_its_words(rung: str, words: str) -> None:
    result = planted(**SMALL)
    table = FULL.stragglers
    verdicts = table["verdict"].where(table["layer"] != STRAGGLER, rung)
    result.__dict__["_stragglers"] = table.assign(verdict=verdicts)
    assert co_moving(result).startswith(words)


def test_without_sharpness_nothing_is_said_to_have_been_looked_for() -> None:
    assert co_moving(RESULTS["no curvature"]).endswith("is not known: no sharpness was measured.")


def test_a_stranger_is_told_what_alpha_is_and_what_to_do_next() -> None:
    command = "sharpscope merge FOLDER --out merged"
    for case, mixes in (("full", True), ("failure", False), ("no end point", False)):
        text = Page(source(case)).text
        assert "alpha is the share of the way from the zero-shot model (0) to the fine-tuned one (1)" in text
        assert (command in text) == mixes, case


def test_each_fact_of_a_model_has_a_line_and_none_is_said_twice() -> None:
    meta = {**FULL.meta, "models": {"zero_shot": {"name": "runs/zs", "path": "runs/zs", "hash": "0a1b"}}}
    facts = dict(dict(provenance(ScanResult(FULL.cells, meta)))["Models"])
    assert facts == {"zero shot": "runs/zs", "zero shot: hash": "0a1b"}


def test_on_a_phone_each_number_of_the_verdict_table_says_what_it_is() -> None:
    cells = [found for tag, found in Page(source("full")).tags if tag == "td" and found.get("data-label")]
    assert {str(found["data-label"]) for found in cells} >= {"zero-shot", "fine-tuned", "change against fine-tuned"}


def test_the_verdict_says_whether_an_alpha_per_layer_is_better() -> None:
    (sentence,) = (reason for reason in verdict(RESULTS["studied"]).reasons if reason.startswith("An alpha per layer"))
    assert "the best recipe tried is better, mean OOD accuracy +4.4 points" in sentence  # planted: 5


def test_the_answer_under_the_path_holds_the_key_numbers() -> None:
    answers = {exhibit.name: exhibit.answer.replace("\xa0", " ") for exhibit in exhibits(FULL)}
    assert "highest at alpha 0.4 with 62.0 %, against 54.0 % zero-shot and 44.0 % fine-tuned" in answers["path"]
    assert "12 of 87 values" in answers["heatmap-trace"]  # 8 layers x 11 alphas, one not measured; 11 noisy, 1 single
    assert f"Least certain: {SINGLE} at alpha 0, relative error unknown" in answers["health-trace"]


@every_case
def test_text_and_html_summaries_say_the_verdict(case: str) -> None:
    result = RESULTS[case]
    assert verdict(result).headline in as_text(result)
    shown = Page(as_html(result))
    assert verdict(result).headline in shown.text
    assert not {"script", "b", "i", "style"} & {tag for tag, _ in shown.tags}


@every_case
def test_a_recommendation_in_a_notebook_is_escaped_text_and_numbers(case: str) -> None:
    result = RESULTS[case]
    if verdict(result).recommendation is None:
        return
    advice = result.recommend()
    shown = Page(advice._repr_html_())
    assert f"Recommended: alpha {advice.alpha:g}" in shown.text
    cells = {
        name: found for name, found in advice.versus.items() if {"zero-shot": 0, "fine-tuned": 1}[name] != advice.alpha
    }
    for found in cells.values():
        for split, change in found.items():
            assert split in shown.texts
            assert f"{points(change.value)} ({interval(change)})" in shown.texts
    assert shown.texts.count("the same model") == (2 - len(cells)) * len(advice.versus["zero-shot"])
    assert {tag for tag, _ in shown.tags} == {"div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"}


def test_a_recommended_recipe_in_a_notebook_says_that_it_is_one() -> None:
    advice = planted(studied=True).recommend(per_layer=True)
    assert "Recommended: an alpha per layer, 2 rules" in Page(advice._repr_html_()).text


def test_a_finding_in_a_notebook_is_its_verdict_and_reason_escaped() -> None:
    shown = Page(Finding("<i>mine</i>", "fail", 2.0, (1.0, 3.0), "<script>2</script> is above 0.5 & all")._repr_html_())
    assert shown.text == "fail <i>mine</i>: <script>2</script> is above 0.5 & all"
    assert [tag for tag, _ in shown.tags] == ["p", "strong"]


# ---------------------------------------------------------------- page


@every_case
def test_the_page_says_no_nan_and_no_none(case: str) -> None:
    found = re.findall(r"\b(?:nan|NaN|inf|None|null|undefined)\b", page(case).text)
    assert found == []


@every_case
def test_ids_are_unique_over_the_page(case: str) -> None:
    ids = page(case).ids
    assert len(ids) == len(set(ids))


@every_case
def test_every_reference_within_the_page_has_its_target(case: str) -> None:
    ids = set(page(case).ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', source(case))) <= ids


@every_case
def test_the_page_asks_the_network_for_nothing(case: str) -> None:
    assert "://" not in source(case)
    assert not re.findall(r"@import|<link|<iframe|<object", source(case))
    for _, attributes in page(case).tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))


@every_case
def test_the_page_is_under_two_megabytes(case: str) -> None:
    assert len(source(case).encode()) < 2_000_000


@every_case
def test_names_from_outside_cannot_become_markup(case: str) -> None:
    tags = [tag for tag, _ in page(case).tags]
    assert tags.count("script") == 1
    assert "i" not in tags  # the planted warning holds one
    if "ood" not in CASES[case]:
        assert "&lt;b&gt;&amp;" in source(case)
        assert HOSTILE in page(case).text


def test_only_the_own_script_may_run() -> None:
    script = re.search(r"<script>(.*?)</script>", source("full"), flags=re.DOTALL)
    assert script is not None
    digest = b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}" in source("full") or f"script-src 'sha256-{digest}'" in source("full")


@every_case
def test_each_figure_has_a_label_and_a_question(case: str) -> None:
    drawings = [found for tag, found in page(case).tags if tag == "svg"]
    assert drawings
    assert all(found["role"] == "img" and len(found["aria-label"] or "") > 40 for found in drawings)
    questions = re.findall(r"<figcaption>.*?<b>([^<]+\?)</b>", source(case), flags=re.DOTALL)
    assert len(questions) == len(drawings)


def test_the_page_is_readable_without_scripts() -> None:
    hidden = [found.get("id") or found.get("class") for tag, found in page("full").tags if "hidden" in found]
    assert hidden == ["theme", "controls", "lit"]  # what does nothing without a script
    assert verdict(FULL).headline in page("full").text


def test_the_page_names_what_was_not_measured_and_why() -> None:
    text = page("full").text
    assert f"not a sharpness of zero. {UNUSED}" in text
    assert "scans: 3 images could not be read <i>" in text
    assert "Co-moving is no proof" in text
    assert "p-value" not in text


def test_a_layer_carries_one_number_through_all_figures_and_tables() -> None:
    number = str(LAYERS.index(STRAGGLER))
    marked = [tag for tag, found in page("full").tags if found.get("data-layer") == number]
    assert marked.count("tr") == 8  # four measures in two tables
    assert marked.count("g") >= 2 * 4 + 1 + 4  # both panels of four heatmaps, the straggler figure, four health figures


def test_optional_facts_may_be_missing() -> None:
    result = RESULTS["failure"]
    needed = {key: result.meta[key] for key in ("alphas", "measures", "splits", "layers", "seed")}
    needed["splits"] = {name: {"role": facts["role"]} for name, facts in needed["splits"].items()}
    bare = ScanResult(result.cells, needed)
    assert "not recorded" in Page(render(bare)).text
    assert as_text(bare).startswith("sharpscope: zero-shot to fine-tuned")


def test_writing_twice_gives_the_same_bytes_in_the_same_place(tmp_path: Path) -> None:
    result = planted(**SMALL)
    assert write(result, tmp_path) == tmp_path / "index.html"
    first = {path.name: path.read_bytes() for path in tmp_path.rglob("*.*")}
    write(planted(**SMALL), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*.*")} == first
    names = {
        "path",
        "plane",
        "forest",
        "multiples",
        "pareto",
        "distance",
        "agreement",
        *(f"{kind}-{m}" for kind in ("heatmap", "health") for m in result.meta["measures"]),
    }
    assert first.keys() == {"index.html", *(f"{name}.svg" for name in names)}


@pytest.mark.parametrize("near", [0.04, 0.0004, 0.00004, 0.000004])
@pytest.mark.parametrize("side", [1, -1])
def test_an_interval_off_zero_never_reads_as_touching_it(near: float, side: int) -> None:
    low, high = sorted((side * near / 100, side * 0.105))
    text = interval(Difference(side * 0.05, low, high)).replace(MINUS, "-")
    assert all(float(end) * side > 0 for end in text.split(" to "))
    assert interval(Difference(0.0, -near / 100, near / 100)) == "0.0 to 0.0"


def test_what_was_not_run_is_said_in_a_sentence_with_the_way_to_it() -> None:
    text = page("full").text
    assert "One layer moved alone is not shown. Interventions were not run in this scan." in text
    assert "--recipes" in text
    assert "is not shown" not in page("studied").text


def test_figures_of_an_earlier_run_are_removed_and_others_kept(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    for name in ("heatmap-gone.svg", "stragglers.svg", "recipe.svg", "mine.svg"):
        (tmp_path / "figures" / name).write_text("<svg/>")
    write(planted(**SMALL), tmp_path)
    left = {path.name for path in (tmp_path / "figures").iterdir()}
    assert "mine.svg" in left
    assert not {"heatmap-gone.svg", "stragglers.svg", "recipe.svg"} & left


def test_an_audit_log_in_the_folder_or_named_is_shown(tmp_path: Path) -> None:
    rows = [(10, "visual.embed", 3, 30, 20, 9, 0.2, 1.0, 0.1, 1e-3, 1.0)]
    lines = [{"format": 1}, *({"kind": "activity", **dict(zip(COLUMNS, row, strict=True))} for row in rows)]
    log = tmp_path / "spd.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = write(planted(**SMALL), tmp_path).read_text(encoding="utf-8")
    assert "held back 9 of 30 tensor-steps" in found
    elsewhere = write(planted(**SMALL), tmp_path / "other", audit=log)
    assert "held back 9 of 30 tensor-steps" in elsewhere.read_text(encoding="utf-8")
    with pytest.raises(UsageError, match=r"nowhere\.jsonl does not exist"):
        write(planted(**SMALL), tmp_path / "third", audit=tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(("passed", "words"), [(True, "The gate passed"), (False, "The gate did not pass")])
def test_the_findings_of_the_gate_stand_below_the_verdict(tmp_path: Path, passed: bool, words: str) -> None:
    rule = {"id": "ood <b>", "verdict": "undecided", "reason": "2 points, 95 % interval -1 to 5"}
    (tmp_path / "check.json").write_text(json.dumps({"passed": passed, "rules": [rule]}))
    shown = Page(write(planted(**SMALL), tmp_path).read_text(encoding="utf-8"))
    assert f"{words} undecided ood <b> : 2 points" in shown.text


def test_forty_layers_stay_well_under_two_megabytes() -> None:
    result = planted(measures=("trace", "lambda_max", "m_sharpness"))
    many = _with_layers(result, [f"visual.block.{i:02d}.self_attn.out_proj.weight" for i in range(40)])
    assert len(render(many).encode()) < 1_000_000


def _with_layers(result: ScanResult, names: list[str]) -> ScanResult:
    facts = dict.fromkeys(names, result.meta["layers"][LAYERS[0]])
    cells = [
        replace(
            cell,
            rows=tuple(replace(row, layer=name) for name in names for row in cell.rows if row.layer == LAYERS[2]),
            arrays=dict.fromkeys(names, cell.arrays[LAYERS[2]]),
        )
        if LAYERS[2] in cell.arrays
        else cell
        for cell in result.cells
    ]
    return ScanResult(cells, {**result.meta, "layers": facts, "unused": []})


# ---------------------------------------------------------------- machines


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import sharpscope.result, sharpscope.summary", ("torch", "matplotlib")),
        ("r = planted(alphas=(0.0, 1.0)); repr(r); r._repr_html_()", ("torch", "matplotlib")),
        (
            "from sharpscope.report.page import render; render(planted(alphas=(0.0, 1.0)))",
            ("torch", "matplotlib.pyplot"),
        ),
    ],
)
def test_reading_a_result_loads_no_more_than_it_needs(code: str, absent: tuple[str, ...]) -> None:
    here = Path(__file__).parent
    script = f"import sys; from planted import planted; {code}; print([m for m in {absent!r} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def _browse(place: Path, profile: Path) -> str:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        if "CI" in os.environ:
            pytest.fail("no Chromium: the page must be opened in a real browser in CI")
        pytest.skip("no Chromium")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    base = [browser, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={profile}"]
    command = [*base, "--dump-dom", place.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_in_a_browser_the_script_runs(tmp_path: Path) -> None:
    place = tmp_path / "index.html"
    place.write_text(source("full"), encoding="utf-8")
    dom = _browse(place, tmp_path / "profile")
    rows = 4 * (len(LAYERS) + 1)  # every measure, every layer, the unused one too
    assert f"{rows} of {rows} rows" in dom
    assert 'aria-sort="none"' in dom
    assert 'class="pick"' in dom


def test_in_a_browser_with_scripts_off_the_page_is_whole(tmp_path: Path) -> None:
    # Chromium prints no DOM with scripts off, so the script is taken out: to the page that is the same.
    place = tmp_path / "index.html"
    place.write_text(re.sub("<script>.*?</script>", "", source("full"), flags=re.DOTALL), encoding="utf-8")
    dom = _browse(place, tmp_path / "profile")
    assert 'aria-sort="none"' not in dom
    assert Page(dom).text == page("full").text


def test_a_page_that_cannot_be_written_or_drawn_is_said_and_the_other_stays(tmp_path, monkeypatch):
    write(planted(**SMALL), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OutputError, match=rf"{tmp_path} cannot be written: No space left on device\n  fix: make room"
        ):
            write(planted(**SMALL, failure=True), tmp_path)
    monkeypatch.setattr("sharpscope.report.page.layer_table", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(planted(**SMALL, failure=True), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
