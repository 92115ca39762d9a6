"""Checks the CUDA kernels as far as a machine without a GPU can.  (make cuda-check)

    python tools/cuda_check.py         # needs nvcc, and a CUDA torch in this Python
    python tools/cuda_check.py --nvcc  # only whether there is an nvcc

1. Compiles every architecture of CMakeLists.txt with warnings as errors, into build/cuda-check.
2. Reads ptxas' reports: no spill, no local memory, registers within the kernel's budget.
3. Disassembles the library: rows move in accesses of a pack wherever they are packed, and enough
   of their loads are in flight on a multiprocessor of sm_90.
4. Imports the library beside a CUDA torch: dispatch keys, fake tensors, stream, architectures.

The budgets are the table "Budgets" of csrc/cuda/README.md. A kernel that is not in the table, or
a line of the table without a kernel, is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda-check"
README = ROOT / "csrc" / "cuda" / "README.md"
REPORT = ".ptxas"  # beside each object, what ptxas said of it

REGISTERS = 64 * 1024  # of a multiprocessor, on every architecture so far
THREADS = 2048  # of a multiprocessor of IN_FLIGHT
IN_FLIGHT = "90"  # where the loads in flight are counted
DTYPES = {"f": "float", "d": "double", "BFloat16": "half", "Float16": "half"}
BYTES = {"half": 2, "float": 4, "double": 8}


# --- Names ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A compiled instantiation, told from its mangled name."""

    name: str
    dtype: str | None  # of its rows: half (both kinds), float, double
    vector_bytes: int  # of an access to a packed row

    def __str__(self) -> str:
        return f"{self.name}<{self.dtype}>" if self.dtype else self.name


def kernel_of(mangled: str) -> Kernel:
    """Kernels are templates on a dtype or on Shape<dtype, lanes, threads, values, width>."""
    rest = mangled.removeprefix("_Z").removeprefix("N")
    name = mangled
    while match := re.match(r"\d+", rest):
        length = int(match[0])
        name, rest = rest[match.end() :][:length], rest[match.end() + length :]
    found = re.search(r"I(?:NS\w*?_\d+)?(BFloat16|Float16|f|d)(?=E|Li)", rest)
    dtype = DTYPES[found[1]] if found else None
    shape = re.search(r"5ShapeI\w+?Li\d+ELi\d+ELi\d+ELi(\d+)E", rest)
    return Kernel(name, dtype, int(shape[1]) * BYTES[dtype] if shape and dtype else 16)


# --- Budgets -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    registers: int
    double_registers: int
    rows: frozenset[str]  # "load", "store": how packed rows move
    others: dict[str, tuple[int, int]]  # dtype: loads and stores of single values
    in_flight: int  # KB of loads, at least

    def registers_of(self, kernel: Kernel) -> int:
        return self.double_registers if kernel.dtype == "double" else self.registers


