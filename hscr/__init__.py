"""HSCR: hierarchical self-contrastive rewarding for aligning medical vision-language models.

The method of Jiang et al., ACL 2025 (arXiv 2506.00805), as a library: it knows nothing of web, queue, database or Redis.

Axis letters used in every shape of this package:
    B batch (rows), T text tokens of a sequence, A tokens of an answer, N visual tokens of an image,
    V vocabulary, D hidden size of the language model, J levels of dispreferred answers of a record.
"""

__version__ = "0.1.0"
