"""What the adapter takes from lm-eval, where it is not installed: the interface of 0.4.13."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

REGISTERED: dict[str, type] = {}


class HFLM:
    """As much of lm-eval's model as the adapter calls or overrides."""

    softmax_dtype = mixed_precision_dtype = None
    max_gen_toks = 256

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any,
        batch_size: int = 1,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size
        self.device = pretrained.device
        self.max_length = max_length or pretrained.config.max_position_embeddings
        self.prefix_token_id = prefix_token_id or tokenizer.eos_token_id
        self.cache_hook = SimpleNamespace(add_partial=lambda *args: None)

    def tok_encode(self, string: str) -> list[int]:
        return self.tokenizer.encode(string)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        pairs = []
        for context, continuation in (request.args for request in requests):
            ids, whole = self.tok_encode(context), self.tok_encode(context + continuation)
            prefix = ids or [self.prefix_token_id]
            pairs.append(((context, continuation), prefix, whole[len(ids) :]))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [self.tok_encode(request.args[0]) for request in requests]
        pairs = [(None, [self.prefix_token_id], ids) for ids in texts]
        return [score for score, _ in self._loglikelihood_tokens(pairs, override_bs=len(pairs))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for prompt, options in (request.args for request in requests):
            ids = torch.tensor([self.tok_encode(prompt)])
            length = ids.shape[1] + options.get("max_gen_toks", self.max_gen_toks)
            output = self._model_generate(
                context=ids, attention_mask=torch.ones_like(ids), stop=[], max_length=length
            )
            texts.append(self.tokenizer.decode(output[0, ids.shape[1] :]))
        return texts

    def _model_generate(self, context: Any, max_length: int, stop: Any, **options: Any) -> Any:
        options.update(max_length=max_length, do_sample=False, use_cache=True)
        return self.model.generate(input_ids=context, **options)


def register_model(name: str) -> Any:
    def register(cls: type) -> type:
        REGISTERED[name] = cls
        return cls

    return register


def install() -> None:
    """Put the stub where ``import lm_eval`` looks."""
    modules = {
        "lm_eval.api.registry": {"register_model": register_model, "get_model": REGISTERED.get},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
    }
    for name in ("lm_eval", "lm_eval.api", "lm_eval.models"):
        sys.modules[name] = ModuleType(name)
    for name, contents in modules.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents)
