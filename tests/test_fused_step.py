"""A decode step that leaves norm, RoPE and the end of the gate to the launch that attends."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import trimkv_kernels as tk
from conftest import make_qwen3
from test_models import BUDGET, batch, make
from test_patch import trimkv
from trimkv_kernels.integrations import base
from trimkv_kernels.kernels import Rope
from trimkv_kernels.policies import make_policy
from trimkv_kernels.policies.base import ModelShape, TokenView
from trimkv_kernels.policies.registry import policy_class

LAYERS, BATCH, HEADS, KV_HEADS, DIM, HIDDEN, TOTAL = 2, 2, 4, 2, 16, 16, 40
SHAPE = ModelShape(
    LAYERS, KV_HEADS, DIM, torch.float32, torch.device("cpu"), num_heads=HEADS, hidden_size=HIDDEN
)
FUSED = ["streaming_llm", "trimkv", "h2o", "shared"]  # on Triton; the last is trimkv in pages
APART = ["key_norm", "r_kv", "expected_attention", "loc_ret"]  # every kind of state that is read
CASES = [
    ("triton", "trimkv"),
    *[
        pytest.param("triton", name, marks=pytest.mark.slow)
        for name in ("streaming_llm", "h2o", "shared", "loc_ret")
    ],
    *[("torch", name) for name in (*FUSED, *APART)],
]


class Stream:
    """Random states before norm and RoPE, and the same ones after them, in float64."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(LAYERS, BATCH, *shape, generator=rng)

        self.query, self.key = draw(HEADS, TOTAL, DIM), draw(KV_HEADS, TOTAL, DIM)
        self.value, self.hidden = draw(KV_HEADS, TOTAL, DIM), draw(TOTAL, HIDDEN)
        self.weights = [1 + torch.randn(DIM, generator=rng) / 3 for _ in range(2)]
        angle = torch.arange(TOTAL)[:, None] * 100.0 ** (-torch.arange(0, DIM, 2) / DIM)
        self.cos, self.sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def rope(self, start: int, stop: int) -> Rope:
        cos, sin = (x[start:stop].expand(BATCH, -1, -1) for x in (self.cos, self.sin))
        return Rope(cos, sin, *self.weights, 1e-6)

    def after(self, states: Tensor, weight: Tensor, start: int, stop: int) -> list[Tensor]:
        """``states`` after the norm, and after RoPE."""
        x = states.double()
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        half = DIM // 2
        turned = torch.cat((-normed[..., half:], normed[..., :half]), -1)
        cos, sin = (x[start:stop].double() for x in (self.cos, self.sin))
        return [normed.float(), (normed * cos + turned * sin).float()]

    def call(
        self, cache: tk.BoundedKVCache, start: int, stop: int, valid: Tensor | None, *, raw: bool
    ) -> list[Tensor]:
        outputs = []
        for layer in range(LAYERS):
            query, key, value = (
                x[layer, :, :, start:stop] for x in (self.query, self.key, self.value)
            )
            options = {"hidden_states": self.hidden[layer, :, start:stop], "valid": valid}
            if raw:
                options["rope"] = self.rope(start, stop)
            else:
                options["query_nope"], query = self.after(query, self.weights[0], start, stop)
                options["key_nope"], key = self.after(key, self.weights[1], start, stop)
            outputs.append(cache.attend(layer, query, key, value, **options))
        cache.evict()
        return outputs


def make_cache(name: str, impl: str, **changes: object) -> tk.BoundedKVCache:
    policy = policy_class(name).example(SHAPE)
    return tk.BoundedKVCache(
        policy, num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, batch_size=BATCH,
        num_heads=HEADS, budget=16, buffer=4, sinks=1, recent=2, dtype=torch.float32, device="cpu",
        impl=impl, **changes,
    )  # fmt: skip


@pytest.mark.parametrize(("impl", "name"), CASES)
def test_rope_is_applied_on_every_way_through_the_cache(impl: str, name: str) -> None:
    """Prompts, steps, padding, drafts and pins, against states that come finished."""
    options = {"allocation": tk.GlobalTopK()} if name == "shared" else {}
    caches = [make_cache("trimkv" if name == "shared" else name, impl, **options) for _ in range(2)]
    stream = Stream()
    padded = torch.tensor([[True], [False]])
    assert caches[0].fuses_rope(1) == (impl == "triton" and name in FUSED)
    assert not caches[0].fuses_rope(2)

    def both(start: int, stop: int, valid: Tensor | None = None) -> None:
        got, expected = (
            stream.call(cache, start, stop, valid, raw=raw)
            for cache, raw in zip(caches, (True, False), strict=True)
        )
        for layer in range(LAYERS):
            torch.testing.assert_close(got[layer], expected[layer], rtol=1e-5, atol=1e-5)
            assert torch.equal(*(cache.positions(layer).sort().values for cache in caches))

    both(0, 12)
    for token in range(12, 22):
        both(token, token + 1, padded if token in (13, 19) else None)
    for cache in caches:
        cache.hold()
    both(22, 23)
    both(23, 25)
    for cache in caches:
        cache.settle(drop=1)
        cache.release()
        cache.pin([[(28, 30)], []])
    both(24, 32)
    for token in range(32, TOTAL):
        both(token, token + 1)
    kept = caches[0].keys(0), caches[1].keys(0)
    torch.testing.assert_close(*(x.sum((0, 1, 2)) for x in kept), rtol=1e-4, atol=1e-4)


