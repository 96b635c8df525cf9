"""`trimkv-kernels`: how commands are found, and what a user's mistakes are answered with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trimkv_kernels as tk
from plugins import BAD, GOOD, POLICY, install
from trimkv_kernels import commands
from trimkv_kernels.cli import main
from trimkv_kernels.embedded import EMBEDDED_MODEL
from trimkv_kernels.inspection import Trace, text_figure
from trimkv_kernels.policies import registry
from trimkv_kernels.progress import count_off

COMMANDS = [
    "chat",
    "check",
    "convert",
    "custom_generate",
    "evaluate",
    "inspect",
    "kl",
    "perplexity",
    "train",
]
GOLDEN_GATES = Path(__file__).parent / "golden" / "trimkv-0.1.5" / "rg" / "gates"


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = [*([] if path is None else [str(path)]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "trimkv_kernels", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model and no tokenizer can be loaded."""
    import transformers

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was loaded")

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", load)


def test_commands_are_found_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(commands.find_commands()) == COMMANDS
    (tmp_path / "greet.py").write_text(
        '"""say hello"""\n'
        "def add_arguments(parser): parser.add_argument('name')\n"
        "def run(options): print('hello', options.name); return 3\n"
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    assert main(["greet", "ada"]) == 3
    assert capsys.readouterr().out == "hello ada\n"
    sys.modules.pop("trimkv_kernels.commands.greet")


def test_version_and_module() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"trimkv-kernels {tk.__version__}\n")
    done = run("perplexty")
    assert done.returncode == 2
    assert "unknown command 'perplexty'; known: chat, check, convert," in done.stderr
    assert done.stderr.rstrip().endswith("Did you mean 'perplexity'?")
    shown = run("--help").stdout
    for name in COMMANDS:
        assert name in shown


