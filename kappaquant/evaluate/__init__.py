"""Compare a quantized variant with the model it was made from: KL divergence, perplexity, exact match."""

from kappaquant.evaluate.documents.report import Variant, json_report
from kappaquant.evaluate.measures.batches import windows
from kappaquant.evaluate.measures.divergence import Divergence, Perplexity, kl_divergence, perplexity
from kappaquant.evaluate.measures.intervals import sign_test, wilson
from kappaquant.evaluate.measures.tasks import ExactMatch, Paired, Question, complete, exact_match, paired

__all__ = [
    "Divergence",
    "ExactMatch",
    "Paired",
    "Perplexity",
    "Question",
    "Variant",
    "complete",
    "exact_match",
    "json_report",
    "kl_divergence",
    "paired",
    "perplexity",
    "sign_test",
    "wilson",
    "windows",
]
