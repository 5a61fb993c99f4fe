"""Damaged and contrived variants of files, drawn from a random generator.

The functions take a `random.Random` and the bytes of an intact file. `damage` knows nothing about formats.
The others change what a file means and leave its syntax, or at least its checksums, intact.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import yaml
from scipy.io import loadmat, savemat

Mutation = Callable[[random.Random, bytes], bytes]

# --- any format ---


def damage(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Apply one to three random changes of bytes; `other` is another file of the same format."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(_DAMAGES)(rng, bytearray(data), other)
    return data


def _offset(rng: random.Random, data: bytes | bytearray) -> int:
    """Choose a position, half of the time near the start, where headers are."""
    end = min(len(data), 512) if rng.random() < 0.5 else len(data)
    return rng.randrange(end) if end else 0


def _length(rng: random.Random) -> int:
    return int(2 ** rng.uniform(0, 11))


def _flip_bits(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 4, 32)) if data else 0):
        data[_offset(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _overwrite(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    start, length = _offset(rng, data), _length(rng)
    length = len(data[start : start + length])
    data[start : start + length] = rng.randbytes(length)
    return bytes(data)


def _zero(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    start = _offset(rng, data)
    length = len(data[start : start + _length(rng)])
    data[start : start + length] = bytes(length)
    return bytes(data)


def _truncate(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    return bytes(data[: _offset(rng, data)])


def _insert(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    start = _offset(rng, data)
    data[start:start] = rng.randbytes(_length(rng))
    return bytes(data)


def _delete(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    start = _offset(rng, data)
    del data[start : start + _length(rng)]
    return bytes(data)


def _duplicate(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    start, target = _offset(rng, data), _offset(rng, data)
    data[target:target] = data[start : start + _length(rng)]
    return bytes(data)


def _splice(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    return bytes(data[: _offset(rng, data)]) + other[_offset(rng, other) :]


def _extreme_integer(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    start, size = _offset(rng, data), rng.choice((1, 2, 4, 8))
    value = rng.choice((0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1))
    data[start : start + size] = value.to_bytes(size, rng.choice(("big", "little")))
    return bytes(data)


_DAMAGES = (
    *(_flip_bits, _overwrite, _zero, _truncate, _insert, _delete, _duplicate, _splice),
    *(_extreme_integer, _extreme_integer, _extreme_integer),
)

# --- text ---

_ODD_TEXTS = (
    *(
        "",
        " ",
        "0",
        "-1",
        "1.5",
        "nan",
        "inf",
        "1e999",
        "true",
        "null",
        "~",
        "99999999999999999999",
        "9" * 5000,
    ),
    *(
        "/",
        ".",
        "..",
        "../../etc/passwd",
        "/dev/zero",
        "-",
        "#",
        "# ",
        "a\0b",
        "a\tb",
        "\u2028",
        "\u0664",
        "²",
    ),
    *(
        "\x1b[31m",
        "<b>",
        "'",
        '"',
        "\\",
        "%s",
        "{}",
        "x" * 300,
        "y " * 40_000,
        "\ufeff",
        "é" * 200,
        "/proc/self/mem",
    ),
)


def damage_lines(rng: random.Random, data: bytes) -> bytes:
    """Change lines and fields of a text file."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 5))):
        number = rng.randrange(len(lines)) if lines else 0
        line = lines[number] if lines else b""
        odd = rng.choice(_ODD_TEXTS).encode()
        fields = re.split(rb"([ ,/\t]+)", line)
        match rng.randrange(11):
            case 0:
                lines[number:number] = [line] * rng.choice((1, 2, 1000))
            case 1:
                del lines[number : number + rng.choice((1, 2, 100))]
            case 2:
                lines.insert(number, odd)
            case 3 | 4 | 5 | 6:
                fields[rng.randrange(len(fields))] = odd
                lines[number : number + 1] = [b"".join(fields)]
            case 7:
                lines[number : number + 1] = [
                    line[: len(line) // 2] + rng.randbytes(3) + line[len(line) // 2 :]
                ]
            case 8:
                rng.shuffle(lines)
            case 9:
                lines[number : number + 1] = [line.replace(b" ", odd)]
            case 10:
                lines = [line + b"\r" for line in lines]
    data = b"\n".join(lines)
    if rng.random() < 0.05:
        data = data.decode(errors="replace").encode(
            rng.choice(("utf-16", "utf-32", "utf-8-sig", "cp500")), "replace"
        )
    return data


# --- JSON and YAML ---


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _odd_value(rng: random.Random) -> Any:
    values = (
        *(None, True, False, 0, 1, -1, 2**31, -(2**31), 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 1e-320),
        *(float("nan"), float("inf"), [], {}, [[]], [0] * 5, {"": ""}, {"a": {"b": []}}, ["x", 1, None]),
    )
    return rng.choice(values) if rng.random() < 0.7 else rng.choice(_ODD_TEXTS)


def damage_tree(rng: random.Random, tree: Any) -> Any:
    """Change one to three values or keys in nested mappings and lists."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = _damage_node(rng, tree)
    return tree


def _damage_node(rng: random.Random, node: Any) -> Any:
    """Return a copy in which a random value below a mapping or list has changed."""
    if isinstance(node, (dict, list)) and node and rng.random() < 0.97:
        copy: Any = dict(node) if isinstance(node, dict) else list(node)
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        value = copy[key]
        match rng.randrange(8):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, dict):
                copy[rng.choice(_ODD_TEXTS)] = copy.pop(key)
            case 1:
                copy += copy
            case 2 | 3:
                copy[key] = _odd_value(rng)
            case 4 if isinstance(copy, dict):
                copy[key], other = copy[rng.choice(list(copy))], copy[key]
                copy[rng.choice(list(copy))] = other
            case 5:
                copy[key] = {"value": value} if rng.random() < 0.5 else [value]
            case 6 if isinstance(value, (str, int, float)):
                copy[key] = str(value) if not isinstance(value, str) else len(value)
            case _:
                copy[key] = _damage_node(rng, value)
        return copy
    return _odd_value(rng)


def damage_json(rng: random.Random, data: bytes) -> bytes:
    """Change values, keys or the text of a JSON file."""
    choice = rng.random()
    if choice < 0.1:
        return damage_lines(rng, data)
    if choice < 0.15:
        return b"[" * rng.choice((10, 2000, 100_000))
    if choice < 0.2:
        return json.dumps(json.loads(data)).encode().replace(b"}", b', "a": 1, "a": 2}', 1)
    tree = damage_tree(rng, json.loads(data))
    try:
        return json.dumps(tree).encode()
    # Integers of more than 4300 digits cannot be written.
    except ValueError:
        return data.replace(b"1", b"1" * 5000, 1)


def yaml_snippets(marker: str) -> list[str]:
    """Return lines of YAML with tags, anchors and nesting. Some would create `marker` if tags were obeyed."""
    bomb = "\n".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else 'x'] * 10)}]" for i in range(9))
    merges = "\n".join(f"m{i}: &m{i} {{{'<<: *m' + str(i - 1) if i else 'seed: 1'}}}" for i in range(9))
    return [
        f"output: !!python/object/apply:os.mkdir [{marker}]",
        f"output: !!python/object/apply:os.system ['mkdir {marker}']",
        f"output: !!python/object/new:os.mkdir [{marker}]",
        f"seed: !!python/object/apply:eval [\"__import__('os').mkdir('{marker}')\"]",
        f"? !!python/object/apply:os.mkdir [{marker}]\n: 1",
        "output: !!python/name:os.mkdir",
        "output: !!python/module:os",
        "seed: !!int 'x'",
        "seed: !!float 1",
        "data: !!set {source, kind}",
        "data: !!omap [source: x]",
        "data: !!pairs [source: x]",
        "output: !!binary aGVsbG8=",
        "output: !!binary '*'",
        "output: !!timestamp 2001-13-45",
        "seed: 2001-01-01",
        "seed: !!timestamp x",
        "output: !unknown x",
        "data: &a {source: x, crop_area: *a}",
        "backbones: &b [*b]",
        "data: *missing",
        "<<: {seed: 3}",
        "<<: [1]",
        "<<: x",
        "? [a, b]\n: c",
        "? {a: b}\n: c",
        "? null\n: c",
        "1: 2",
        "true: 1",
        "seed: 0x7fffffffffffffffffff",
        "seed: 190:20:30",
        "seed: 0b1_",
        "seed: ._",
        "seed: .inf",
        "train: {epochs: .nan}",
        f"data: {'[' * 3000}",
        f"data: {'[' * 3000}{']' * 3000}",
        f"data: {'{a: ' * 2000}",
        "a: " * 200,
        "- " * 3000,
        bomb,
        merges,
        "base: .",
        "base: /dev/null",
        "base: [a]",
        "base: ''",
        "base: recipe.yaml",
        f"base: {'x' * 5000}",
        'base: "a\\0b"',
        "--- 1\n--- 2",
        "%YAML 9.9\n---",
        "%TAG ! tag:x,2000:\n---",
        "\t",
        'output: "\\ud800"',
        'output: "\\0"',
        "output: |\n  a\n  b",
        "output: 'a\nb'",
        "seed: 1_000",
        f"seed: {'9' * 5000}",
        f"output: {'z' * 200_000}",
    ]


def damage_yaml(rng: random.Random, data: bytes, marker: str) -> bytes:
    """Change values, keys or the text of a YAML file."""
    choice = rng.random()
    if choice < 0.35:
        lines = data.decode().split("\n")
        lines.insert(
            rng.choice((0, len(lines), rng.randrange(len(lines) + 1))), rng.choice(yaml_snippets(marker))
        )
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    if choice < 0.45:
        return rng.choice(yaml_snippets(marker)).encode("utf-8", "surrogatepass")
    if choice < 0.6:
        return damage_lines(rng, data)
    return yaml.safe_dump(damage_tree(rng, yaml.safe_load(data)), sort_keys=False).encode()


# --- formats with checksums ---


def damage_member(rng: random.Random, data: bytes) -> bytes:
    """Damage a member of a zip archive and store it with the right checksum."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    chosen = rng.choice(list(members))
    match rng.randrange(8):
        case 0:
            del members[chosen]
        case 1:
            members[chosen] = rng.choice(list(members.values()))
        case _:
            members[chosen] = damage(rng, members[chosen], rng.choice(list(members.values())))
    return zipped(members)


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def damage_png(rng: random.Random, data: bytes) -> bytes:
    """Damage, drop, repeat or move the chunks of a PNG; their checksums are right."""
    chunks, position = [], 8
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        chunks.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += 12 + length
    number = rng.randrange(len(chunks))
    kind, content = chunks[number]
    match rng.randrange(8):
        case 0:
            del chunks[number]
        case 1:
            chunks.insert(rng.randrange(len(chunks) + 1), chunks[number])
        case 2:
            rng.shuffle(chunks)
        case 3 if kind == b"IDAT":
            with_damage = damage(rng, zlib.decompress(content)) if _is_whole(content) else content
            chunks[number] = kind, zlib.compress(with_damage)
        case 4:
            chunks[number] = (
                rng.choice((b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"PLTE", b"acTL")),
                content,
            )
        case 5:
            header = chunks[0][1]
            side = rng.choice((0, 1, 2**15, 2**31 - 1, 20_000)).to_bytes(4, "big")
            start = rng.choice((0, 4))
            chunks[0] = chunks[0][0], header[:start] + side + header[start + 4 :]
        case _:
            chunks[number] = kind, damage(rng, content, content)
    return data[:8] + b"".join(_chunk(kind, content) for kind, content in chunks)


def _is_whole(content: bytes) -> bool:
    try:
        zlib.decompress(content)
    except zlib.error:
        return False
    return True


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + checksum


def damage_jpeg(rng: random.Random, data: bytes) -> bytes:
    """Damage, drop, repeat or move the segments of a JPEG before its first scan."""
    segments, position = [], 2
    while data[position + 1] != 0xDA:
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        segments.append(data[position : position + 2 + length])
        position += 2 + length
    number = rng.randrange(len(segments))
    segment = segments[number]
    match rng.randrange(6):
        case 0:
            del segments[number]
        case 1:
            segments.insert(rng.randrange(len(segments) + 1), segment)
        case 2:
            rng.shuffle(segments)
        case 3:
            frames = [i for i, one in enumerate(segments) if one[1] in (0xC0, 0xC1, 0xC2)]
            for i in frames[:1]:
                sides = [
                    rng.choice((0, 1, 8, 500, 30_000, 65_500, 65_535)).to_bytes(2, "big") for _ in range(2)
                ]
                segments[i] = segments[i][:5] + b"".join(sides) + segments[i][9:]
        case _:
            content = damage(rng, segment[4:], segment[4:])[:65_000]
            segments[number] = segment[:2] + (len(content) + 2).to_bytes(2, "big") + content
    return data[:2] + b"".join(segments) + data[position:]


# --- arrays and tensors ---


class Payload:
    """An object whose pickle calls a function with arguments when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def payload(rng: random.Random, marker: str) -> Payload:
    """Return an object that creates the folder `marker` if it is unpickled without restrictions."""
    import os
    import subprocess

    return rng.choice(
        [
            Payload(os.mkdir, marker),
            Payload(os.system, f"mkdir {marker}"),
            Payload(eval, f"__import__('os').mkdir({marker!r})"),
            Payload(exec, f"import os; os.mkdir({marker!r})"),
            Payload(subprocess.call, ["mkdir", marker]),
            Payload(torch.save, torch.zeros(1), marker),
            Payload(np.save, marker, np.zeros(1)),
        ]
    )


def planted_pickle(rng: random.Random, marker: str, content: Any) -> bytes:
    """Return a checkpoint, in the format of torch or as a plain pickle, that contains a payload."""
    tree = {**content, rng.choice(("state", "epoch", "args", "weight")): payload(rng, marker)}
    buffer = io.BytesIO()
    match rng.randrange(3):
        case 0:
            torch.save(tree, buffer)
        case 1:
            torch.save(tree, buffer, _use_new_zipfile_serialization=False)
        case 2:
            pickle.dump(
                tree if rng.random() < 0.5 else payload(rng, marker), buffer, protocol=rng.randrange(6)
            )
    return buffer.getvalue()


def odd_array(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """Change the dtype, the shape or the values of an array."""
    match rng.randrange(9):
        case 0 if array.dtype.kind in "biuf":
            return array.astype(
                rng.choice((np.uint8, np.int64, np.float64, np.bool_, np.complex64, "S3", "U3"))
            )
        case 1:
            return array[:0]
        case 2:
            return array[None] if rng.random() < 0.5 else array.ravel()
        case 3:
            return np.asarray(array.ravel()[0]) if array.size else np.asarray(0)
        case 4:
            return np.concatenate([array, array])
        case 5:
            return array[: len(array) // 2] if array.ndim else array
        case 6 if array.size:
            copy = array.copy()
            info = np.iinfo(array.dtype) if array.dtype.kind in "iu" else None
            extremes = (info.min, info.max) if info else (np.nan, np.inf, -np.inf, 1e300)
            if array.dtype.kind in "iuf":
                copy.ravel()[rng.randrange(array.size)] = rng.choice(extremes)
            return copy
        case 7:
            return np.asarray(rng.choice(("", "x", "1")))
        case _:
            copy = array.copy()
            if copy.size and copy.dtype.kind in "iuf":
                copy.ravel()[rng.randrange(copy.size)] = rng.choice((0, 1, 2, 100))
            return copy


def damage_npz(rng: random.Random, data: bytes, marker: str) -> bytes:
    """Change an array of a NumPy archive, or its JSON."""
    choice = rng.random()
    if choice < 0.3:
        return damage_member(rng, data)
    with np.load(io.BytesIO(data)) as content:
        arrays = dict(content)
    chosen = rng.choice(list(arrays))
    buffer = io.BytesIO()
    if choice < 0.4:
        arrays[chosen] = np.array([payload(rng, marker)], dtype=object)
    elif choice < 0.6:
        told = damage_json(rng, arrays["told"].tobytes())
        arrays["told"] = np.frombuffer(told, dtype=np.uint8)
    elif choice < 0.65:
        del arrays[chosen]
    elif choice < 0.7:
        # One array instead of an archive.
        np.save(buffer, arrays[chosen])
        return buffer.getvalue()
    else:
        arrays[chosen] = odd_array(rng, arrays[chosen])
    (np.savez_compressed if rng.random() < 0.2 else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def damage_mat(rng: random.Random, data: bytes) -> bytes:
    """Change a variable of a MATLAB file."""
    variables: dict[str, Any] = {k: v for k, v in loadmat(io.BytesIO(data)).items() if k[:2] != "__"}
    chosen = rng.choice(list(variables))
    match rng.randrange(6):
        case 0:
            variables[chosen] = rng.choice(
                ("text", {"a": 1}, [["x", 1]], np.array([[1, "a"]], object), 5, [])
            )
        case 1:
            variables["other"] = variables.pop(chosen)
        case _:
            variables[chosen] = odd_array(rng, variables[chosen])
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            savemat(buffer, variables, do_compression=rng.random() < 0.3)
        # MATLAB files cannot hold every dtype.
        except (TypeError, ValueError):
            return damage(rng, data)
    return buffer.getvalue()


def odd_tensor(rng: random.Random, tensor: torch.Tensor) -> Any:
    """Change the dtype, the layout, the shape or the values of a tensor, or replace it."""
    flat = tensor.flatten()
    if not tensor.ndim:
        return rng.choice((flat, tensor * float("nan"), tensor.item(), None, "text", torch.zeros(3)))
    makers: list[Callable[[], Any]] = [
        lambda: tensor.to(rng.choice((torch.int8, torch.int64, torch.bool, torch.complex64, torch.float64))),
        lambda: tensor.to(rng.choice((torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.uint16))),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: tensor.to_sparse(),
        lambda: tensor.to_sparse_csr() if tensor.ndim == 2 else tensor.to_sparse(),
        lambda: tensor.to("meta"),
        lambda: torch.tensor(1.5),
        lambda: tensor[:0],
        lambda: tensor[None],
        lambda: flat,
        lambda: tensor.T if tensor.ndim == 2 else tensor[..., None],
        lambda: torch.nested.nested_tensor([flat[:1].float(), flat[:2].float()]),
        lambda: torch.tensor(1.0).expand(10**5, 10**6),
        lambda: torch.tensor(1.0).expand(tensor.shape),
        lambda: torch.nn.Parameter(tensor.float()),
        lambda: torch.full_like(tensor.float(), rng.choice((float("nan"), float("inf"), 1e38))),
        lambda: flat.tolist(),
        lambda: {"inner": tensor},
        lambda: None,
        lambda: "text",
        lambda: torch.zeros(0),
    ]
    with warnings.catch_warnings():
        # Sparse, quantised and nested tensors are beta or deprecated.
        warnings.simplefilter("ignore")
        return rng.choice(makers)()


def damage_state(rng: random.Random, tree: Any) -> Any:
    """Change tensors, keys or values of nested mappings with tensors."""
    if rng.random() < 0.25:
        return damage_tree(rng, tree)
    keys = [key for key, value in tree.items() if isinstance(value, (torch.Tensor, dict))]
    if not keys:
        return damage_tree(rng, tree)
    key = rng.choice(keys)
    value = tree[key]
    changed = damage_state(rng, value) if isinstance(value, dict) else odd_tensor(rng, value)
    return {**tree, key: changed}


def damage_checkpoint(rng: random.Random, data: bytes, marker: str) -> bytes:
    """Change the contents of a file that torch.save has written; some cannot be loaded safely."""
    choice = rng.random()
    if choice < 0.3 and zipfile.is_zipfile(io.BytesIO(data)):
        return damage_member(rng, data)
    tree = torch.load(io.BytesIO(data), weights_only=True)
    if choice < 0.45:
        return planted_pickle(rng, marker, tree)
    buffer = io.BytesIO()
    torch.save(damage_state(rng, tree), buffer, _use_new_zipfile_serialization=rng.random() < 0.9)
    return buffer.getvalue()


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Change the header of a safetensors file, which says what its bytes mean, and store its right length."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.4:
        metadata = header.get("__metadata__", {})
        inner = [key for key, value in metadata.items() if value.startswith("{")]
        if inner:
            key = rng.choice(inner)
            metadata[key] = damage_json(rng, metadata[key].encode()).decode("utf-8", "replace")
        else:
            header["__metadata__"] = damage_tree(rng, metadata)
        changed = json.dumps(header).encode()
    elif rng.random() < 0.4:
        name = rng.choice([key for key in header if key != "__metadata__"])
        start, end = header[name]["data_offsets"]
        count = (end - start) // 4
        shapes: list[list[int]] = [
            [],
            [count],
            [1, count],
            [count, 1],
            [count, 1, 1],
            [0],
            [2**63],
            [2**32, 2**32],
        ]
        header[name]["shape"] = rng.choice(shapes)
        if rng.random() < 0.5:
            types = (
                ("I32", count),
                ("F16", 2 * count),
                ("U8", 4 * count),
                ("F64", count // 2),
                ("BOOL", 4 * count),
            )
            dtype, elements = rng.choice(types)
            header[name] |= {"dtype": dtype, "shape": [elements]}
        changed = json.dumps(header).encode()
    else:
        changed = damage_json(rng, data[8 : 8 + length])
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]
