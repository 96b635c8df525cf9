"""What differs between versions of transformers; CI runs this file on each of them."""

from __future__ import annotations

import re
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import Qwen3ForCausalLM

import trimkv_kernels as tk
from trimkv_kernels.integrations import compat
from trimkv_kernels.testing import embedded_model

ROOT = Path(__file__).parents[1]
OPTIONS = {"budget": 24, "buffer": 6, "sinks": 2, "recent": 4}


def looping(length: int = 40) -> Tensor:
    """A prompt that repeats itself, so that n-grams of it are worth trying."""
    ids = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:10] + 3
    return ids.repeat(length // 10)[None]


def generate(model: Qwen3ForCausalLM, ids: Tensor, **options: object) -> Tensor:
    return model.generate(ids, max_new_tokens=30, do_sample=False, **options)


def test_ci_runs_what_is_said_to_be_tested() -> None:
    older = sorted(path.stem for path in (ROOT / ".ci" / "versions").glob("[0-9]*.txt"))
    (newest,) = re.findall(
        r"^transformers==(\d+\.\d+)\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    assert (*older, newest) == compat.TESTED
    for version in older:
        pins = (ROOT / ".ci" / "versions" / f"{version}.txt").read_text()
        assert f"\ntransformers=={version}." in pins
    assert f'"transformers>={compat.TESTED[0]}"' in (ROOT / "pyproject.toml").read_text()
    assert transformers.__version__.rsplit(".", 1)[0] in compat.TESTED


@pytest.mark.parametrize(
    ("version", "is_tested"),
    [((4, 56), False), ((4, 57), True), ((5, 17), True), ((5, 23), True), ((5, 24), False)],
)
def test_an_untested_version_warns_once(
    version: tuple[int, int],
    is_tested: bool,
    qwen3: Qwen3ForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "_VERSION", version)
    compat.warn_if_untested.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            tk.patch(qwen3, "random", **OPTIONS).unpatch()
    said = [w for w in caught if "untested" in str(w.message)]
    assert len(said) == (0 if is_tested else 1)
    for warning in said:
        assert "4.57, 5.17, 5.23" in str(warning.message)
        assert Path(warning.filename) == Path(__file__)


@pytest.mark.parametrize("policy", ["random", "h2o", "snap_kv"])
def test_n_gram_drafts_with_room_for_all(policy: str, qwen3: Qwen3ForCausalLM) -> None:
    with tk.patch(qwen3, policy, budget=100, buffer=8):
        plain = generate(qwen3, looping())
        assert torch.equal(generate(qwen3, looping(), prompt_lookup_num_tokens=4), plain)


def test_drafts_evict_as_if_only_the_confirmed_tokens_had_come(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, "random", **OPTIONS)
    cache, plain = handle.new_cache(), handle.new_cache()
    rounds = [0]
    crop = cache.crop

    def spy(count: int) -> None:
        crop(count)
        rounds.append(int(cache.get_seq_length()))

    cache.crop = spy
    output = generate(qwen3, looping(), prompt_lookup_num_tokens=4, past_key_values=cache)
    assert len(rounds) < 30, "no draft was ever right"
    with torch.no_grad():
        for start, stop in pairwise(rounds):
            qwen3(output[:, start:stop], past_key_values=plain)
    assert cache.stats().evictions.min() > 0
    for layer in range(3):
        kept = (c.positions(layer).sort(dim=-1).values for c in (cache, plain))
        assert torch.equal(*kept)


@pytest.mark.parametrize(
    ("to_length", "argument", "stay"),
    [
        (True, 25, 25),
        (True, 40, 29),
        (True, -4, 25),
        (True, 0, 29),
        (False, -4, 25),
        (False, 0, 29),
    ],
)
def test_crop_takes_what_the_version_gives(
    to_length: bool,
    argument: int,
    stay: int,
    qwen3: Qwen3ForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "_CROPS_TO_LENGTH", to_length)
    cache = tk.patch(qwen3, "random", **OPTIONS).new_cache()
    with torch.no_grad():
        qwen3(looping()[:, :25], past_key_values=cache)
        qwen3(looping()[:, 25:29], past_key_values=cache)
    cache.crop(argument)
    assert int(cache.get_seq_length()) == stay


def test_a_length_to_crop_to_is_refused_since_5_18(
    qwen3: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "_CROPS_TO_LENGTH", False)
    with pytest.raises(ValueError, match="tokens_to_remove must be 0 or negative"):
        tk.patch(qwen3, "random", **OPTIONS).new_cache().crop(2)


def test_a_padded_prompt_in_chunks_generates_what_the_rows_alone_do(
    qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    ids = torch.cat((looping(60), looping(60)))
    mask = torch.ones_like(ids)
    ids[0, :33] = mask[0, :33] = 0
    alone = [generate(stock, ids[:1, 33:])[0, 27:], generate(stock, ids[1:])[0, 60:]]
    tk.patch(qwen3, "random", budget=128, buffer=8, prefill_chunk=8)
    together = generate(qwen3, ids, attention_mask=mask)[:, 60:]
    for row, expected in zip(together, alone, strict=True):
        assert row[: len(expected)].tolist() == expected.tolist()


def test_the_embedded_model_is_the_same_in_every_version() -> None:
    model, tokenizer = embedded_model()
    size = model.config.head_dim
    inv_freq = 1e6 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    torch.testing.assert_close(
        model.model.rotary_emb.inv_freq.double(), inv_freq, rtol=1e-6, atol=0
    )
    assert set(tokenizer("hello", return_tensors="pt")) == {"input_ids", "attention_mask"}
    assert tokenizer.padding_side == "left"
