"""Messages of protected roles are found in the tokens of a chat, and are never evicted."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

import trimkv_kernels as tk

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|> ' + m['role'] + '\n' + m['content'] + ' <|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant\n' }}{% endif %}"
)
# as Llama 3's: a beginning of text, and another layout
HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ ' <head> ' + m['role'] + ' </head>\n\n' + m['content'] + ' <eot>' }}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|> system\nbe kind <|im_end|>\n{% endif %}"
)
WORDS = """
    <pad> <s> <|im_start|> <|im_end|> <head> </head> <eot> system user assistant be kind brief
    who are you a tree and now says hello <first> <answer> <second> <rules>
"""


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    model = Tokenizer(
        WordLevel({word: i for i, word in enumerate(WORDS.split())}, unk_token="<pad>")
    )
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>")
    tokenizer.chat_template = template
    tokenizer.padding_side = "left"
    return tokenizer


MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "who are you"},
    {"role": "assistant", "content": "a tree"},
    {"role": "user", "content": "and now"},
]


def found(tokenizer: PreTrainedTokenizerFast, roles: tuple[str, ...], messages: list) -> list[str]:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    (spans,) = tk.ChatRoles(tokenizer, roles).find(ids, None, [0])
    return [tokenizer.decode(ids[0, a:b]) for a, b in spans]


@pytest.mark.parametrize("template", [CHATML, HEADERS, DEFAULT_SYSTEM + CHATML])
def test_messages_are_found(template: str) -> None:
    tokenizer = make_tokenizer(template)
    head, end = ("<head>", "<eot>") if template == HEADERS else ("<|im_start|>", "<|im_end|>")
    close = " </head>" if template == HEADERS else ""
    assert found(tokenizer, ("system",), MESSAGES) == [f"{head} system{close} be brief {end}"]
    assert found(tokenizer, ("assistant", "user"), MESSAGES) == [
        f"{head} user{close} who are you {end}",
        f"{head} assistant{close} a tree {end}",
        f"{head} user{close} and now {end}",
    ]


def test_spans_are_positions_of_each_row() -> None:
    tokenizer = make_tokenizer(CHATML)
    texts = [
        tokenizer.apply_chat_template(m, tokenize=False) for m in (MESSAGES[:2], MESSAGES[1:2])
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    roles = tk.ChatRoles(tokenizer, ("user",))
    assert roles.find(batch.input_ids, batch.attention_mask.bool(), [0, 7]) == [
        [(5, 11)],
        [(7, 13)],
    ]


def test_an_open_message_reaches_to_the_end() -> None:
    tokenizer = make_tokenizer(CHATML)
    ids = tokenizer("<|im_start|> system\nbe kind", return_tensors="pt").input_ids
    assert tk.ChatRoles(tokenizer).find(ids, None, [0]) == [[(0, 4)]]


def test_bad_roles() -> None:
    with pytest.raises(ValueError, match="roles must be some of"):
        tk.ChatRoles(make_tokenizer(CHATML), ("tool",))
    with pytest.raises(ValueError, match="tokenizer must have a chat template"):
        tk.ChatRoles(make_tokenizer(None))
    shapeless = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    with pytest.raises(ValueError, match="does not show where messages of 'system' begin"):
        tk.ChatRoles(make_tokenizer(shapeless))


@pytest.mark.parametrize("policy", ["random", "key_norm"])
def test_a_system_message_is_never_evicted(policy: str, qwen3: Qwen3ForCausalLM) -> None:
    tokenizer = make_tokenizer(CHATML)
    roles = tk.ChatRoles(tokenizer)
    handle = tk.patch(qwen3, policy, budget=10, buffer=2, sinks=0, recent=1, protect=roles)
    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False)
        for messages in (MESSAGES, [MESSAGES[1], *MESSAGES])
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    cache = handle.new_cache()
    qwen3.generate(**batch, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert cache.stats().evictions.min() > 0
    for layer in range(3):
        for row, start in enumerate((0, 6)):
            for head in cache.positions(layer)[row].tolist():
                assert set(range(start, start + 5)) <= set(head)


def test_pins_that_exceed_the_budget_raise_before_anything_is_read(
    qwen3: Qwen3ForCausalLM,
) -> None:
    tokenizer = make_tokenizer(CHATML)
    roles = tk.ChatRoles(tokenizer, ("system", "user"))
    handle = tk.patch(qwen3, "random", budget=10, buffer=2, sinks=0, recent=1, protect=roles)
    ids = tokenizer(
        tokenizer.apply_chat_template(MESSAGES, tokenize=False), return_tensors="pt"
    ).input_ids
    cache = handle.new_cache()
    with pytest.raises(ValueError, match="budget must exceed the protected slots: budget=10"):
        qwen3(ids, past_key_values=cache)
    assert cache.is_empty
    with pytest.raises(ValueError, match="needs input_ids, got inputs_embeds"):
        qwen3(inputs_embeds=torch.randn(1, 5, 64), past_key_values=handle.new_cache())
