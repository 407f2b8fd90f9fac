"""Counts of a kernel's machine code: what its main loop and its epilogue issue.

The main loop is the loop with the most math instructions; of equals, the shortest.  Its
slots are its instructions, each counted once, or as often as an inner loop runs whose
counter goes from zero to an immediate.  What a branch jumps over counts as issued.
Nothing here is a time: it bounds how fast a loop can be at best.
"""

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

_MATH = re.compile(r"([FD]FMA|[HIDQ]G?MMA)\b")
_COPY = re.compile(r"(?:LDGSTS|LDG)\b(?:.*\.[US]?(8|16|64|128)\b)?")
_STORE = re.compile(r"STG\b(?:.*\.[US]?(8|16|64|128)\b)?")

Loop = tuple[int, int]  # its first and its last instruction


class Copies(NamedTuple):
    """Copies of so many bytes in an iteration, and the slots from one to the next."""

    bytes: int
    number: int
    slots: float


class Results(NamedTuple):
    """Results of a thread, and bytes of each."""

    number: int
    bytes: int


class Counts(NamedTuple):
    """What a warp issues in an iteration of the main loop, and after it.

    ``alone`` are the slots of a block that one warp alone executes; ``epilogue`` has,
    for each path that stores results, its bytes of a store and its slots for each
    result.
    """

    slots: int
    alone: int
    math: int
    copies: tuple[Copies, ...]
    epilogue: tuple[tuple[int, float], ...]

    def share(self, threads: int) -> float:
        """Math instructions of all slots, those of the one warp shared among all."""
        return self.math / (self.slots + self.alone * 32 / threads)


def disassembler() -> str:
    """The path of nvdisasm."""
    wheels = Path(sysconfig.get_path("purelib")).glob("nvidia/**/bin/nvdisasm*")
    if found := shutil.which("nvdisasm") or next(wheels, None):
        return str(found)
    raise FileNotFoundError("no nvdisasm: install the wheel nvidia-cuda-nvdisasm")


def disassembled(binary: bytes) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        command = [disassembler(), str(path)]
        return subprocess.check_output(command, text=True)  # noqa: S603 - as above


class Code:
    """The instructions of a kernel, its loops and its jumps forward."""

    def __init__(self, text: str) -> None:
        labels: dict[str, int] = {}
        self.lines: list[str] = []
        for line in map(str.strip, text.splitlines()):
            if label := re.match(r"([.\w$]+):$", line):
                labels[label[1]] = len(self.lines)
            elif found := re.match(r"/\*[0-9a-f]{4,}\*/\s+([^.\s].*?)\s*;", line):
                self.lines.append(found[1])
        jumps = [re.search(r"\bBRA\b.*?`\((\S+)\)", line) for line in self.lines]
        pairs = [(k, labels[to[1]]) for k, to in enumerate(jumps) if to]
        self.loops = [(to, k) for k, to in pairs if to < k]
        self.skips = [(k + 1, to - 1) for k, to in pairs if to > k + 1]
        self.names = [re.sub(r"^@!?U?P\w+\s+", "", x).split()[0] for x in self.lines]

    def inside(self, part: Loop) -> list[Loop]:
        """The loops inside a part of the code, other than itself."""
        first, last = part
        return [x for x in self.loops if x != part and first <= x[0] and x[1] <= last]

    def trips(self, loop: Loop) -> int:
        """How often an inner loop runs: once, unless an immediate says it."""
        body = "\n".join(self.lines[loop[0] : loop[1] + 1])
        test = r"[\s\S]*ISETP\S+ (U?P\d), U?PT, (\w+), (0x\w+), U?PT[\s\S]*\n@!?\1 BRA"
        if not (end := re.match(test, body)):
            return 1
        add = rf"(?:U?IADD3|VIADD) {end[2]}, {end[2]}, (?:U?RZ, )?(0x\w+)"
        step = re.search(add, body)
        return int(end[3], 16) // int(step[1], 16) if step else 1

    def issued(self, part: Loop) -> Iterator[tuple[int, str, int]]:
        """Each instruction of a part, and how often going through it once issues it."""
        trips = {x: self.trips(x) for x in self.inside(part)}
        for k in range(part[0], part[1] + 1):
            times = prod(n for x, n in trips.items() if x[0] <= k <= x[1])
            yield k, self.names[k], times

    def count(self, part: Loop) -> Counter[str]:
        total: Counter[str] = Counter()
        for _, name, times in self.issued(part):
            math = _MATH.match(name)
            total["math" if math else name.split(".")[0]] += times
        return total

    def main_loop(self) -> Loop:
        math = {loop: self.count(loop)["math"] for loop in self.loops}
        loop = max(math, key=lambda x: (math[x], x[0] - x[1]), default=(0, 0))
        if not math.get(loop):
            raise ValueError("no loop multiplies")
        return loop


