"""Questions and answers about one slice, from its facts alone.

Owns every phrasing. A kind of question always asks for the same facts, whatever its wording, so that an answer can
be scored by its grounded words: the words that only the image can give, each with the alternatives of its category.
No alternative of a category ever occurs elsewhere in an answer (tested). Knows nothing of pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hscr.demo.slices import Facts
from hscr.demo.volumes import LOBES, PLANES, STRUCTURES

SIDES = ("left", "right")
SIZES = ("small", "large")
LOOKS = ("bright", "dark")
SIGNALS = ("hyperintense", "hypointense")
REGIONS = LOBES[1:]
PARTS = STRUCTURES[1:]
YES_NO = ("yes", "no")

_REGION_NOUNS = {"insular": ("cortex", "region"), "cerebellar": ("hemisphere", "region"), "deep": ("nuclei", "region")}
_PART_NOUNS = {"cingulate": " gyrus", "caudate": " nucleus"} | dict.fromkeys(REGIONS[:4], " lobe")


@dataclass(frozen=True)
class Asked:
    """One question with its reference answer."""

    kind: str
    template: str  # "q3/a1": which question and answer phrasing
    question: str
    answer: str
    grounded: tuple[tuple[str, tuple[str, ...]], ...]  # (word, its category's words)
    options: tuple[str, ...] = ()  # closed questions only

    @property
    def answer_type(self) -> str:
        return "closed" if self.options else "open"


# Questions and answers by kind. {…} in an answer is filled from the facts; {on} is a place like "in the left
# frontal lobe" (without a side in sagittal slices, where none can be known).
OPEN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plane": (
        (
            "In which plane was this slice acquired?",
            "What is the orientation of this image?",
            "Name the plane of the slice.",
            "Which imaging plane does this picture show?",
            "From which direction is the brain cut here?",
        ),
        (
            "This is an {plane} slice.",
            "The image shows an {plane} view of the brain.",
            "The brain was cut in the {plane} plane.",
            "It is an {plane} section.",
            "The orientation is {plane}.",
        ),
    ),
    "marker": (
        (
            "What lies under the marker?",
            "Which structure does the cross point to?",
            "Name the structure at the marker.",
            "What anatomy is marked by the white cross?",
            "On which part of the brain was the marker placed?",
            "Where in the brain is the cross?",
            "Identify the marked structure.",
        ),
        (
            "The marker lies on the {spart}.",
            "The cross points to the {spart}.",
            "Under the marker is the {spart}.",
            "The marked structure is the {spart}.",
            "This is the {spart}.",
            "The white cross was placed on the {spart}.",
        ),
    ),
    "describe": (
        (
            "Describe the lesion.",
            "What abnormality is seen in this slice?",
            "Report the finding.",
            "Please describe the abnormal finding and its location.",
            "What does the scan show?",
            "Give a short report of this image.",
            "What is abnormal here?",
            "Summarise the finding in one sentence.",
        ),
        (
            "There is a {size} {look} lesion {on}.",
            "The slice shows a {size} {look} lesion {on}.",
            "A {size} {look} lesion is seen {on}.",
            "Finding: a {size}, {look} focus {on}.",
            "A {size} {look} area can be seen {on}.",
            "The scan reveals a {size} {look} lesion {on}, and the rest is unremarkable.",
            "One {size} {look} abnormality is present {on}.",
            "We see a {size} {look} lesion {on}, with no other finding.",
        ),
    ),
    "where": (
        (
            "Where is the lesion?",
            "Where does the abnormality lie?",
            "Locate the lesion.",
            "What is the location of the lesion?",
            "In what part of the brain is the abnormal focus?",
            "Give the position of the lesion.",
            "Where would you point to show the abnormality?",
        ),
        (
            "The lesion lies {on}.",
            "It is located {on}.",
            "The abnormality is {on}.",
            "The abnormal focus is seen {on}.",
            "One finds it {on}.",
            "The lesion can be seen {on}.",
        ),
    ),
    "region": (
        (
            "Which region of the brain is affected?",
            "Which lobe or region holds the lesion?",
            "What region does the lesion involve?",
            "Name the affected region.",
            "The lesion belongs to which brain region?",
        ),
        (
            "The {region} region is affected.",
            "The lesion involves the {region} region.",
            "It is the {region} region.",
            "The affected tissue is {region}.",
            "The lesion belongs to the {region} region.",
        ),
    ),
    "side": (
        (
            "Which side of the patient is affected?",
            "Which hemisphere holds the lesion?",
            "On which side of the brain is the abnormality?",
            "The image shows the patient in neurological convention: which side is abnormal?",
            "Name the side of the lesion.",
        ),
        (
            "The {side} side is affected.",
            "The lesion is on the {side} side.",
            "It lies in the {side} hemisphere.",
            "The abnormality is seen on the {side}.",
            "The {side} hemisphere holds the lesion.",
        ),
    ),
    "size": (
        (
            "How big is the lesion?",
            "What is the size of the lesion?",
            "Describe the extent of the abnormality.",
            "Judge the size of the abnormal focus.",
            "How much tissue does the lesion take up?",
        ),
        (
            "The lesion is {size}.",
            "It is a {size} lesion.",
            "The abnormality is {size}.",
            "A {size} focus is seen.",
            "The extent of the lesion is {size}.",
        ),
    ),
    "look": (
        (
            "How does the lesion look compared with normal tissue?",
            "Describe the brightness of the lesion.",
            "What is the shade of the abnormality?",
            "How does the abnormal focus appear?",
            "What is the grey level of the lesion like?",
        ),
        (
            "The lesion is {look}.",
            "It looks {look} against the normal tissue.",
            "The abnormality appears {look}.",
            "A {look} focus is seen.",
            "Compared with its surroundings the lesion is {look}.",
        ),
    ),
    "signal": (
        (
            "What is the signal of the lesion?",
            "Describe the signal intensity of the abnormality.",
            "Report the lesion's signal behaviour.",
            "Which signal does the abnormal focus give?",
        ),
        (
            "The lesion is {signal}.",
            "The signal is {signal}.",
            "It gives a {signal} signal.",
            "The abnormality appears {signal} to normal tissue.",
        ),
    ),
}

# Phrases around questions and answers: language that carries no fact, as people write it.
PREAMBLES = (
    "Looking at this scan, {}",
    "In your opinion, {}",
    "A short question: {}",
    "For the report, {}",
    "Dear colleague, {}",
    "As a radiologist, {}",
    "Please tell me: {}",
    "Judging from the picture alone, {}",
    "Before the ward round I must know: {}",
    "From this magnetic resonance image, {}",
    "My student asks: {}",
    "We need a second reading: {}",
)
CLOSERS = (
    "The surrounding tissue keeps its usual shape.",
    "No second lesion is seen.",
    "Nothing else stands out.",
    "The remaining brain looks healthy.",
    "There is no midline shift.",
    "Comparison with earlier studies is advised.",
    "Follow up if symptoms persist.",
    "Its margin is somewhat irregular.",
    "This should be confirmed by an expert.",
    "Contrast medium was not given.",
)

CLOSED: dict[str, tuple[str, ...]] = {
    "plane_which": (
        "Is this slice {a} or {b}?",
        "Which is it, an {a} or a {b} view?",
        "{A} or {b} plane?",
    ),
    "plane_yesno": ("Is this an {a} slice?", "Does the image show an {a} view?", "Was the brain cut in the {a} plane?"),
    "visible": (
        "Is the {part} visible in this slice?",
        "Can the {part} be seen here?",
        "Does this image show the {part}?",
        "Is any of the {part} in the picture?",
        "Do you see the {part}?",
    ),
    "marker_side": (
        "Is the marker on the left or the right side?",
        "Which side does the cross lie on, left or right?",
        "Marker: left or right hemisphere?",
    ),
    "marker_yesno": (
        "Does the marker lie on the {part}?",
        "Is the cross on the {part}?",
        "Is the {part} the marked structure?",
    ),
    "present": (
        "Is there a lesion in this slice?",
        "Do you see any abnormality?",
        "Does the scan show a lesion?",
        "Is this slice abnormal?",
        "Can a lesion be seen?",
    ),
    "side_which": (
        "Is the lesion on the left or the right?",
        "Left or right: where is the lesion?",
        "Does the abnormality lie in the left or in the right hemisphere?",
        "Which hemisphere is abnormal, left or right?",
    ),
    "side_yesno": (
        "Is the lesion on the {a} side?",
        "Does the lesion lie in the {a} hemisphere?",
        "Is the {a} hemisphere affected?",
    ),
    "size_which": (
        "Is the lesion small or large?",
        "Small or large: how big is the abnormality?",
        "Would you call the lesion small or large?",
    ),
    "look_which": (
        "Is the lesion bright or dark?",
        "Does the lesion look bright or dark?",
        "Bright or dark: how does the abnormality appear?",
    ),
    "region_yesno": (
        "Is the lesion {a}?",
        "Does the lesion lie in the {a} region?",
        "Is the {a} region affected?",
    ),
}
KINDS = (*OPEN, *CLOSED)


def kinds_for(facts: Facts) -> tuple[str, ...]:
    """The kinds of question that can be asked of a slice with these facts."""
    kinds = ["plane", "plane_which", "plane_yesno", "visible", "present"]
    if facts.marker is not None:
        kinds += ["marker", "marker_yesno"] + (["marker_side"] if facts.marker.side else [])
    if facts.lesion is not None:
        kinds += ["describe", "where", "region", "size", "look", "signal", "size_which", "look_which", "region_yesno"]
        kinds += ["side", "side_which", "side_yesno"] if facts.lesion.side else []
    return tuple(kinds)


def ask(rng: np.random.Generator, facts: Facts, kind: str, part: str | None = None) -> Asked:
    """One question of this kind with its answer. `part` fixes the structure of a "visible" question.

    Raises ValueError when the facts cannot answer that kind.
    """
    if kind not in kinds_for(facts):
        raise ValueError(f"kind {kind!r} cannot be asked of {facts}")
    asked = _ask_open(rng, facts, kind) if kind in OPEN else _ask_closed(rng, facts, kind, part)
    if rng.random() < 0.25:
        question = _pick(rng, PREAMBLES)[1].format(asked.question[0].lower() + asked.question[1:])
        asked = replace(asked, question=question)
    if kind in ("describe", "where") and rng.random() < 0.2:
        asked = replace(asked, answer=f"{asked.answer} {_pick(rng, CLOSERS)[1]}")
    return asked


def _pick(rng: np.random.Generator, items: tuple[str, ...]) -> tuple[int, str]:
    index = int(rng.integers(len(items)))
    return index, items[index]


def _ask_open(rng: np.random.Generator, facts: Facts, kind: str) -> Asked:
    questions, answers = OPEN[kind]
    q, question = _pick(rng, questions)
    a, template = _pick(rng, answers)
    slots: dict[str, str] = {"plane": facts.plane}
    grounded: list[tuple[str, tuple[str, ...]]] = [(facts.plane, PLANES)] if kind == "plane" else []
    if facts.lesion is not None:
        lesion = facts.lesion
        noun = _REGION_NOUNS.get(lesion.region, ("lobe", "region"))[int(rng.integers(2))]
        side = f"{lesion.side} " if lesion.side else ""
        signal = SIGNALS[LOOKS.index(lesion.look)]
        slots |= {"size": lesion.size, "look": lesion.look, "signal": signal, "side": lesion.side}
        slots |= {"region": lesion.region, "on": f"in the {side}{lesion.region} {noun}"}
        place = ([(lesion.side, SIDES)] if lesion.side else []) + [(lesion.region, REGIONS)]
        grounded += {
            "describe": [(lesion.size, SIZES), (lesion.look, LOOKS), *place],
            "where": place,
            "region": [(lesion.region, REGIONS)],
            "side": [(lesion.side, SIDES)],
            "size": [(lesion.size, SIZES)],
            "look": [(lesion.look, LOOKS)],
            "signal": [(signal, SIGNALS)],
        }.get(kind, [])
    if kind == "marker" and facts.marker is not None:
        marker = facts.marker
        part = marker.structure + _PART_NOUNS.get(marker.structure, "")
        slots["spart"] = f"{marker.side} {part}" if marker.side else part
        grounded = ([(marker.side, SIDES)] if marker.side else []) + [(marker.structure, PARTS)]
    answer = template.format(**slots)
    if facts.plane != "axial":
        answer = answer.replace(f"an {facts.plane}", f"a {facts.plane}")
    return Asked(kind, f"q{q}/a{a}", question, answer, tuple(grounded))


def _ask_closed(rng: np.random.Generator, facts: Facts, kind: str, part: str | None) -> Asked:
    q, question = _pick(rng, CLOSED[kind])
    answer, options, slots = _CLOSED_FACTS[kind](rng, facts, part)
    text = question.format(**slots)
    for word in ("coronal", "sagittal"):
        text = text.replace(f"an {word}", f"a {word}")
    text = text.replace("or a axial", "or an axial")
    return Asked(kind, f"q{q}", text, answer, ((answer, options),), options)


_Closed = tuple[str, tuple[str, ...], dict[str, str]]


def _plane_which(rng: np.random.Generator, facts: Facts, part: str | None) -> _Closed:
    other = _other(rng, PLANES, facts.plane)
    pair = (facts.plane, other) if rng.random() < 0.5 else (other, facts.plane)
    return facts.plane, pair, {"a": pair[0], "b": pair[1], "A": pair[0].capitalize()}


def _true_or_other(rng: np.random.Generator, words: tuple[str, ...], word: str) -> tuple[str, str]:
    """(yes, the word itself) or (no, another of its category), evenly."""
    return ("yes", word) if rng.random() < 0.5 else ("no", _other(rng, words, word))


def _other(rng: np.random.Generator, words: tuple[str, ...], word: str) -> str:
    return _pick(rng, tuple(w for w in words if w != word))[1]


def _yes_no(attribute: Callable[[Facts], tuple[tuple[str, ...], str]], slot: str) -> Callable[..., _Closed]:
    def facts_of(rng: np.random.Generator, facts: Facts, part: str | None) -> _Closed:
        words, word = attribute(facts)
        answer, asked = _true_or_other(rng, words, word)
        return answer, YES_NO, {slot: asked + (_PART_NOUNS.get(asked, "") if slot == "part" else "")}

    return facts_of


def _visible(rng: np.random.Generator, facts: Facts, part: str | None) -> _Closed:
    if part is None:  # a rough balance of yes and no; the data sets fix `part` themselves and are exact
        seen = rng.random() < 0.5 if facts.absent else True
        part = _pick(rng, tuple(sorted(facts.present if seen else facts.absent)))[1]
    return "yes" if part in facts.present else "no", YES_NO, {"part": part + _PART_NOUNS.get(part, "")}


def _which(attribute: Callable[[Facts], str], words: tuple[str, ...]) -> Callable[..., _Closed]:
    return lambda rng, facts, part: (attribute(facts), words, {})


_CLOSED_FACTS: dict[str, Callable[..., _Closed]] = {
    "plane_which": _plane_which,
    "plane_yesno": _yes_no(lambda f: (PLANES, f.plane), "a"),
    "visible": _visible,
    "marker_side": _which(lambda f: f.marker.side if f.marker else "", SIDES),
    "marker_yesno": _yes_no(lambda f: (PARTS, f.marker.structure if f.marker else ""), "part"),
    "present": _which(lambda f: "yes" if f.lesion else "no", YES_NO),
    "side_which": _which(lambda f: f.lesion.side if f.lesion else "", SIDES),
    "side_yesno": _yes_no(lambda f: (SIDES, f.lesion.side if f.lesion else ""), "a"),
    "size_which": _which(lambda f: f.lesion.size if f.lesion else "", SIZES),
    "look_which": _which(lambda f: f.lesion.look if f.lesion else "", LOOKS),
    "region_yesno": _yes_no(lambda f: (REGIONS, f.lesion.region if f.lesion else ""), "a"),
}
