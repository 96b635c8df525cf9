"""Policies of other installed packages are found by name; a broken one harms no other."""

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from transformers import Qwen3ForCausalLM

import trimkv_kernels as tk
from plugins import GOOD, POLICY, install
from trimkv_kernels.policies import make_policy, registry

BOTH = POLICY.format(name="Large", score=GOOD) + POLICY.format(name="Second", score=GOOD)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was looked up yet, and nothing found stays."""
    monkeypatch.setattr(registry, "_plugins", registry._Plugins())
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )


def kind_of(name: str) -> str:
    return type(make_policy(name)).__module__


def test_found_by_name_everywhere(site: Path, qwen3: Qwen3ForCausalLM) -> None:
    install(site, "plugged_one", BOTH, {"large_value": "Large", "second_value": "Second"})
    assert {"large_value", "second_value", "key_norm"} <= set(tk.available_policies())
    assert make_policy("large_value").name == "large_value"
    with tk.patch(qwen3, "second_value", budget=8, buffer=2) as handle:
        assert kind_of(handle.policy.name) == "plugged_one.policies"


@pytest.mark.slow
def test_found_in_other_processes(site: Path) -> None:
    install(site, "plugged_two", BOTH, {"large_value": "Large"})
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(kind_of, "large_value").result() == "plugged_two.policies"
    code = "import trimkv_kernels as tk; print(tk.available_policies())"
    assert "'large_value'" in run(site, "-c", code).stdout


def test_imported_only_when_a_name_is_not_ours(site: Path) -> None:
    install(site, "plugged_three", BOTH, {"large_value": "Large"})
    make_policy("key_norm")
    assert "plugged_three.policies" not in sys.modules
    make_policy("large_value")
    assert "plugged_three.policies" in sys.modules


def test_a_class_may_register_itself(site: Path) -> None:
    code = "from trimkv_kernels import register_policy\n" + POLICY.format(name="Large", score=GOOD)
    decorated = code.replace("@dataclass", '@register_policy("large_value")\n@dataclass')
    install(site, "plugged_four", decorated, {"large_value": "Large"})
    assert kind_of("large_value") == "plugged_four.policies"


OURS = "from trimkv_kernels.policies.key_norm import KeyNorm as Large\n"
THIEF = (
    "from trimkv_kernels import RetentionPolicy, register_policy\n"
    "@register_policy('key_norm')\nclass KeyNorm(RetentionPolicy): pass\n"
    "class Large(RetentionPolicy): pass\n"
)


@pytest.mark.parametrize(
    ("package", "code", "name", "message"),
    [
        ("broken_import", "import no_such_module", "large_value", "No module named 'no_such_mod"),
        ("broken_name", "", "large_value", "AttributeError"),
        ("broken_kind", "Large = int", "large_value", "must be a RetentionPolicy class, got <cla"),
        ("broken_other", OURS, "large_value", "registered as 'key_norm': the entry point must"),
        ("broken_taken", BOTH, "key_norm", "taken by trimkv_kernels.policies.key_norm.KeyNorm"),
        ("broken_thief", THIEF, "large_value", "it replaces the policy 'key_norm' of trim"),
    ],
)
def test_a_broken_one_is_named_and_the_others_work(
    site: Path,
    caplog: pytest.LogCaptureFixture,
    package: str,
    code: str,
    name: str,
    message: str,
) -> None:
    install(site, package, code, {name: "Large"})
    install(site, f"{package}_friend", BOTH, {"zz_value": "Second"})
    names = tk.available_policies()
    assert "zz_value" in names
    assert kind_of("key_norm") == "trimkv_kernels.policies.key_norm"
    (record,) = caplog.records
    told = record.getMessage()
    assert f"policy {name!r} of the installed package {package} ({package}.policies:Large)" in told
    assert message in told
    if name != "key_norm":
        assert name not in names
        with pytest.raises(ValueError, match=f"policy {name!r} of the installed package {package}"):
            make_policy(name)
