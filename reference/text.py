"""Text made from a seed: arithmetic word problems with worked answers, and prose (from reference.prose).

Every generator is deterministic and needs the standard library only; each text belongs to one split for good.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from reference.prose import prose, scenes
from reference.split import Split, split_of

__all__ = ["Problem", "extract_answer", "format_prompt", "problems", "prose", "scenes"]

_VOCABULARY = {
    "names": "Mia Tom Ann Ben Lena Omar Ruth Ivan Nora Paul Zoe Sam Ella Hugo Ada Leo Iris Max Clara Finn Maya Carl "
    "Rosa Nils Eva Karim Tess Otto Lucy Ravi",
    "items": "apples pears plums lemons shells stones coins stamps cards marbles buttons pencils books stickers beads "
    "ribbons candles cookies muffins eggs nuts flowers seeds tickets photos badges keys cups plates bottles",
}
NAMES, ITEMS = (words.split() for words in _VOCABULARY.values())


@dataclass(frozen=True)
class Problem:
    """A word problem: the prompt up to "Answer:", the worked answer that follows it, and the number it ends in."""

    prompt: str
    worked: str
    answer: int


@dataclass(frozen=True)
class Scene:
    """The sentences of one kind of story; {n}, {a} and {b} are numbers, {who} a name and {item} a plural noun."""

    start: tuple[str, ...]
    add: tuple[str, ...]
    subtract: tuple[str, ...]
    multiply: tuple[str, ...]
    packs: tuple[str, ...]
    divide: tuple[str, ...]
    ask: tuple[str, ...]


SCENES = (
    Scene(
        start=("{who} has {n} {item}.", "{who} owns {n} {item}.", "There are {n} {item} in the box of {who}."),
        add=("{who} finds {n} more.", "A friend brings {n} more.", "Then {who} buys {n} more {item}."),
        subtract=("{who} gives {n} away.", "{who} loses {n} of them.", "A neighbour takes {n} {item}."),
        multiply=("Over the summer the number grows to {a} times as many.", "Soon {who} has {a} times as many."),
        packs=("{who} buys {a} bags with {b} {item} each.", "{a} friends bring {b} {item} each."),
        divide=(
            "{who} shares them equally among {a} children. How many {item} does each child get?",
            "{who} puts them equally into {a} boxes. How many {item} are in each box?",
        ),
        ask=("How many {item} does {who} have now?", "How many {item} are there in the end?"),
    ),
    Scene(
        start=("{who} has saved {n} dollars.", "{who} starts the week with {n} dollars."),
        add=(
            "{who} earns {n} dollars in the garden.",
            "An aunt sends {n} dollars.",
            "{who} sells a toy for {n} dollars.",
        ),
        subtract=(
            "{who} spends {n} dollars on a gift.",
            "A new lamp costs {who} {n} dollars.",
            "{who} pays {n} dollars.",
        ),
        multiply=("A year later there is {a} times as much.",),
        packs=(
            "{who} works {a} hours for {b} dollars an hour.",
            "{who} sells {a} {item} for {b} dollars each.",
        ),
        divide=("{who} divides the money equally into {a} jars. How many dollars are in each jar?",),
        ask=("How many dollars does {who} have now?", "How much money is left?"),
    ),
    Scene(
        start=("A shop has {n} {item} in the morning.", "A shop opens with {n} {item}."),
        add=("A truck brings {n} more.", "The owner finds {n} more in the cellar."),
        subtract=("By noon {n} {item} are sold.", "{who} buys {n} of them.", "Later {n} are broken."),
        multiply=("The next order makes it {a} times as many.",),
        packs=("Then {a} crates of {b} {item} arrive.", "{a} drivers deliver {b} {item} each."),
        divide=("The rest is packed equally into {a} crates. How many {item} are in each crate?",),
        ask=("How many {item} does the shop have in the evening?", "How many {item} are left in the shop?"),
    ),
    Scene(
        start=("A bus leaves with {n} people.", "There are {n} people on a ferry."),
        add=("At the first stop {n} people get on.", "Then {n} more people come aboard."),
        subtract=("At the market {n} people get off.", "At the bridge {n} people leave."),
        multiply=("At the station it fills to {a} times as many people.",),
        packs=("Then {a} groups of {b} people get on.", "{a} families of {b} get on."),
        divide=("The people form {a} equal groups. How many people are in each group?",),
        ask=("How many people are there now?", "How many people arrive at the end?"),
    ),
)


def _chain(rng: random.Random) -> tuple[list[str], list[str], int]:
    """A story that changes one quantity two to four times: sentences, equations, the last value."""
    scene = rng.choice(SCENES)
    words: dict[str, str | int] = {"who": rng.choice(NAMES), "item": rng.choice(ITEMS)}
    value = rng.randint(5, 90)
    story = [rng.choice(scene.start).format(n=value, **words)]
    work: list[str] = []
    steps = rng.randint(2, 4)
    while len(work) < steps:
        left = steps - len(work)
        kind = rng.choice(("add", "subtract", "subtract", "multiply", "packs", "divide"))
        if kind == "add":
            n = rng.randint(2, 99)
            story.append(rng.choice(scene.add).format(n=n, **words))
            work.append(f"{value}+{n}={value + n}.")
            value += n
        elif kind == "subtract" and value > 6:
            n = rng.randint(2, value - 2)
            story.append(rng.choice(scene.subtract).format(n=n, **words))
            work.append(f"{value}-{n}={value - n}.")
            value -= n
        elif kind == "multiply" and value <= 60:
            a = rng.randint(2, 4)
            story.append(rng.choice(scene.multiply).format(a=a, **words))
            work.append(f"{value}*{a}={value * a}.")
            value *= a
        elif kind == "packs" and left >= 2:
            a, b = rng.randint(2, 9), rng.randint(2, 12)
            story.append(rng.choice(scene.packs).format(a=a, b=b, **words))
            work += [f"{a}*{b}={a * b}.", f"{value}+{a * b}={value + a * b}."]
            value += a * b
        elif kind == "divide" and left == 1 and value <= 150:
            parts = [a for a in range(2, 10) if value % a == 0 and value > a]
            if parts:
                a = rng.choice(parts)
                work.append(f"{value}/{a}={value // a}.")
                return [*story, rng.choice(scene.divide).format(a=a, **words)], work, value // a
    return [*story, rng.choice(scene.ask).format(**words)], work, value


def _compare(rng: random.Random) -> tuple[list[str], list[str], int]:
    """Three people, each count told by the one before: sentences, equations, the last value."""
    first, second, third = rng.sample(NAMES, 3)
    item = rng.choice(ITEMS)
    x, d, k = rng.randint(4, 60), rng.randint(2, 30), rng.randint(2, 4)
    more = rng.random() < 0.5 or d >= x
    y = x + d if more else x - d
    story = [f"{first} has {x} {item}.", f"{second} has {d} {'more' if more else 'fewer'} than {first}."]
    story.append(f"{third} has {k} times as many as {second}.")
    work = [f"{x}{'+' if more else '-'}{d}={y}.", f"{y}*{k}={y * k}."]
    if rng.random() < 0.5:
        return [*story, f"How many {item} does {third} have?"], work, y * k
    story.append(f"How many {item} do {first} and {third} have together?")
    return story, [*work, f"{x}+{y * k}={x + y * k}."], x + y * k


def _shopping(rng: random.Random) -> tuple[list[str], list[str], int]:
    """Two purchases and the change: sentences, equations, the last value."""
    who, (item, other) = rng.choice(NAMES), rng.sample(ITEMS, 2)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    p, q = rng.randint(2, 12), rng.randint(2, 12)
    total = a * p + b * q
    story = [f"{who} buys {a} {item} for {p} dollars each and {b} {other} for {q} dollars each."]
    work = [f"{a}*{p}={a * p}.", f"{b}*{q}={b * q}.", f"{a * p}+{b * q}={total}."]
    if rng.random() < 0.5:
        return [*story, f"How many dollars does {who} pay?"], work, total
    paid = total + rng.randint(1, 60)
    story.append(f"{who} pays with {paid} dollars. How many dollars does {who} get back?")
    return story, [*work, f"{paid}-{total}={paid - total}."], paid - total


def _journey(rng: random.Random) -> tuple[list[str], list[str], int]:
    """Distances of a trip: sentences, equations, the last value."""
    who = rng.choice(NAMES)
    speed, hours, walk, days = rng.randint(3, 30), rng.randint(2, 6), rng.randint(2, 40), rng.randint(2, 4)
    ridden = speed * hours
    story = [f"{who} rides {hours} hours at {speed} km an hour and then walks {walk} km."]
    work = [f"{speed}*{hours}={ridden}.", f"{ridden}+{walk}={ridden + walk}."]
    if rng.random() < 0.5 or ridden + walk > 90:
        return [*story, f"How many km does {who} travel?"], work, ridden + walk
    story.append(f"{who} does this on {days} days. How many km is that in all?")
    return story, [*work, f"{ridden + walk}*{days}={(ridden + walk) * days}."], (ridden + walk) * days


_STORIES: tuple[Callable[[random.Random], tuple[list[str], list[str], int]], ...]
_STORIES = (_chain, _chain, _chain, _chain, _compare, _shopping, _journey)


def format_prompt(question: str) -> str:
    """The prompt the model was trained on for a question in plain words."""
    return f"Question: {question}\nAnswer:"


def problems(seed: int, n: int, split: Split = "held_out") -> list[Problem]:
    """n different problems of a split, of two to four steps each; the same for the same arguments, always."""
    rng = random.Random(f"problems {seed}")
    seen: dict[str, Problem] = {}
    while len(seen) < n:
        story, work, answer = rng.choice(_STORIES)(rng)
        prompt = format_prompt(" ".join(story))
        if split_of(prompt) == split:
            seen[prompt] = Problem(prompt, f" {' '.join(work)} #### {answer}", answer)
    return list(seen.values())


def extract_answer(text: str) -> int | None:
    """The number after the first "####" of a completion, or None where there is none."""
    match = re.search(r"####\s*(-?\d+)", text)
    return int(match.group(1)) if match else None
