"""Targets: the descriptions, and what is made of this machine."""

from __future__ import annotations

import platform
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import tvm

from tvm_pivot import targets
from tvm_pivot.errors import UnsupportedTargetError
from tvm_pivot.targets import (
    PRESETS,
    cannot_run,
    detect_host,
    machine_name,
    missing_features,
    needed_features,
    resolve,
)

X86 = sorted(name for name, target in PRESETS.items() if target.family == "x86")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_describe_machines_that_could_exist(name: str) -> None:
    target = PRESETS[name]
    assert target.name == name
    assert target.family in ("x86", "arm", "cuda")
    assert 0 < target.l1_bytes < target.l2_bytes
    assert target.lanes >= 4
    assert target.registers >= 16
    assert target.block_rows
    assert len(set(target.block_rows)) == len(target.block_rows)
    assert target.has_schedules


@pytest.mark.parametrize("name", sorted(n for n, t in PRESETS.items() if t.family != "cuda"))
def test_presets_are_targets_llvm_knows(name: str) -> None:
    made = PRESETS[name].to_tvm()
    assert isinstance(made, tvm.target.Target)
    assert str(made.attrs["mcpu"]) == PRESETS[name].tvm["mcpu"]
    assert int(made.attrs["num-cores"]) == PRESETS[name].cores


@pytest.mark.parametrize("name", X86)
def test_lanes_and_registers_are_those_of_the_instruction_set(name: str) -> None:
    has = tvm.get_global_func("target.llvm_cpu_has_feature")
    target = PRESETS[name]
    wide = bool(has("avx512f", target.to_tvm()))
    assert (target.lanes, target.registers) == ((16, 32) if wide else (8, 16))
    assert has("fma", target.to_tvm())


def test_targets_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PRESETS["arm"].lanes = 8  # type: ignore[misc]


def test_resolve() -> None:
    assert resolve("zen4") is PRESETS["zen4"]
    mine = replace(PRESETS["zen4"], name="mine", cores=3)
    assert resolve(mine) is mine
    assert resolve("x86") == detect_host()
    known = ", ".join(["x86", "cuda", *sorted(PRESETS)])
    with pytest.raises(UnsupportedTargetError, match=f"unknown target 'riscv'; known: {known}"):
        resolve("riscv")


def test_a_target_without_schedules_says_which_have_some() -> None:
    assert PRESETS["haswell"].require_schedules() is PRESETS["haswell"]
    bare = replace(PRESETS["arm"], name="bare", has_schedules=False)
    with pytest.raises(UnsupportedTargetError) as caught:
        bare.require_schedules()
    assert "'bare'" in str(caught.value)
    assert ", ".join(sorted(PRESETS)) in str(caught.value)


def test_an_unknown_cpu_is_an_error_and_not_a_log_line() -> None:
    wrong = replace(PRESETS["haswell"], tvm={"kind": "llvm", "mcpu": "haswel"})
    with pytest.raises(UnsupportedTargetError, match="LLVM has no CPU named 'haswel' for x86_64"):
        wrong.to_tvm()
    foreign = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "haswell"}
    with pytest.raises(UnsupportedTargetError, match="'haswell' for aarch64"):
        replace(PRESETS["arm"], tvm=foreign).to_tvm()


def fake_host(monkeypatch: pytest.MonkeyPatch, cpu: str, *hidden: str) -> None:
    """Pretend that this machine is a `cpu`, less the features `hidden` by a hypervisor."""
    real = tvm.get_global_func
    described = real("target.llvm_get_cpu_features")(
        tvm.target.Target({"kind": "llvm", "mcpu": cpu})
    )
    offered = {str(feature) for feature in described} - set(hidden)
    every = [str(feature) for feature in real("tvm.codegen.llvm.GetHostCPUFeatures")()]
    fakes = {
        "tvm.codegen.llvm.GetHostCPUFeatures": lambda: {f: f in offered for f in every},
        "target.llvm_get_system_cpu": lambda: cpu,
    }
    monkeypatch.setattr(tvm, "get_global_func", lambda name: fakes.get(name) or real(name))
    monkeypatch.setattr(targets, "_linux_features", frozenset)


AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


