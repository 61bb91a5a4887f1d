"""Damaged and hostile files: hypothesis strategies that change a good adapter or run configuration."""

from __future__ import annotations

import copy
import json
import math
import struct
from typing import Any

import yaml
from hypothesis import strategies as st

from ept import EPTConfig

FIELDS = sorted(EPTConfig.__dataclass_fields__)

_TELLING = [
    *("", "auto", "EPT", "LORA", "CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TEXT", "uniform", "linear", "classifier"),
    *("../../../etc/passwd", "/etc/passwd", "nobody/nothing", "file:///etc/passwd", "model", "default", "er", "prompt"),
    *("__import__('os').system('id')", "\x1b[2J\x00", "\ud800", "a/b\n---\nlicense: mit", "é" * 300, "x" * 1_200_000),
]
_sizes = st.sampled_from([-1, 0, 1, 2, 3, 5, 12, 32, 2**31 - 1, 2**31, 10**9, 10**12, 2**63, 10**400])
_rare = st.sampled_from([1e-320, 1e308, -0.0, float("nan"), float("inf"), float("-inf")])
_numbers = st.one_of(_sizes, st.integers(), st.floats(), _rare)
_texts = st.one_of(st.sampled_from(_TELLING), st.text(max_size=30))
_leaves = st.one_of(st.none(), st.booleans(), _numbers, _texts)
values = st.one_of(
    _leaves,
    st.recursive(_leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4)),
    st.integers(2, 600).map(lambda depth: json.loads("[" * depth + "0" + "]" * depth)),
)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with bits turned, a piece cut out or put in, or its end missing."""
    kind = draw(st.sampled_from(["bits", "cut", "insert", "truncate", "repeat", "replace"]))
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "bits":
        changed = bytearray(content)
        for position in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
            changed[position] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if kind == "replace":
        return draw(st.binary(max_size=200))
    length = draw(st.integers(0, 64))
    ends = {
        "cut": content[at + length :],
        "insert": draw(st.binary(max_size=64)) + content[at:],
        "truncate": b"",
        "repeat": content[at : at + length] * 3 + content[at:],
    }
    return content[:at] + ends[kind]


@st.composite
def configurations(draw: st.DrawFn, good: dict[str, Any]) -> bytes:
    """`adapter_config.json` with fields changed, added or left out, or damaged as a text."""
    changed = dict(good)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.one_of(st.sampled_from(FIELDS), _texts))
        if draw(st.integers(0, 9)) == 0:
            changed.pop(name, None)
        else:
            changed[name] = draw(values)
    text = json.dumps(changed)
    name = draw(st.sampled_from(FIELDS))
    how = draw(st.integers(0, 9))
    if how == 0:
        text = json.dumps(draw(values))
    elif how == 1:
        text = f'{text[:-1]}, "{name}": {json.dumps(draw(values))}}}'  # perhaps said twice
    elif how == 2:
        raw = ["1e999", "-1e999", "9" * 5000, "[" * 100_000, "{" * 5000, '"\\ud800\\u0000"', "0x10", "١"]
        text = f'{text[:-1]}, "x": {draw(st.sampled_from(raw))}}}'
    content = text.encode(draw(st.sampled_from(["utf-8"] * 8 + ["utf-16", "utf-8-sig"])))
    return draw(damaged_bytes(content)) if how == 3 else content


@st.composite
def weights(draw: st.DrawFn, good: bytes) -> bytes:
    """`adapter_model.safetensors` with a lying header, other values, or damaged as bytes."""
    kind = draw(st.sampled_from(["bytes", "length", "header", "header", "header", "header", "values"]))
    if kind == "bytes":
        return draw(damaged_bytes(good))
    (length,) = struct.unpack("<Q", good[:8])
    header, data = good[8 : 8 + length], good[8 + length :]
    if kind == "length":
        other = draw(st.one_of(st.sampled_from([0, 1, 2**63, 2**64 - 1, 100_000_001]), st.integers(0, 2 * len(good))))
        return struct.pack("<Q", other) + header + data
    if kind == "values":
        at = draw(st.integers(0, len(data) // 4 - 1)) * 4
        special = draw(st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f"]))
        return good[: 8 + length] + data[:at] + special + data[at + 4 :]
    entries: dict[str, Any] = json.loads(header)
    dtypes = ["F64", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "I64", "I32", "U8", "BOOL", "C64", "U16", "F32"]
    fields = {
        "dtype": st.sampled_from(dtypes) | _texts,
        "shape": st.lists(_sizes, max_size=4) | values,
        "data_offsets": st.lists(st.integers(0, len(data) + 8) | _sizes, min_size=2, max_size=2) | values,
    }
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(entries)))
        what = draw(st.sampled_from([*fields, "rename", "drop", "add", "any", "metadata"]))
        if what == "metadata":
            entries["__metadata__"] = draw(values)
        elif what == "add":
            entries[draw(_texts)] = draw(values | st.just(copy.copy(entries[name])))
        elif what == "drop" and len(entries) > 1:
            del entries[name]
        elif what == "rename":
            entries[draw(_texts)] = entries.pop(name)
        elif what == "any" or not isinstance(entries[name], dict):
            entries[name] = draw(values)
        elif what in fields:
            entries[name] = {**entries[name], what: draw(fields[what])}
    if draw(st.booleans()):
        entries = lie_consistently(entries)
    changed = json.dumps(entries).encode()
    changed += b" " * (-len(changed) % 8)
    return struct.pack("<Q", len(changed)) + changed + data


def lie_consistently(entries: dict[str, Any]) -> dict[str, Any]:
    """The tensors laid out one after the other as their dtypes and shapes say, so that only the contents are wrong."""
    bits = {"F64": 64, "I64": 64, "C64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "U16": 16, "F4": 4}
    start = 0
    for name, entry in entries.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if name == "__metadata__" or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            continue
        size = math.prod(shape) * bits.get(str(entry.get("dtype")), 8) // 8
        entry["data_offsets"] = [start, start + size]
        start += size
    return entries


_YAML_SCRAPS = [
    *("&a [*a]", "*missing", "!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!binary x"),
    *("!!int ''", "!!bool maybe", "!!timestamp x", "!!float .", "2024-13-45", "0x" + "f" * 9000, "9" * 5000),
    *("190:20:30", ".nan", "-.inf", "1e400", "{a: {b: {c: 1}}}", "<<: {}", "? [a]\n: b", "yes", "~", "\t"),
    *("[" * 3000, "{x: 1, x: 2}", "!x y", "%YAML 9.9", "--- a\n--- b", "&a {x: &b [1, 1], y: *b}"),
    *("x" * 1_200_000, "!!set {a, b}", "!!omap [a: 1]", "=", "<<"),
]


@st.composite
def run_configurations(draw: st.DrawFn, good: dict[str, Any]) -> bytes:
    """A run's YAML with values changed or added, with YAML's stranger parts, or damaged as a text."""
    changed = {name: dict(part) if isinstance(part, dict) else part for name, part in good.items()}
    for _ in range(draw(st.integers(1, 3))):
        section = draw(st.sampled_from(sorted(changed)))
        part = changed[section]
        if isinstance(part, dict) and part and draw(st.integers(0, 3)):
            part[draw(st.sampled_from(sorted(part, key=str)) | _texts)] = draw(values)
        else:
            changed[section] = draw(values)
        changed.setdefault(draw(st.sampled_from(sorted(good))), {})
    text, as_yaml = json.dumps(changed), draw(st.booleans())
    if as_yaml and len(text) < 1 << 20:  # a longer one is refused unread, and takes PyYAML a second to write
        text = yaml.dump(changed, Dumper=_Plain)
    how = draw(st.integers(0, 3))
    content = text.encode("utf-8", "surrogatepass")
    if how == 0:
        return draw(damaged_bytes(content))
    if how == 1:
        scrap = draw(st.sampled_from(_YAML_SCRAPS))
        at = draw(st.sampled_from(["seed", "model", "data", "method", "training", "x"]))
        return f"{at}: {scrap}\n".encode() + (content if draw(st.booleans()) else b"")
    return content


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True
