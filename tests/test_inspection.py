"""Traces of what a policy keeps, and the pictures of them."""

import base64
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from trimkv_kernels import TrimKV, patch
from trimkv_kernels.cli import main
from trimkv_kernels.inspection import (
    Trace,
    draw,
    kept_figure,
    page,
    retention_figure,
    split_text,
    text_figure,
    trace,
)
from trimkv_kernels.policies import make_policy
from trimkv_kernels.policies.base import ModelShape, RetentionPolicy
from trimkv_kernels.testing import embedded_model

TOKENS = 40


def gates_policy(num_layers: int, num_kv_heads: int, hidden_size: int) -> TrimKV:
    shape = ModelShape(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
        hidden_size=hidden_size,
    )
    return TrimKV.example(shape)


@pytest.fixture
def policy(request: pytest.FixtureRequest) -> RetentionPolicy:
    return gates_policy(3, 2, 64) if request.param == "trimkv" else make_policy(request.param)


@pytest.fixture
def input_ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 96, (1, TOKENS), generator=generator)


@pytest.fixture
def worked() -> Trace:
    """Two layers of one head over four tokens, by hand."""
    dropped_at = torch.tensor([[[2, 4, 4, 4]], [[4, 1, 3, 4]]], dtype=torch.int32)
    beta = torch.tensor([[[0.5, 1.0, 0.9, 0.1]], [[0.2, 0.3, 0.4, 0.6]]])
    return Trace("trimkv", 3, dropped_at, beta.log())


@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm", "key_norm", "h2o"], indirect=True)
@pytest.mark.parametrize(("prompt_length", "buffer"), [(1, 1), (1, 4), (25, 3)])
def test_kept_sets_are_those_of_the_cache(
    qwen3: Qwen3ForCausalLM,
    input_ids: torch.Tensor,
    policy: RetentionPolicy,
    prompt_length: int,
    buffer: int,
) -> None:
    options = {"budget": 12, "buffer": buffer}
    traced = trace(qwen3, input_ids, policy, prompt_length=prompt_length, **options)
    assert traced.dropped_at.dtype == torch.int32
    assert traced.dropped_at.shape == (3, 2, TOKENS)
    assert (traced.dropped_at < TOKENS).any()
    with torch.no_grad(), patch(qwen3, policy, **options) as handle:
        cache = handle.new_cache()
        calls = input_ids.split([prompt_length] + [1] * (TOKENS - prompt_length), dim=1)
        for step, call in enumerate(calls, start=prompt_length - 1):
            qwen3(input_ids=call, past_key_values=cache)
            for layer in range(3):
                for head, slots in enumerate(cache.positions(layer)[0].tolist()):
                    kept = traced.kept(step)[layer, head].nonzero().flatten().tolist()
                    assert kept == sorted(p for p in slots if p >= 0), (step, layer, head)


@pytest.mark.parametrize("prompt_length", [1, 25])
def test_decay_is_what_the_gates_say(
    qwen3: Qwen3ForCausalLM, input_ids: torch.Tensor, prompt_length: int
) -> None:
    """With nothing evicted the gates read what a stock forward gives the attention layers."""
    policy = gates_policy(3, 2, 64)
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in qwen3.model.layers
    ]
    with torch.no_grad():
        qwen3(input_ids=input_ids, use_cache=False)
        expected = [policy.gates.layers[i](x)[0] for i, x in enumerate(seen)]
    for hook in hooks:
        hook.remove()
    traced = trace(
        qwen3, input_ids, policy, prompt_length=prompt_length, budget=TOKENS + 1, buffer=1
    )
    assert traced.log_beta is not None
    torch.testing.assert_close(traced.log_beta, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert (traced.dropped_at == TOKENS).all()
    assert not policy.gates._forward_hooks  # nothing stays behind


def test_worked_trace(worked: Trace) -> None:
    assert worked.kept(0).int().tolist() == [[[1, 0, 0, 0]], [[1, 0, 0, 0]]]
    assert worked.kept(2).int().tolist() == [[[0, 1, 1, 0]], [[1, 0, 1, 0]]]
    expected = torch.tensor([[[0.25, 1.0, 1.0, 0.0]], [[0.04, 0.3, 1.0, 0.0]]])
    torch.testing.assert_close(worked.retention(2), expected)
    with pytest.raises(ValueError, match=r"step must be in \[0, 4\), got 4"):
        worked.kept(4)
    with pytest.raises(ValueError, match=r"only TRIM-KV.*policy 'h2o'"):
        Trace("h2o", 3, worked.dropped_at).retention(0)


def test_overflowed_gates_still_know_their_newest_token(
    qwen3: Qwen3ForCausalLM, input_ids: torch.Tensor
) -> None:
    policy = gates_policy(3, 2, 64)
    with torch.no_grad():
        for gate in policy.gates.layers:
            gate.bias.fill_(-torch.inf)
    traced = trace(qwen3, input_ids[:, :6], policy, budget=4, buffer=1)
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0]).expand(3, 2, 6)
    assert torch.equal(traced.retention(5), expected)


