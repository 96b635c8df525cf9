"""Read a recall text with a model, and measure how many facts the model still knows at the end."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch

from trimkv_kernels.embedded.texts import RecallText


class WordTokenizer(Protocol):
    """What a tokenizer needs: the id of a word. Every tokenizer of transformers has this method."""

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        """Returns the id of each word."""
        ...


@dataclass(frozen=True)
class EncodedText:
    """A context followed by its questions with their answers, for one teacher-forced forward.

    Attributes:
        input_ids: int64 `[num_tokens]`, the context and every question with its answer.
        num_context: tokens of the context.
        answer_positions: int64 `[questions]`, the indices of the answers in `input_ids`; the logits
            that predict an answer are one position before it.
        answers: int64 `[questions]`, the answers' ids: `input_ids[answer_positions]`.
    """

    input_ids: torch.Tensor
    num_context: int
    answer_positions: torch.Tensor
    answers: torch.Tensor


def encode(text: RecallText, tokenizer: WordTokenizer) -> EncodedText:
    """Turn a text into token ids, with its questions and their answers.

    Args:
        text: the text.
        tokenizer: must have every word of the text as one token, as the embedded model's does.

    Returns:
        The encoded text, on the CPU.
    """
    words = list(text.words)
    answer_positions = []
    for question in text.questions:
        answer_positions.append(len(words) + len(question.prompt))
        words += question.words
    input_ids = torch.tensor(tokenizer.convert_tokens_to_ids(words), dtype=torch.int64)
    positions = torch.tensor(answer_positions, dtype=torch.int64)
    return EncodedText(input_ids, len(text.words), positions, input_ids[positions])


@torch.inference_mode()
def predict_answers(
    model: torch.nn.Module,
    tokenizer: WordTokenizer,
    texts: Sequence[RecallText],
    *,
    new_cache: Callable[[], Any] | None = None,
    context_chunk: int | None = None,
    question_chunk: int = 1,
    batch_size: int = 8,
) -> list[torch.Tensor]:
    """Read each text, then its questions one after the other, on one cache.

    The questions are teacher-forced: the model reads the right answer even if the prediction was
    wrong, so one miss does not spoil the next question. Pairs that the cache drops while it reads
    questions are missing afterwards.

    Args:
        model: a causal language model of transformers, patched or not.
        tokenizer: has every word as one token.
        texts: successive texts of equal length are read as one batch.
        new_cache: makes the `past_key_values` of a batch; with `None` the model makes them.
        context_chunk: context tokens read per forward; `None` reads the context at once.
        question_chunk: question tokens read per forward; 1 is what `generate` does.
        batch_size: texts per batch, at most.

    Returns:
        For each text the predicted ids, int64 `[questions]`, on the CPU.

    Raises:
        ValueError: if a chunk or `batch_size` is below 1.
    """
    for name, value in (
        ("context_chunk", context_chunk),
        ("question_chunk", question_chunk),
        ("batch_size", batch_size),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    predictions: list[torch.Tensor] = []
    for batch in _batches([encode(text, tokenizer) for text in texts], batch_size):
        num_context = batch[0].num_context
        input_ids = stack(batch).to(next(model.parameters()).device)
        context, questions = input_ids[:, :num_context], input_ids[:, num_context:]
        cache = None if new_cache is None else new_cache()
        logits, cache = read_in_chunks(model, context, context_chunk or num_context, cache)
        before = logits[:, -1:].argmax(-1)
        logits, _ = read_in_chunks(model, questions, question_chunk, cache)
        predicted = torch.cat((before, logits.argmax(-1)), dim=1).cpu()
        for row, encoded in zip(predicted, batch, strict=True):
            predictions.append(row[encoded.answer_positions - num_context])
    return predictions


@torch.inference_mode()
def read_in_chunks(
    model: torch.nn.Module, input_ids: torch.Tensor, chunk: int, cache: Any = None
) -> tuple[torch.Tensor, Any]:
    """Read tokens with a model, teacher-forced, in chunks.

    Args:
        model: a causal language model of transformers, patched or not.
        input_ids: int64 `[batch, num_tokens]`.
        chunk: tokens per forward, at least 1.
        cache: the `past_key_values` to continue; with `None` the model makes them.

    Returns:
        The logits `[batch, num_tokens, vocab_size]`, and the cache afterwards.
    """
    logits = []
    for part in input_ids.split(chunk, dim=1):
        output = model(input_ids=part, use_cache=True, past_key_values=cache)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


def stack(encoded: Sequence[EncodedText]) -> torch.Tensor:
    """Texts of equal context length as one batch, on the CPU.

    Returns:
        int64 `[batch, num_tokens]`. Rows with fewer questions are filled up with zeros at the end,
        where nothing is scored.
    """
    return torch.nn.utils.rnn.pad_sequence([text.input_ids for text in encoded], batch_first=True)


def recall(
    model: torch.nn.Module,
    tokenizer: WordTokenizer,
    texts: Sequence[RecallText],
    *,
    new_cache: Callable[[], Any] | None = None,
    context_chunk: int | None = None,
    question_chunk: int = 1,
    batch_size: int = 8,
) -> float:
    """The share of all questions about `texts` that the model answers correctly, greedily.

    Args:
        model: a causal language model of transformers, patched or not.
        tokenizer: has every word as one token.
        texts: at least one question among them.
        new_cache: as in `predict_answers`.
        context_chunk: as in `predict_answers`.
        question_chunk: as in `predict_answers`.
        batch_size: as in `predict_answers`.

    Returns:
        A share between 0 and 1.

    Raises:
        ValueError: if no text has a question, or as in `predict_answers`.
    """
    num_questions = sum(len(text.questions) for text in texts)
    if num_questions == 0:
        raise ValueError(f"texts: expected at least one question, got none in {len(texts)} texts")
    predictions = predict_answers(
        model,
        tokenizer,
        texts,
        new_cache=new_cache,
        context_chunk=context_chunk,
        question_chunk=question_chunk,
        batch_size=batch_size,
    )
    right = sum(
        int((predicted == encode(text, tokenizer).answers).sum())
        for predicted, text in zip(predictions, texts, strict=True)
    )
    return right / num_questions


def _batches(encoded: Sequence[EncodedText], batch_size: int) -> Iterator[list[EncodedText]]:
    for _, group in groupby(encoded, key=lambda text: text.num_context):
        same_length = list(group)
        for first in range(0, len(same_length), batch_size):
            yield same_length[first : first + batch_size]
