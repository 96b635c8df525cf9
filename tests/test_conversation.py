"""`chat`: turns on one cache, against the stock model that reads everything again."""

from __future__ import annotations

import io
import re
import shutil
from os import terminal_size
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import trimkv_kernels as tk
from trimkv_kernels.cli import main
from trimkv_kernels.conversation import Conversation, LiveLine
from trimkv_kernels.embedded import (
    EMBEDDED_MODEL,
    FIRST_HELD_OUT_SEED,
    embedded_model,
    make_recall_text,
)
from trimkv_kernels.loading import share_weights

TEXT = make_recall_text(200, seed=FIRST_HELD_OUT_SEED)
CHATML = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + '\n' + m['content'] + ' </s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant\n' }}{% endif %}"
)


def questions(count: int) -> list[tuple[str, str]]:
    return [(" ".join(one.prompt), one.answer) for one in TEXT.questions[:count]]


def answers_of_the_stock_model(model: Any, tokenizer: Any, turns: list[str]) -> list[str]:
    """Every turn without a cache of before; an end of text is not read."""
    text, found = "", []
    for turn in turns:
        text += f"\n{turn}\n" if text else f"{turn}\n"
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        found.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        text += found[-1]
    return found


@pytest.mark.parametrize("bounded", [True, False])
def test_turns_on_one_cache_answer_as_the_stock_model_that_reads_all(bounded: bool) -> None:
    model, tokenizer = embedded_model()
    asked = questions(3)
    turns = [TEXT.text, *(question for question, _ in asked)]
    expected = answers_of_the_stock_model(model, tokenizer, turns)
    assert [answer.split()[0] for answer in expected[1:]] == [answer for _, answer in asked]
    cache: Any = DynamicCache(config=model.config)
    if bounded:
        cache = tk.patch(model, "streaming_llm", budget=400, buffer=8).new_cache()
    talk = Conversation(model, tokenizer, cache)
    assert [talk.ask(turn, max_new_tokens=8) for turn in turns] == expected
    assert talk.figures().startswith(f"{len(talk.ids)} tokens seen, ")
    assert cache.get_seq_length() == len(talk.ids)  # so nothing was read twice


def test_a_chat_template_gives_the_tokens_of_the_whole_conversation() -> None:
    model, tokenizer = embedded_model()
    tokenizer.chat_template = CHATML
    talk = Conversation(model, tokenizer, DynamicCache(config=model.config))
    messages = []
    for turn in ("ada keeps amber .", "what does ada keep ?", "and now ?"):
        prompt = [*messages, {"role": "user", "content": turn}]
        answer = talk.ask(turn, max_new_tokens=4)
        rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        read = tokenizer(rendered, add_special_tokens=False).input_ids
        assert talk.ids[: len(read)] == read
        messages = [*prompt, {"role": "assistant", "content": answer}]


def scripted(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_conversation_longer_than_the_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = questions(3)
    scripted(monkeypatch, TEXT.text, *(question for question, _ in asked), "/new", asked[0][0])
    arguments = ["chat", "--model", str(EMBEDDED_MODEL), "--budget", "64", "--buffer", "8"]
    assert main([*arguments, "--new", "8", "--compare"]) == 0
    first, _, second = capsys.readouterr().out.partition("a new conversation\n")
    shown = re.findall(
        r"(bounded|full): (.*)\n\[(\d+) tokens seen, (?:at most )?(\d+) slots used, "
        r"(\d+ pairs|nothing) evicted",
        first,
    )
    assert len(shown) == 2 * 4
    for number, (_, answer) in enumerate(asked, 1):
        for side, said, seen, slots, evicted in shown[2 * number : 2 * number + 2]:
            assert said.split()[0] == answer
            assert int(seen) > 200
            if side == "bounded":
                assert int(slots) <= 72
                # of 2 layers with 2 KV heads each
                assert int(evicted.split()[0]) == 4 * (int(seen) - int(slots))
            else:
                assert (slots, evicted) == (seen, "nothing")
    assert int(re.findall(r"\[(\d+) tokens seen", second)[0]) < 30


def test_the_text_is_read_with_the_first_line(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT.text)
    ((question, answer),) = questions(1)
    scripted(monkeypatch, "", question, "/quit", "not read")
    arguments = ["chat", "--model", str(EMBEDDED_MODEL), "--text-file", str(tmp_path / "text.txt")]
    assert main([*arguments, "--new", "8"]) == 0
    printed = capsys.readouterr().out
    assert f"> > {answer} " in printed
    assert printed.count("tokens seen") == 1


def test_the_twin_shares_weights_and_stays_stock() -> None:
    model, tokenizer = embedded_model()
    twin = share_weights(model)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    ids = tokenizer(TEXT.text, return_tensors="pt").input_ids
    with torch.no_grad():
        before = twin(ids).logits
        with tk.patch(model, "streaming_llm", budget=16, buffer=4):
            model(ids[:, :-1])
            assert torch.equal(twin(ids).logits, before)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_line_is_the_last_row_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: terminal_size((20, 5)))
    out = Terminal()
    with LiveLine(out) as line:
        line.show(lambda: "12 tokens seen, and so on and on")
        assert out.getvalue().count("\033[1;4r") == 1
        assert out.getvalue().endswith("\033[5;1H\033[2K\033[7m12 tokens seen, and \033[0m\0338")
        line.show(lambda: "13")
        assert out.getvalue().count("\033[1;4r") == 1
    assert out.getvalue().endswith("\0337\033[r\033[5;1H\033[2K\0338")


def test_no_live_line_in_a_file() -> None:
    out = io.StringIO()
    with LiveLine(out) as line:
        line.show(lambda: pytest.fail("was asked for"))
    assert out.getvalue() == ""