def test_trace_refuses(qwen3: Qwen3ForCausalLM, input_ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"input_ids must have shape \[1, tokens\], got \[40\]"):
        trace(qwen3, input_ids[0], "streaming_llm")
    with pytest.raises(ValueError, match=r"prompt_length must be in \[1, 40\].*got 41"):
        trace(qwen3, input_ids, "streaming_llm", prompt_length=41)


def test_split_text_gives_back_the_text() -> None:
    _, tokenizer = embedded_model()
    text = "ada keeps amber .\n\n  what does ada keep ? </s>"
    input_ids, words = split_text(tokenizer, text)
    assert "".join(words) == text
    assert [word.strip() for word in words] == text.split()
    assert input_ids.tolist() == [tokenizer.convert_tokens_to_ids(text.split())]
    with pytest.raises(ValueError, match="text must have at least one token"):
        split_text(tokenizer, "")


def test_split_text_names_tokens_without_a_piece() -> None:
    class Tokenizer:
        """A special token first, then the two halves of one character."""

        is_fast = True

        def __call__(self, text: str, return_offsets_mapping: bool) -> dict[str, Any]:
            return {"input_ids": [1, 2, 3, 4], "offset_mapping": [(0, 0), (0, 1), (0, 1), (1, 3)]}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["<s>", "x", "y", "ok"]

    assert split_text(Tokenizer(), "é k")[1] == ["<s>", "é", "y", " k"]


