"""A patched Qwen3 against the stock one, and against the full cache masked to what was kept."""

import copy
import itertools
import logging
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3ForCausalLM,
    StaticCache,
    TextIteratorStreamer,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Model

import trimkv_kernels as tk
from conftest import CACHE_IMPLS, GOLDEN, make_qwen3
from trimkv_kernels.gates import GateConfig, RetentionGates
from trimkv_kernels.policies import ModelShape, example_policy, make_policy
from trimkv_kernels.policies.allocation import Uniform
from trimkv_kernels.testing import masked_reference

BUDGET = {"budget": 24, "buffer": 6, "sinks": 2, "recent": 4}


def trimkv(model: Qwen3ForCausalLM, seed: int = 0, **options: int) -> tk.TrimKV:
    """TRIM-KV with random gates whose retention is spread out."""
    config = GateConfig(
        kind="rg",
        hidden_size=model.config.hidden_size,
        intermediate_size=32,
        num_layers=model.config.num_hidden_layers,
        num_kv_heads=model.config.num_key_value_heads,
        bias_init=2.0,
    )
    torch.manual_seed(seed)
    gates = RetentionGates(config)
    with torch.no_grad():
        for parameter in gates.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20.0)
    return tk.TrimKV(gates, **options)


def policy(name: str, model: Qwen3ForCausalLM) -> tk.RetentionPolicy:
    if name == "trimkv":
        return trimkv(model)
    if name == "trimkv-lookahead":
        return trimkv(model, lookahead=8)
    config = model.config
    shape = ModelShape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        dtype=model.dtype,
        device=model.device,
    )
    return example_policy(name, shape)


NAMES = sorted({*tk.available_policies(), "trimkv-lookahead"} - {"full"})  # that never evicts


