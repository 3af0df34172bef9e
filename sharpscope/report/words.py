"""Numbers and names as people read them: the one place where the report rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable

from sharpscope.stragglers.paired import Difference
from sharpscope.table import MODEL

UNKNOWN = "unknown"
MINUS = "\N{MINUS SIGN}"
TIED = "\N{NO-BREAK SPACE}"  #: keeps a unit with its number
MEASURES = {
    "trace": "Hessian trace",
    "lambda_max": "largest Hessian eigenvalue",
    "lambda_min": "smallest Hessian eigenvalue",
    "directional": "curvature along the layer's own delta",
    "m_sharpness_average": "average m-sharpness",
    "m_sharpness": "worst-case m-sharpness",
}
GAUSS_NEWTON = "gauss_newton_"
MOST = 6  # digits after the point
LEAST = 6  # characters of a shortened name's end
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def measure_name(measure: str) -> str:
    """Return the measure in words, or as it is if it has none.

    >>> measure_name("gauss_newton_trace"), measure_name("m_sharpness_adaptive")
    ('Gauss-Newton trace', 'worst-case m-sharpness (adaptive)')
    """
    if measure.startswith(GAUSS_NEWTON):
        return measure_name(measure.removeprefix(GAUSS_NEWTON)).replace("Hessian", "Gauss-Newton")
    variant_of = next((known for known in MEASURES if measure.startswith(f"{known}_")), None)
    if measure in MEASURES or variant_of is None:
        return MEASURES.get(measure, measure)
    return f"{MEASURES[variant_of]} ({measure.removeprefix(f'{variant_of}_').replace('_', ', ')})"


def titled(text: str) -> str:
    """Return the text with its first letter large and the others as they are.

    >>> titled("worst-case SAM")
    'Worst-case SAM'
    """
    return text[:1].upper() + text[1:]


def layer_name(layer: str) -> str:
    """Return the layer id, with the whole network called so."""
    return f"whole{TIED}model" if layer == MODEL else layer


def layer_label(layer: str, limit: int = 40) -> str:
    """Return the layer's name in at most so many characters: the first parts of a dotted one become their initials.

    The numbers in it stay, and its end, which tell the layers of a network apart.

    >>> layer_label("vision_model.encoder.layers.11.self_attn.q_proj.weight")
    'v.e.layers.11.self_attn.q_proj.weight'
    >>> layer_label("vision_model.encoder.layers.11.layer_norm2.attention_output_projection", 24)
    'v.e.l.11.l2…t_projection'
    """
    parts = layer_name(layer).split(".")
    for place, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > limit and not part.isdigit():
            parts[place] = part[:1] + "".join(filter(str.isdigit, part[1:]))
    name, start = ".".join(parts), ".".join(parts[:-1])
    if len(name) <= limit:
        return name
    start = start if len(start) <= limit - LEAST else ""
    return f"{start}…{name[len(start) + 1 - limit :]}"


def shortened(name: str, limit: int = 40) -> str:
    """Return the name with its middle left out if it is longer than the limit.

    >>> shortened("abcdefghij", 7)
    'abc…hij'
    """
    half = (limit - 1) // 2
    return name if len(name) <= limit else f"{name[:half]}…{name[-half:]}"


def listed(names: Iterable[str]) -> str:
    """Return the names as a list in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def alpha_text(alpha: float) -> str:
    """Return alpha with at most three digits after the point.

    >>> alpha_text(0.30000000000000004)
    '0.3'
    """
    return f"{round(alpha, 3):g}"


def percent(fraction: float, digits: int = 1) -> str:
    """Return a fraction as a percentage, its sign on the same line; infinite is unknown.

    >>> percent(0.6125).replace(TIED, " ")
    '61.3 %'
    """
    if not math.isfinite(fraction):
        return UNKNOWN
    return f"{100 * fraction:.{digits}f}{TIED}%" if abs(fraction) < 10 else f"> 999{TIED}%"


def points(fraction: float, digits: int = 1) -> str:
    """Return a difference of two fractions in percentage points, always with its sign.

    >>> points(0.0321), points(-0.01), points(0.0)
    ('+3.2', '−1.0', '0.0')
    """
    rounded = round(100 * fraction, digits)
    return "0.0" if rounded == 0 else f"{rounded:+.{digits}f}".replace("-", MINUS)


def p_text(p: float) -> str:
    """Return a p-value to the digit that matters.

    >>> p_text(0.0004), p_text(0.034), p_text(0.5)
    ('< 0.001', '0.034', '0.50')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def interval(difference: Difference) -> str:
    """Return the 95 % interval of a difference in percentage points.

    An end that lies off zero is not shown as zero: it has as many digits as that takes.

    >>> interval(Difference(0.05, 0.0003, 0.1)), interval(Difference(0.05, -0.0003, 0.1))
    ('+0.03 to +10.0', '0.0 to +10.0')
    """
    low, high = difference.interval
    near, shown = (low if difference.sign > 0 else high), 1
    while difference.sign and shown < MOST and round(100 * near, shown) == 0:
        shown += 1
    return f"{points(low, shown if near == low else 1)} to {points(high, shown if near == high else 1)}"


def significant(value: float, digits: int = 3) -> str:
    """Return a number to a few significant digits, powers of ten spelled out.

    >>> significant(1234.5), significant(-0.0000123), significant(0.5)
    ('1230', '−1.23×10⁻⁵', '0.5')
    """
    if not math.isfinite(value):
        return UNKNOWN
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{float(f'{value:.{digits}g}'):.12g}".replace("-", MINUS)
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{float(mantissa):g}{_power_of_ten(int(exponent))}".replace("-", MINUS)


def with_error(value: float, stderr: float) -> str:
    """Return the value with its standard error, both to the second digit of the error but to five digits at most.

    >>> with_error(12.0, 0.641), with_error(1.0, float("inf")), with_error(2.5e-6, 1.2e-7)
    ('12.00 ± 0.64', '1 ± unknown', '(2.50 ± 0.12)×10⁻⁶')
    """
    size = max(abs(value), stderr)
    if not math.isfinite(stderr) or size == 0:
        return f"{significant(value)} ± {significant(stderr, 2)}"
    power = math.floor(math.log10(size))
    shift = 0 if -3 <= power < 5 else power
    wanted = 1 - math.floor(math.log10(stderr)) if stderr > 0 else 2 - power
    digits = max(0, min(wanted, 4 - power) + shift)
    both = f"{value / 10**shift:.{digits}f} ± {stderr / 10**shift:.{digits}f}".replace("-", MINUS)
    return both if shift == 0 else f"({both}){_power_of_ten(shift)}"


def _power_of_ten(power: int) -> str:
    return f"×10{str(power).translate(_SUPERSCRIPT)}"


def count(number: int, singular: str) -> str:
    """Return a number of things; the plural adds an s.

    >>> count(1, "layer"), count(12000, "image")
    ('1 layer', '12,000 images')
    """
    return f"{number:,} {singular}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a time in the unit that fits.

    >>> duration(3.21), duration(75), duration(7300)
    ('3.2 s', '1 min 15 s', '2 h 1 min')
    """
    whole = round(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
