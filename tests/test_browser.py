"""The page in a real browser: pick, sort, filter, theme, keyboard, narrow, hostile names; no error, no request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Tab, browsing
from planted import ALPHAS, LAYERS, MEASURES, STRAGGLER, planted

from sharpscope.report.page import write
from sharpscope.result import ScanResult

NAMES = {
    "visual.embed": "<script>document.title='hacked'</script>",
    "visual.block.00": "<img src=x onerror=\"document.title='hacked'\">",
    "visual.block.01": "layer'\"`&amp; ${1}",
    "visual.block.03": "x" * 300,
    "visual.proj": "🦀 crab \N{RIGHT-TO-LEFT OVERRIDE}gnol\N{POP DIRECTIONAL FORMATTING}",
    "visual.norm": "שלום עולם",
}


def hostile() -> ScanResult:
    result = planted(measures=("trace", "lambda_max"))
    layers = {NAMES.get(name, name): facts for name, facts in result.meta["layers"].items()}
    cells = [
        replace(
            cell,
            rows=tuple(replace(row, layer=NAMES.get(row.layer, row.layer)) for row in cell.rows),
            arrays={NAMES.get(name, name): drawn for name, drawn in cell.arrays.items()},
        )
        for cell in result.cells
    ]
    return ScanResult(cells, {**result.meta, "layers": layers})


def _opened(result: ScanResult, folder: Path) -> Iterator[Tab]:
    page = write(result, folder / "out")
    with browsing(folder / "profile") as tab:
        tab.open(page.as_uri())
        yield tab
        assert tab.complaints == []
        assert [address for address in tab.requests if not address.startswith("data:")] == [page.as_uri()]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    yield from _opened(planted(studied=True), tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def hostile_tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    yield from _opened(hostile(), tmp_path_factory.mktemp("hostile"))


PER_LAYER = ("forest", "multiples", "interventions", "recipe", "distance", "heatmap-trace", "health-trace")
NUMBER = LAYERS.index(STRAGGLER)


def lit(tab: Tab) -> dict[str, int]:
    """Return how many elements are highlighted by figure or table."""
    return tab.evaluate(
        "Object.fromEntries([...document.querySelectorAll('figure, table')].map((e) => [e.id, "
        "e.querySelectorAll('.lit').length]).filter(([, count]) => count))"
    )


@pytest.mark.parametrize(
    "where",
    [
        f"#layer-table tr[data-layer='{NUMBER}'] th",
        f"#straggler-table tr[data-layer='{NUMBER}'] th",
        *(f"#{name} [data-layer='{NUMBER}']" for name in ("forest", "heatmap-trace", "interventions", "recipe")),
    ],
)
def test_a_layer_picked_anywhere_is_highlighted_everywhere(tab: Tab, where: str) -> None:
    tab.click(where)
    found = lit(tab)
    numbers = tab.evaluate("[...new Set([...document.querySelectorAll('.lit')].map((e) => e.dataset.layer))]")
    note = tab.evaluate("document.querySelector('#lit span').textContent")
    tab.key("Escape")
    assert {*PER_LAYER, "layer-table", "straggler-table"} <= found.keys()
    assert found["layer-table"] == len(MEASURES)
    assert numbers == [str(NUMBER)]
    assert note == f"Highlighted: {STRAGGLER}"
    assert lit(tab) == {}


def test_a_highlight_is_seen(tab: Tab) -> None:
    colour = f"getComputedStyle(document.querySelector(`#heatmap-trace g[data-layer='{NUMBER}'] path`)).stroke"
    before = tab.evaluate(colour)
    tab.click(f"#layer-table tr[data-layer='{NUMBER}'] th")
    after = tab.evaluate(colour)
    tab.key("Escape")
    assert before == "none"
    assert after == "rgb(194, 24, 91)"


def column(tab: Tab, table: str, index: int) -> list[str]:
    return tab.evaluate(
        f"[...document.querySelectorAll('#{table} tbody tr')].map((row) => row.cells[{index}].textContent)"
    )


def test_numbers_sort_by_size_and_names_by_letter(tab: Tab) -> None:
    heads = tab.evaluate("[...document.querySelectorAll('#straggler-table thead th')].map((e) => e.textContent)")
    place = heads.index("tau")
    taus = planted(studied=True).stragglers["tau"]
    for sign in (-1, 1):
        tab.click(f"#straggler-table thead th:nth-child({place + 1}) button")
        expected = [f"{tau:.2f}".replace("-", "−") for tau in sorted(taus, key=lambda tau: sign * tau)]
        assert column(tab, "straggler-table", place) == expected
    tab.click("#straggler-table thead th:nth-child(2) button")
    names = column(tab, "straggler-table", 1)
    assert names == sorted(names, key=str.lower, reverse=True)
    assert tab.evaluate("document.querySelectorAll('#straggler-table [aria-sort=descending]').length") == 1


def test_the_filter_leaves_the_rows_that_hold_every_word(tab: Tab) -> None:
    tab.evaluate("(() => {const f = document.querySelector('#filter'); f.value = 'BLOCK trace';"
                 "f.dispatchEvent(new Event('input'))})()")  # fmt: skip
    shown = tab.evaluate(
        "[...document.querySelectorAll('#layer-table tbody tr')].filter((row) => row.getClientRects().length)"
        ".map((row) => row.cells[0].textContent)"
    )
    tab.evaluate("(() => {const f = document.querySelector('#filter'); f.value = '';"
                 "f.dispatchEvent(new Event('input'))})()")  # fmt: skip
    assert sorted(shown) == sorted([*(name for name in LAYERS if "block" in name), "text.block.00"])


def test_the_theme_button_turns_the_page_and_its_figures_dark(tab: Tab) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('#path svg text')).fill"
    light = tab.evaluate(f"[{ground}, {ink}]")
    tab.click("#theme")
    dark = tab.evaluate(f"[{ground}, {ink}]")
    tab.click("#theme")
    assert light == ["rgb(245, 246, 248)", "rgb(27, 31, 36)"]
    assert dark == ["rgb(17, 20, 24)", "rgb(232, 234, 237)"]
    assert tab.evaluate(f"[{ground}, {ink}]") == light


def test_the_keyboard_reaches_a_layer_and_picks_it(tab: Tab) -> None:
    tab.evaluate("document.querySelector('#filter').focus()")
    for _ in range(40):
        tab.key("Tab")
        if tab.evaluate("document.activeElement.closest('#layer-table tbody th') !== null"):
            break
    tab.key("Enter", "\r")
    pressed = tab.evaluate("document.activeElement.getAttribute('aria-pressed')")
    found = lit(tab)
    tab.key("Escape")
    assert pressed == "true"
    assert "heatmap-trace" in found


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("which", ["tab", "hostile_tab"])
def test_the_page_is_no_wider_than_the_window(which: str, width: int, request: pytest.FixtureRequest) -> None:
    tab = request.getfixturevalue(which)
    tab.resize(width)
    found = tab.evaluate("document.documentElement.scrollWidth")
    tab.resize(1400)
    assert found <= width


def test_hostile_names_are_text_in_every_table_and_figure(hostile_tab: Tab) -> None:
    names = set(column(hostile_tab, "layer-table", 0))
    assert set(NAMES.values()) <= names
    drawn = hostile_tab.evaluate("[...document.querySelectorAll('#heatmap-trace svg text')].map((e) => e.textContent)")
    assert {name for name in NAMES.values() if len(name) <= 40} <= set(drawn)
    assert hostile_tab.evaluate("document.title").startswith("sharpscope:")
    assert hostile_tab.evaluate("document.querySelectorAll('script').length") == 1
    assert hostile_tab.evaluate("document.querySelectorAll('img').length") == 0


@pytest.mark.parametrize("figure", ["forest", "multiples", "distance", "heatmap-trace", "health-trace"])
def test_long_and_foreign_names_leave_figures_in_their_frame(hostile_tab: Tab, figure: str) -> None:
    outside = hostile_tab.evaluate(
        f"(() => {{const box = document.querySelector('#{figure} svg').getBoundingClientRect();"
        f"return [...document.querySelectorAll('#{figure} svg text')].filter((text) => {{"
        "const b = text.getBoundingClientRect();"
        "return b.left < box.left - 8 || b.right > box.right + 8}).map((text) => text.textContent)})()"
    )
    assert outside == []


def test_alphas_are_where_the_figures_say(tab: Tab) -> None:
    texts = tab.evaluate("[...document.querySelectorAll('#heatmap-trace svg text')].map((e) => e.textContent)")
    assert [text for text in texts if text in {f"{alpha:g}" for alpha in ALPHAS}].count("0.5") == 2


@pytest.mark.parametrize("which", ["tab", "hostile_tab"])
def test_a_printed_page_is_no_wider_than_the_paper(which: str, request: pytest.FixtureRequest) -> None:
    tab = request.getfixturevalue(which)
    tab.resize(703)  # A4 between the margins that the page asks for
    tab.send("Emulation.setEmulatedMedia", media="print")
    found = tab.evaluate("document.documentElement.scrollWidth")
    tab.send("Emulation.setEmulatedMedia", media="")
    tab.resize(1400)
    assert found <= 703


@pytest.mark.parametrize("table", ["layer-table", "straggler-table"])
def test_on_a_phone_a_wide_table_keeps_its_title_and_the_names_of_its_rows_in_view(tab: Tab, table: str) -> None:
    tab.resize(390)
    edges = tab.evaluate(
        f"(() => {{const scroll = document.querySelector('#{table}').closest('.scroll'); const text = new Range();"
        f"text.selectNodeContents(document.querySelector('#{table} caption'));"
        "const frame = scroll.getBoundingClientRect(); const right = text.getBoundingClientRect().right;"
        f"scroll.scrollLeft = 200; const name = document.querySelector('#{table} tbody th').getBoundingClientRect();"
        "scroll.scrollLeft = 0; return [right - frame.right, frame.left - name.left]})()"
    )
    tab.resize(1400)
    assert max(edges) <= 0
