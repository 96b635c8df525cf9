"""PEFT's adapters, added before and after the patch."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import tiny
import torch

import agreement
import trimkv_kernels as tk

TEXT = agreement.distinct()
QKV = ["q_proj", "k_proj", "v_proj"]


def lora(seed: int = 1, model: Any = None, modules: list[str] = QKV, **options: Any) -> Any:
    """A model with an adapter that is not zero."""
    model = tiny.llama() if model is None else model
    torch.manual_seed(seed)
    return peft.get_peft_model(model, lora_config(modules, **options)).eval()


def lora_config(modules: list[str] = QKV, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=modules, init_lora_weights=False, **options
    )


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules": "all-linear"}])
def test_lora_before_the_patch(options: dict[str, Any]) -> None:
    agreement.check_evicting(lora(**options), lora(**options))
    agreement.check_whole(lora(**options), lora(**options))


def test_lora_after_the_patch() -> None:
    model = tiny.llama()
    handle = tk.patch(model, "key_norm", **agreement.OPTIONS)
    adapted = lora(model=model)
    agreement.check_patched(handle, adapted, lora())
    tk.unpatch(adapted)
    with torch.no_grad():
        assert torch.equal(adapted(TEXT).logits, lora()(TEXT).logits)


def test_an_adapter_that_changes_between_calls() -> None:
    """And within one text, from one turn to the next."""
    model = lora()
    torch.manual_seed(2)
    model.add_adapter("second", lora_config(["q_proj", "k_proj"]))
    stock = copy.deepcopy(model)
    with tk.patch(model, "key_norm", **agreement.OPTIONS) as handle, torch.no_grad():
        for name in ("second", "default", "second"):
            model.set_adapter(name)
            stock.set_adapter(name)
            agreement.check_patched(handle, model, stock)
        with model.disable_adapter():
            agreement.check_patched(handle, model, tiny.llama())
    with tk.patch(model, "key_norm", **agreement.WHOLE) as handle, torch.no_grad():
        cache, full = handle.new_cache(), None
        for name in ("second", "default"):
            model.set_adapter(name)
            stock.set_adapter(name)
            got = model(TEXT, past_key_values=cache).logits
            want = stock(TEXT, past_key_values=full, use_cache=True)
            full = want.past_key_values
            torch.testing.assert_close(got, want.logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_for_each_row() -> None:
    """Every row of a mixed batch is as if it were alone with its adapter."""
    model = lora()
    torch.manual_seed(2)
    model.add_adapter("second", lora_config())
    names = ["default", "second", "__base__"]
    text = tiny.ids(3, 20)
    call = {"max_new_tokens": 12, **tiny.GREEDY}
    with tk.patch(model, "key_norm", **agreement.OPTIONS):
        got = model.generate(input_ids=text, adapter_names=names, **call)
        for row, name in enumerate(names):
            alone = text[row : row + 1]
            want = model.generate(input_ids=alone, adapter_names=[name], **call)
            assert torch.equal(got[row : row + 1], want)


def test_merged_adapters() -> None:
    """A merge of the patched model, and the wrapper's removal."""
    model = lora()
    handle = tk.patch(model, "key_norm", **agreement.OPTIONS)
    model.merge_adapter()
    agreement.check_patched(handle, model, lora())
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    agreement.check_patched(handle, merged, lora())
    tk.unpatch(merged)
    with torch.no_grad():
        want = lora().merge_and_unload()(TEXT).logits
        assert torch.equal(merged(TEXT).logits, want)
    agreement.check_evicting(merged, lora())


def test_saved_adapters(tmp_path: Any) -> None:
    """A patched model saves its adapter, and takes one that was saved."""
    model = lora()
    with tk.patch(model, "key_norm", **agreement.OPTIONS):
        model.save_pretrained(tmp_path)
    plain = tiny.llama()
    handle = tk.patch(plain, "key_norm", **agreement.OPTIONS)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    agreement.check_patched(handle, loaded, lora())


