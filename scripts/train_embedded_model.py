"""Train the small Qwen3 that ships with the package, and print what it recalls.

    python scripts/train_embedded_model.py

It takes a few minutes on two CPU cores and writes the model and its word-level tokenizer to
`src/trimkv_kernels/embedded/embedded_model`. Two phases:

1. sequences of random words that repeat spans of themselves, until the repeats are predicted:
   the model learns to look up what followed the last time;
2. recall texts of `trimkv_kernels.embedded` with their questions, first of 64 tokens, twice as long
   whenever the longest are answered, up to 2,048. Short and dense texts stay in the mix to the
   end: without them the model forgets how to read them.

Data and initial weights follow from `--seed`. The sums inside a matrix product are ordered by torch
and depend on its version, the CPU and the number of threads, so the very same weights are to be
had on the same machine only; the recall at the end is what is reproduced elsewhere.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trimkv_kernels.embedded import (
    EOS,
    FIRST_HELD_OUT_SEED,
    PAD,
    SPECIAL_TOKENS,
    UNK,
    VOCABULARY,
    encode,
    make_recall_text,
    recall,
)

FOLDER = Path(__file__).parents[1] / "src/trimkv_kernels/embedded/embedded_model"
PAD_ID = SPECIAL_TOKENS.index(PAD)
MAX_LENGTH = 8192
ROPE_THETA = 1_000_000.0

LENGTHS = (64, 128, 256, 512, 1024, 2048)
SPACINGS = ((24, 90), (24, 40), (24, 24))
TOKENS_PER_BATCH = 8192
# Ordinary words are predicted too, at a small weight, so that free generation stays well-formed.
ORDINARY_SHARE, ORDINARY_WEIGHT = 0.25, 0.1
WARMUP_STEPS, DECAY_SHARE = 50, 0.4

Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids and where the answers stand: int64 and bool `[rows, length]`."""


def main() -> None:
    """Trains, saves and evaluates."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    tokenizer, model = make_tokenizer(), make_model()
    print(f"{model.num_parameters():,} parameters", flush=True)
    started = time.monotonic()
    trainer = Trainer(model, args.lr, args.matrix_lr)
    learn_to_look_up(trainer, rng)
    learn_to_recall(trainer, tokenizer, rng, args.steps)
    print(f"trained in {time.monotonic() - started:.0f} s", flush=True)
    model.eval()
    save(model, tokenizer, args.out)
    print_recall(model, tokenizer, args.num_texts)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes both so that transformers 4.57 reads them too, which knows neither the place of
    `rope_theta` nor the tokenizer's class that transformers 5 writes.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, added in (
        ("config.json", {"rope_theta": ROPE_THETA}),
        (
            "tokenizer_config.json",
            {
                "model_input_names": ["input_ids", "attention_mask"],
                "tokenizer_class": "PreTrainedTokenizerFast",
            },
        ),
    ):
        data = json.loads((folder / name).read_text()) | added
        (folder / name).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--steps", type=int, default=500, help="steps on texts")
    parser.add_argument("--lr", type=float, default=3e-3, help="of embeddings and norms (AdamW)")
    parser.add_argument("--matrix-lr", type=float, default=0.02, help="of the matrices (Muon)")
    parser.add_argument("--num-texts", type=int, default=32, help="texts per figure of the result")
    return parser.parse_args()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word; case does not matter, punctuation stands alone."""
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    words = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[^\w\s]"), behavior="isolated"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=EOS,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_model() -> Qwen3ForCausalLM:
    """A Qwen3 of two layers: the first looks at the last few words, the second far back."""
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        pad_token_id=PAD_ID,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    look_back_by_distance(model)
    return model


@torch.no_grad()
def look_back_by_distance(model: Qwen3ForCausalLM, fast: int = 6, gain: float = 2.0) -> None:
    """Lets head h of the first layer begin by looking h + 1 words back, whatever the words are.

    Left to itself such a head takes thousands of steps to appear: keys and queries of random
    weights have nothing in common that RoPE could turn. So all embeddings get a common part (the
    softmax over words does not see it), keys are made of it, and queries of the same, turned back
    by the distance. `fast` of the quickest RoPE frequencies and the norms' `gain` make it sharp.
    """
    config, attention = model.config, model.model.layers[0].self_attn
    half = config.head_dim // 2
    common = torch.randn(config.hidden_size)
    model.model.embed_tokens.weight += config.initializer_range * common
    key = torch.zeros(config.head_dim)
    key[:fast] = 1.0
    distances = torch.arange(1, config.num_attention_heads + 1)
    cos, sin = model.model.rotary_emb(common, distances[None])
    queries = key * cos[0] - torch.cat((-key[half:], key[:half])) * sin[0]
    keys = key.expand(config.num_key_value_heads, -1)
    for projection, wanted in ((attention.q_proj, queries), (attention.k_proj, keys)):
        projection.weight.mul_(0.2)
        projection.weight += torch.outer(wanted.flatten(), common / common.norm())
    attention.q_norm.weight.fill_(gain)
    attention.k_norm.weight.fill_(gain)


