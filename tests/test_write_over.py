"""Elementwise functions that write over an input: the same bits, and only where none is lost."""

import random

import numpy as np
import pytest
import tvm
from relax_nets import make
from test_write_in_place import RNG, SHAPE, check_network, conv, in_place
from tvm import relax

from tvm_pivot.relay_passes import PHASES, Compilation
from tvm_pivot.schedules.analysis import walk
from tvm_pivot.schedules.write_over import inputs_to_write_over, write_over
from tvm_pivot.targets import resolve

FUNCTIONS = ("gelu", "silu", "multiply", "tanh", "abs")


def finished(body, *shapes):
    """The only function of a network of one elementwise operator, scheduled."""
    mod = make(body, *shapes)
    state = Compilation(mod, resolve("x86"))
    for phase in PHASES[:-1]:
        state = phase.run(state)
    (func,) = (f for _, f in state.mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc))
    return func


@pytest.mark.parametrize("shape", [(4, 64), (3, 7, 16), (2, 5, 13), (1, 1000)])
def test_an_elementwise_function_over_its_input_computes_the_same_bits(shape):
    def body(b, x):
        return b.emit(relax.op.nn.silu(x))

    func = finished(body, shape)
    over = inputs_to_write_over(func)
    assert over in ([0], [])
    forms = {"beside": func, **({"over": write_over(func, 0)} if over else {})}
    mod = tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in forms.items()})
    lib = tvm.compile(mod, target=resolve("x86").to_tvm())
    x = RNG.standard_normal([int(n) for n in func.params[0].ty.shape]).astype(np.float32)
    y = tvm.runtime.tensor(np.zeros([int(n) for n in func.params[-1].ty.shape], np.float32))
    lib["beside"](tvm.runtime.tensor(x), y)
    want = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(y.numpy().ravel(), want.ravel(), rtol=1e-5, atol=1e-6)
    if over:
        place = tvm.runtime.tensor(x.reshape(y.shape))
        lib["over"](place)
        assert np.array_equal(place.numpy(), y.numpy())


def test_what_vectors_overlap_in_is_not_computed_twice():
    """The last vector of 13 ends with the row: some elements are stored two times."""
    func = finished(lambda b, x: b.emit(relax.op.exp(x)), (5, 1001))
    stored = 1
    for loop in walk(func.body, tvm.tirx.For):
        stored *= int(loop.extent)
    assert (inputs_to_write_over(func) == [0]) == (stored == 5 * 1001)


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (lambda b, x, y: b.emit(relax.op.multiply(x, y)), ["x0", "x1"]),
        (lambda b, x, y: b.emit(relax.op.add(x, relax.op.flip(y, 0))), ["x0"]),
        (lambda b, x, y: b.emit(relax.op.add(x, relax.op.permute_dims(y))), []),
        (lambda b, x, y: b.emit(relax.op.flip(relax.op.multiply(x, y), 0)), []),
    ],
)
def test_only_inputs_read_at_the_same_place_are_written_over(body, names):
    func = finished(body, (32, 32), (32, 32))
    places = inputs_to_write_over(func)
    assert sorted(str(func.params[place].name) for place in places) == names


def test_an_input_of_another_type_is_not_written_over():
    assert not inputs_to_write_over(finished(lambda b, x: relax.op.astype(x, "int32"), (4, 64)))


def gelu_between(b, x):
    return conv(b, b.emit(relax.op.nn.gelu(conv(b, x))))


def twice_in_turn(b, x):
    y = b.emit(relax.op.nn.gelu(conv(b, x)))
    return conv(b, b.emit(relax.op.nn.gelu(conv(b, y))))


def last_of_all(b, x):
    return b.emit(relax.op.nn.gelu(conv(b, x)))


def gelu_of_the_input(b, x):
    return conv(b, b.emit(relax.op.nn.gelu(x)))


def gelu_read_later(b, x):
    y = conv(b, x)
    return conv(b, b.emit(relax.op.nn.gelu(y))), conv(b, y, 8)


def gelu_of_a_constant(b, x):
    made = relax.const(RNG.standard_normal(SHAPE).astype("float32"))
    return b.emit(relax.op.multiply(conv(b, x), b.emit(relax.op.nn.silu(made))))


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (gelu_between, 1),
        (twice_in_turn, 2),
        (last_of_all, 1),
        (gelu_of_the_input, 0),
        (gelu_read_later, 0),
        (gelu_of_a_constant, 1),
    ],
)
def test_an_input_that_nothing_reads_again_is_written_over(body, count, monkeypatch):
    mod = make(body, SHAPE)
    assert in_place(mod, FUNCTIONS) == count
    check_network(mod, monkeypatch)


@pytest.mark.parametrize("seed", range(6))
def test_random_networks_of_functions(seed, monkeypatch):
    rng = random.Random(seed)
    unary = (relax.op.nn.gelu, relax.op.nn.silu, relax.op.tanh, relax.op.abs)

    def body(b, x):
        values = [x, conv(b, x)]
        for _ in range(8):
            source, other = rng.choice(values[-3:]), rng.choice(values[-4:])
            choice = rng.random()
            if choice < 0.4:
                new = b.emit(rng.choice(unary)(source))
            elif choice < 0.6:
                new = b.emit(relax.op.multiply(relax.op.tanh(source), other))
            else:
                new = conv(b, source, kernel=rng.choice([1, 3]))
            values.append(new)
        return values[-rng.randint(1, 3) :]

    check_network(make(body, SHAPE), monkeypatch)
