"""The small Qwen3 that ships with the package, and the texts that it reads.

They are enough to try a policy, train gates or run the commands without a network::

    model, tokenizer = embedded_model()
    text = make_recall_text(300, seed=FIRST_HELD_OUT_SEED)
    recall(model, tokenizer, [text])
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_kernels.embedded.reading import (
    EncodedText,
    WordTokenizer,
    encode,
    predict_answers,
    read_in_chunks,
    recall,
    stack,
)
from trimkv_kernels.embedded.texts import (
    EOS,
    FIRST_HELD_OUT_SEED,
    NAMES,
    PAD,
    SPECIAL_TOKENS,
    UNK,
    VALUES,
    VOCABULARY,
    Kind,
    Question,
    RecallText,
    Statement,
    make_recall_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "EMBEDDED_MODEL",
    "EOS",
    "FIRST_HELD_OUT_SEED",
    "NAMES",
    "PAD",
    "SPECIAL_TOKENS",
    "UNK",
    "VALUES",
    "VOCABULARY",
    "EncodedText",
    "Kind",
    "Question",
    "RecallText",
    "Statement",
    "WordTokenizer",
    "embedded_model",
    "encode",
    "make_recall_text",
    "predict_answers",
    "read_in_chunks",
    "recall",
    "stack",
]

EMBEDDED_MODEL = Path(__file__).parent / "embedded_model"


def embedded_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The small Qwen3 that ships with the package, in eval mode, and its word-level tokenizer.

    It reads the texts of :func:`make_recall_text`; no network is needed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    return model.eval(), AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