def budgets(readme: str) -> dict[str, Budget]:
    """The table "Budgets": kernel, registers (double), rows move by, others (three a/b), KB."""
    section = re.search(r"^## Budgets\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    if section is None:
        raise SystemExit('cuda-check: csrc/cuda/README.md must have a section "## Budgets"')
    table = {}
    for line in section[1].splitlines():
        if not line.startswith("| `"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = re.fullmatch(
            r"`(\w+)` \| (\d+) \((\d+)\) \| ([\w, -]*) \| (\d+/\d+ \d+/\d+ \d+/\d+) \| (\d+)",
            " | ".join(cells),
        )
        rows = frozenset(re.findall(r"\w+", found[4])) if found else frozenset()
        if found is None or not rows <= {"load", "store"}:
            raise SystemExit(
                "cuda-check: a budget must read | `kernel` | registers (double) | load, store | "
                f"a/b a/b a/b | KB |, got {line}"
            )
        pairs = re.findall(r"(\d+)/(\d+)", found[5])
        others = {dtype: (int(a), int(b)) for dtype, (a, b) in zip(BYTES, pairs, strict=True)}
        table[found[1]] = Budget(int(found[2]), int(found[3]), rows, others, int(found[6]))
    return table


# --- 2. ptxas ------------------------------------------------------------------------------


@dataclass
class Usage:
    """What ptxas reports of a kernel on an architecture; everything but registers in bytes."""

    registers: int = 0
    shared: int = 0  # static
    stack: int = 0
    spills: int = 0
    local: int = 0


def read_ptxas(report: str) -> dict[tuple[str, str], Usage]:
    """(mangled name, architecture) -> usage. What a kernel calls counts as the kernel's."""
    found: dict[tuple[str, str], Usage] = {}
    usage = Usage()
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            usage = found.setdefault((match[1], match[2]), Usage())
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            usage.stack = max(usage.stack, int(match[1]))
            usage.spills += int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            usage.registers = int(match[1])
            usage.shared = sum(map(int, re.findall(r"(\d+) bytes smem", line)))
            usage.local = sum(map(int, re.findall(r"(\d+) bytes lmem", line)))
    return found


def check_usage(
    kernel: Kernel, arch: str, usage: Usage, budget: Budget, threads: int
) -> Iterator[str]:
    where = f"{kernel} on sm_{arch}"
    if usage.spills:
        yield f"{where}: {usage.spills} bytes of spill stores and loads"
    if usage.stack or usage.local:
        yield f"{where}: {max(usage.stack, usage.local)} bytes of local memory"
    limit = budget.registers_of(kernel)
    if usage.registers > limit:
        yield f"{where}: {usage.registers} registers, its budget is {limit}"
    if limit * threads > REGISTERS:
        yield f"{where}: a budget of {limit} registers for {threads} threads exceeds {REGISTERS}"


# --- 3. Machine code -----------------------------------------------------------------------


@dataclass
class Instruction:
    address: int
    predicate: str | None  # "P0", "!P0"
    opcode: str
    operands: str


@dataclass
class Accesses:
    """Accesses to global memory in the text of a kernel."""

    wide: dict[str, int] = field(default_factory=lambda: {"load": 0, "store": 0})
    # Single values of the rows' width that are not the other branch of a wide access.
    others: dict[str, int] = field(default_factory=lambda: {"load": 0, "store": 0})
    local: int = 0


_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
# LD and ST, of any memory, are how a block of a cluster reads another one's shared memory.
_ENDS = ("EXIT", "RET", "KILL")
_MEMORY = {"LDG": "load", "LDGSTS": "load", "STG": "store"}


def functions(listing: Iterable[str]) -> Iterator[tuple[str, str, list[Instruction]]]:
    """(mangled name, architecture, instructions) of what cuobjdump --dump-sass prints."""
    arch = name = ""
    code: list[Instruction] = []
    for line in listing:
        if match := _INSTRUCTION.match(line):
            code.append(Instruction(int(match[1], 16), match[2], match[3], match[4]))
        elif match := re.match(r"\s*(?:Function : (\S+)|arch = sm_(\w+))", line):
            if name:
                yield name, arch, code
            name, code = match[1] or "", []
            arch = match[2] or arch
    if name:
        yield name, arch, code


def access_bytes(opcode: str) -> int:
    widths = re.findall(r"\.[US]?(8|16|64|128|256)\b", opcode)
    return int(widths[0]) // 8 if widths else 4


class Graph:
    """Control flow of a kernel: nodes are runs of instructions without a jump."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        jumps = self._jumps()
        starts = {0}
        for i, targets in jumps.items():
            starts.update(targets, {i + 1} if i + 1 < len(code) else ())
        firsts = sorted(starts)
        node_at = {first: node for node, first in enumerate(firsts)}
        self.next: list[list[int]] = []
        self.node_of: list[int] = []  # of each instruction
        # Predicate that a jump tests -> (jump, its node, where it goes if true, if false); None:
        # out of the kernel.
        self.tests: dict[str, list[tuple[int, int, int | None, int | None]]] = {}
        for node, (first, end) in enumerate(zip(firsts, [*firsts[1:], len(code)], strict=True)):
            last = end - 1
            targets = jumps.get(last, [end] if end < len(code) else [])
            self.next.append([node_at[target] for target in targets])
            self.node_of += [node] * (end - first)
            if (predicate := code[last].predicate) and targets:
                yes, no = self.next[node] if len(targets) == 2 else (None, self.next[node][0])
                if len(targets) == 1 and code[last].opcode.split(".")[0] not in _ENDS:
                    continue
                self.tests.setdefault(predicate, []).append((last, node, yes, no))
                self.tests.setdefault(negated(predicate), []).append((last, node, no, yes))
        self._order()
        self._find_loops()

    def _jumps(self) -> dict[int, list[int]]:
        """Instruction that ends a node -> where it leads; the taken side comes first."""
        index = {x.address: i for i, x in enumerate(self.code)}
        convergence: dict[str, list[int]] = {}  # BSSY names the place where its BSYNC leads
        for x in self.code:
            if x.opcode.startswith("BSSY"):
                register, *_, place = re.split(r"[,\s]+", x.operands)
                convergence.setdefault(register, []).append(index[int(place, 16)])
        jumps = {}
        for i, x in enumerate(self.code):
            base = x.opcode.split(".")[0]
            after = [i + 1] if i + 1 < len(self.code) else []
            if base in ("BRA", "JMP"):
                taken = index[int(re.findall(r"0x[0-9a-f]+", x.operands)[-1], 16)]
                conditional = x.predicate or re.search(r"\bU?P\d", x.operands)
                jumps[i] = [taken, *(after if conditional else [])]
            elif base in ("BRX", "JMX", "BRXU", "JMXU"):
                raise ValueError(f"cannot follow {x.opcode} at {x.address:#x}")
            elif base in _ENDS:
                jumps[i] = after if x.predicate else []
            elif base == "BSYNC":
                places = convergence[x.operands]
                jumps[i] = after if after and after[0] in places else places
        return jumps

    def _order(self) -> None:
        """Backward edges of a depth-first walk; what each node reaches without them, as bits."""
        self.back: set[tuple[int, int]] = set()
        self.reach = [0] * len(self.next)
        walked: dict[int, bool] = {0: False}  # False: on the path to here
        path = [(0, iter(self.next[0]))]
        while path:
            node, rest = path[-1]
            for target in rest:
                if target not in walked:
                    walked[target] = False
                    path.append((target, iter(self.next[target])))
                    break
                if not walked[target]:
                    self.back.add((node, target))
            else:
                walked[node] = True
                path.pop()
                self.reach[node] = 1 << node
                for target in self.next[node]:
                    if (node, target) not in self.back:
                        self.reach[node] |= self.reach[target]

    def _find_loops(self) -> None:
        before: list[list[int]] = [[] for _ in self.next]
        for node, targets in enumerate(self.next):
            for target in targets:
                before[target].append(node)
        loops: dict[int, set[int]] = {}
        for node, head in self.back:
            body = loops.setdefault(head, {head})
            todo = [node]
            while todo:
                if (inside := todo.pop()) not in body:
                    body.add(inside)
                    todo += before[inside]
        self._loops = sorted(loops.items(), key=lambda item: len(item[1]))

    def loop(self, node: int) -> int | None:
        """Head of the innermost loop around a node."""
        return next((head for head, body in self._loops if node in body), None)

    def outer(self, loop: int | None) -> int | None:
        """Head of the loop around a loop."""
        around = (head for head, body in self._loops if loop in body and head != loop)
        return next(around, None)

    def exclude(self, a: int, b: int) -> bool:
        """Whether no pass through the innermost loop runs both instructions."""
        node_a, node_b = self.node_of[a], self.node_of[b]
        if not (self.reach[node_a] >> node_b & 1 or self.reach[node_b] >> node_a & 1):
            return True
        # `@P0 LDG.E.128; @P0 BRA beyond`: what the jump, or an exit, skips is the other branch.
        if (predicate := self.code[a].predicate) is None:
            return False
        if self.code[b].predicate == negated(predicate) and self._keeps(predicate, a, b):
            return True
        return any(
            self.reach[node_a] >> node & 1
            and self._reaches(no, node_b)
            and not self._reaches(yes, node_b)
            and self._keeps(predicate, a, jump)
            for jump, node, yes, no in self.tests.get(predicate, ())
        )

    def _reaches(self, node: int | None, target: int) -> bool:
        return node is not None and bool(self.reach[node] >> target & 1)

    def _keeps(self, predicate: str, a: int, b: int) -> bool:
        """Whether no instruction between may write the predicate."""
        name = predicate.removeprefix("!")
        return not any(
            x.opcode.startswith("R2P") or name in re.split(r"[,\s]+", x.operands)[:3]
            for x in self.code[min(a, b) : max(a, b)]
        )


def negated(predicate: str) -> str:
    return predicate[1:] if predicate.startswith("!") else "!" + predicate


def accesses_of(kernel: Kernel, code: list[Instruction]) -> Accesses:
    """A single access is excused if a wide one stands in another branch of the same loop, or,
    where the compiler has made two loops of one, in a loop of another branch."""
    found = Accesses(local=sum(x.opcode.split(".")[0] in ("LDL", "STL") for x in code))
    graph = Graph(code)
    single_bytes = BYTES[kernel.dtype] if kernel.dtype else 4
    placed: dict[str, list[tuple[int, int | None, int]]] = {"load": [], "store": []}
    for i, x in enumerate(code):
        if kind := _MEMORY.get(x.opcode.split(".")[0]):
            placed[kind].append((i, graph.loop(graph.node_of[i]), access_bytes(x.opcode)))
    for kind, here in placed.items():
        wide = [(i, loop) for i, loop, size in here if size >= kernel.vector_bytes]
        wide_loops = {loop for _, loop in wide}
        found.wide[kind] = len(wide)
        for i, loop, size in here:
            if size != single_bytes:
                continue
            excused = any(
                graph.exclude(other, i)
                and (
                    other_loop == loop
                    or (
                        None not in (loop, other_loop)
                        and loop not in wide_loops
                        and graph.outer(loop) == graph.outer(other_loop)
                    )
                )
                for other, other_loop in wide
            )
            found.others[kind] += not excused
    return found


def registers_in(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"\bR(\d+)", text)}


@dataclass
class Effect:
    """Registers that an instruction reads and writes. Where it is not clear that one is written,
    as where a predicate is written before it, it counts as read."""

    reads: set[int]
    writes: set[int]
    load: int | None = None  # the first register of a pack of the row


def effect_of(x: Instruction, vector_bytes: int) -> Effect:
    to, _, rest = x.operands.partition(",")
    written = registers_in(to)
    if not to.startswith("R") or x.opcode.split(".")[0] in ("RED", "RET"):
        return Effect(registers_in(x.operands), set())
    if not written:  # RZ
        return Effect(registers_in(rest), set())
    first = min(written)
    loads = x.opcode.startswith(("LD.", "LDG.", "LDS.", "LDC."))
    size = access_bytes(x.opcode) if loads else 4
    if re.match(r"D(ADD|MUL|FMA)|CS2R|\S+\.WIDE", x.opcode):
        size = 8
    writes = set(range(first, first + max(1, size // 4)))
    row = x.opcode.startswith("LDG.") and size >= vector_bytes
    return Effect(registers_in(rest), writes, first if row else None)


def loads_in_flight(kernel: Kernel, code: list[Instruction]) -> int:
    """The most packs that a thread has asked for before it uses a value of the first: followed
    along the flow of control, and told apart by their registers. What nobody reads any more, as
    after a loop that looks ahead, does not count."""
    graph = Graph(code)
    effects = [effect_of(x, kernel.vector_bytes) for x in code]
    packs = {
        x.load: set(range(x.load, x.load + kernel.vector_bytes // 4))
        for x in effects
        if x.load is not None
    }
    nodes: list[list[int]] = [[] for _ in graph.next]
    for i, node in enumerate(graph.node_of):
        nodes[node].append(i)

    wanted: list[set[int]] = [set() for _ in nodes]  # registers that are read from its start on
    after: list[set[int]] = [set()] * len(code)
    todo = set(range(len(nodes)))
    before: list[list[int]] = [[] for _ in nodes]
    for node, targets in enumerate(graph.next):
        for target in targets:
            before[target].append(node)
    while todo:
        node = max(todo)
        todo.remove(node)
        live = set().union(*(wanted[target] for target in graph.next[node]))
        for i in reversed(nodes[node]):
            after[i] = live
            if code[i].predicate is None:
                live = live - effects[i].writes
            live = live | effects[i].reads
        if live != wanted[node]:
            wanted[node] = live
            todo.update(before[node])

    most = 0
    asked: list[set[int]] = [set() for _ in nodes]  # on some way to its start
    todo = set(range(len(nodes)))
    while todo:
        node = min(todo)
        todo.remove(node)
        here = asked[node]
        for i in nodes[node]:
            touched = effects[i].reads | effects[i].writes
            here = {load for load in here if not packs[load] & touched}
            if (load := effects[i].load) is not None:
                here.add(load)
            here = {load for load in here if packs[load] & after[i]}
            most = max(most, len(here))
        for target in graph.next[node]:
            if not here <= asked[target]:
                asked[target] = asked[target] | here
                todo.add(target)
    return most


def kilobytes_in_flight(loads: int, registers: int, threads: int) -> int:
    """Of a multiprocessor that holds as many blocks as the registers of their threads allow."""
    of_a_block = -(-registers // 8) * 8 * threads  # handed out by eights
    blocks = min(REGISTERS // of_a_block, THREADS // threads)
    return loads * 16 * blocks * threads // 1024


def check_accesses(kernel: Kernel, arch: str, accesses: Accesses, budget: Budget) -> Iterator[str]:
    where = f"{kernel} on sm_{arch}"
    if accesses.local:
        yield f"{where}: {accesses.local} instructions on local memory"
    if kernel.dtype is None:
        return
    for kind, limit in zip(("load", "store"), budget.others[kernel.dtype], strict=True):
        if kind in budget.rows and not accesses.wide[kind]:
            yield f"{where}: no {kind} of {kernel.vector_bytes} bytes"
        if accesses.others[kind] > limit:
            yield (
                f"{where}: {accesses.others[kind]} {kind}s of single {kernel.dtype} values beside "
                f"those of unaligned rows, its budget is {limit}"
            )


# --- Everything together -------------------------------------------------------------------


def find_nvcc() -> str | None:
    """As CMakeLists.txt looks for it."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = os.pathsep.join(
        [os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in folders if folder)]
    )
    return shutil.which(os.environ.get("CUDACXX") or "nvcc", path=places)