def test_a_policy_that_reads_adapted_weights() -> None:
    """CriticalKV multiplies values by the output projection, as the adapter has made it."""
    modules = [*QKV, "o_proj"]
    merged = lora(modules=modules).merge_and_unload()
    call = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for model in (lora(modules=modules), merged):
        with tk.patch(model, "critical_kv", **agreement.OPTIONS) as handle:
            cache = handle.new_cache()
            text = model.generate(input_ids=TEXT, past_key_values=cache, **call, **tiny.GREEDY)
            found.append((torch.stack(text.logits), tiny.kept(cache)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    assert found[0][1] == found[1][1]


VIRTUAL = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, encoder_hidden_size=16
    ),
}


def virtual(kind: str) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(tiny.llama(), VIRTUAL[kind]()).eval()


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens(kind: str) -> None:
    """They are as tokens of the prompt: the plain model gets their embeddings in its own."""
    model, plain = virtual(kind), tiny.llama()
    agreement.check_whole(virtual(kind), model)
    with torch.no_grad():
        words = plain.get_input_embeddings()(TEXT)
        embeds = torch.cat([model.get_prompt(1).to(words.dtype), words], dim=1)
    call = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for patched, given in ((model, {"input_ids": TEXT}), (plain, {"inputs_embeds": embeds})):
        with tk.patch(patched, "key_norm", **agreement.OPTIONS) as handle:
            cache = handle.new_cache()
            text = patched.generate(**given, past_key_values=cache, **call, **tiny.GREEDY)
            found.append((torch.stack(text.logits), tiny.kept(cache), cache.stats()))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    assert found[0][1] == found[1][1]
    assert int(found[0][2].evictions.min()) > 0
    assert found[0][2].tokens_seen == [6 + TEXT.shape[1] + 12 - 1]


def test_virtual_tokens_before_padding_are_refused() -> None:
    """PEFT puts them before the padding of a batch, where a bounded cache takes none."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    text, model = tiny.ids(2, 9), virtual("prompt tuning")
    with (
        tk.patch(model, "key_norm", **agreement.OPTIONS),
        pytest.raises(ValueError, match="virtual tokens"),
    ):
        model.generate(input_ids=text, attention_mask=mask, max_new_tokens=3, **tiny.GREEDY)


def prefix(model: Any) -> Any:
    torch.manual_seed(3)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    return peft.get_peft_model(model, config).eval()


def test_prefix_tuning_is_refused_at_the_patch() -> None:
    model = prefix(tiny.llama())
    with pytest.raises(TypeError, match="prefix tuning.*prompt tuning or LoRA"):
        tk.patch(model, "key_norm", **agreement.OPTIONS)
    assert "forward" not in model.base_model.model.layers[0].self_attn.__dict__


def test_prefix_tuning_after_the_patch_is_refused_at_the_call() -> None:
    plain = tiny.llama()
    with tk.patch(plain, "key_norm", **agreement.OPTIONS):
        model = prefix(plain)
        with pytest.raises(TypeError, match="prefix tuning"):
            model.generate(input_ids=TEXT, max_new_tokens=3, **tiny.GREEDY)
        with pytest.raises(TypeError, match="prefix tuning"):
            model(TEXT)


def test_adaption_prompts() -> None:
    """They are in a module around each attention layer."""

    def make() -> Any:
        config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_layers=2, adapter_len=4)
        torch.manual_seed(3)
        model = peft.get_peft_model(tiny.llama(1, head_dim=8), config).eval()
        for name, parameter in model.named_parameters():
            if "adaption_gate" in name:
                torch.nn.init.constant_(parameter, 0.5)
        return model

    agreement.check_whole(make(), make())
    agreement.check_evicting(make(), make())


@pytest.mark.parametrize("merge", [False, True])
def test_lora_on_packed_weights(merge: bool) -> None:
    model = tiny.llama()
    handle = tk.patch(model, "key_norm", pack_weights=True, **agreement.OPTIONS)
    adapted, stock = lora(model=model), lora()
    if merge:  # the safe way gives each parameter a new tensor
        adapted, stock = (x.merge_and_unload(safe_merge=True) for x in (adapted, stock))
    agreement.check_patched(handle, adapted, stock)
    tk.unpatch(adapted)
    with torch.no_grad():
        assert torch.equal(adapted(TEXT).logits, stock(TEXT).logits)
