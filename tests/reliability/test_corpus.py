"""Bad checkpoints and saved caches, made from a good one of every layout by every fault.

Each must raise ``ValueError``, run nothing, and leave its folder as it was; a cache that was asked
to load it stays as it was, which ``layouts.load_cache`` checks.
"""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from layouts import CACHES, GATES, Layout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LAYOUTS = {**GATES, **CACHES}
DEEP = "[" * 50_000 + "]" * 50_000
Data = dict[str, Any]


class Payload:
    """Unpickled, this would write a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.marker, "w"))


def read(path: Path) -> tuple[Data, dict[str, str] | None]:
    """The contents of a good file, and its metadata if it is a safetensors file."""
    if path.suffix != ".safetensors":
        return torch.load(path, weights_only=True), None
    with safe_open(path, framework="pt") as file:
        # copies, because the file is overwritten
        data = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return data, file.metadata()


def write(path: Path, data: Data, metadata: dict[str, str] | None) -> None:
    if path.suffix != ".safetensors":
        torch.save(data, path)
    else:
        save_file({name: x.contiguous() for name, x in data.items()}, path, metadata=metadata)


def own(data: Data) -> Data:
    """The dictionary that holds the last layer's tensors."""
    return data["module"][-1] if "module" in data else data


def on_tensors(change: Callable[[Data, str], object]) -> Callable[[Path, Path], None]:
    """A fault of the tensor that ``change`` is told the name of: the last key that matters."""

    def apply(path: Path, marker: Path) -> None:
        data, metadata = read(path)
        names = [name for name, x in own(data).items() if x.is_floating_point() and x.dim() > 1]
        change(own(data), sorted(names)[-1])
        write(path, data, metadata)

    return apply


def put(data: Data, name: str, number: float) -> None:
    data[name] = data[name].clone()
    data[name].view(-1)[0] = number


def on_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    return lambda path, marker: path.write_bytes(change(path.read_bytes())) and None


def on_header(change: Callable[[Data], object]) -> Callable[[Path, Path], None]:
    """A fault in the header of a safetensors file."""

    def apply(path: Path, marker: Path) -> None:
        raw = path.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        change({name: x for name, x in header.items() if name != "__metadata__"})
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return apply


def every(header: Data, name: str, value: object) -> None:
    for entry in header.values():
        entry[name] = value


def replace_by_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def fifo(path: Path, marker: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, marker: Path) -> None:
    path.unlink()
    path.mkdir()


def payload(path: Path, marker: Path) -> None:
    """A pickle with a payload beside the tensors, whatever the suffix says."""
    data, _ = read(path)
    torch.save({**data, "extra": Payload(marker)}, path)


def old_payload(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(marker)))