def batch(padding: tuple[int, ...], total: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Left-padded rows of distinct tokens: equal ones would have keys of equal norm."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(93, generator=generator)[:total] + 3 for _ in padding]
    ids = torch.stack(rows)
    mask = (torch.arange(total) >= torch.tensor(padding)[:, None]).long()
    return ids * mask, mask


@pytest.mark.parametrize("impl", CACHE_IMPLS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_masked_full_cache(
    name: str,
    impl: str,
    qwen3: Qwen3ForCausalLM,
    stock: Qwen3ForCausalLM,
    device: str,
) -> None:
    model, stock = qwen3.to(device), stock.to(device)
    budget = 20 if name == "pyramid_kv" else 14  # its top layer has less than the mean
    handle = tk.patch(
        model, policy(name, model), impl=impl, budget=budget, buffer=4, sinks=2, recent=4
    )
    ids, mask = batch((0, 7), 38)
    cache = handle.new_cache()
    bounded, reference = masked_reference(
        model,
        stock,
        ids.to(device),
        attention_mask=mask.to(device),
        calls=[24, *[1] * 5, 7, 1, 1],
        cache=cache,
    )
    torch.testing.assert_close(bounded, reference, atol=1e-5, rtol=1e-5)
    stats = cache.stats()
    assert stats.evictions.amax((0, 2)).min() > 0  # in every row
    assert not stats.nan_layers


@pytest.mark.parametrize("name", NAMES)
def test_full_budget_is_bit_identical_to_the_full_cache(
    name: str, qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    ids, _ = batch((0,), 60)
    chosen = policy(name, qwen3)
    handle = tk.patch(qwen3, chosen, budget=60, buffer=1, allocation=Uniform(), impl="torch")
    # where a policy must see attention, SDPA does not serve: it returns none
    tolerance = 0.0 if chosen.needs.attention is None else 1e-5
    ours, theirs = handle.new_cache(), DynamicCache(config=stock.config)
    with torch.no_grad():
        for tokens in ids.split([30, 1, 1, 1, 1, 10, 1, 1, 14], dim=1):
            got = qwen3(tokens, past_key_values=ours).logits
            want = stock(tokens, past_key_values=theirs).logits
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_full_budget_of_a_padded_batch(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    ids, mask = batch((9, 0), 50)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache = tk.patch(qwen3, "full", budget=50).new_cache()
    theirs = DynamicCache(config=stock.config)
    edges = (0, 30, *range(31, 51))
    with torch.no_grad():
        for start, stop in itertools.pairwise(edges):
            call = {
                "input_ids": ids[:, start:stop],
                "attention_mask": mask[:, :stop],
                "position_ids": position[:, start:stop],
            }
            got = qwen3(**call, past_key_values=cache).logits
            want = stock(**call, past_key_values=theirs).logits
            real = mask[:, start:stop, None]
            torch.testing.assert_close(got * real, want * real, atol=1e-5, rtol=1e-5)


def test_the_oracle_can_fail(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    ids, _ = batch((0,), 60)
    cache = tk.patch(qwen3, "streaming_llm", **BUDGET).new_cache()
    honest = cache.positions
    cache.positions = lambda layer: honest(layer).where(honest(layer) != 0, 1)
    bounded, reference = masked_reference(qwen3, stock, ids, calls=[40, *[1] * 20], cache=cache)
    assert (bounded - reference).abs().max() > 1e-3


def test_impls_keep_the_same_sets(qwen3: Qwen3ForCausalLM, device: str) -> None:
    model = qwen3.to(device)
    ids, mask = (x.to(device) for x in batch((5, 0), 64))
    kept = {}
    for impl in ("torch", "triton"):
        with tk.patch(model, trimkv(model), impl=impl, **BUDGET) as handle, torch.no_grad():
            cache = handle.new_cache()
            for stop in range(40, 65):
                start = 0 if stop == 40 else stop - 1
                model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            kept[impl] = [cache.positions(layer).sort(-1).values for layer in range(3)]
    for ours, theirs in zip(kept["torch"], kept["triton"], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 3, "do_sample": False}],
    ids=["greedy", "sampling", "beams"],
)
def test_generate_with_a_full_budget_equals_stock(
    options: dict, qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    ids, mask = batch((6, 0), 20)
    call = {"attention_mask": mask, "max_new_tokens": 30, "eos_token_id": None, **options}
    torch.manual_seed(0)
    expected = stock.generate(ids, **call)
    tk.patch(qwen3, "full", budget=64)
    torch.manual_seed(0)
    assert torch.equal(qwen3.generate(ids, **call), expected)


def test_generate_bounded_equals_steps_by_hand(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    ids, _ = batch((0,), 40)
    output = qwen3.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
    cache = handle.new_cache()
    tokens, generated = ids, []
    with torch.no_grad():
        for _ in range(40):
            tokens = qwen3(tokens, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            generated.append(tokens)
    assert torch.equal(output[:, 40:], torch.cat(generated, 1))
    assert cache.stats().budget_reached


def test_a_padded_row_generates_what_it_generates_alone(qwen3: Qwen3ForCausalLM) -> None:
    # not those that score keys alone: repeated tokens tie there but for rounding
    for name in ("trimkv", "trimkv-lookahead", "streaming_llm", "random", "h2o", "tova"):
        with tk.patch(qwen3, policy(name, qwen3), **BUDGET):
            ids, mask = batch((17, 0, 4), 40)
            call = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
            together = qwen3.generate(ids, attention_mask=mask, **call)
            for row, pad in enumerate((17, 0, 4)):
                alone = qwen3.generate(ids[row : row + 1, pad:], **call)
                assert torch.equal(alone[0, 40 - pad :], together[row, 40:])


def test_a_finished_row_does_not_disturb_the_others(qwen3: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    ids, _ = batch((0, 0), 30)
    free = qwen3.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None)
    eos = int(free[0, 34])  # row 0 stops early
    output = qwen3.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=eos)
    if eos not in free[1, 30:]:
        assert torch.equal(output[1], free[1])
    assert output[0, 36:].eq(0).all()


def test_streamer(qwen3: Qwen3ForCausalLM) -> None:
    class Recorder(TextIteratorStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    ids, _ = batch((0,), 30)
    streamer = Recorder()
    output = qwen3.generate(ids, max_new_tokens=20, do_sample=False, streamer=streamer)
    assert streamer.tokens == [*output[0].tolist(), -1]


def test_two_interleaved_caches(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    texts = [batch((0,), 60, seed)[0] for seed in (1, 2)]

    def read(caches: list, order: list[int]) -> list[Tensor]:
        logits: dict[int, list[Tensor]] = {0: [], 1: []}
        done = [0, 0]
        for which in order:
            start = done[which]
            done[which] = stop = 20 if start == 0 else start + 1
            tokens = texts[which][:, start:stop]
            logits[which].append(qwen3(tokens, past_key_values=caches[which]).logits)
        return [torch.cat(logits[which], 1) for which in (0, 1)]

    with torch.no_grad():
        apart = read([handle.new_cache(), handle.new_cache()], [0] * 41 + [1] * 41)
        together = read([handle.new_cache(), handle.new_cache()], [0, 1] * 41)
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def test_several_turns_on_one_cache(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    ids, mask = batch((5, 0), 20)
    more, _ = batch((0, 0), 8, seed=7)
    call = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}

    def turns(model: Qwen3ForCausalLM, cache: object) -> Tensor:
        first = model.generate(ids, attention_mask=mask, past_key_values=cache, **call)
        second = torch.cat((first, more), 1)
        long = torch.cat((mask, torch.ones(2, 18, dtype=torch.long)), 1)
        return model.generate(second, attention_mask=long, past_key_values=cache, **call)

    expected = turns(stock, DynamicCache(config=stock.config))
    with tk.patch(qwen3, "full", budget=64) as handle:
        assert torch.equal(turns(qwen3, handle.new_cache()), expected)
    with tk.patch(qwen3, trimkv(qwen3), **BUDGET) as handle:
        cache = handle.new_cache()
        output = turns(qwen3, cache)
        assert output.shape == expected.shape
        # the last token was never fed back
        assert cache.stats().tokens_seen == [42, 47]


def test_a_deep_copy_goes_on_alone(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    ids, _ = batch((0,), 60)
    cache = handle.new_cache()
    with torch.no_grad():
        qwen3(ids[:, :40], past_key_values=cache)
        twin = copy.deepcopy(cache)
        assert twin.owner is handle
        assert twin.layers[0].keys.data_ptr() == twin.slots.keys(0).data_ptr()
        before = [cache.positions(layer) for layer in range(3)]
        first = [qwen3(ids[:, i : i + 1], past_key_values=twin).logits for i in range(40, 60)]
        assert all(torch.equal(cache.positions(i), before[i]) for i in range(3))
        again = [qwen3(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 60)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_prefill_chunk_reads_the_prompt_in_pieces(qwen3: Qwen3ForCausalLM) -> None:
    ids, mask = batch((33, 0), 60)
    call = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for policy in (trimkv(qwen3), make_policy("streaming_llm")):
        with tk.patch(qwen3, policy, prefill_chunk=8, **BUDGET) as handle:
            output = qwen3.generate(ids, attention_mask=mask, **call)
            cache = handle.new_cache()
            with torch.no_grad():
                for stop in (*range(8, 57, 8), 60):
                    start = stop - 8 if stop < 60 else 56
                    position = (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
                    logits = qwen3(
                        ids[:, start:stop],
                        attention_mask=mask[:, :stop],
                        position_ids=position,
                        past_key_values=cache,
                    ).logits
            assert torch.equal(output[:, 60], logits[:, -1].argmax(-1))
            alone = qwen3.generate(ids[:1, 33:], **call)
            assert alone.shape == (1, 39)


def test_num_return_sequences_and_inputs_embeds(
    qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    ids, _ = batch((0,), 15)
    call = {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(1)
    expected = stock.generate(ids, **call)
    tk.patch(qwen3, "full", budget=64)
    torch.manual_seed(1)
    assert torch.equal(qwen3.generate(ids, **call), expected)
    embeds = stock.get_input_embeddings()(ids)
    greedy = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(
        qwen3.generate(inputs_embeds=embeds, **greedy),
        stock.generate(inputs_embeds=embeds, **greedy),
    )


@pytest.mark.parametrize("nested", ["forward", "generate"])
def test_drafts_are_settled_in_the_cache_of_the_call(nested: str, qwen3: Qwen3ForCausalLM) -> None:
    """A call of the model inside ``generate`` makes a cache of its own, which is not settled."""
    handle = tk.patch(qwen3, "random", **BUDGET)
    ids = batch((0,), 10)[0].repeat(1, 3)  # n-grams of it are worth trying
    inner = batch((0,), 12, seed=2)[0]
    calls = []

    def score(input_ids: Tensor, scores: Tensor, **kwargs: object) -> bool:
        if nested == "generate":
            calls.append(qwen3.generate(inner, max_new_tokens=2, eos_token_id=None))
        else:
            calls.append(qwen3(inner).past_key_values)
        return False

    cache = handle.new_cache()
    qwen3.generate(
        ids,
        max_new_tokens=12,
        do_sample=False,
        prompt_lookup_num_tokens=3,
        past_key_values=cache,
        stopping_criteria=[score],
    )
    assert calls
    assert not cache.slots.is_holding
    seen = int(cache.get_seq_length())
    with torch.no_grad():
        qwen3(inner, past_key_values=cache)
    assert int(cache.slots.t) == seen + 12


def test_without_a_cache_the_model_is_stock(
    qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    ids, mask = batch((4, 0), 30)
    tk.patch(qwen3, "streaming_llm", budget=8, buffer=2)
    labels = ids.masked_fill(mask == 0, -100)
    ours = qwen3(ids, attention_mask=mask, labels=labels, use_cache=False)
    theirs = stock(ids, attention_mask=mask, labels=labels, use_cache=False)
    assert torch.equal(ours.logits, theirs.logits)
    ours.loss.backward()
    theirs.loss.backward()
    for a, b in zip(qwen3.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    qwen3.train()
    qwen3(ids, use_cache=False)


def test_a_bare_forward_makes_its_own_cache(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, "streaming_llm", budget=8, buffer=2)
    with torch.no_grad():
        output = qwen3(batch((0,), 30)[0])
    cache = output.past_key_values
    assert cache.positions(0)[0, 0].tolist() == [0, 1, 2, 3, 26, 27, 28, 29, -1, -1]
    assert len(cache) == 3
    assert cache.layers[1].keys.shape == (1, 2, 10, 16)
    assert int(cache.get_seq_length()) == 30
    assert handle.stats().tokens_seen == [30]
    with torch.no_grad():  # the decoder stack alone, positional arguments
        again = qwen3.model(batch((0,), 30)[0], None, None, handle.new_cache())
    assert torch.equal(again.past_key_values.positions(0), cache.positions(0))


def test_no_mask_is_built_once_slots_are_filled(qwen3: Qwen3ForCausalLM) -> None:
    cache = tk.patch(qwen3, "random", **BUDGET).new_cache()
    ids, mask = batch((6, 0), 40)
    masks = []
    qwen3.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        for start, stop in ((0, 30), (30, 31), (31, 40)):
            qwen3(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
    assert masks[0].shape == (2, 1, 30, 30)
    assert masks[1:] == [None, None]


def test_inference_mode_and_no_grad_may_alternate(qwen3: Qwen3ForCausalLM) -> None:
    cache = tk.patch(qwen3, trimkv(qwen3), **BUDGET).new_cache()
    ids, _ = batch((0,), 50)
    with torch.inference_mode():
        qwen3(ids[:, :40], past_key_values=cache)
    with torch.no_grad():
        for stop in range(41, 51):
            qwen3(ids[:, stop - 1 : stop], past_key_values=cache)
    assert cache.stats().tokens_seen == [50]


def test_eager_and_sdpa_prompts_agree(qwen3: Qwen3ForCausalLM) -> None:
    ids, mask = batch((6, 0), 40)
    logits = {}
    for implementation in ("sdpa", "eager"):
        qwen3.set_attn_implementation(implementation)
        with tk.patch(qwen3, trimkv(qwen3), **BUDGET), torch.no_grad():
            logits[implementation] = qwen3(ids, attention_mask=mask).logits * mask[..., None]
    torch.testing.assert_close(logits["sdpa"], logits["eager"], atol=2e-5, rtol=2e-5)


def snapshot(model: Qwen3ForCausalLM) -> list:
    hooks = [(name, dict(m._forward_pre_hooks)) for name, m in model.named_modules()]
    attributes = [
        {k: v for k, v in m.__dict__.items() if not k.startswith("_")} for m in model.modules()
    ]
    private = [set(m.__dict__) for m in model.modules()]
    return [hooks, attributes, private, Qwen3Attention.forward, Qwen3Model.forward]


def test_unpatch_is_exact(qwen3: Qwen3ForCausalLM) -> None:
    ids, mask = batch((3, 0), 30)
    before, logits = snapshot(qwen3), qwen3(ids, attention_mask=mask).logits
    keys = list(qwen3.state_dict())
    for undo in ("function", "handle", "context", "error"):
        if undo == "context":
            with tk.patch(qwen3, "random", budget=16) as handle:
                assert handle is not None
        elif undo == "error":
            with pytest.raises(KeyError), tk.patch(qwen3, "random", budget=16):
                raise KeyError
        else:
            handle = tk.patch(qwen3, "random", budget=16)
            assert list(qwen3.state_dict()) == keys
            handle.unpatch() if undo == "handle" else tk.unpatch(qwen3)
        assert snapshot(qwen3) == before
        assert torch.equal(qwen3(ids, attention_mask=mask).logits, logits)


def test_a_forward_set_by_others_comes_back(qwen3: Qwen3ForCausalLM) -> None:
    layer = qwen3.model.layers[1].self_attn
    calls = []

    def spy(self: Qwen3Attention, *args: object, **kwargs: object) -> object:
        calls.append(1)
        return type(self).forward(self, *args, **kwargs)

    layer.forward = theirs = MethodType(spy, layer)
    handle = tk.patch(qwen3, "random", budget=16)
    qwen3(batch((0,), 5)[0], use_cache=False)
    assert calls == [1]
    handle.unpatch()
    assert layer.forward is theirs


def test_only_this_instance_is_patched(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    ids, _ = batch((0,), 40)
    expected = stock.generate(ids, max_new_tokens=20, do_sample=False)
    tk.patch(qwen3, "random", **BUDGET)
    assert torch.equal(stock.generate(ids, max_new_tokens=20, do_sample=False), expected)
    assert isinstance(stock(ids).past_key_values, DynamicCache)


def test_a_second_patch_raises(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, "random", budget=16)
    with pytest.raises(ValueError, match=r"model is already patched: call unpatch\(model\) first"):
        tk.patch(qwen3, "random", budget=16)
    handle.unpatch()
    with pytest.raises(ValueError, match="model is not patched any more"):
        handle.unpatch()
    with pytest.raises(ValueError, match="model is not patched: there is nothing to undo"):
        tk.unpatch(qwen3)


def test_a_deep_copy_of_a_patched_model_is_unpatched_alone(
    qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    handle = tk.patch(qwen3, "random", **BUDGET)
    twin = copy.deepcopy(qwen3)
    tk.unpatch(twin)
    assert not [m for m in twin.modules() if "forward" in vars(m) or m._forward_pre_hooks]
    assert "generate" not in vars(twin)
    ids, _ = batch((0,), 40)
    call = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    assert torch.equal(twin.generate(ids, **call), stock.generate(ids, **call))
    qwen3.generate(ids, **call, past_key_values=(cache := handle.new_cache()))
    assert cache.stats().budget_reached
    handle.unpatch()


def test_continuous_batching_is_refused(qwen3: Qwen3ForCausalLM) -> None:
    """It would run on transformers' paged cache, which no budget bounds."""
    names = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
    there = [name for name in names if hasattr(qwen3, name)]
    assert "generate_batch" in there
    handle = tk.patch(qwen3, "random", **BUDGET)
    for name in there:
        with pytest.raises(
            NotImplementedError, match=rf"^{name}\(\) does not work.*call generate\(\) or decode_lo"
        ):
            getattr(qwen3, name)([[5, 6, 7]])
    # transformers before 5 knows no such name
    refused = (
        "^generate_batch\\(\\) does not work on a patched model|Invalid `cache_implementation`"
    )
    with pytest.raises((NotImplementedError, ValueError), match=refused):
        qwen3.generate(batch((0,), 8)[0], cache_implementation="paged", max_new_tokens=2)
    handle.unpatch()
    assert not [name for name in names if name in qwen3.__dict__]
    assert not qwen3.generate_batch([])  # stock again


def test_a_failing_patch_leaves_nothing_behind(
    qwen3: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(qwen3)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no hooks today")

    monkeypatch.setattr(
        type(qwen3.model),
        "register_forward_pre_hook",
        fail,
    )
    with pytest.raises(OSError, match="no hooks today"):
        tk.patch(qwen3, "random", budget=16)
    monkeypatch.undo()
    assert snapshot(qwen3) == before


def test_default_policy_is_streaming_llm_without_gates(
    qwen3: Qwen3ForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    qwen3.config._name_or_path = "Qwen/Qwen3-4B"
    with caplog.at_level(logging.INFO, "trimkv_kernels"), tk.patch(qwen3) as handle:
        assert repr(handle) == (
            "PatchHandle(policy='streaming_llm', budget=512, buffer=128, sinks=4, recent=0, "
            "impl='auto')"
        )
    assert (
        "policy: StreamingLLM (no TRIM-KV gates found for Qwen/Qwen3-4B; "
        "policy='trimkv' downloads ngocbh/TrimKV-Qwen3-4B-Math)"
    ) in caplog.text
    caplog.clear()
    qwen3.config._name_or_path = "someone/tiny"
    with tk.patch(qwen3):
        assert "no TRIM-KV gates found for someone/tiny; none are published for it" in caplog.text


def test_gates_beside_the_base_are_found(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_qwen3()
    model.save_pretrained(tmp_path / "base")
    trimkv(model).save_pretrained(tmp_path / "base" / "retention_gates")
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "base")
    with caplog.at_level(logging.INFO, "trimkv_kernels"), tk.patch(model) as handle:
        assert isinstance(handle.policy, tk.TrimKV)
        assert "sinks=0, recent=0" in repr(handle)
    assert "TRIM-KV" in caplog.text
    with tk.patch(model, "trimkv") as handle:
        assert isinstance(handle.policy, tk.TrimKV)


def test_gates_bring_their_budget_and_follow_the_model(tmp_path) -> None:
    model = make_qwen3()
    policy = trimkv(model)
    config = GateConfig.from_dict(
        {**policy.gates.config.to_dict(), "memory_size": 40.0, "buffer_size": 8}
    )
    gates = RetentionGates(config)
    tk.TrimKV(gates).save_pretrained(tmp_path)
    loaded = tk.TrimKV.from_pretrained(tmp_path)
    with tk.patch(model.to(torch.bfloat16), loaded) as handle:
        assert "budget=40, buffer=8" in repr(handle)
        assert next(handle.policy.gates.parameters()).dtype == torch.bfloat16
        assert next(loaded.gates.parameters()).dtype == torch.float32


def test_unsupported_models(qwen3: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(TypeError, match="one of .*Qwen3ForCausalLM.*, got GPT2LMHeadModel"):
        tk.patch(gpt2)
    with pytest.raises(TypeError, match="model must be a transformers model, got str"):
        tk.patch("Qwen/Qwen3-4B")

    class Mine(Qwen3Attention):
        pass

    other = copy.deepcopy(qwen3)
    other.model.layers[2].self_attn.__class__ = Mine
    with pytest.raises(TypeError, match="attention layers must be Qwen3Attention, got Mine"):
        tk.patch(other)
    assert "forward" not in other.model.layers[0].self_attn.__dict__

    def foreign(self: Qwen3Attention, hidden_states: Tensor) -> Tensor:
        return hidden_states

    monkeypatch.setattr(Qwen3Attention, "forward", foreign)
    with pytest.raises(TypeError, match="forward must be transformers' Qwen3Attention.forward"):
        tk.patch(qwen3)
    foreign.__module__ = Qwen3Attention.__module__
    with pytest.raises(TypeError, match="must take .*this version of transformers"):
        tk.patch(qwen3)


def test_sliding_window_layers_are_refused() -> None:
    model = make_qwen3(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(TypeError, match="got layers with .'sliding_attention'"):
        tk.patch(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget must be an int of at least 1, got 0"),
        (
            {"budget": 4},
            ValueError,
            "budget must exceed the protected slots: budget=4, but sinks=4",
        ),
        ({"policy": "snap"}, ValueError, "unknown policy 'snap'; known: .*key_norm"),
        ({"policy": 3}, TypeError, "policy must be a RetentionPolicy, a name or None"),
        ({"policy": "trimkv"}, ValueError, "needs retention gates, and none are known for"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk must be an int of at least 1, got 0"),
        ({"impl": "fast"}, ValueError, "impl must be one of .*got 'fast'"),
    ],
)
def test_bad_options(
    options: dict, error: type[Exception], message: str, qwen3: Qwen3ForCausalLM
) -> None:
    before = snapshot(qwen3)
    with pytest.raises(error, match=message):
        tk.patch(qwen3, **{"policy": "streaming_llm", **options})
    assert snapshot(qwen3) == before


def test_prefix_tuning_is_refused(qwen3: Qwen3ForCausalLM) -> None:
    """An adapter as PEFT leaves it on a model; the library itself is in ``tests_neighbours``."""
    qwen3.peft_config = {"mine": SimpleNamespace(peft_type="PREFIX_TUNING")}
    with pytest.raises(TypeError, match="no prefix tuning, got the adapter 'mine'"):
        tk.patch(qwen3, "random")
    qwen3.peft_config = {"mine": SimpleNamespace(peft_type="LORA")}
    tk.patch(qwen3, "random").unpatch()


def test_gates_of_another_base_are_refused(qwen3: Qwen3ForCausalLM) -> None:
    other = trimkv(make_qwen3(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"(?s)num_layers|layers"):
        tk.patch(qwen3, other)
    tk.patch(qwen3, tk.TrimKV.from_pretrained(GOLDEN / "rg" / "gates"), budget=16)


def test_padding_that_is_not_on_the_left(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, "random", **BUDGET)
    ids, mask = batch((0, 0), 12)
    right = mask.clone()
    right[1, -3:] = 0
    hole = mask.clone()
    hole[0, 5] = 0
    with torch.no_grad():
        for bad, row in ((right, 1), (hole, 0)):
            cache = handle.new_cache()
            with pytest.raises(ValueError, match=rf"left only, got .* rows \[{row}\].*'left'"):
                qwen3(ids, attention_mask=bad, past_key_values=cache)
            assert cache.is_empty
        cache = handle.new_cache()
        qwen3(ids, attention_mask=mask, past_key_values=cache)
        later = torch.ones(2, 16, dtype=torch.long)
        later[0, 14:] = 0
        with pytest.raises(ValueError, match=r"left only, got .* rows \[0\]"):
            qwen3(ids[:, :4], attention_mask=later, past_key_values=cache)
        assert cache.stats().tokens_seen == [12, 12]


def test_a_row_of_padding_only(qwen3: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, "random", **BUDGET)
    ids, mask = batch((0, 12), 12)
    message = r"real token in every row, got only padding in rows \[1\]"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        qwen3(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=message):
        qwen3.generate(ids, attention_mask=mask, max_new_tokens=3, prefill_chunk_size=4)


def test_masks_of_the_wrong_shape(qwen3: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, "random", **BUDGET)
    ids, mask = batch((0, 0), 12)
    with torch.no_grad():
        for bad in (mask[:1], mask[:, :5], mask[:, None, None].expand(2, 1, 12, 12)):
            with pytest.raises(
                ValueError, match=r"attention_mask must have shape \[2, at least 12"
            ):
                qwen3(ids, attention_mask=bad)


def test_foreign_caches(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, "random", **BUDGET)
    ids, _ = batch((0,), 12)
    message = r"past_key_values must be a cache from this model's PatchHandle.new_cache\(\), got"
    foreign = (
        DynamicCache(config=qwen3.config),
        StaticCache(config=qwen3.config, max_cache_len=64),
        tk.patch(stock, "random", **BUDGET).new_cache(),
    )
    for cache in foreign:
        with torch.no_grad(), pytest.raises(TypeError, match=message):
            qwen3(ids, past_key_values=cache)
        with pytest.raises(TypeError, match=message):
            qwen3.generate(ids, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation='static' does not work.*new_cache"):
        qwen3.generate(ids, cache_implementation="static", max_new_tokens=2)


def test_a_bounded_cache_on_an_unpatched_model(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, "random", **BUDGET)
    cache = handle.new_cache()
    handle.unpatch()
    with pytest.raises(NotImplementedError, match="does not support update: only a model patched"):
        qwen3(batch((0,), 4)[0], past_key_values=cache)


def test_what_the_cache_cannot_do_names_the_alternative(qwen3: Qwen3ForCausalLM) -> None:
    cache = tk.patch(qwen3, "random", **BUDGET).new_cache()
    for call, alternative in (
        (lambda: cache.layers[0].update(None, None), "only a model patched"),
        (lambda: cache.layers[0].reset(), r"reset\(\) of the cache"),
        (lambda: cache.layers[0].reorder_cache(None), r"reorder_cache\(\) of the cache"),
        (lambda: cache.layers[0].lazy_initialization(None, None), "first call"),
    ):
        with pytest.raises(NotImplementedError, match=alternative):
            call()
    with pytest.raises(RuntimeError, match=r"positions\(\) of an unused cache"):
        cache.positions(0)


def test_training_gradients_and_attentions(qwen3: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, "random", **BUDGET)
    ids, _ = batch((0,), 12)
    with pytest.raises(ValueError, match=r"key must not require grad.*no_grad"):
        qwen3(ids)
    with torch.no_grad():
        with pytest.raises(ValueError, match="output_attentions=True does not work"):
            qwen3(ids, output_attentions=True)
        qwen3.train()
        with pytest.raises(ValueError, match=r"does not train: call model.eval\(\), or pass"):
            qwen3(ids)


def test_generate_in_training_mode(qwen3: Qwen3ForCausalLM) -> None:
    """As trainers of TRL call it: right where nothing is random, else refused."""
    tk.patch(qwen3, "random", **BUDGET)
    ids, call = batch((0,), 30)[0], {"max_new_tokens": 12, "do_sample": False}
    expected = qwen3.generate(ids, **call)
    qwen3.train()
    assert torch.equal(qwen3.generate(ids, **call), expected)
    qwen3.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"does not train.*without dropout"):
        qwen3.generate(ids, **call)


def test_another_batch_size(qwen3: Qwen3ForCausalLM) -> None:
    cache = tk.patch(qwen3, "random", **BUDGET).new_cache()
    with torch.no_grad():
        qwen3(batch((0,), 12)[0], past_key_values=cache)
        with pytest.raises(ValueError, match="must have 1 rows.*got 2; make another"):
            qwen3(batch((0, 0), 12)[0], past_key_values=cache)


def test_full_refuses_to_generate_past_its_budget(qwen3: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, "full", budget=32)
    with pytest.raises(ValueError, match="'full' never evicts: the cache holds budget=32"):
        qwen3.generate(batch((0,), 30)[0], max_new_tokens=8, eos_token_id=None)


def test_strict_is_checked_after_generate_and_at_unpatch(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, "random", strict=True, **BUDGET)
    ids, _ = batch((0,), 12)
    cache = handle.new_cache()
    with pytest.raises(RuntimeError, match="'random' never had to evict"):
        qwen3.generate(ids, past_key_values=cache, max_new_tokens=3)
    qwen3.generate(ids, max_new_tokens=30, eos_token_id=None)
    cache = handle.new_cache()
    with torch.no_grad():
        qwen3(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match="never had to evict"):
        handle.unpatch()
    qwen3(ids, use_cache=True)  # stock again


def test_stats_without_a_cache(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, "random", **BUDGET)
    with pytest.raises(RuntimeError, match=r"no cache is alive: keep one from new_cache\(\)"):
        handle.stats()