def test_importing_the_commands_takes_no_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from trimkv_kernels.cli import main\nmain(['kl', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--text-file" in done.stdout


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("command", ["kl", "inspect"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "h20"], "unknown policy 'h20'; known: .* Did you mean 'h2o'?"),
        (["--dtype", "bf16"], "dtype must be one of auto, .* Did you mean 'bfloat16'?"),
        (["--device", "gpu"], "device must be one such as cpu, cuda or cuda:1, got 'gpu'"),
        (["--model", "/no/such"], "model must be a folder or a hub id .*: no folder /no/such"),
        (["--model", "{empty}"], "{empty} is a folder without config.json: pass the folder"),
        (["--model", "{parent}"], "without config.json: did you mean {model}?"),
        (["--model", "{ours}"], "config.json: it holds retention gates: pass it as gates"),
        (["--model", "{golden}"], "holds retention gates and no model: pass it as gates"),
        (["--model", "{file}"], "model must be a folder or a hub id, got the file {file}"),
        (["--gates", "{empty}"], "no retention-gate weights in {empty}"),
        (["--text-file", "/no/such"], "No such file or directory: '/no/such'"),
        (["--text-file", "{file}"], "text_file must be UTF-8 text, got {file}"),
    ],
)
def test_mistakes_are_told_before_a_model_loads(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"\xff\xfe\xfd")
    places = {
        "empty": tmp_path / "empty",
        "file": tmp_path / "file",
        "model": EMBEDDED_MODEL,
        "parent": EMBEDDED_MODEL.parent,
        "ours": EMBEDDED_MODEL / "retention_gates",
        "golden": GOLDEN_GATES,
    }
    out = ["--out", str(tmp_path / "out")] if command == "inspect" else []
    assert main([command, *out, *(option.format(**places) for option in options)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"trimkv-kernels {command}: ")
    parts = message.format(**places).split(".*")
    assert all(part.strip() in error for part in parts), error
    assert not (tmp_path / "out").exists()


def test_a_cuda_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    count = torch.cuda.device_count()
    assert main(["kl", "--device", f"cuda:{count}"]) == 1
    assert f"this machine has {count} of the kind 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kl", "--polcy", "h2o"], "unrecognized arguments: --polcy h2o. Did you mean '--policy'?"),
        (["kl", "--budget", "0"], "argument --budget: must be an int of at least 1, got '0'"),
        (["inspect", "--out", "x", "--layers", "5-3"], "ranges such as 0,3-5, got '5-3'"),
        (["inspect", "--out", "x", "--layers", "0,,1"], "ranges such as 0,3-5, got '0,,1'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_misuse(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("never_loads")
def test_training_names_its_data_and_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["train", "--model", str(EMBEDDED_MODEL), "--budget", "4"]
    assert main([*arguments, "--data", "/no/such", "--out", str(tmp_path / "out")]) == 1
    assert "data must be a jsonl file: there is no file /no/such" in capsys.readouterr().err
    file = str(tmp_path / "file")
    assert main([*arguments, "--data", file, "--out", file]) == 1
    assert f"out must be a folder, got the file {file}" in capsys.readouterr().err


def test_an_interrupt_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimkv_kernels.evaluation.measure_text", interrupt)
    assert main(["kl"]) == 130
    assert capsys.readouterr().err == "trimkv-kernels kl: interrupted\n"


def test_a_bar_appears_on_a_terminal_only_and_after_two_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(count_off(range(3), "reading", total=3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for delay, shown, bar in ((2.0, True, False), (0.0, True, True), (0.0, False, False)):
        monkeypatch.setattr("trimkv_kernels.progress._DELAY", delay)
        assert list(count_off(range(3), "reading", total=3, shown=shown)) == [0, 1, 2]
        assert ("reading" in capsys.readouterr().err) is bar


# What `inspect` draws of some layers.


def test_selected_layers_keep_their_numbers() -> None:
    whole = Trace("h2o", 2, torch.tensor([[[3, 1, 3]], [[2, 3, 3]], [[1, 3, 3]]]).int())
    some = whole.select((0, 2))
    assert some.layers == (0, 2)
    assert some.dropped_at.tolist() == [[[3, 1, 3]], [[1, 3, 3]]]
    assert some.select((2,)).dropped_at.tolist() == [[[1, 3, 3]]]
    assert whole.select(None) is whole
    texts = [text.get_text() for text in text_figure(some, ["a", "b", "c"]).texts]
    assert any("layers 0, 2, all heads" in text for text in texts)
    for wrong in ((1,), (), (0, 3)):
        with pytest.raises(ValueError, match="layers must be some of 0 to 2"):
            some.select(wrong)


def test_inspect_draws_the_layers_that_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ada keeps amber . " * 4)
    arguments = ["inspect", "--text-file", str(text), "--policy", "h2o", "--budget", "8"]
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out), "--layers", "1"]) == 0
    page = (out / "inspect.html").read_text()
    assert '"shape": [1, 2, 16], "layers": [1]' in page
    assert main([*arguments, "--out", str(tmp_path / "none"), "--layers", "0-2"]) == 1
    assert "layers must be some of 0 to 1, got 2" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# `check`: the conformance suite of a policy.


def test_check_of_a_registered_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "key_norm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15
    assert all(line.endswith("  pass") for line in lines[:14])
    assert lines[14] == "policy 'key_norm': 14 of 14 rules hold"


def test_check_of_an_installed_policy_and_of_a_module(tmp_path: Path) -> None:
    code = POLICY.format(name="Good", score=GOOD) + POLICY.format(name="Bad", score=BAD)
    install(tmp_path, "plugged_check", code, {"good_value": "Good"})
    done = run("check", "good_value", path=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "policy 'good_value': 14 of 14 rules hold" in done.stdout
    done = run("check", "plugged_check.policies:Bad", path=tmp_path)
    assert done.returncode == 1
    purity = next(line for line in done.stdout.splitlines() if line.startswith("purity"))
    assert "FAIL  policy 'Bad' breaks the rule 'purity': two calls" in purity
    assert "shape_and_dtype   pass" in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("key_nrm", "Did you mean 'key_norm'?"),
        ("no_such_module:Policy", "module no_such_module cannot be imported: ModuleNotFoundErr"),
        ("json:Policy", "policy 'json:Policy': json has no 'Policy'"),
        ("json:JSONDecoder", "policy 'json:JSONDecoder' must be a RetentionPolicy class"),
        (
            "trimkv_kernels.policies.gated:StaticGatePolicy",
            "StaticGatePolicy cannot be made without arguments",
        ),
    ],
)
def test_check_of_what_is_no_policy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    monkeypatch.setattr(registry, "_plugins", registry._Plugins())
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["check", name]) == 1
    assert message in capsys.readouterr().err