@pytest.mark.parametrize(
    ("cpu", "hidden", "lanes", "mcpu"),
    [
        ("znver4", (), 16, "znver4"),
        ("haswell", (), 8, "haswell"),
        ("znver2", (), 8, "znver2"),
        # The model's name alone would promise instructions that are not there.
        ("sapphirerapids", ("avx512fp16",), 16, "skylake-avx512"),
        ("skylake-avx512", AVX512, 8, "haswell"),
        # Hidden, but nothing that code like ours contains.
        ("icelake-server", ("sgx", "pconfig", "pku", "wbnoinvd"), 16, "icelake-server"),
    ],
)
def test_hosts(
    monkeypatch: pytest.MonkeyPatch, cpu: str, hidden: tuple[str, ...], lanes: int, mcpu: str
) -> None:
    fake_host(monkeypatch, cpu, *hidden)
    host = detect_host()
    assert (host.name, host.family, host.lanes, host.tvm["mcpu"]) == ("x86", "x86", lanes, mcpu)
    assert missing_features(needed_features(host)) == ()
    assert host.cores >= 1


def test_hosts_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fake_host(patch, "ivybridge")
        with pytest.raises(UnsupportedTargetError, match=r"this CPU \(ivybridge\) has no AVX2"):
            detect_host()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(UnsupportedTargetError, match="needs an x86-64 host; this one is aarch64"):
        resolve("x86")


def test_what_runs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"zen4": "x86_64", "raspberry-pi-4": "aarch64", "armv7-neon": "armv7l"}
    for machine in (*places.values(), "AMD64", "arm64"):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        for name, runs_on in places.items():
            reason = cannot_run(PRESETS[name])
            if runs_on == {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine):
                assert reason is None
            else:
                assert reason is not None
                assert f"made for target {name!r}" in reason
                assert f"which this {machine_name()} machine cannot run" in reason


ARM = sorted(name for name, target in PRESETS.items() if target.family == "arm")


@pytest.mark.parametrize("name", ARM)
def test_arm_presets_have_neon(name: str) -> None:
    target = PRESETS[name]
    assert tvm.get_global_func("target.llvm_cpu_has_feature")("neon", target.to_tvm())
    assert "neon" in needed_features(target)
    assert (target.lanes, target.registers) == (4, 16 if name == "armv7-neon" else 32)


def test_features_of_arm_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(targets, "_arm_features", lambda: frozenset({"neon", "lse", "rdm"}))
    assert missing_features(needed_features(PRESETS["cortex-a53"])) == ()
    assert missing_features(needed_features(PRESETS["arm"])) == ()
    assert "dotprod" in missing_features(needed_features(PRESETS["cortex-a76"]))
    assert "sve" in missing_features(needed_features(PRESETS["neoverse-v1"]))


def test_missing_features(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_host(monkeypatch, "haswell")
    assert missing_features(needed_features(PRESETS["x86-avx2"])) == ()
    assert missing_features(needed_features(PRESETS["x86-avx512"])) == tuple(sorted(AVX512))
    extra = {"kind": "llvm", "mcpu": "haswell", "mattr": ["+avxvnni", "-fma"]}
    assert missing_features(needed_features(replace(PRESETS["x86-avx2"], tvm=extra))) == (
        "avxvnni",
    )


def write_cache(folder: Any, level: int, kind: str, size: str) -> None:
    folder.mkdir(parents=True)
    for name, text in (("level", str(level)), ("type", kind), ("size", size)):
        (folder / name).write_text(f"{text}\n")


def test_cache_sizes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_CACHES", str(tmp_path))
    write_cache(tmp_path / "index0", 1, "Instruction", "64K")
    write_cache(tmp_path / "index1", 1, "Data", "48K")
    write_cache(tmp_path / "index2", 2, "Unified", "2M")
    write_cache(tmp_path / "index3", 3, "Unified", "odd")
    write_cache(tmp_path / "index4", 4, "Unified", "")
    assert targets._cache_bytes(1, 7) == 48 << 10
    assert targets._cache_bytes(2, 7) == 2 << 20
    assert targets._cache_bytes(3, 7) == 7
    assert targets._cache_bytes(4, 7) == 7
    monkeypatch.setattr(targets, "_CACHES", str(tmp_path / "absent"))
    assert targets._cache_bytes(1, 7) == 7
