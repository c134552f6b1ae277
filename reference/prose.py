"""Plain prose from a seed: short scenes written by a small grammar (standard library only)."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import islice

from reference.split import Split, split_of

_SLOT = re.compile(r"\{(=?)(\w+)\}")

#: {x} is a fresh choice from the rule x; {=x} is chosen once in a scene and then kept.
_WORDS = {
    "she": "Mara|Johanna|Edith|Salome|Greta|Amina|Beatrix|Noemi|Ottilie|Vera",
    "he": "Anselm|Jakob|Viktor|Elias|Konrad|Matteo|Rashid|Simon|Tobias|Yusuf",
    "job": "a baker|a teacher|a sailor|a clockmaker|a gardener|a nurse|a carpenter|a painter|a miller|a doctor",
    "place": "the harbour|the old mill|the market|the river|the forest|the castle|the bridge|the station|the library"
    "|the hill",
    "room": "the kitchen|the workshop|the hall|the attic|the garden|the cellar|the tower|the stable",
    "time": "In the morning|At noon|In the evening|Late at night|Before sunrise|On the third day|After the storm"
    "|That winter",
    "weather": "rain|snow|fog|wind|sunlight|thunder|frost|mist",
    "weather_verb": "covered|filled|crossed|left|reached|surrounded",
    "thing": "letter|lantern|map|clock|violin|key|book|mirror|coat|basket|knife|bell|drawing|ladder|wheel",
    "quality": "small|heavy|broken|golden|strange|old|empty|bright|wooden|forgotten|quiet|cold|narrow|faded",
    "material": "iron|oak|silver|glass|paper|leather|stone|copper|wool|clay",
    "animal": "dog|cat|horse|crow|fox|owl|goat|heron|mouse|donkey",
    "animal_verb": "slept|waited|watched|listened|followed them|ran away|made no sound|came closer",
    "feeling": "afraid|happy|tired|curious|certain|lonely|proud|calm|angry|surprised",
    "manner": "slowly|carefully|without a word|with both hands|in silence|at once|for a long time"
    "|as if it were nothing",
    "kin": "brother|sister|mother|father|uncle|aunt|cousin|grandmother|neighbour|teacher",
    "action": "opened the window|closed the door|lit a fire|counted the coins|poured some tea|swept the floor"
    "|wrote a line|folded the cloth|looked at the sky|washed the cups|sharpened the tools|read the last page",
    "motion": "walked to|hurried to|returned to|looked toward|thought about|rode past|turned away from|sailed to",
    "abstract": "time|patience|silence|memory|courage|hope|work|trust|luck|truth",
    "claim": "is worth more than gold|grows in the dark|never comes alone|cannot be bought|asks for nothing"
    "|is lost in a moment|must be learned twice|belongs to everyone",
    "craft": "bread|cheese|rope|candles|paper|barrels|boats|bricks|honey|ink",
    "duration": "three days|a whole week|two hours|most of the year|one long night|forty years",
    "people": "the sailors|the children|the farmers|the travellers|the guards|the musicians|the merchants|the monks",
    "people_verb": "sang|argued|laughed|prayed|danced|waited|slept|worked",
    "colour": "red|blue|green|white|black|yellow|grey|brown",
}
_OPENINGS = (
    "{=hero} was {=job} who lived near {=place}.",
    "{time}, {=hero} {motion} {=place} with the {=quality} {=thing}.",
    "Nobody at {=place} remembered when {=hero} had become {=job}.",
    "{=hero} kept a {=quality} {=thing} of {material} in {=room}.",
    "For {duration}, {=hero} had been waiting near {=place}.",
)
_SENTENCES = (
    "{time}, {pron} {motion} {place}.",
    "{time} the {weather} {weather_verb} {=place}, and {people} {people_verb}.",
    "The {=thing} was {quality} and made of {material}.",
    "{Pron} {action} and {action} {manner}.",
    '"I am not {feeling}," said {=hero}, "only {feeling}."',
    '"Where is the {=thing}?" asked the {=kin}.',
    '"It is in {=room}, under the {colour} {thing}," {pron} answered.',
    "{Poss} {=kin} {action}, but {=hero} did not notice.",
    "In {=room} the {=animal} {animal_verb}.",
    "{Pron} had learned from {poss} {=kin} that {abstract} {claim}.",
    "Perhaps {abstract} {claim}, {pron} thought, and {abstract} {claim}.",
    "When the {=animal} {animal_verb}, {=hero} was {feeling}.",
    "A {colour} {animal} {animal_verb} beside the {quality} {thing}.",
    "To make good {craft} one needs {abstract}, {material} and {duration}.",
    "{people_cap} at {=place} made {craft} and sold {craft} for {duration}.",
    "If the {weather} came back, {pron} would have to leave {=place}.",
    "{Pron} took the {=thing}, {action}, and {motion} {=room}.",
    "There was a {quality} {thing} on the table and a {colour} {thing} by the door.",
    "The {=kin} was {feeling}, because the {=thing} was {quality}.",
    "After {duration} the {weather} was gone, and so was {poss} {=kin}.",
)
_ENDINGS = (
    "And so the {=thing} stayed in {=room}.",
    "That is how {=hero} came to be {=job}.",
    "Since then {people} have said that {abstract} {claim}.",
    "{Pron} never saw {=place} again.",
    "In the end {=hero} was {feeling}, and the {=animal} {animal_verb}.",
)
_RULES = {name: words.split("|") for name, words in _WORDS.items()}


def _scene(rng: random.Random) -> str:
    """One scene: an opening, three to six sentences and often an ending."""
    pronoun = rng.choice(("she", "he"))
    own = {"she": "her", "he": "his"}[pronoun]
    kept = {"hero": rng.choice(_RULES[pronoun])}
    fixed = {"pron": pronoun, "Pron": pronoun.capitalize(), "poss": own, "Poss": own.capitalize()}

    def fill(match: re.Match[str]) -> str:
        keep, name = match.groups()
        if keep:
            return kept.setdefault(name, rng.choice(_RULES[name]) if name in _RULES else "")
        if name == "people_cap":
            return rng.choice(_RULES["people"]).capitalize()
        return fixed.get(name) or rng.choice(_RULES[name])

    lines = [rng.choice(_OPENINGS), *rng.sample(_SENTENCES, rng.randint(3, 6))]
    if rng.random() < 0.7:
        lines.append(rng.choice(_ENDINGS))
    return " ".join(_SLOT.sub(fill, line) for line in lines)


def _stream(seed: int, split: Split) -> Iterator[str]:
    """The scenes of a split, without end."""
    rng = random.Random(f"prose {seed}")
    while True:
        text = _scene(rng)
        if split_of(text) == split:
            yield text


def scenes(seed: int, n: int, split: Split = "held_out") -> list[str]:
    """n scenes of a split, about 340 characters each; the same for the same arguments, always."""
    return list(islice(_stream(seed, split), n))


def prose(seed: int, n_chars: int, split: Split = "held_out") -> str:
    """Scenes of a split joined by blank lines and cut to n_chars characters."""
    parts: list[str] = []
    length = 0
    for text in _stream(seed, split):
        if length >= n_chars:
            break
        parts.append(text)
        length += len(text) + 2
    return "\n\n".join(parts)[:n_chars]
