"""tools/cuda_check.py on reports and listings of nvcc, good and bad; no nvcc is needed."""

from __future__ import annotations

import importlib.util
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SNIPPETS = Path(__file__).parent / "cuda_check"  # snippets.cu says how they were made


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


check = load("cuda_check")

TABLE = """
## Budgets
Text.

| Kernel | Registers | Rows | Others | KB |
|---|---|---|---|---|
| `wide_kernel` | 32 (40) | load, store | 0/0 1/2 3/4 | 48 |
"""
BUDGET = check.Budget(
    registers=32,
    double_registers=40,
    rows=frozenset({"load", "store"}),
    others={"half": (0, 0), "float": (0, 0), "double": (0, 0)},
    in_flight=0,
)


@pytest.fixture(scope="module")
def usages():
    report = (SNIPPETS / "snippets.ptxas").read_text()
    return {
        check.kernel_of(name).name: (check.kernel_of(name), arch, usage)
        for (name, arch), usage in check.read_ptxas(report).items()
    }


@pytest.fixture(scope="module")
def accesses():
    found = {}
    for name, arch, code in check.functions((SNIPPETS / "snippets.sass").read_text().splitlines()):
        kernel = check.kernel_of(name)
        found[kernel.name] = (kernel, arch, check.accesses_of(kernel, code))
    return found


# --- Names ---------------------------------------------------------------------------------

PREFIX = "_ZN6bmtard4cuda51_GLOBAL__N__489e839c_18_softmax_entropy_cu_f800e2a4"


@pytest.mark.parametrize(
    ("template", "dtype", "vector_bytes"),
    [
        ("INS0_5ShapeIdLi8ELi128ELi4ELi2ELb0EEEEE", "double", 16),
        ("INS0_5ShapeIfLi8ELi256ELi4ELi2ELb0EEEEE", "float", 8),  # two values of four bytes
        ("INS0_5ShapeINS_7Float16ELi8ELi256ELi4ELi2EEEEE", "half", 4),
        ("INS0_5ShapeIfLi32ELi256ELi32ELi4ELb0EEEEE", "float", 16),
        ("INS0_5ShapeINS_8BFloat16ELi256ELi256ELi0ELi8ELb1EEEEE", "half", 16),
        ("IfLi2EE", "float", 16),
        ("INS_8BFloat16EE", "half", 16),
    ],
)
def test_mangled_names(template, dtype, vector_bytes):
    name = f"{PREFIX}22softmax_entropy_kernel{template}vNS_18SoftmaxEntropyArgsEb"
    assert check.kernel_of(name) == check.Kernel("softmax_entropy_kernel", dtype, vector_bytes)


def test_kernel_without_a_template():
    assert check.kernel_of("_Z12plain_kernelPf") == check.Kernel("plain_kernel", None, 16)
    assert check.kernel_of("_ZN6bmtard12plain_kernelEPf").name == "plain_kernel"


# --- Budgets -------------------------------------------------------------------------------


def test_budgets_are_read():
    (budget,) = check.budgets(TABLE).values()
    assert (budget.registers, budget.double_registers) == (32, 40)
    assert budget.rows == {"load", "store"}
    assert budget.others == {"half": (0, 0), "float": (1, 2), "double": (3, 4)}
    assert budget.in_flight == 48


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("32 (40)", "32"),
        ("load, store", "loads"),
        ("0/0 1/2 3/4", "0/0 1/2"),
        (" | load, store", ""),
        (" | 48 |", " |"),
    ],
)
def test_broken_budget_is_named(old, new):
    with pytest.raises(SystemExit, match=r"a budget must read .* got \| `wide_kernel`"):
        check.budgets(TABLE.replace(old, new))


def test_missing_table_is_named():
    with pytest.raises(SystemExit, match='section "## Budgets"'):
        check.budgets("# CUDA kernels")


def test_every_kernel_of_the_sources_has_a_budget():
    """What `make cuda-check` finds out by compiling, without nvcc."""
    sources = "".join(path.read_text() for path in ROOT.glob("csrc/cuda/*.cu*"))
    kernels = set(re.findall(r"BMTARD_KERNEL\([^\n]*\)\s*(\w+)\(", sources))
    assert kernels
    assert kernels == set(check.budgets(check.README.read_text()))


