"""What a bounded cache costs on a text: perplexity, and divergence from the full cache.

::

    perplexity(model, input_ids, "streaming_llm", budget=512, buffer=128)
    kl(model, input_ids, policy, budget=512, buffer=128)

:mod:`trimkv_kernels.evaluation.lm_eval` runs the tasks of lm-eval. It needs the extra ``eval``.
"""

from trimkv_kernels.evaluation.command import measure_text
from trimkv_kernels.evaluation.perplexity import (
    Divergence,
    Perplexity,
    compare_logits,
    kl,
    perplexity,
)

__all__ = [
    "Divergence",
    "Perplexity",
    "compare_logits",
    "kl",
    "measure_text",
    "perplexity",
]
