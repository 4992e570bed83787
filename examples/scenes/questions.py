"""Questions about a scene: templates whose answer is chosen first, so that the question alone does not tell it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from random import Random

from .scene import VALUES, Scene, Thing

ATTRIBUTES = tuple(VALUES)
LARGEST_COUNT = 4
MARGIN = 10.0
"""Pixels by which one object is left of another, at least, for a question to ask it."""
SIDES = ("left", "right", "above", "below")
ANSWERS = (
    "yes",
    "no",
    *map(str, range(LARGEST_COUNT + 1)),
    *(value for values in VALUES.values() for value in values),
    *SIDES,
)
"""Every answer; an answer's place is its label."""

PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}


@dataclass(frozen=True)
class Question:
    """A question in lower case, words apart by spaces.

    Attributes:
        kind: its template, one of `SHARES`.
        text: its words.
        answer: one of `ANSWERS`.
        mentions: the place of a phrase's last word among the words, and the object that the phrase picks out.
    """

    kind: str
    text: str
    answer: str
    mentions: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Phrase:
    """Attributes that objects must have, as words: `small red things`."""

    values: tuple[tuple[str, str], ...]

    def fits(self, thing: Thing) -> bool:
        """Whether an object has them all."""
        return all(thing.value(attribute) == value for attribute, value in self.values)

    def words(self, plural: bool = False) -> str:
        """`small red star`, or `small red stars`."""
        values = dict(self.values)
        shape = values.pop("shape", None)
        noun = ("things" if plural else "thing") if shape is None else PLURALS[shape] if plural else shape
        return " ".join([values[name] for name in ATTRIBUTES if name in values] + [noun])


Template = Callable[[Scene, Random], "Question | None"]


def ask(scene: Scene, rng: Random, count: int) -> list[Question]:
    """Different questions about a scene.

    A template is drawn by `SHARES`, and its answer next; where the scene has no such question another is drawn.
    """
    asked: dict[str, Question] = {}
    kinds, shares = list(SHARES), [share for share, _ in SHARES.values()]
    while len(asked) < count:
        (kind,) = rng.choices(kinds, shares)
        question = SHARES[kind][1](scene, rng)
        if question is not None:
            asked.setdefault(question.text, question)
    return list(asked.values())


def _phrases(count: int, without: str | None = None) -> Iterator[tuple[str, ...]]:
    """The attributes of every phrase that names `count`, at most two of them before the noun."""
    for names in combinations([name for name in ATTRIBUTES if name != without], count):
        if len([name for name in names if name != "shape"]) <= 2:
            yield names


def _of(thing: Thing, names: tuple[str, ...]) -> Phrase:
    return Phrase(tuple((name, thing.value(name)) for name in names))


def _picking(scene: Scene, number: int, rng: Random, without: str | None = None) -> Phrase | None:
    """A phrase that one object alone fits, of the fewest attributes or one more."""
    found: list[Phrase] = []
    fewest = len(ATTRIBUTES)
    for count in range(1, len(ATTRIBUTES)):
        if count > fewest + 1:
            break
        for names in _phrases(count, without):
            phrase = _of(scene.things[number], names)
            if sum(map(phrase.fits, scene.things)) == 1:
                found.append(phrase)
                fewest = min(fewest, count)
    return rng.choice(found) if found else None


def _random_phrase(rng: Random, count: int) -> Phrase:
    names = rng.choice(list(_phrases(count)))
    return Phrase(tuple((name, rng.choice(VALUES[name])) for name in names))


def _counted(scene: Scene, phrase: Phrase) -> int:
    return sum(map(phrase.fits, scene.things))


def _exists(scene: Scene, rng: Random) -> Question | None:
    wanted, count = rng.random() < 0.5, rng.choice((1, 2, 2, 3))
    for _ in range(40):
        phrase = _random_phrase(rng, count)
        if (_counted(scene, phrase) > 0) == wanted:
            return Question("exists", f"is there any {phrase.words()}", "yes" if wanted else "no")
    return None


def _count(scene: Scene, rng: Random) -> Question | None:
    wanted, count = rng.choices(range(LARGEST_COUNT + 1), (1, 1, 1, 1.3, 1.6))[0], rng.choice((1, 1, 2))
    for _ in range(60):
        phrase = _random_phrase(rng, count)
        if _counted(scene, phrase) == wanted:
            return Question("count", f"how many {phrase.words(plural=True)} are there", str(wanted))
    return None


def _attribute(name: str) -> Template:
    def template(scene: Scene, rng: Random) -> Question | None:
        wanted = rng.choice(VALUES[name])
        numbers = [i for i, thing in enumerate(scene.things) if thing.value(name) == wanted]
        if not numbers:
            return None
        number = rng.choice(numbers)
        phrase = _picking(scene, number, rng, without=name)
        return phrase and _about([(phrase, number)], name, f"what {name} is the {{}}", wanted)

    return template