def test_a_gates_end_is_that_of_the_policy() -> None:
    """In the slots, by kernel and by policy; not where a subclass changes `affine` alone."""

    class Halved(tk.TrimKV):
        def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
            slope, offset = super().affine(tokens)
            return slope / 2, offset / 2

    plain = policy_class("trimkv").example(SHAPE)
    for policy in (plain, replace(plain, age_offset=-1), Halved(plain.gates)):
        terms = []
        for impl in ("torch", "triton"):
            cache = make_cache("trimkv", impl)
            cache = tk.BoundedKVCache(
                policy, num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, batch_size=BATCH,
                budget=16, buffer=4, dtype=torch.float32, device="cpu", impl=impl,
            )  # fmt: skip
            stream = Stream()
            for token in range(12):
                stream.call(cache, token, token + 1, None, raw=True)
            slots = cache.storages[0].slots
            terms.append((slots.slope[..., :12], slots.offset[..., :12]))
        torch.testing.assert_close(*terms, rtol=2**-20, atol=2**-22)
    assert make_policy("trimkv", gates=plain.gates, lookahead=5).decay(None) is None


def count_fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note for each attention layer's step on a bounded cache whether it was fused."""
    found: list[bool] = []
    known = base.plain_rope

    def noted(*args: object) -> Rope | None:
        rope = known(*args)
        found.append(rope is not None)
        return rope

    monkeypatch.setattr(base, "plain_rope", noted)
    return found


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("Qwen3", "h2o"),
        ("Llama", "streaming_llm"),
        *[
            pytest.param(name, "streaming_llm", marks=pytest.mark.slow)
            for name in ("Mistral", "Qwen2", "Qwen3-MoE", "Phi-3")
        ],
    ],
)
def test_models_decode_as_with_transformers_own_norm_and_rope(
    name: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = batch((7, 0), 20)
    logits, fused = [], count_fused(monkeypatch)
    for impl in ("torch", "triton"):
        model = make(name)
        tk.patch(model, policy, impl=impl, **BUDGET)
        assert not fused
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        logits.append(torch.stack(output.logits))
    layers = model.config.num_hidden_layers
    assert fused == [True] * (0 if name == "Phi-3" else 11 * layers)  # Phi-3 turns a part
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_changed_norms_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, _ = batch((0,), 12)
    fused = count_fused(monkeypatch)
    for change in ("hook", "forward"):
        logits = []
        for impl in ("torch", "triton"):
            model = make_qwen3()
            norm = model.model.layers[1].self_attn.k_norm
            if change == "hook":
                norm.register_forward_hook(lambda module, args, output: output * 1.5)
            else:
                known = norm.forward
                norm.forward = lambda states, known=known: known(states) * 1.5
            tk.patch(model, trimkv(model), impl=impl, **BUDGET)
            cache = model.generate(
                ids, max_new_tokens=6, do_sample=False, eos_token_id=None,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            logits.append(torch.stack(cache.logits))
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        assert fused.count(False) == 5
        fused.clear()


def test_bad_rope_changes_nothing() -> None:
    stream, cache = Stream(), make_cache("streaming_llm", "torch")
    query, key, value = (x[0, :, :, :1] for x in (stream.query, stream.key, stream.value))
    rope = stream.rope(0, 1)
    bad = [
        ({"rope": replace(rope, cos=rope.cos[:1])}, r"cos must have shape \[2, 1, 16\], got"),
        ({"rope": replace(rope, sin=rope.sin.half())}, "sin must have dtype torch.float32, got"),
        ({"rope": replace(rope, key_weight=None)}, "must both be given, or neither"),
        ({"rope": replace(rope, key_weight=torch.ones(8))}, r"key_weight must have shape \[16\]"),
        ({"rope": rope, "query_nope": query}, "query_nope must be None with rope="),
        ({"rope": replace(rope, cos=rope.cos.clone())}, "cos and sin must have the same strides"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            cache.attend(0, query, key, value, **options)
    assert cache.t.tolist() == [0, 0]
