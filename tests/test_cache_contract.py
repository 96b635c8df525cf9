"""What transformers and its users do with a cache, each against a run that never did it."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

import trimkv_kernels as tk

OPTIONS = {"budget": 24, "buffer": 6, "sinks": 2, "recent": 4}
LAYERS = 3


def prompt(rows: int = 1, length: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(93, generator=generator)[:length] + 3 for _ in range(rows)])


def generate(model: Qwen3ForCausalLM, ids: Tensor, **options: object) -> Tensor:
    return model.generate(
        ids, **{"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, **options}
    )


def kept(cache: object) -> list[list[int]]:
    return [
        sorted(p for p in head if p >= 0)
        for layer in range(LAYERS)
        for row in cache.positions(layer).tolist()
        for head in row
    ]


def looping(length: int) -> Tensor:
    """A prompt that repeats itself, so that n-grams of it are worth trying."""
    return prompt(length=10).repeat(1, length // 10)


@pytest.mark.parametrize("policy", ["random", "h2o", "snap_kv"])
def test_n_gram_drafts_with_room_for_all(policy: str, qwen3: Qwen3ForCausalLM) -> None:
    ids = looping(40)
    with tk.patch(qwen3, policy, budget=100, buffer=8):
        plain = generate(qwen3, ids)
        assert torch.equal(generate(qwen3, ids, prompt_lookup_num_tokens=4), plain)


@pytest.mark.parametrize("policy", ["random", "h2o"])
def test_drafts_evict_as_if_only_the_confirmed_tokens_had_come(
    policy: str, qwen3: Qwen3ForCausalLM
) -> None:
    """The confirmed tokens of each round, fed as one call to a cache that never held anything."""
    handle = tk.patch(qwen3, policy, **OPTIONS)
    rounds = []
    cache = handle.new_cache()
    crop = cache.crop

    def spy(count: int) -> None:
        crop(count)
        rounds.append(int(cache.get_seq_length()))

    cache.crop = spy
    output = generate(qwen3, looping(40), prompt_lookup_num_tokens=4, past_key_values=cache)
    assert len(rounds) < 40, "no draft was ever right"
    assert cache.stats().evictions.min() > 0
    plain = handle.new_cache()
    with torch.no_grad():
        for start, stop in zip([0, *rounds], rounds, strict=False):
            qwen3(output[:, start:stop], past_key_values=plain)
    assert kept(cache) == kept(plain)
    # it holds no more: the next tokens go into the slots at once
    assert not cache.slots.is_holding
    with torch.no_grad():
        again = [qwen3(output[:, -1:], past_key_values=c).logits for c in (cache, plain)]
    torch.testing.assert_close(*again, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_both", [False, True])
def test_a_draft_model(patch_both: bool, qwen3: Qwen3ForCausalLM) -> None:
    drafter = copy.deepcopy(qwen3)
    with torch.no_grad():  # right often, not always
        for parameter in drafter.lm_head.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 3
            )
    ids = prompt(length=40)
    tk.patch(qwen3, "random", budget=100, buffer=8)
    plain = generate(qwen3, ids)
    if patch_both:
        tk.patch(drafter, "streaming_llm", **OPTIONS)
    assert torch.equal(generate(qwen3, ids, assistant_model=drafter), plain)


def test_crop_of_a_cache_in_use(qwen3: Qwen3ForCausalLM) -> None:
    ids = prompt(length=29)
    handle = tk.patch(qwen3, "random", **OPTIONS)
    tried, plain = handle.new_cache(), handle.new_cache()
    with torch.no_grad():
        qwen3(ids[:, :25], past_key_values=tried)
        qwen3(prompt(length=4, seed=5), past_key_values=tried)
        tried.crop(-4)
        qwen3(ids[:, :25], past_key_values=plain)
        logits = [qwen3(ids[:, 25:], past_key_values=c).logits for c in (tried, plain)]
    assert torch.equal(*logits)
    assert kept(tried) == kept(plain)
    with pytest.raises(ValueError, match="tokens_to_remove must be 0 or negative"):
        tried.crop(2)
    with torch.no_grad():
        qwen3(ids[:, :4], past_key_values=tried)  # evicts
    with pytest.raises(ValueError, match=r"count must lie in \[0, 0\], the tokens since the last"):
        tried.crop(-1)


def test_rows_are_repeated_and_selected(qwen3: Qwen3ForCausalLM) -> None:
    ids, more = prompt(2), prompt(2, 20, seed=1)
    handle = tk.patch(qwen3, "random", **OPTIONS)
    moved, plain = handle.new_cache(), handle.new_cache()
    with torch.no_grad():
        qwen3(ids, past_key_values=moved)
        moved.batch_repeat_interleave(2)
        moved.batch_select_indices(torch.tensor([3, 0]))
        qwen3(ids.flip(0), past_key_values=plain)
        logits = [qwen3(more, past_key_values=c).logits for c in (moved, plain)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    assert kept(moved) == kept(plain)


def test_one_prompt_many_answers(qwen3: Qwen3ForCausalLM) -> None:
    """A fork of a prompt's cache continues as if each copy had read the prompt itself."""
    ids, more = prompt(1), prompt(3, 10, seed=2)
    handle = tk.patch(qwen3, "streaming_llm", **OPTIONS)
    trunk = handle.new_cache()
    with torch.no_grad():
        qwen3(ids, past_key_values=trunk)
        before = kept(trunk)
        fork = trunk.fork(3)
        forked = qwen3(more, past_key_values=fork).logits
        plain = handle.new_cache()
        qwen3(ids.expand(3, -1), past_key_values=plain)
        torch.testing.assert_close(
            forked, qwen3(more, past_key_values=plain).logits, atol=1e-5, rtol=1e-5
        )
    assert kept(fork) == kept(plain)
    assert kept(trunk) == before
    assert fork.layers[0].keys.data_ptr() == fork.slots.keys(0).data_ptr()


