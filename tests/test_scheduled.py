"""No naive loop anywhere: every TIR function of the test networks was scheduled."""

import pytest
from tvm import tirx

from benchmarks import zoo
from tvm_pivot.importer import import_model
from tvm_pivot.relay_passes import PHASES, Compilation
from tvm_pivot.schedules.analysis import is_naive
from tvm_pivot.targets import resolve

NETWORKS = {
    "resnet18": {"image": 64},
    "resnet50": {"image": 64},
    "vgg16": {"image": 32},
    "mobilenet_v1": {"image": 64},
    "mobilenet_v2": {"image": 64},
    "bert2": {"length": 32},
    "mlp": {},
    "lstm": {"length": 4},
    "gru": {"length": 4},
}


def functions(model, **options):
    """The TIR functions of a network as they go to code generation."""
    imported = import_model(model, **options)
    state = Compilation(imported.mod, resolve("x86"))
    for phase in PHASES:
        state = phase.run(state)
    return {
        str(var.name_hint): func
        for var, func in state.mod.functions_items()
        if isinstance(func, tirx.PrimFunc)
    }


def check(funcs):
    assert funcs
    unscheduled = [name for name, f in funcs.items() if not f.attrs.get("tirx.is_scheduled")]
    assert not unscheduled
    naive = [name for name, f in funcs.items() if is_naive(f)]
    assert not naive


@pytest.mark.parametrize("name", NETWORKS)
def test_every_function_of_a_standing_network_is_scheduled(name):
    module, x = zoo.build_torch(name, "8x1@0.2", **NETWORKS[name])
    check(functions(module, example_inputs=(x,)))


@pytest.mark.parametrize("name", ["lenet5_dns", "lenet300_dns", "ultraface_rfb320"])
def test_every_function_of_a_real_network_is_scheduled(name, shared_data):
    check(functions(shared_data / f"{name}.onnx"))