def _about(pairs: list[tuple[Phrase, int]], kind: str, pattern: str, answer: str) -> Question:
    """A question of a pattern with a place for each phrase, and what its phrases mention."""
    text = pattern.format(*(phrase.words() for phrase, _ in pairs))
    mentions, start = [], 0
    for phrase, number in pairs:
        words = phrase.words()
        end = text.index(words, start) + len(words)
        mentions.append((len(text[:end].split()) - 1, number))
        start = end
    return Question(kind, text, answer, tuple(mentions))


def _two(scene: Scene, rng: Random, suits: Callable[[Thing, Thing], bool]) -> list[int] | None:
    """Two objects, drawn from the ordered pairs that suit."""
    pairs = [
        [i, j]
        for i, one in enumerate(scene.things)
        for j, other in enumerate(scene.things)
        if i != j and suits(one, other)
    ]
    return rng.choice(pairs) if pairs else None


def _of_two(
    scene: Scene,
    rng: Random,
    suits: Callable[[Thing, Thing], bool],
    kind: str,
    pattern: str,
    answer: str,
    without: str | None = None,
) -> Question | None:
    numbers = _two(scene, rng, suits)
    if numbers is None:
        return None
    phrases = [_picking(scene, number, rng, without) for number in numbers]
    pairs = [(phrase, number) for phrase, number in zip(phrases, numbers, strict=True) if phrase is not None]
    return _about(pairs, kind, pattern, answer) if len(pairs) == 2 else None


def _larger(scene: Scene, rng: Random) -> Question | None:
    wanted = rng.random() < 0.5

    def suits(one: Thing, other: Thing) -> bool:
        return (one.size == "large" and other.size == "small") == wanted

    return _of_two(scene, rng, suits, "larger", "is the {} larger than the {}", "yes" if wanted else "no", "size")


def _more(scene: Scene, rng: Random) -> Question | None:
    wanted = rng.random() < 0.5
    for _ in range(40):
        name = rng.choice(("colour", "texture", "shape"))
        one, other = (Phrase(((name, value),)) for value in rng.sample(VALUES[name], 2))
        counts = _counted(scene, one), _counted(scene, other)
        if max(counts) and (counts[0] > counts[1]) == wanted:
            text = f"are there more {one.words(plural=True)} than {other.words(plural=True)}"
            return Question("more", text, "yes" if wanted else "no")
    return None


def _is_beside(one: Thing, other: Thing, side: str) -> bool:
    """Whether one object is on that side of the other by the margin."""
    return {
        "left": other.x - one.x,
        "right": one.x - other.x,
        "above": other.y - one.y,
        "below": one.y - other.y,
    }[side] >= MARGIN


OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def _relation(scene: Scene, rng: Random) -> Question | None:
    wanted, side = rng.random() < 0.5, rng.choice(SIDES)
    true_side = side if wanted else OPPOSITE[side]
    link = f"{side} of" if side in ("left", "right") else side

    def suits(one: Thing, other: Thing) -> bool:
        return _is_beside(one, other, true_side)

    return _of_two(scene, rng, suits, "relation", f"is the {{}} {link} the {{}}", "yes" if wanted else "no")


def _where(scene: Scene, rng: Random) -> Question | None:
    side = rng.choice(SIDES)

    def suits(one: Thing, other: Thing) -> bool:
        across, along = abs(one.x - other.x), abs(one.y - other.y)
        if side in ("above", "below"):
            across, along = along, across
        return _is_beside(one, other, side) and across >= 1.5 * along

    return _of_two(scene, rng, suits, "where", "where is the {} from the {}", side)


def _same(scene: Scene, rng: Random) -> Question | None:
    wanted, name = rng.random() < 0.5, rng.choice(ATTRIBUTES)

    def suits(one: Thing, other: Thing) -> bool:
        return (one.value(name) == other.value(name)) == wanted

    pattern = f"do the {{}} and the {{}} have the same {name}"
    return _of_two(scene, rng, suits, "same", pattern, "yes" if wanted else "no", name)


SHARES: dict[str, tuple[float, Template]] = {
    "exists": (0.08, _exists),
    "count": (0.16, _count),
    "colour": (0.26, _attribute("colour")),
    "shape": (0.22, _attribute("shape")),
    "texture": (0.11, _attribute("texture")),
    "size": (0.05, _attribute("size")),
    "larger": (0.06, _larger),
    "more": (0.05, _more),
    "relation": (0.06, _relation),
    "where": (0.11, _where),
    "same": (0.08, _same),
}
"""How often each template is drawn; more often than it shall be asked, where scenes often have no such question."""
