"""Text while its tokens come: joined deltas are the answer, and nothing is told that is taken back."""

from __future__ import annotations

import random

import pytest

from hscr.answers import TokenLogprob
from hscr.model import VLM, decode_text
from hscr.saying import Saying

WORDS = ["left", " lobe", "\n", " ", "  ", "é", "中", "😀", "STOP", " yes", ".", "ST", "OP", "O"]


def ids_of(vlm: VLM, text: str) -> list[int]:
    return list(vlm.tokenizer(text, add_special_tokens=False)["input_ids"])


def told(vlm: VLM, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[Saying, list[str], list[int]]:
    """Say the tokens one by one: the deltas' texts and their tokens."""
    saying, texts, tokens = Saying(vlm, stop), [], []
    logprobs: list[TokenLogprob] = []
    for at, token in enumerate(ids):
        saying.push(token)
        logprobs.append(TokenLogprob(token, "", float(at), []))
        last = saying.stopped or at == len(ids) - 1
        delta = saying.delta(logprobs, last=last)
        if delta is not None:
            texts.append(delta.text)
            assert delta.logprobs is not None
            assert [x.token_id for x in delta.logprobs] == delta.token_ids
            assert [x.logprob for x in delta.logprobs] == [
                float(n) for n in range(len(tokens), len(tokens) + len(delta.token_ids))
            ]
            tokens += delta.token_ids
        if last:
            break
    return saying, texts, tokens


@pytest.mark.parametrize("seed", range(30))
def test_joined_deltas_are_the_answer(vlm: VLM, seed: int) -> None:
    """Random texts with characters of several tokens, spaces at both ends, and stop strings that begin and do not go on."""
    rng = random.Random(seed)
    text = "".join(rng.choices(WORDS, k=rng.randint(1, 12)))
    ids = ids_of(vlm, text) + [vlm.eos_id] * rng.randint(0, 1)
    for stop in ((), ("STOP",), ("\n", "TO"), ("😀",)):
        saying, texts, tokens = told(vlm, ids, stop)
        whole = text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))].strip()
        assert "".join(texts) == saying.text == whole
        assert tokens == ids[: saying.kept]
        assert not any("\ufffd" in t for t in texts)
        assert saying.stopped == any(s in text for s in stop)
        if not stop:
            assert whole == decode_text(vlm, ids)


def test_text_is_told_as_soon_as_it_stands(vlm: VLM) -> None:
    ids = ids_of(vlm, "There is a large lesion in the left lobe")
    _, texts, _ = told(vlm, ids)
    assert len(texts) > 4  # not all at the end
    assert texts[0] == vlm.tokenizer.decode(ids[:1])


def test_half_a_character_and_half_a_stop_string_are_held_back(vlm: VLM) -> None:
    saying = Saying(vlm, ["lobe"])
    for token in ids_of(vlm, "left lo"):
        saying.push(token)
    delta = saying.delta()
    assert delta is not None
    assert delta.text == "left"  # "lo" may become "lobe", and the space before it would then end the answer
    for token in ids_of(vlm, "st"):
        saying.push(token)
    delta = saying.delta(last=True)
    assert delta is not None
    assert delta.text == " lost"
    half = Saying(vlm)
    half.push(ids_of(vlm, "中")[0])
    assert half.delta() is None
    assert half.text == "\ufffd"  # an answer that ends there is what its tokens say


def test_tokens_of_a_stop_string_are_no_part_of_the_answer(vlm: VLM) -> None:
    ids = ids_of(vlm, "left") + ids_of(vlm, "\n\n") + ids_of(vlm, "right")
    saying, texts, tokens = told(vlm, ids, ("\n\n",))
    assert (saying.text, "".join(texts)) == ("left", "left")
    assert tokens == ids_of(vlm, "left")


def test_a_tokenizer_that_tidies_up_is_told_at_the_end(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm.tokenizer, "clean_up_tokenization_spaces", True)
    ids = ids_of(vlm, "There is a lesion")
    saying, texts, tokens = told(vlm, ids)
    assert texts == [saying.text]
    assert tokens == ids
