"""exp, log, erf, tanh and their like as polynomials, so that they stay in vector registers.

LLVM has no vector version of them: a vectorised loop over `expf` leaves its registers for
sixteen calls of the C library, many times slower. `expand` replaces the
float32 calls of a scheduled function by arithmetic with an error of a few units in the last place.
Coefficients: Cephes (exp, log) and Eigen (tanh, erf).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import ir, tirx

Expr = Any

_LOG2E = 1.44269504088896341
_INF_BITS = 0x7F800000
# Added to a float32, it rounds it to a whole number, which the last bits of the sum then are.
_ROUNDING = 1.5 * 2**23
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # the high part times any exponent is exact
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_TANH_UP = (
    *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
    *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
)
_TANH_DOWN = (
    *(1.19825839466702e-06, 1.18534705686654e-04),
    *(2.26843463243900e-03, 4.89352518554385e-03),
)
_ERF_UP = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
    *(-7.34990630306855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
)
_ERF_DOWN = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03),
    *(-7.37332916720468e-03, -1.42647390514189e-02),
)


def _f(value: float) -> Expr:
    return tirx.const(value, "float32")


def _i(value: int) -> Expr:
    return tirx.const(value, "int32")


def _let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """`body(v)` with v bound to `value`, which is so evaluated once."""
    var = tirx.Var("v", value.ty)
    return tirx.Let(var, value, body(var))


def _horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    """The polynomial in x with the highest coefficient first."""
    total = _f(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + _f(coefficient)
    return total


def _exp(x: Expr) -> Expr:
    """exp(x): 0 below -87, inf above 88.7228, NaN stays NaN."""

    def value(x: Expr, shifted: Expr) -> Expr:
        n = shifted - _f(_ROUNDING)
        # Shifting leaves the last bits, which are n, in the place of the exponent.
        power = tirx.reinterpret(
            "float32", (tirx.reinterpret("int32", shifted) << _i(23)) + _i(126 << 23)
        )
        remainder = x - n * _f(_LN2_HIGH) - n * _f(_LN2_LOW)
        mantissa = _let(remainder, lambda r: _horner(r, _EXP) * (r * r) + r + _f(1.0))
        # 2^128 is no float32: multiply by 2^(n-1), then by 2.
        return tirx.Select(x < _f(-87.0), _f(0.0), mantissa * _f(2.0) * power)

    # Beyond 89 all is inf. Written so that a NaN, for which every comparison is false, survives.
    bound = tirx.Select(x > _f(89.0), _f(89.0), x)
    return _let(bound, lambda x: _let(x * _f(_LOG2E) + _f(_ROUNDING), lambda t: value(x, t)))


def _log(x: Expr) -> Expr:
    """log(x): -inf at 0, NaN below, exact exponents; subnormal numbers count as 0."""

    def value(x: Expr, bits: Expr) -> Expr:
        # x = m 2^e with m in [sqrt(1/2), sqrt(2)): subtract the bits of sqrt(1/2) from x's.
        exponent = tirx.Cast("float32", (bits - _i(0x3F3504F3)) >> _i(23))
        offset = ((bits - _i(0x3F3504F3)) & _i(0x7FFFFF)) + _i(0x3F3504F3)
        series = _let(
            tirx.reinterpret("float32", offset) - _f(1.0),
            lambda m: m + (m * m) * (_horner(m, _LOG) * m - _f(0.5)) + exponent * _f(_LN2_LOW),
        )
        normal = series + exponent * _f(_LN2_HIGH)
        small = tirx.Select(x < _f(0.0), _f(float("nan")), _f(float("-inf")))
        low = tirx.Select(x < _f(1.17549435e-38), small, normal)
        # Told by their bits: `x != x` would be folded to false.
        special = tirx.any(bits == _i(_INF_BITS), (bits & _i(0x7FFFFFFF)) > _i(_INF_BITS))
        return tirx.Select(special, x, low)

    return _let(x, lambda x: value(x, tirx.reinterpret("int32", x)))


def _ratio(limit: float, up: Sequence[float], down: Sequence[float]) -> Callable[[Expr], Expr]:
    """The odd function x up(x^2) / down(x^2), constant beyond +-limit."""

    def apply(x: Expr) -> Expr:
        # Written so that a NaN in x, for which every comparison is false, survives.
        bound = tirx.Select(x > _f(limit), _f(limit), tirx.Select(x < _f(-limit), _f(-limit), x))
        return _let(
            bound,
            lambda x: _let(x * x, lambda s: x * _horner(s, up) / _horner(s, down)),
        )

    return apply


def _sinh(x: Expr) -> Expr:
    """sinh(x) in x's own dtype: a series where exp(x) - exp(-x) would cancel."""

    def value(x: Expr) -> Expr:
        total = one = tirx.const(1.0, str(x.ty))
        for n in range(15, 1, -2):
            total = one + total * x * x / tirx.const(n * (n - 1.0), str(x.ty))
        large = (tirx.exp(x) - tirx.exp(-x)) / tirx.const(2.0, str(x.ty))
        return tirx.Select(tirx.abs(x) < one, x * total, large)

    return _let(x, value)


def _cosh(x: Expr) -> Expr:
    return _let(x, lambda x: (tirx.exp(x) + tirx.exp(-x)) / tirx.const(2.0, str(x.ty)))


def _pow(x: Expr, exponent: Expr) -> Expr | None:
    """Powers with a small constant exponent as products; None for the others."""
    if not isinstance(exponent, tirx.FloatImm):
        return None
    match float(exponent.value):
        case 1.0:
            return x
        case 2.0:
            return _let(x, lambda x: x * x)
        case 3.0:
            return _let(x, lambda x: x * x * x)
        case 4.0:
            return _let(x, lambda x: _let(x * x, lambda s: s * s))
        case -1.0:
            return _f(1.0) / x
        case _:
            return None


_EXPANSIONS: dict[str, Callable[..., Expr | None]] = {
    "tirx.exp": _exp,
    "tirx.log": _log,
    "tirx.tanh": _ratio(7.90531110763549805, _TANH_UP, _TANH_DOWN),
    "tirx.erf": _ratio(4.0, _ERF_UP, _ERF_DOWN),
    "tirx.sigmoid": lambda x: _f(1.0) / (_f(1.0) + _exp(_f(0.0) - x)),
    "tirx.rsqrt": lambda x: _f(1.0) / tirx.sqrt(x),
    "tirx.pow": _pow,
}


# TVM knows no vector version of these for any type; they become exp first.
_THROUGH_EXP: dict[str, Callable[..., Expr]] = {"tirx.sinh": _sinh, "tirx.cosh": _cosh}


def expand(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """`func` with its float32 exp, log, tanh, erf, sigmoid, rsqrt and constant powers expanded.

    sinh and cosh are expanded for every type.
    """

    def through_exp(call: Any) -> Any:
        expansion = _THROUGH_EXP.get(getattr(call.op, "name", ""))
        return call if expansion is None else expansion(*call.args)

    def rewrite(call: Any) -> Any:
        expansion = _EXPANSIONS.get(getattr(call.op, "name", ""))
        if expansion is None or str(call.ty) != "float32":
            return call
        replaced = expansion(*call.args)
        return call if replaced is None else replaced

    func = tvm_ffi.structural_map(func, (ir.Call, through_exp))
    return tvm_ffi.structural_map(func, (ir.Call, rewrite))