def panels(figure: Any) -> list[np.ma.MaskedArray]:
    return [np.ma.masked_invalid(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def test_retention_panels_are_powers_of_beta(worked: Trace) -> None:
    assert worked.log_beta is not None
    figure = retention_figure(worked)
    for layer, panel in enumerate(panels(figure)[:2]):
        for step in range(4):
            for token in range(4):
                if token > step:
                    assert panel.mask[step, token]
                else:
                    beta = math.exp(worked.log_beta[layer, 0, token].item())
                    assert panel[step, token] == pytest.approx(beta ** (step - token), rel=1e-6)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["layer 0, head 0", "layer 1, head 0"]


def test_kept_panels(worked: Trace) -> None:
    first, second = (panel.filled(-1).tolist() for panel in panels(kept_figure(worked)))
    assert first == [[1, -1, -1, -1], [1, 1, -1, -1], [0, 1, 1, -1], [0, 1, 1, 1]]
    assert second == [[1, -1, -1, -1], [1, 0, -1, -1], [1, 0, 1, -1], [1, 0, 0, 1]]


def test_long_texts_are_sampled() -> None:
    tokens = 3000
    long = Trace(
        "h2o", 8, torch.arange(8, tokens + 8, dtype=torch.int32).clamp(max=tokens)[None, None]
    )
    (panel,) = panels(kept_figure(long))
    assert panel.shape[0] == panel.shape[1] < 500
    assert panel[-1, -1] == 1
    assert panel[-1, 0] == 0
    assert panel[0, 0] == 1


def test_words_are_coloured_by_the_share_of_heads(worked: Trace) -> None:
    words = ["$a$", " <b>", " c", "\nd"]

    def shown(**where: int) -> tuple[list[str], list[str]]:
        axes = text_figure(worked, words, **where).axes[0]
        struck = [line.get_xdata()[0] for line in axes.lines]
        return [text.get_text() for text in axes.texts], [f"{x:g}" for x in struck]

    # at the end layer 0 holds tokens 1, 2 and 3, layer 1 tokens 0 and 3
    assert shown() == (["$a$", "<b>", "c", "d"], [])
    assert shown(layer=0)[1] == ["0"]
    assert shown(layer=1, head=0)[1] == ["4", "8"]
    with pytest.raises(ValueError, match=r"layer must be in \[0, 2\) or None, got 2"):
        shown(layer=2)
    with pytest.raises(ValueError, match="one entry for each of 4 tokens, got 2"):
        text_figure(worked, words[:2])


def test_a_missing_matplotlib_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it now fails
    assert main(["inspect", "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'trimkv-kernels[inspect]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


HOSTILE = ["</script><script>alert(1)</script>", " <!--<b>&amp;", ' "é"', " __TRACE__"]


def page_data(html: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="trace">(.*?)</script>', html, re.S)
    return json.loads(text)


def test_page_carries_the_trace(worked: Trace) -> None:
    data = page_data(page(worked, HOSTILE))
    assert data["words"] == HOSTILE
    assert (data["policy"], data["budget"], data["shape"]) == ("trimkv", 3, [2, 1, 4])
    dropped_at = np.frombuffer(base64.b64decode(data["droppedAt"]), "<i4")
    log_beta = np.frombuffer(base64.b64decode(data["logBeta"]), "<f4")
    assert worked.log_beta is not None
    assert dropped_at.tolist() == worked.dropped_at.flatten().tolist()
    assert log_beta.tolist() == worked.log_beta.flatten().tolist()
    assert page_data(page(Trace("h2o", 3, worked.dropped_at), HOSTILE))["logBeta"] is None


def test_page_is_self_contained_and_escapes(worked: Trace) -> None:
    html = page(worked, HOSTILE)
    assert not re.search(r"https?:|//\w+\.|\b(src|href)\s*=|@import|url\(", html)
    assert "default-src 'none'" in html
    # the text brings no element: those of the template are all there are
    assert html.count("<script") == html.count("</script>") == 2
    assert "alert(1)</" not in html
    assert "<!--" not in html
    assert "innerHTML" not in html
    assert re.search(r'<input type="range" id="step"', html)


def test_draw_writes_all_or_nothing(worked: Trace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one entry for each"):
        draw(worked, HOSTILE[:3], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    written = draw(worked, HOSTILE, tmp_path / "all")
    names = ["retention.png", "kept.png", "text.png", "inspect.html"]
    assert [path.name for path in written] == names
    for path in written[:3]:
        assert path.read_bytes().startswith(b"\x89PNG")
    without = draw(Trace("h2o", 3, worked.dropped_at), HOSTILE, tmp_path / "other")
    assert [path.name for path in without] == names[1:]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ada keeps amber . " * 6 + "what does ada keep ?")
    gates = tmp_path / "gates"
    gates_policy(2, 2, 128).save_pretrained(gates)
    out = tmp_path / "out"
    arguments = ["inspect", "--text-file", str(text), "--budget", "8", "--out", str(out)]
    assert main([*arguments, "--policy", "trimkv", "--gates", str(gates)]) == 0
    printed = capsys.readouterr().out.splitlines()
    names = ["retention.png", "kept.png", "text.png", "inspect.html"]
    assert printed == [str(out / name) for name in names]
    data = page_data((out / "inspect.html").read_text())
    assert "".join(data["words"]) == text.read_text()
    assert data["shape"] == [2, 2, 29]
    assert main([*arguments, "--policy", "h2o", "--gates", str(gates)]) == 1
    assert "gates are for policy 'trimkv', got policy 'h2o'" in capsys.readouterr().err