# --- ptxas ---------------------------------------------------------------------------------


def test_report_is_read(usages):
    kernel, arch, usage = usages["wide_kernel"]
    assert (kernel.dtype, arch) == ("float", "90")
    assert usage == check.Usage(registers=30)
    assert usages["spilling_kernel"][2].spills == 364 + 392
    assert usages["spilling_kernel"][2].stack == 192


def test_shared_memory_is_read():
    report = (
        "ptxas info    : Compiling entry function 'k' for 'sm_75'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 89 registers, used 1 barriers, 2208 bytes smem, 520 bytes cmem[0]\n"
    )
    assert check.read_ptxas(report) == {("k", "75"): check.Usage(registers=89, shared=2208)}


@pytest.mark.parametrize(
    ("kernel", "problems"),
    [
        ("wide_kernel", []),
        ("spilling_kernel", ["756 bytes of spill", "192 bytes of local memory"]),
        ("local_kernel", ["64 bytes of local memory", "40 registers, its budget is 32"]),
    ],
)
def test_spills_and_local_memory_are_found(usages, kernel, problems):
    found = list(check.check_usage(*usages[kernel], BUDGET, threads=256))
    assert len(found) == len(problems)
    for message, problem in zip(found, problems, strict=True):
        assert f"{kernel}<float> on sm_90: {problem}" in message