def counts(text: str, results: Results) -> Counts:
    """Count a kernel by its disassembly."""
    code = Code(text)
    loop = code.main_loop()
    total = code.count(loop)
    alone = _alone(code, loop)
    return Counts(
        total.total() - alone,
        alone,
        total["math"],
        tuple(_copies(code, loop)),
        tuple(_epilogue(code, loop[1] + 1, results)),
    )


def _alone(code: Code, loop: Loop) -> int:
    """Slots that all warps but one jump over: they fill shared memory by themselves."""
    inside = (x for x in code.skips if loop[0] <= x[0] and x[1] <= loop[1])
    jumped = map(code.count, inside)
    copying = ("math", "LDGSTS", "LDG")
    fills = (x for x in jumped if x["STS"] > 2 and not any(x[n] for n in copying))
    return min((x.total() for x in fills), default=0)


def _copies(code: Code, loop: Loop) -> Iterator[Copies]:
    """Copies of one size: the mean number of slots from one to the next."""
    groups: dict[int, dict[int, int]] = {}
    for k, name, times in code.issued(loop):
        if found := _COPY.match(name):
            groups.setdefault(int(found[1] or 32) // 8, {})[k] = times
    for size, at in groups.items():
        span = (max(at) - min(at)) / (len(at) - 1) if len(at) > 1 else 0.0
        yield Copies(size, sum(at.values()), span)


def _epilogue(code: Code, start: int, results: Results) -> Iterator[tuple[int, float]]:
    """Bytes of a store and slots for a result, of each path behind the main loop.

    A path goes through shared memory: it begins at the first of two barriers.
    """
    bars = [k for k in range(start, len(code.lines)) if code.names[k].startswith("BAR")]
    ends = [*(k - 1 for k in bars[2::2]), len(code.lines) - 1]
    for first, second, end in zip(bars[::2], bars[1::2], ends, strict=True):
        size, slots = _path(code, (first, end), second, results)
        if size:
            yield size, (slots + bars[0] - start) / results.number


def _path(code: Code, part: Loop, second: int, results: Results) -> tuple[int, float]:
    """Bytes of a store, and all slots of a thread.

    The shortest loop that stores runs until all results are stored.  Around it there
    may be one over slices: a thread has its results in one of them, and jumps over what
    writes those of others into shared memory.
    """
    sizes = {
        k: int(found[1] or 32) // 8
        for k in range(part[0], part[1] + 1)
        if (found := _STORE.match(code.names[k]))
    }
    if not sizes:
        return 0, 0
    jumped = [x for x in code.skips if part[0] < x[0] <= x[1] < second]
    storing = [x for x in code.inside(part) if any(x[0] <= k <= x[1] for k in sizes)]
    turns = dict.fromkeys(storing, 1.0)
    if storing:
        leaf = min(storing, key=lambda x: x[1] - x[0])
        stored = sum(n for k, n in sizes.items() if leaf[0] <= k <= leaf[1])
        turns[leaf] = results.number * results.bytes / stored
        outer = (x for x in storing if x != leaf)
        turns |= dict.fromkeys(outer, turns[leaf] / code.trips(leaf))
    slots = 0.0
    for k in range(part[0], part[1] + 1):
        once = code.names[k].startswith("STS") or any(a <= k <= b for a, b in jumped)
        inner = [x for x in storing if x[0] <= k <= x[1]]
        slots += (
            1 if once or not inner else turns[min(inner, key=lambda x: x[1] - x[0])]
        )
    return max(sizes.values()), slots
