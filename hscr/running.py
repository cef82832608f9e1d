"""Answers while they are decoded: rows join and leave between steps, each with its own adapter, limits and random stream.

A step is one forward pass of one token a row over the padded caches (hscr/prefix.py). What a row says does not depend on which rows share
its steps, nor on when it came (float32). An exception in a step leaves nothing running; one in `join` leaves what ran as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hscr.answers import TokenLogprob
from hscr.decode import sampled
from hscr.lora_rows import LoraRows
from hscr.model import VLM
from hscr.plain_decoder import PlainDecoder, logits_of
from hscr.prefix import Rows
from hscr.prefix_cache import PrefixCache, begin
from hscr.saying import Saying
from hscr.visual_tokens import Prompt


@dataclass(eq=False)
class Row:
    """One answer: what it is asked, and what was said so far. `logprobs` (nats, temperature 1) are kept where `scored`."""

    prompt: Prompt
    adapter: str | None
    limit: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    salt: str = ""
    scored: bool = False
    n_top: int | None = None  # likeliest tokens noted at each place
    saying: Saying | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stream = torch.Generator().manual_seed(self.seed)


class Running:
    """The rows that are being decoded. Not thread-safe."""

    def __init__(
        self, vlm: VLM, lora: LoraRows, cache: PrefixCache | None = None, decoder: PlainDecoder | None = None
    ) -> None:
        self.vlm, self.lora, self.cache, self.decoder = vlm, lora, cache, decoder
        self.rows: list[Row] = []
        self._batch: Rows | None = None

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> list[Row]:
        """Compute the rows' prompts and their first tokens, and let them run with the others; those that end at once are returned.

        Raises ValueError where others run and the model's cache takes no newcomers.
        """
        if self._batch is not None and not self._batch.can_join:
            raise ValueError("nothing can join what runs: the model's cache forgets what lies before its window")
        begun = begin(
            self.vlm,
            self.lora,
            self.cache,
            [row.prompt for row in rows],
            [()] * len(rows),
            [row.adapter for row in rows],
            [row.salt for row in rows],
            decoder=self.decoder,
            new=max(row.limit for row in rows),
        )
        said = [[rows[i] for i in part.numbers] for part in begun]
        ended = [self._say(own, part.logits[:, -1], part.rows) for own, part in zip(said, begun, strict=True)]
        try:  # nothing joins before all have spoken
            parts = sorted(zip(begun, said, ended, strict=True), key=lambda part: -len(part[1]))
            for part, own, over in parts:  # the largest first: it need not be copied to take the others in
                self._take(part.rows, own, over)
        except Exception:
            self.clear()  # some layers may have the newcomers already
            raise
        return [row for over in ended for row in over]

    def _take(self, batch: Rows, rows: list[Row], ended: Sequence[Row]) -> None:
        """Let the rows of a batch run with the others, but those that ended."""
        if len(ended) == len(rows):
            return
        if ended:
            rows = [rows[i] for i in batch.leave([i for i, row in enumerate(rows) if row in ended])]
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.join(batch)
        self.rows += rows

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """One more token a row; those that ended are returned and have left."""
        assert self._batch is not None
        try:
            with self.lora.rows([row.adapter for row in self.rows]):
                logits = logits_of(self._batch, self.decoder, self.lora)[:, -1]
            ended = self._say(self.rows, logits, self._batch)
            self.leave(ended)
        except Exception:
            self.clear()
            raise
        return ended

    @torch.inference_mode()  # other rows move into the places that become free
    def leave(self, rows: Sequence[Row]) -> None:
        """Take rows out; those that do not run are passed over."""
        gone = [i for i, row in enumerate(self.rows) if row in rows]
        if len(gone) == len(self.rows):
            self.clear()
        elif gone:
            assert self._batch is not None
            self.rows = [self.rows[i] for i in self._batch.leave(gone)]

    def clear(self) -> None:
        self.rows, self._batch = [], None

    def _say(self, rows: Sequence[Row], logits: Tensor, batch: Rows) -> list[Row]:
        """Choose a token for each row from logits [n, V]; the rows that it ends."""
        noted = [i for i, row in enumerate(rows) if row.scored or row.n_top is not None]
        logprobs = (
            logits[noted].float().log_softmax(-1) if noted else None
        )  # before placeholders go: teacher forcing has them too
        logits[:, self.vlm.placeholder_ids] = -torch.inf  # an image placeholder without an image is no answer
        chosen = logits.argmax(-1).tolist()  # one transfer for all greedy rows
        for i, row in enumerate(rows):
            if row.temperature > 0:
                chosen[i] = sampled(logits[i], row.temperature, row.stream, row.top_p)
            row.ids.append(chosen[i])
            if row.saying is not None:
                row.saying.push(chosen[i])
        if logprobs is not None:
            self._note([rows[i] for i in noted], logprobs, [chosen[i] for i in noted])
        batch.append(chosen)
        return [row for row in rows if self._ended(row)]

    def _note(self, rows: Sequence[Row], logprobs: Tensor, chosen: Sequence[int]) -> None:
        index = torch.tensor(chosen, device=logprobs.device)[:, None]
        own = logprobs.gather(-1, index).squeeze(-1).tolist()
        most = max((row.n_top for row in rows if row.n_top is not None), default=0)
        values, tokens = logprobs.topk(most) if most else (logprobs[:, :0], index[:, :0])
        decode = self.vlm.tokenizer.decode
        for at, row in enumerate(rows):
            row.logprobs.append(own[at])
            if row.n_top is not None:
                pairs = zip(tokens[at, : row.n_top].tolist(), values[at, : row.n_top].tolist(), strict=True)
                top = [(decode([token]), value) for token, value in pairs]
                row.top.append(TokenLogprob(chosen[at], decode([chosen[at]]), own[at], top))

    def _ended(self, row: Row) -> bool:
        stopped = row.saying is not None and row.saying.stopped
        return stopped or row.ids[-1] in self.vlm.eos_ids or len(row.ids) == row.limit