def test_a_freed_row_takes_the_next_sequence(qwen3: Qwen3ForCausalLM) -> None:
    ids, more = prompt(2), prompt(2, 20, seed=3)
    handle = tk.patch(qwen3, "random", **OPTIONS)
    reused, alone = handle.new_cache(), handle.new_cache()
    with torch.no_grad():
        qwen3(ids, past_key_values=reused)
        reused.reset(rows=[0])
        assert reused.slots.t.tolist() == [0, 40]
        position = torch.stack((torch.arange(20), torch.arange(40, 60)))
        got = qwen3(more, position_ids=position, past_key_values=reused).logits
        want = qwen3(more[:1], past_key_values=alone).logits
    torch.testing.assert_close(got[:1], want, atol=1e-5, rtol=1e-5)
    rows = [x for i, x in enumerate(kept(reused)) if i % 4 < 2]
    assert rows == kept(alone)


def test_a_saved_cache_goes_on(qwen3: Qwen3ForCausalLM, tmp_path: Path) -> None:
    ids, more = prompt(2), prompt(2, 20, seed=1)
    handle = tk.patch(qwen3, "h2o", **OPTIONS)
    cache, loaded = handle.new_cache(), handle.new_cache()
    with torch.no_grad():
        qwen3(ids, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        loaded.load(tmp_path / "cache.safetensors")
        logits = [qwen3(more, past_key_values=c).logits for c in (cache, loaded)]
    assert torch.equal(*logits)
    assert kept(cache) == kept(loaded)


def test_a_cache_of_another_model_or_policy_is_refused(
    qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM, tmp_path: Path
) -> None:
    cache = tk.patch(qwen3, "random", **OPTIONS).new_cache()
    with pytest.raises(RuntimeError, match=r"save\(\) of an unused cache"):
        cache.save(tmp_path / "cache")
    with torch.no_grad():
        qwen3(prompt(), past_key_values=cache)
    cache.save(tmp_path / "cache")
    other = tk.patch(stock, "streaming_llm", **OPTIONS)
    with pytest.raises(ValueError, match="policy must be streaming_llm-.* got random-"):
        other.new_cache().load(tmp_path / "cache")
    other.unpatch()
    stock.config.rope_parameters["rope_theta"] = 5e5
    changed = tk.patch(stock, "random", **OPTIONS).new_cache()
    with pytest.raises(ValueError, match="model must be Qwen3Model .* got Qwen3Model"):
        changed.load(tmp_path / "cache")
    assert changed.is_empty
    (tmp_path / "foreign").write_bytes(b"")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="must be written by save"):
        changed.load(tmp_path / "foreign")


def test_a_patched_model_moves_to_another_dtype(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, "random", **OPTIONS)
    cache = handle.new_cache()
    qwen3.to(torch.bfloat16)
    generate(qwen3, prompt(), past_key_values=cache)
    assert cache.slots.dtype == torch.bfloat16
    handle.unpatch()
    assert "forward" not in qwen3.model.layers[0].self_attn.__dict__


def test_a_patched_model_is_saved_as_the_stock_one(
    qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM, tmp_path: Path
) -> None:
    tk.patch(qwen3, "random", **OPTIONS)
    qwen3.save_pretrained(tmp_path / "patched")
    stock.save_pretrained(tmp_path / "stock")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "patched" / name).read_bytes() == (
            tmp_path / "stock" / name
        ).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    with torch.no_grad():
        assert torch.equal(loaded(prompt()).logits, stock(prompt()).logits)


def test_wrapped_projections_are_called(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    """As adapters do: a linear layer is replaced by a module around it, after patching."""

    class Adapter(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 0.1 * x[..., :1]

    tk.patch(qwen3, "full", budget=60)
    for model in (qwen3, stock):
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(layer.self_attn, name, Adapter(getattr(layer.self_attn, name)))
    with torch.no_grad():
        assert torch.equal(qwen3(prompt()).logits, stock(prompt()).logits)


@pytest.mark.parametrize("padding", [0, 4])
def test_rows_that_were_all_freed_take_the_next_prompts(
    padding: int, qwen3: Qwen3ForCausalLM
) -> None:
    """Freed one by one: the columns seen so far stay, so the next prompt is a later call."""
    ids, more = prompt(2), prompt(2, 30, seed=3)
    mask = torch.ones_like(more)
    mask[0, :padding] = 0
    handle = tk.patch(qwen3, "random", **OPTIONS)
    reused, alone = handle.new_cache(), handle.new_cache()
    with torch.no_grad():
        qwen3(ids, past_key_values=reused)
        for row in range(2):
            reused.reset(rows=[row])
        call = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        got = qwen3(more, past_key_values=reused, **call).logits
        want = qwen3(more, past_key_values=alone, **call).logits
    torch.testing.assert_close(got[mask > 0], want[mask > 0], atol=1e-5, rtol=1e-5)
    assert kept(reused) == kept(alone)