def compressed(path: Path, marker: Path) -> None:
    data, _ = read(path)
    torch.save({**data, "zeros": torch.zeros(1 << 20)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in entries.items():
            archive.writestr(name, contents)


BYTES: dict[str, Callable[[Path, Path], None]] = {
    "empty": on_bytes(lambda x: b""),
    "one byte": on_bytes(lambda x: x[:1]),
    "a tenth": on_bytes(lambda x: x[: len(x) // 10]),
    "half": on_bytes(lambda x: x[: len(x) // 2]),
    "the last byte missing": on_bytes(lambda x: x[:-1]),
    "the first byte missing": on_bytes(lambda x: x[1:]),
    "zeros": on_bytes(lambda x: bytes(len(x))),
    "text": on_bytes(lambda x: b"<html>404</html>"),
    "a pointer of git lfs": on_bytes(lambda x: b"version https://git-lfs.github.com/spec/v1\n"),
    "a huge header": on_bytes(lambda x: struct.pack("<Q", 2**63) + x[8:]),
    "a folder": folder,
    "a pipe": fifo,
    "a device": lambda path, marker: replace_by_link(path, "/dev/zero"),
    "a link to nothing": lambda path, marker: replace_by_link(path, "nothing"),
    "a link to itself": lambda path, marker: replace_by_link(path, path.name),
    "a payload": payload,
    "a payload alone": old_payload,
    "compressed": compressed,
}
TENSORS: dict[str, Callable[[Path, Path], None]] = {
    "missing": on_tensors(lambda x, name: x.pop(name)),
    "under another name": on_tensors(lambda x, name: x.update({f"{name}x": x.pop(name)})),
    "under a path": on_tensors(lambda x, name: x.update({f"../../{name}": x.pop(name)})),
    "one row more": on_tensors(
        lambda x, name: x.update({name: torch.cat((x[name], x[name][:1])).contiguous()})
    ),
    "no row": on_tensors(lambda x, name: x.update({name: x[name][:0].contiguous()})),
    "flat": on_tensors(lambda x, name: x.update({name: x[name].flatten()})),
    "one dimension more": on_tensors(lambda x, name: x.update({name: x[name][None]})),
    "int32": on_tensors(lambda x, name: x.update({name: x[name].int()})),
    "fp64": on_tensors(lambda x, name: x.update({name: x[name].double()})),
    "bool": on_tensors(lambda x, name: x.update({name: x[name].bool()})),
    "NaN": on_tensors(lambda x, name: put(x, name, float("nan"))),
    "infinite": on_tensors(lambda x, name: put(x, name, float("inf"))),
    "minus infinite": on_tensors(lambda x, name: put(x, name, -float("inf"))),
}
HEADERS: dict[str, Callable[[Path, Path], None]] = {
    "huge shapes": on_header(lambda x: every(x, "shape", [2**40, 2**40])),
    "negative shapes": on_header(lambda x: every(x, "shape", [-1])),
    "no offsets": on_header(lambda x: [entry.pop("data_offsets") for entry in x.values()]),
    "offsets beyond the end": on_header(lambda x: every(x, "data_offsets", [0, 2**40])),
    "a dtype of no library": on_header(lambda x: every(x, "dtype", "F99")),
    "a dtype that is no text": on_header(lambda x: every(x, "dtype", 7)),
}
PICKLES: dict[str, Callable[[Path, Path], None]] = {
    "a list": lambda path, marker: torch.save([torch.zeros(2)], path),
    "a tensor": lambda path, marker: torch.save(torch.zeros(2), path),
    "numbers": on_tensors(lambda x, name: x.update({name: 7})),
    "numbers as names": on_tensors(lambda x, name: x.update({7: x.pop(name)})),
    "huge": on_tensors(lambda x, name: x.update({name: torch.zeros(1).expand(2**20, 2**20)})),
    "meta": on_tensors(lambda x, name: x.update({name: x[name].to("meta")})),
    "sparse": on_tensors(lambda x, name: x.update({name: x[name].to_sparse()})),
}
CONFIGS: dict[str, str] = {
    "empty": "",
    "half": '{"retention_gate": "rg',
    "deep": DEEP,
    "deep inside": f'{{"a": {DEEP}}}',
    "a list": "[]",
    "a text": '"rg"',
    "a number": "3",
    "null": "null",
    "an empty object": "{}",
    "not UTF-8": "\udcff",
    "a huge number": f'{{"num_layers": {"9" * 5000}}}',
    "html": "<html>404</html>",
}
VALUES: list[Any] = [0, -1, 3, 2**31, 2**63, 10**400, 1.5, True, None, "2", [2], {"a": 2}]


def cases() -> list[Any]:
    found = []
    for name, layout in LAYOUTS.items():
        is_pickle = not layout.weights.endswith(".safetensors")
        kinds = {**BYTES, **TENSORS, **(PICKLES if is_pickle else HEADERS)}
        found += [pytest.param(layout, x, id=f"{name}: {fault}") for fault, x in kinds.items()]
    return found


def snapshot(folder: Path) -> dict[str, Any]:
    return {
        str(x.relative_to(folder)): (x.lstat().st_mode, x.lstat().st_size, x.lstat().st_mtime_ns)
        for x in folder.rglob("*")
    }


def refused(layout: Layout, folder: Path, marker: Path) -> str:
    before = snapshot(folder)
    with pytest.raises(ValueError, match=r"\w+ \w+") as error:
        layout.load(folder)
    assert not marker.exists()
    assert snapshot(folder) == before
    return str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_the_good_one_loads(layout: Layout, tmp_path: Path) -> None:
    layout.write(tmp_path)
    assert layout.load(tmp_path) is not None


@pytest.mark.parametrize(("layout", "fault"), cases())
def test_weights(layout: Layout, fault: Callable[[Path, Path], None], tmp_path: Path) -> None:
    folder, marker = tmp_path / "checkpoint", tmp_path / "marker"
    folder.mkdir()
    layout.write(folder)
    fault(folder / layout.weights, marker)
    message = refused(layout, folder, marker)
    assert "checkpoint" in message or layout.weights in message, "it names the file"
    assert len(message) < 2000


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        pytest.param(layout, text, id=f"{name}: {fault}")
        for name, layout in LAYOUTS.items()
        if layout.config
        for fault, text in CONFIGS.items()
    ],
)
def test_configs(layout: Layout, text: str, tmp_path: Path) -> None:
    layout.write(tmp_path)
    (tmp_path / str(layout.config)).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert str(layout.config) in refused(layout, tmp_path, tmp_path / "marker")


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        pytest.param(layout, key, id=f"{name}: {key}")
        for name, layout in LAYOUTS.items()
        for key in layout.sizes
    ],
)
def test_sizes(layout: Layout, key: str, tmp_path: Path) -> None:
    layout.write(tmp_path)
    path = tmp_path / str(layout.config)
    good = json.loads(path.read_text())
    for value in VALUES:
        if value is None and key == "hidden_dim":
            continue  # a linear gate, which these are not: refused, but by their names
        path.write_text(json.dumps({**good, key: value}))
        message = refused(layout, tmp_path, tmp_path / "marker")
        assert len(message) < 2000


@pytest.mark.parametrize("layout", CACHES.values(), ids=list(CACHES))
def test_fingerprints(layout: Layout, tmp_path: Path) -> None:
    """Whatever the file says of itself must be what the cache is."""
    layout.write(tmp_path)
    path = tmp_path / layout.weights
    data, metadata = read(path)
    assert metadata is not None
    for name in metadata:
        for value in ("", "99"):
            write(path, data, {**metadata, name: value})
            assert name in refused(layout, tmp_path, tmp_path / "marker")
        write(path, data, {key: x for key, x in metadata.items() if key != name})
        refused(layout, tmp_path, tmp_path / "marker")
    write(path, data, None)
    refused(layout, tmp_path, tmp_path / "marker")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
WITH_CONFIG = {name: layout for name, layout in GATES.items() if layout.config}
SETTINGS = hypothesis.settings(
    derandomize=True, deadline=None, database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip


@hypothesis.given(name=st.sampled_from(sorted(WITH_CONFIG)), data=st.data())
@hypothesis.settings(SETTINGS, max_examples=60)
def test_any_value_of_a_config(name: str, data: st.DataObject, tmp_path: Path) -> None:
    """A value of any type is taken or refused in words."""
    layout = WITH_CONFIG[name]
    layout.write(tmp_path)
    path = tmp_path / str(layout.config)
    good = json.loads(path.read_text())
    key = data.draw(st.sampled_from(sorted(good)))
    path.write_text(json.dumps({**good, key: data.draw(JSON)}))
    message = "config"
    try:
        layout.load(tmp_path)
    except ValueError as error:
        message = str(error)
    assert "config" in message


@hypothesis.given(name=st.sampled_from(sorted(LAYOUTS)), data=st.data())
@hypothesis.settings(SETTINGS, max_examples=60)
def test_any_byte_of_the_weights(name: str, data: st.DataObject, tmp_path: Path) -> None:
    """Some bytes are changed: the file is taken, with finite numbers, or refused in words."""
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    path = tmp_path / layout.weights
    raw = bytearray(path.read_bytes())
    places = st.integers(0, min(len(raw), 2000) - 1) | st.integers(0, len(raw) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        raw[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw))
    try:
        loaded = layout.load(tmp_path)
    except ValueError:
        return
    tensors: list[Tensor] = (
        [*loaded.parameters()] if isinstance(loaded, torch.nn.Module) else [loaded.keys(0)]
    )
    assert all(bool(x.isfinite().all()) for x in tensors)