class Trainer:
    """One step at a time: Muon on the matrices of the layers, AdamW on the rest."""

    def __init__(self, model: Qwen3ForCausalLM, lr: float, matrix_lr: float) -> None:
        self.model = model
        self.lrs = (matrix_lr, lr)
        layers = list(model.model.layers.parameters())
        matrices = [parameter for parameter in layers if parameter.ndim == 2]
        others = [parameter for parameter in layers if parameter.ndim == 1]
        others += [model.model.norm.weight, model.model.embed_tokens.weight]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.01),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        )

    def step(self, batch: Batch, *, lr_share: float, ordinary_weight: float) -> float:
        """Trains on one batch; returns the share of the answers that were right before."""
        input_ids, is_answer = batch
        hidden = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        labels, is_answer = input_ids[:, 1:], is_answer[:, 1:]
        logits = self.model.lm_head(hidden[is_answer])
        loss = functional.cross_entropy(logits, labels[is_answer])
        if ordinary_weight:
            ordinary = torch.rand(labels.shape) < ORDINARY_SHARE
            ordinary &= ~is_answer & (labels != PAD_ID)
            ordinary_logits = self.model.lm_head(hidden[ordinary])
            loss += ordinary_weight * functional.cross_entropy(ordinary_logits, labels[ordinary])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, lr in zip(self.optimizers, self.lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_share
            optimizer.step()
            optimizer.zero_grad()
        return (logits.argmax(-1) == labels[is_answer]).float().mean().item()


def learn_to_look_up(trainer: Trainer, rng: random.Random, max_steps: int = 500) -> None:
    """The first phase."""
    accuracy = 0.0
    for step in range(1, max_steps + 1):
        right = trainer.step(
            repeated_spans(rng, rows=64, length=64),
            lr_share=min(1.0, step / WARMUP_STEPS),
            ordinary_weight=0.0,
        )
        accuracy = 0.8 * accuracy + 0.2 * right
        if step % 50 == 0:
            print(f"repeats, step {step}: {accuracy:.3f}", flush=True)
        if accuracy > 0.96:
            return


def learn_to_recall(
    trainer: Trainer, tokenizer: PreTrainedTokenizerFast, rng: random.Random, steps: int
) -> None:
    """The second phase; half of the batches are of the greatest length reached so far."""
    reached, accuracy = 0, 0.0
    for step, lr_share in enumerate(schedule(steps), start=1):
        length = LENGTHS[reached] if rng.random() < 0.5 else rng.choice(LENGTHS[: reached + 1])
        right = trainer.step(
            texts_of(length, tokenizer, rng), lr_share=lr_share, ordinary_weight=ORDINARY_WEIGHT
        )
        if length == LENGTHS[reached]:
            accuracy = 0.8 * accuracy + 0.2 * right
        if step % 25 == 0:
            print(f"texts up to {LENGTHS[reached]}, step {step}: {accuracy:.3f}", flush=True)
        if accuracy > 0.95 and reached + 1 < len(LENGTHS):
            reached, accuracy = reached + 1, 0.0


def schedule(steps: int) -> Iterator[float]:
    """Shares of the full learning rate: a warmup, a plateau, a linear decay."""
    for step in range(1, steps + 1):
        yield min(1.0, step / WARMUP_STEPS, (1 - (step - 1) / steps) / DECAY_SHARE)


def repeated_spans(rng: random.Random, rows: int, length: int) -> Batch:
    """Random words, then random spans of what stands before; a span's first word is a surprise."""
    input_ids = torch.randint(len(SPECIAL_TOKENS), len(VOCABULARY), (rows, length))
    is_repeat = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        at = rng.randint(8, length // 2)
        while at < length:
            span = min(rng.randint(8, 24), length - at, at)
            source = rng.randint(0, at - span)
            input_ids[row, at : at + span] = input_ids[row, source : source + span].clone()
            is_repeat[row, at + 1 : at + span] = True
            at += span
    return input_ids, is_repeat


def texts_of(length: int, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Batch:
    """Texts of one length and mixed density, all their questions answered, padded at the end."""
    rows, answers = [], []
    for _ in range(TOKENS_PER_BATCH // length):
        seed, spacing = rng.randrange(FIRST_HELD_OUT_SEED), rng.choice(SPACINGS)
        encoded = encode(make_recall_text(length, seed=seed, spacing=spacing), tokenizer)
        is_answer = torch.zeros(len(encoded.input_ids), dtype=torch.bool)
        is_answer[encoded.answer_positions] = True
        rows.append(encoded.input_ids)
        answers.append(is_answer)
    return pad_sequence(rows, True, padding_value=PAD_ID), pad_sequence(answers, True)


def print_recall(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> None:
    """Prints the recall with the full cache, on texts that were never trained on."""
    for spacing in ((24, 90), (24, 24)):
        for num_tokens in (512, 1024, 1536, 2048):
            seeds = range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + count)
            texts = [make_recall_text(num_tokens, seed=seed, spacing=spacing) for seed in seeds]
            # Fed at once, the questions get the answers they get one token at a time, but sooner.
            share = recall(model, tokenizer, texts, question_chunk=MAX_LENGTH)
            distance = "24" if spacing == (24, 24) else "24 to 90"
            print(f"{num_tokens:5} tokens, a fact every {distance}: {share:.2%}", flush=True)


if __name__ == "__main__":
    main()
