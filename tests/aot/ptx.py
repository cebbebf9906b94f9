"""Runs PTX on the CPU: what a compiled kernel computes, where there is no GPU. Knows instructions; knows no kernel.

The threads of a block go in step, so a branch must be taken by all of them or none, and races are not found. Copies
from global to shared memory arrive no earlier than they are waited for; unaligned and wild accesses are errors.
"""

import re
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

_UNWRITTEN = 0xAB
_NOTHING_TO_DO = ("bar", "griddepcontrol", "fence", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group", "membar")
_COMPARE: dict[str, Callable] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal
}  # fmt: skip
_ARITHMETIC: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "shl": np.left_shift, "shr": np.right_shift,
    "neg": np.negative, "not": np.invert, "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: a.astype(np.float64) * b + c,
}  # fmt: skip
Instruction = tuple[str | None, list[str], list]  # guard, parts of the name, operands; those in braces are lists


def run(ptx: str, arrays: Sequence[np.ndarray], *, grid: tuple[int, int], shared_bytes: int) -> None:
    """Runs every block. `arrays` are the parameters, contiguous; the last is the output and is written."""
    program, labels = _parse(ptx)
    threads = int(re.findall(r"\.reqntid (\d+)", ptx)[0])
    starts = np.cumsum([0, *(-(-array.nbytes // 256) * 256 + 256 for array in arrays)])
    memory = np.full(starts[-1], _UNWRITTEN, np.uint8)
    for start, array in zip(starts, arrays, strict=False):
        memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    for y, x in np.ndindex(grid[1], grid[0]):
        _Block(threads, memory, shared_bytes, {"%ctaid.x": x, "%ctaid.y": y}, starts).run(program, labels)
    arrays[-1].reshape(-1).view(np.uint8)[:] = memory[starts[-2] :][: arrays[-1].nbytes]


def _parse(ptx: str) -> tuple[list[Instruction], dict[str, int]]:
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index("{", ptx.index(".entry")) + 1 : ptx.rindex("}")])
    body = re.sub(r"\{(\s*\.reg [^{}]*)\}", r"\1", body)  # the scope of our own inline assembly
    program, labels = [], {}
    for statement in body.split(";"):
        statement = statement.strip()
        while label := re.match(r"(\$\w+):\s*", statement):
            labels[label[1]] = len(program)
            statement = statement[label.end() :]
        if not statement or statement.startswith("."):
            continue
        guard, name, operands = re.fullmatch(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", statement, re.DOTALL).groups()
        parts = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)]
        lists = [re.split(r"\s*,\s*", part[1:-1].strip()) if part.startswith("{") else part for part in parts]
        program.append((guard, name.split("."), lists))
    return program, labels


class _Block:
    """Registers hold the bits of each thread, as uint64."""

    def __init__(self, threads: int, memory: np.ndarray, shared_bytes: int, ids: dict[str, int], starts: np.ndarray):
        self.threads, self.memory, self.starts = threads, memory, starts
        self.shared = np.full(shared_bytes, _UNWRITTEN, np.uint8)
        self.registers = {"%tid.x": np.arange(threads, dtype=np.uint64), "global_smem": np.zeros(threads, np.uint64)}
        self.registers |= {name: np.full(threads, value, np.uint64) for name, value in ids.items()}
        self.copies: list[list[tuple]] = [[]]  # groups in flight; the last is still open

    def run(self, program: list[Instruction], labels: dict[str, int]) -> None:
        at = 0
        while at < len(program):
            guard, name, operands = program[at]
            at += 1
            self.active = np.ones(self.threads, bool)
            if guard:
                self.active = self.read(guard.lstrip("!"), "pred") ^ guard.startswith("!")
            if name[0] in ("bra", "ret"):
                assert self.active.all() or not self.active.any(), "threads part"
                if self.active.any():
                    at = labels[operands[-1]] if name[0] == "bra" else len(program)
                continue
            with np.errstate(all="ignore"):
                self.execute(name, operands)

    # ---- registers

    def bits(self, operand: str) -> np.ndarray:
        if operand in self.registers:
            return self.registers[operand]
        literal = int(operand[2:], 16) if operand.startswith("0f") else int(operand.rstrip("U"), 0)
        return np.full(self.threads, literal % (1 << 64), np.uint64)

    def read(self, operand: str, type_: str) -> np.ndarray:
        bits = self.bits(operand)
        if type_ == "pred":
            return (bits & np.uint64(1)).astype(bool)
        if type_ == "bf16x2":
            return bits.astype(np.uint32).view(ml_dtypes.bfloat16).reshape(-1, 2).astype(np.float32)
        if type_ in ("f32", "bf16"):
            return _narrow(bits, type_).view(np.float32 if type_ == "f32" else ml_dtypes.bfloat16).astype(np.float32)
        narrow = _narrow(bits, type_)
        return (narrow.view(narrow.dtype.name.removeprefix("u")) if type_[0] == "s" else narrow).astype(np.int64)

    def write(self, operand: str, values: np.ndarray, type_: str) -> None:
        if type_ == "bf16x2":
            values = values.astype(ml_dtypes.bfloat16).view(np.uint32).reshape(-1)
        elif type_ in ("f32", "bf16"):
            values = values.astype(np.float32 if type_ == "f32" else ml_dtypes.bfloat16)
            values = values.view(np.uint32 if type_ == "f32" else np.uint16)
        elif type_ != "pred":
            values = _narrow(values.astype(np.int64).view(np.uint64), type_)
        before = self.registers.get(operand, np.zeros(self.threads, np.uint64))
        self.registers[operand] = np.where(self.active, values.astype(np.uint64), before)

    # ---- memory

    def addresses(self, operand: str) -> np.ndarray:
        base, offset = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
        return self.bits(base).view(np.int64) + int(offset or 0)

    def access(self, name: list[str], operands: list) -> None:
        """Loads and stores, of vectors too."""
        memory = self.memory if "global" in name else self.shared  # also known as shared::cta
        size = int(name[-1][1:]) // 8
        at, registers = (operands[0], operands[1]) if name[0] == "st" else (operands[1], operands[0])
        registers = registers if isinstance(registers, list) else [registers]
        addresses = self.addresses(at)
        here = addresses[self.active]
        assert (here % (size * len(registers)) == 0).all(), "unaligned"
        assert ((here >= 0) & (here + size * len(registers) <= memory.size)).all(), "wild"
        for i, register in enumerate(registers):
            places = here[:, None] + i * size + np.arange(size)
            if name[0] == "st":
                memory[places] = self.bits(register)[self.active].view(np.uint8).reshape(-1, 8)[:, :size]
            else:
                loaded = np.zeros((self.threads, 8), np.uint8)
                loaded[self.active, :size] = memory[places]
                self.write(register, loaded.view(np.int64)[:, 0], "b64")

    def arrive(self, *, all_but: int) -> None:
        while len(self.copies) > all_but + 1:
            for to, origin, room, size in self.copies.pop(0):
                assert to % room == 0, "unaligned"
                assert 0 <= to <= self.shared.size - room, "wild"
                self.shared[to : to + room] = 0
                if size:  # of no bytes, the address may be any
                    assert origin % room == 0, "unaligned"
                    assert 0 <= origin <= self.memory.size - size, "wild"
                    self.shared[to : to + size] = self.memory[origin : origin + size]

    # ---- instructions

    def execute(self, name: list[str], operands: list) -> None:
        full, type_ = ".".join(name), name[-1]
        if full.startswith(_NOTHING_TO_DO):
            return
        if full.startswith("ld.param"):
            self.write(
                operands[0], np.full(self.threads, self.starts[int(operands[1].strip("[]").split("_")[-1])]), "b64"
            )
        elif name[:2] == ["cp", "async"] and name[2] in ("ca", "cg"):
            to, origin, room = self.addresses(operands[0]), self.addresses(operands[1]), int(operands[2], 0)
            sizes = self.read(operands[-1], "b32")  # the last of 3 or 4: how many bytes are not zeros
            self.copies[-1] += [(to[i], origin[i], room, sizes[i]) for i in np.flatnonzero(self.active)]
        elif full == "cp.async.commit_group":
            self.copies.append([])
        elif full == "cp.async.wait_group":
            self.arrive(all_but=int(operands[0], 0))
        elif name[0] in ("ld", "st"):
            self.access(name, operands)
        elif name[0] in ("mov", "cvta"):
            self.move(operands, type_)
        elif name[0] == "shfl":
            self.shuffle(name[2], operands)
        elif name[0] == "redux":
            warps = self.read(operands[1], type_).reshape(-1, 32)
            self.write(operands[0], np.repeat(_ARITHMETIC[name[2]].reduce(warps, axis=1), 32), type_)
        elif name[0] == "setp":
            self.write(operands[0], _COMPARE[name[1]](*(self.read(o, type_) for o in operands[1:])), "pred")
        elif name[0] == "selp":
            chosen = np.where(self.read(operands[3], "pred"), self.bits(operands[1]), self.bits(operands[2]))
            self.write(operands[0], chosen, "b64")
        elif name[0] == "cvt":
            value = self.read(operands[1], type_)
            self.write(operands[0], np.clip(value, 0, 1) if "sat" in name else value, name[-2])
        elif name[0] == "prmt":
            self.permute(operands)
        elif name[0] == "bfe":
            self.extract(operands, type_)
        elif name[0] == "ex2":
            self.write(operands[0], np.exp2(self.read(operands[1], type_)), type_)
        elif name[0] == "ldmatrix":
            self.load_matrices(name, operands)
        elif name[0] in ("mma", "wgmma"):
            self.multiply_matrices(full, operands)
        elif name[0] in _ARITHMETIC:
            self.compute(name, operands)
        else:
            raise NotImplementedError(f"{full}: teach tests/aot/ptx.py what it does")

    def move(self, operands: list, type_: str) -> None:
        """Between registers, or between one and the parts of it."""
        to, origin = operands
        if isinstance(origin, list):
            width = int(type_[1:]) // len(origin)
            parts = [self.read(part, f"b{width}") << (width * i) for i, part in enumerate(origin)]
            self.write(to, np.bitwise_or.reduce(parts), type_)
        elif isinstance(to, list):
            width = int(type_[1:]) // len(to)
            for i, part in enumerate(to):
                self.write(part, (self.bits(origin) >> np.uint64(width * i)).view(np.int64), f"b{width}")
        else:
            self.write(to, self.read(origin, type_) if type_ == "pred" else self.bits(origin), type_)

    def compute(self, name: list[str], operands: list) -> None:
        """Arithmetic in one type; wide products, and sums of a narrow and a wide float, have two."""
        type_, mixed = name[-1], name[-2:] == ["f32", "bf16"]
        types = [type_] * (len(operands) - 1)
        if mixed:
            types[-1] = "f32"
        if wide := "wide" in name:
            types[2:] = [f"{type_[0]}64"] * (len(operands) - 3)
        assert "hi" not in name, name
        out = _ARITHMETIC[name[0]](*(self.read(o, t) for o, t in zip(operands[1:], types, strict=True)))
        if "rm" in name:  # rounded towards minus infinity
            near = out.astype(np.float32)
            out = np.where(near > out, np.nextafter(near, np.float32(-np.inf)), near)
        self.write(operands[0], out, "b64" if wide else "f32" if mixed else type_)

    def shuffle(self, mode: str, operands: list) -> None:
        threads, by = np.arange(self.threads), int(operands[2], 0)
        lane = threads % 32
        origin = {"bfly": lane ^ by, "up": np.where(lane < by, lane, lane - by), "idx": np.full_like(lane, by)}[mode]
        self.write(operands[0], self.bits(operands[1])[threads - lane + origin], "b32")

    def permute(self, operands: list) -> None:
        source = np.concatenate([_bytes(self.bits(operands[1]), 4), _bytes(self.bits(operands[2]), 4)], axis=1)
        selectors = self.read(operands[3], "b32")[:, None] >> (4 * np.arange(4)) & 0xF
        chosen = np.take_along_axis(source, selectors & 7, axis=1)
        chosen = np.where(selectors & 8, np.where(chosen & 0x80, 0xFF, 0), chosen).astype(np.uint8)
        self.write(operands[0], chosen.view(np.uint32)[:, 0], "b32")

    def extract(self, operands: list, type_: str) -> None:
        start, width = int(operands[2], 0), int(operands[3], 0)
        field = self.read(operands[1], type_) >> start & (1 << width) - 1
        self.write(operands[0], field - (field >> (width - 1) << width) * (type_[0] == "s"), type_)

    def load_matrices(self, name: list[str], operands: list) -> None:
        assert not {"m8n16", "m16n16", "trans"} & set(name), name
        addresses, lanes = self.addresses(operands[1]).reshape(-1, 32), np.arange(32)
        for i, register in enumerate(operands[0]):
            rows = self.shared[addresses[:, 8 * i : 8 * i + 8, None] + np.arange(16)].view(np.uint32)
            self.write(register, rows[:, lanes // 4, lanes % 4].reshape(-1), "b32")

    def multiply_matrices(self, full: str, operands: list) -> None:
        """Each warp multiplies 16 rows by columns that lie in registers, or by a warp group's in shared memory."""
        sums, left, right, before = operands[:4]
        assert re.search(r"m(16n8|64n\d+)k16.*f32\.bf16\.bf16", full), full
        assert isinstance(left, list), "the left operand of wgmma lies in shared memory"
        left_ = np.empty((self.threads // 32, 16, 16))
        for i, register in enumerate(left):
            left_[:, _ROW + 8 * (i % 2), _PAIR + 8 * (i // 2)] = self.read(register, "bf16x2").reshape(-1, 32, 2)
        if full.startswith("wgmma"):
            assert operands[4:] == ["1", "1", "0"]
            assert self.read(before, "pred").all()
            before, right_ = sums, self.described(right, columns=2 * len(sums))
        else:
            right_ = np.empty((self.threads // 32, 8, 16))
            for i, register in enumerate(right):
                right_[:, _ROW, _PAIR + 8 * i] = self.read(register, "bf16x2").reshape(-1, 32, 2)
        product = left_ @ right_.swapaxes(1, 2)
        for i, (register, old) in enumerate(zip(sums, before, strict=True)):
            mine = product[:, _ROW[:, 0] + 8 * (i // 2 % 2), _PAIR[:, i % 2] + 8 * (i // 4)].reshape(-1)
            self.write(register, mine + self.read(old, "f32"), "f32")

    def described(self, descriptor: str, *, columns: int) -> np.ndarray:
        """[warps, columns, 16] of the matrix in shared memory that each warp group's descriptor tells of."""
        bits = self.bits(descriptor).reshape(-1, 128)
        assert (bits == bits[:, :1]).all()
        found = []
        for number in map(int, bits[:, 0]):
            start, stride, swizzle = (number & 0x3FFF) << 4, (number >> 32 & 0x3FFF) << 4, number >> 62
            row_bytes, mask = {1: (128, 7), 2: (64, 3), 3: (32, 1)}[swizzle]
            n, k = np.arange(columns)[:, None], np.arange(16)
            places = start + n // 8 * stride + n % 8 * row_bytes + 2 * k
            places ^= (places >> 7 & mask) << 4
            matrix = self.shared[places[..., None] + np.arange(2)].view(ml_dtypes.bfloat16)[..., 0]
            found += [matrix.astype(np.float64)] * 4
        return np.stack(found)


_ROW, _PAIR = np.arange(32)[:, None] // 4, np.arange(32)[:, None] % 4 * 2 + np.arange(2)  # where a lane's pair stands


def _narrow(bits: np.ndarray, type_: str) -> np.ndarray:
    width = int(re.sub(r"\D", "", type_.removeprefix("bf")))
    return bits.astype(f"u{width // 8}")


def _bytes(bits: np.ndarray, count: int) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.uint8).reshape(-1, 8)[:, :count]