def wanted_architectures() -> list[str]:
    listed = re.search(r"foreach\(arch ([\d ]+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert listed is not None, "CMakeLists.txt has no foreach(arch ...)"
    return listed[1].split()


def launch(command: list[str]) -> int:
    """Runs nvcc for CMake and leaves what ptxas reports beside the object."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    infos = [line for line in done.stderr.splitlines() if not re.match(r"ptxas info|    \d", line)]
    print(*infos, sep="\n", end="\n" if infos else "", file=sys.stderr)
    if "-o" in command:
        Path(command[command.index("-o") + 1] + REPORT).write_text(done.stderr)
    return done.returncode


def run(*command: str | Path, **env: str) -> None:
    if subprocess.run(command, env=os.environ | env).returncode:
        raise SystemExit(f"cuda-check: failed: {' '.join(map(str, command))}")


def tool(name: str) -> Path:
    """A program of this Python's environment (cuobjdump, nvdisasm), or one on PATH."""
    for folder in sys.path:
        if (inside := Path(folder) / "nvidia" / "cu13" / "bin" / name).is_file():
            return inside
    if found := shutil.which(name):
        return Path(found)
    raise SystemExit(f"cuda-check: {name} is missing: pip install nvidia-cuda-{name}")


def build() -> None:
    scripts = Path(sys.executable).parent
    env = {"PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_COMPILER_LAUNCHER": f"{sys.executable};{Path(__file__).resolve()};--launch",
        "CMAKE_CUDA_FLAGS": "-Xptxas=-v",
        "Python_EXECUTABLE": sys.executable,
        "BMTARD_CUDA": "1",
        "BMTARD_CUDA_ARCHS": "default",
        "BMTARD_WERROR": "ON",
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    run("cmake", "-G", "Ninja", "-S", ROOT, "-B", BUILD, *defines, **env)
    jobs = ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    run("cmake", "--build", BUILD, *jobs, **env)


def disassembly(library: Path) -> Iterator[str]:
    env = os.environ | {"PATH": f"{tool('nvdisasm').parent}{os.pathsep}{os.environ['PATH']}"}
    command = [str(tool("cuobjdump")), "--dump-sass", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise SystemExit(f"cuda-check: cuobjdump --dump-sass {library} failed")


def threads_of_kernels(ptx: str) -> dict[str, int]:
    """Mangled name -> most threads of a block, from __launch_bounds__."""
    entry = r"\.entry (\w+)\([^)]*\)\s*(?:\.\w+[^\n]*\n\s*)*?\.maxntid (\d+)"
    pairs = re.findall(entry, ptx)
    return {name: int(threads) for name, threads in pairs}


def check_binary(library: Path, table: dict[str, Budget]) -> Iterator[str]:
    """Problems of the kernels of the library that was built in BUILD."""
    usages: dict[tuple[str, str], Usage] = {}
    for report in sorted(BUILD.glob(f"CMakeFiles/bmtard_ops.dir/**/*{REPORT}")):
        if report.with_suffix("").is_file():
            usages |= read_ptxas(report.read_text())
    ptx = subprocess.run(
        [tool("cuobjdump"), "--dump-ptx", library], capture_output=True, text=True, check=True
    ).stdout
    threads = threads_of_kernels(ptx)
    yield from check_kernels(disassembly(library), usages, threads, table, wanted_architectures())


def check_kernels(
    listing: Iterable[str],
    usages: dict[tuple[str, str], Usage],
    threads: dict[str, int],
    table: dict[str, Budget],
    wanted: list[str],
) -> Iterator[str]:
    """Problems of all kernels of a listing; prints what it found of each."""
    seen: dict[str, set[str]] = {}  # mangled name -> architectures
    lines: dict[str, Line] = {}
    for mangled, arch, code in functions(listing):
        kernel = kernel_of(mangled)
        seen.setdefault(mangled, set()).add(arch)
        if (mangled, arch) not in usages:
            yield f"{kernel} on sm_{arch}: no report of ptxas: remove {BUILD} and try again"
        elif mangled not in threads:
            yield f"{kernel}: no __launch_bounds__"
        else:
            usage, accesses = usages[mangled, arch], accesses_of(kernel, code)
            in_flight = None
            # Rows of few classes have smaller packs. Doubles are for tests of gradients.
            if (
                arch == IN_FLIGHT
                and kernel.dtype in ("half", "float")
                and kernel.vector_bytes == 16
            ):
                loads = loads_in_flight(kernel, code)
                in_flight = kilobytes_in_flight(loads, usage.registers, threads[mangled])
            line = lines.setdefault(kernel.name, Line())
            line.add(kernel, usage, accesses, threads[mangled], in_flight)
            if budget := table.get(kernel.name):
                yield from check_usage(kernel, arch, usage, budget, threads[mangled])
                yield from check_accesses(kernel, arch, accesses, budget)
                if in_flight is not None and in_flight < budget.in_flight:
                    yield (
                        f"{kernel} on sm_{arch}: {in_flight} KB of loads in flight, its budget is "
                        f"{budget.in_flight}"
                    )
    print_table(lines, table)
    for name in sorted(lines.keys() - table.keys()):
        yield f"{name} has no budget in csrc/cuda/README.md; measured: {lines[name].row(name)}"
    compiled = {kernel_of(mangled).name for mangled in seen}
    yield from (f"{name} has a budget, but is not compiled" for name in table.keys() - compiled)
    for mangled, archs in seen.items():
        if missing := [arch for arch in wanted if arch not in archs]:
            yield f"{kernel_of(mangled)} is not compiled for {', '.join(missing)}"
    if not seen:
        yield "the library has no kernels"


@dataclass
class Line:
    """The worst of a kernel over its instantiations and all architectures."""

    registers: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    others: dict[tuple[str, str], int] = field(default_factory=dict)
    wide: dict[str, int] = field(default_factory=dict)  # the fewest
    threads: int = 0
    shared: int = 0
    count: int = 0
    in_flight: int | None = None  # the least

    def add(
        self,
        kernel: Kernel,
        usage: Usage,
        accesses: Accesses,
        threads: int,
        in_flight: int | None,
    ) -> None:
        double = kernel.dtype == "double"
        self.registers[double] = max(self.registers[double], usage.registers)
        self.threads, self.shared = max(self.threads, threads), max(self.shared, usage.shared)
        self.count += 1
        if in_flight is not None:
            self.in_flight = min(in_flight, in_flight if self.in_flight is None else self.in_flight)
        for kind in ("load", "store"):
            key = (kernel.dtype or "float", kind)
            self.others[key] = max(self.others.get(key, 0), accesses.others[kind])
            self.wide[kind] = min(self.wide.get(kind, 1 << 30), accesses.wide[kind])

    def row(self, name: str) -> str:
        """A line of the table of budgets that this kernel would just keep."""
        rows = ", ".join(kind for kind, count in self.wide.items() if count)
        others = " ".join(
            f"{self.others.get((dtype, 'load'), 0)}/{self.others.get((dtype, 'store'), 0)}"
            for dtype in BYTES
        )
        registers = f"{self.registers[False]} ({self.registers[True]})"
        return f"| `{name}` | {registers} | {rows} | {others} | {self.in_flight or 0} |"


def print_table(lines: dict[str, Line], table: dict[str, Budget]) -> None:
    print("\nThe most of each kernel over dtypes, shapes and architectures (budget):")
    header = ("kernel", "compiled", "threads", "registers", "double", "static", "wide ld/st")
    print("{:34}{:>9}{:>9}{:>12}{:>12}{:>8}{:>12}{:>10}  others".format(*header, "KB"))
    for name, line in sorted(lines.items()):
        budget = table.get(name)
        limits = (budget.registers, budget.double_registers) if budget else ("-", "-")
        registers, double = (f"{line.registers[i]} ({limits[i]})" for i in (False, True))
        wide = f"{line.wide['load']}/{line.wide['store']}"
        in_flight = f"{line.in_flight or 0} ({budget.in_flight if budget else '-'})"
        others = line.row(name).split("|")[-3].strip()
        print(
            f"{name:34}{line.count:>9}{line.threads:>9}{registers:>12}{double:>12}"
            f"{line.shared:>8}{wide:>12}{in_flight:>10}  {others}"
        )
    print(flush=True)


# --- 4. Beside a CUDA torch ----------------------------------------------------------------

BESIDE_TORCH = """
import ctypes, sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import bmtard

if torch.version.cuda is None:
    sys.exit(f"torch {torch.__version__} has no CUDA")
info = bmtard.build_info()
print(info)
if not info.native or not info.cuda or list(info.cuda_architectures) != sys.argv[1:]:
    sys.exit(f"build_info() must name compiled kernels for {sys.argv[1:]}")
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("bmtard::")]
registered = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [(n, key) for n in names for key in ("CPU", "CUDA") if not registered(n, key)]
if missing or not names:
    sys.exit(f"no kernel: {missing}" if names else "no ops")
if not hasattr(ctypes.CDLL(str(info.library)), "aoti_torch_get_current_cuda_stream"):
    sys.exit("torch's current stream cannot be found from the library")

def expect(what, tensor, shape, dtype=torch.float32):
    got = (tuple(tensor.shape), tensor.dtype, tensor.device.type)
    if got != (shape, dtype, "cuda"):
        sys.exit(f"{what}: expected {(shape, dtype, 'cuda')}, got {got}")

def gradients(output):
    # The engine asks for a device that is not there, so the node is called by itself.
    grads = output.grad_fn.apply(torch.empty_like(output))
    return [x for x in (grads if isinstance(grads, tuple) else (grads,)) if x is not None]

N, C, K = 6, 10, 2
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    with FakeTensorMode():
        logits = [torch.empty(N, C, dtype=dtype, device="cuda") for _ in range(K)]
        logits = [x.requires_grad_() for x in logits]
        teachers = [torch.empty(N, C, dtype=dtype, device="cuda") for _ in range(K)]
        entropy = bmtard.softmax_entropy(logits[0], 2.0)
        expect("softmax_entropy", entropy, (N,), real)
        temperature = torch.empty(K, device="cuda")
        kl = bmtard.multi_teacher_kl(logits, teachers, temperature, reduction="none")
        expect("multi_teacher_kl", kl, (K, N), real)
        per_row = bmtard.bisect_temperature(teachers[0], 1.0, per_sample=True)
        expect("bisect_temperature, rows", per_row.temperature, (N,), real)
        batch = bmtard.bisect_temperature(teachers[0], 1.0)
        expect("bisect_temperature, batch", batch.temperature, (), real)
        x = torch.empty(N, 3, 4, 4, dtype=dtype, device="cuda")
        for norm in ("linf", "l2"):
            bmtard.pgd_step_(
                x, torch.empty_like(x), torch.empty_like(x), step_size=0.1, epsilon=0.2, norm=norm
            )
        grads = [*gradients(kl), *gradients(entropy)]
        for balance in ("sign", "bisect"):
            loss = bmtard.BMTARDLoss(balance=balance).to("cuda")(logits, teachers)
            expect("BMTARDLoss", loss, (), real)
            grads += gradients(loss)
        for grad in grads:
            expect("gradient", grad, (N, C), dtype)
        if len(grads) != 4 * K - 1:
            sys.exit(f"expected gradients by {4 * K - 1} logits, got {len(grads)}")
print(f"{len(names)} ops, each with kernels for CPU and CUDA; fake tensors on cuda; stream found")
"""


def check_beside_torch(library: Path) -> None:
    """Imports the library that was just compiled; bmtard/_C.so of the checkout stays as it is."""
    folder = BUILD / "package"
    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "bmtard", folder / "bmtard", ignore=ignore)
    shutil.copy(library, folder / "bmtard")
    env = {"PYTHONPATH": str(folder), "BMTARD_REQUIRE_NATIVE": "1"}
    script = folder / "beside_torch.py"
    script.write_text(BESIDE_TORCH)
    run(sys.executable, script, *wanted_architectures(), **env)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--launch"]:
        return launch(arguments[1:])
    if arguments not in ([], ["--nvcc"]):
        print(__doc__)
        return 2
    if find_nvcc() is None:
        print(
            "cuda-check: there is no nvcc in CUDACXX, on PATH, in CUDA_HOME or in /usr/local/cuda, "
            "so the CUDA kernels can be neither compiled nor checked here",
            file=sys.stderr,
        )
        return 1
    if arguments:
        return 0
    table = budgets(README.read_text())
    build()
    library = BUILD / "_C.so"
    problems = list(dict.fromkeys(check_binary(library, table)))  # instantiations say the same
    for problem in problems:
        print(f"cuda-check: {problem}", file=sys.stderr)
    check_beside_torch(library)
    print(f"cuda-check: {f'{len(problems)} problems' if problems else 'passed'}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