@pytest.mark.parametrize(("dtype", "limit"), [("float", 32), ("double", 40), ("half", 32)])
def test_registers_beyond_the_budget_are_found(dtype, limit):
    kernel = check.Kernel("k", dtype, 16)

    def problems(registers, threads=256):
        usage = check.Usage(registers=registers)
        return list(check.check_usage(kernel, "90", usage, BUDGET, threads))

    assert not problems(limit)
    assert problems(limit + 1) == [
        f"k<{dtype}> on sm_90: {limit + 1} registers, its budget is {limit}"
    ]
    assert not problems(limit, threads=65536 // limit)
    assert "exceeds 65536" in problems(limit, threads=65536 // limit + 1)[0]


# --- Machine code --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "wide", "others"),
    [
        ("wide_kernel", (2, 1), (0, 0)),
        ("one_scalar_kernel", (1, 1), (4, 0)),
        ("scalar_kernel", (0, 0), (8, 4)),
    ],
)
def test_accesses_are_told_apart(accesses, kernel, wide, others):
    found = accesses[kernel][2]
    assert (found.wide["load"], found.wide["store"]) == wide
    assert (found.others["load"], found.others["store"]) == others


@pytest.mark.parametrize(
    ("kernel", "problems"),
    [
        ("wide_kernel", []),
        ("one_scalar_kernel", ["4 loads of single float values"]),
        (
            "scalar_kernel",
            [
                "no load of 16 bytes",
                "8 loads of single float values",
                "no store of 16 bytes",
                "4 stores of single float values",
            ],
        ),
    ],
)
def test_scalar_accesses_are_found(accesses, kernel, problems):
    found = list(check.check_accesses(*accesses[kernel], BUDGET))
    assert len(found) == len(problems)
    for message, problem in zip(found, problems, strict=True):
        assert problem in message


def test_local_memory_is_found_in_the_code(accesses):
    assert "instructions on local memory" in next(
        check.check_accesses(*accesses["local_kernel"], BUDGET)
    )


def instructions(text: str):
    lines = [
        f"        /*{16 * i:04x}*/ {line.strip()} ;" for i, line in enumerate(text.split("\n"))
    ]
    ((_, _, code),) = check.functions(["arch = sm_120", "Function : k", *lines])
    return code


def listing(text: str):
    return check.accesses_of(check.Kernel("k", "float", 16), instructions(text))


# As ptxas writes it for sm_120: the wide branch is a predicate, two jumps test it.
PREDICATED = """@P1 LDG.E.128 R4, desc[UR6][R6.64]
@P1 LDG.E.128 R8, desc[UR6][R10.64]
@P1 BRA 0x50
LDG.E R4, desc[UR6][R6.64]
NOP
@P1 BRA 0x80
LDG.E R8, desc[UR6][R10.64]
NOP
EXIT"""


def test_predicated_branches_are_followed():
    assert listing(PREDICATED).others["load"] == 0
    # Another value of the predicate, or a value that is read on both ways.
    rewritten = PREDICATED.replace("NOP\n@P1", "ISETP.GT.AND P1, PT, R2, R4, PT\n@P1")
    assert listing(rewritten).others["load"] == 1
    both = PREDICATED.replace("NOP\nEXIT", "NOP\nLDG.E R3, desc[UR6][R12.64]")
    assert listing(both).others["load"] == 1


def test_opposite_predicates_exclude_each_other():
    both = "@P0 LDG.E.128 R4, [R6.64]\n{}LDG.E R4, [R6.64]\nEXIT"
    assert listing(both.format("@!P0 ")).others["load"] == 0
    assert listing(both.format("@P0 ")).others["load"] == 1
    assert listing(both.format("")).others["load"] == 1


@pytest.mark.parametrize("end", ["EXIT", "RET.REL.NODEC R2"])
def test_exits_under_a_predicate_are_followed(end):
    """The end of a kernel: the wide branch is a predicate, and leaves."""
    last = f"@!P0 STG.E.128 [R8.64], R4\n{{}}@!P0 {end}\nSTG.E [R8.64], R4\nEXIT"
    assert listing(last.format("")).others["store"] == 0
    assert listing(last.format("ISETP.GT.AND P0, PT, R2, R4, PT\n")).others["store"] == 1
    other = last.format("").replace(f"@!P0 {end}", f"@P0 {end}")
    assert listing(other).others["store"] == 1
    assert listing(last.format("").replace(f"@!P0 {end}", "NOP")).others["store"] == 1


def test_shared_memory_of_another_block_is_no_row():
    assert listing("LD.E R4, desc[UR6][R6.64]\nST.E [R6.64], R4\nEXIT") == check.Accesses()


def test_unknown_jump_is_an_error():
    with pytest.raises(ValueError, match="cannot follow BRX at 0x0"):
        listing("BRX R2 -0x10\nEXIT")


def in_flight(text: str) -> int:
    return check.loads_in_flight(check.Kernel("k", "float", 16), instructions(text))


@pytest.mark.parametrize(
    ("rest", "loads"),
    [
        ("LDG.E.128 R8, desc[UR6][R2.64]\nFADD R12, R4, R8", 2),
        ("FADD R12, R5, R5\nLDG.E.128 R8, desc[UR6][R2.64]\nFADD R12, R12, R8", 1),  # waits
        ("MOV R9, R7\nLDG.E.128 R4, desc[UR6][R2.64]\nFADD R12, R9, R4", 1),  # to move is to wait
        ("LDG.E.128 R8, desc[UR6][R2.64]\nFADD R12, R4, R4", 1),  # nobody reads the second
        ("LDG.E R8, desc[UR6][R2.64]\nFADD R12, R4, R8", 1),  # no pack
        ("STG.E desc[UR6][R2.64], R6\nLDG.E.128 R8, desc[UR6][R2.64]\nFADD R12, R8, R8", 1),
    ],
)
def test_loads_in_flight_are_counted(rest, loads):
    assert in_flight(f"LDG.E.128 R4, desc[UR6][R2.64]\n{rest}\nSTG.E [R2.64], R12\nEXIT") == loads


# Looks two tiles ahead; after the loop, loads that do not wait for what it fetched last.
RING = """LDG.E.128 R4, desc[UR6][R2.64]
LDG.E.128 R8, desc[UR6][R2.64]
FADD R12, R4, R12
@P0 LDG.E.128 R4, desc[UR6][R2.64]
FADD R12, R8, R12
@P0 LDG.E.128 R8, desc[UR6][R2.64]
@P0 BRA 0x20
LDG.E.128 R16, desc[UR6][R2.64]
LDG.E.128 R20, desc[UR6][R2.64]
FADD R12, R16, R20
STG.E [R2.64], R12
EXIT"""


def test_loads_of_a_loop_are_not_counted_after_it():
    assert in_flight(RING) == 2
    assert in_flight(RING.replace("FADD R12, R16, R20", "FFMA R12, R16, R20, R8")) == 3


def test_loads_of_other_branches_are_one():
    """What leads to the same registers."""
    text = """@P0 BRA 0x30
LDG.E.128 R4, desc[UR6][R2.64]
BRA 0x40
LDG.E.128 R4, desc[UR6][R10.64]
LDG.E.128 R16, desc[UR6][R2.64]
FADD R12, R4, R16
STG.E [R2.64], R12
EXIT"""
    assert in_flight(text) == 2


@pytest.mark.parametrize(
    ("registers", "threads", "resident"),
    [(64, 256, 1024), (65, 256, 768), (32, 256, 2048), (16, 256, 2048), (128, 512, 512)],
)
def test_kilobytes_follow_from_registers(registers, threads, resident):
    assert check.kilobytes_in_flight(3, registers, threads) == 3 * 16 * resident // 1024


def test_launch_bounds_are_read():
    ptx = """
.visible .entry free(
.param .u64 free_param_0
)
{ ret; }
.entry bounded(
.param .align 8 .b8 bounded_param_0[264],
.param .u8 bounded_param_1
)
.explicitcluster
.maxntid 128, 1, 1
.minnctapersm 1
"""
    assert check.threads_of_kernels(ptx) == {"bounded": 128}


# --- Everything together -------------------------------------------------------------------


@pytest.fixture
def found(capsys):
    """Problems of the listing of snippets, with parts of the input changed."""
    listing = (SNIPPETS / "snippets.sass").read_text().splitlines()
    usages = check.read_ptxas((SNIPPETS / "snippets.ptxas").read_text())
    names = {check.kernel_of(name).name: name for name, _ in usages}
    # The very rows that the check proposes.
    threads = dict.fromkeys(names.values(), 256)
    rows = [
        message.split("measured: ")[1]
        for message in check.check_kernels(listing, usages, threads, {}, ["90"])
    ]
    printed = capsys.readouterr().out
    assert "wide_kernel" in printed
    assert "30 (-)" in printed

    def problems(
        listing=listing, wanted=("90",), lacks=(), unbounded=(), extra="", change=lambda row: row
    ):
        table = check.budgets("## Budgets\n" + "\n".join(map(change, rows)) + extra)
        reports = {key: usage for key, usage in usages.items() if key[0] not in lacks}
        bounds = {name: 256 for name in threads if name not in unbounded}
        return list(check.check_kernels(listing, reports, bounds, table, list(wanted)))

    problems.names = names
    return problems


def test_rows_that_it_proposes_are_kept(found):
    """All but local memory, which no budget allows."""
    assert {message.split("<")[0] for message in found()} == {"local_kernel", "spilling_kernel"}


def test_too_few_loads_in_flight_are_named(found):
    assert not any("in flight" in message for message in found())
    more = found(change=lambda row: re.sub(r"\d+ \|$", "4096 |", row))
    assert any("KB of loads in flight, its budget is 4096" in message for message in more)


def test_what_is_missing_is_named(found):
    wide = found.names["wide_kernel"]
    assert "wide_kernel<float> is not compiled for 100" in found(wanted=("90", "100"))
    assert any("no report of ptxas" in message for message in found(lacks=[wide]))
    assert "wide_kernel<float>: no __launch_bounds__" in found(unbounded=[wide])
    gone = "\n| `gone_kernel` | 8 (8) | - | 0/0 0/0 0/0 | 0 |"
    assert "gone_kernel has a budget, but is not compiled" in found(extra=gone)
    assert found(listing=[])[-1] == "the library has no kernels"


# --- The program ---------------------------------------------------------------------------


def test_without_nvcc_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(check.shutil, "which", lambda name, path: None)
    for arguments in ([], ["--nvcc"]):
        assert check.main(arguments) == 1
        assert "there is no nvcc in CUDACXX, on PATH" in capsys.readouterr().err


def test_launcher_keeps_the_report_and_shows_the_rest(tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text(
        '#!/bin/sh\necho "ptxas info    : Used 30 registers" >&2\n'
        "echo 'a.cu(1): warning: unused' >&2\nexit 3\n"
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    tool = ROOT / "tools" / "cuda_check.py"
    done = subprocess.run(
        [sys.executable, tool, "--launch", compiler, "-c", "a.cu", "-o", tmp_path / "a.o"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr == "a.cu(1): warning: unused\n"
    assert "Used 30 registers" in (tmp_path / "a.o.ptxas").read_text()
