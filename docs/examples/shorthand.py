"""Three domains of shorthand, made by rules: prescriptions, aviation weather, flats to let.

A pair is a note as people write it and the sentence it stands for. Parts are drawn at random, so
that passages of a domain differ in details and a query must be understood to find its own. No
drug order, report or flat is real. Knows nothing of models.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from docs.examples.retrieval import Pair

Choices = tuple[tuple[str, str], ...]
"""Shorthand and what it means."""

DRUGS = ("amoxicillin", "ibuprofen", "metformin", "ramipril", "omeprazole", "codeine", "warfarin")
FORMS: Choices = (
    ("i tab", "Take one tablet"),
    ("ii tabs", "Take two tablets"),
    ("i cap", "Take one capsule"),
    ("ii caps", "Take two capsules"),
    ("5 mL", "Take five millilitres"),
)
ROUTES: Choices = (("po", "by mouth"), ("sl", "under the tongue"), ("pr", "rectally"))
FREQUENCIES: Choices = (
    ("od", "once a day"),
    ("bid", "twice a day"),
    ("tid", "three times a day"),
    ("qid", "four times a day"),
    ("q4h", "every four hours"),
    ("q8h", "every eight hours"),
    ("qhs", "at bedtime"),
    ("qam", "every morning"),
    ("qod", "every other day"),
)
CONDITIONS: Choices = (
    ("ac", "before meals"),
    ("pc", "after meals"),
    ("prn pain", "when needed for pain"),
    ("prn N/V", "when needed for nausea or vomiting"),
    ("x 5d", "for five days"),
    ("x 2wk", "for two weeks"),
    ("ut dict", "as directed"),
)


def make_prescription(draw: random.Random) -> Pair:
    """Return such as `amoxicillin i cap po tid x 5d`."""
    drug = draw.choice(DRUGS)
    form, route, frequency, condition = _draw(draw, FORMS, ROUTES, FREQUENCIES, CONDITIONS)
    return Pair(
        f"{drug} {form[0]} {route[0]} {frequency[0]} {condition[0]}",
        f"{form[1]} of {drug} {route[1]} {frequency[1]}, {condition[1]}.",
    )


VISIBILITIES: Choices = (
    ("1/2SM", "half a mile"),
    ("1SM", "one mile"),
    ("3SM", "three miles"),
    ("10SM", "ten miles"),
)
WEATHER: Choices = (
    ("-RA", "light rain"),
    ("+RA", "heavy rain"),
    ("-SN", "light snow"),
    ("+SN", "heavy snow"),
    ("TSRA", "a thunderstorm with rain"),
    ("BR", "mist"),
    ("FG", "fog"),
    ("HZ", "haze"),
    ("FZDZ", "freezing drizzle"),
    ("GR", "hail"),
    ("DU", "dust"),
    ("FU", "smoke"),
)
CLOUDS: Choices = (
    ("FEW", "a few clouds"),
    ("SCT", "scattered clouds"),
    ("BKN", "broken cloud"),
    ("OVC", "an overcast sky"),
)
HEIGHTS: Choices = (
    ("005", "five hundred feet"),
    ("010", "one thousand feet"),
    ("040", "four thousand feet"),
    ("100", "ten thousand feet"),
)


def make_weather_report(draw: random.Random) -> Pair:
    """Return such as `3SM TSRA BKN010`."""
    visibility, weather, cloud, height = _draw(draw, VISIBILITIES, WEATHER, CLOUDS, HEIGHTS)
    return Pair(
        f"{visibility[0]} {weather[0]} {cloud[0]}{height[0]}",
        f"Visibility of {visibility[1]}, {weather[1]}, {cloud[1]} at {height[1]}.",
    )


SIZES: Choices = (
    ("studio", "A one-room flat"),
    ("1 BR apt", "A flat with one bedroom"),
    ("2 BR apt", "A flat with two bedrooms"),
    ("3 BR hse", "A house with three bedrooms"),
    ("rm in shrd hse", "A room in a shared house"),
)
FEATURES: Choices = (
    ("A/C", "air conditioning"),
    ("W/D", "a washer and a dryer"),
    ("D/W", "a dishwasher"),
    ("EIK", "a kitchen large enough to eat in"),
    ("HWF", "floors of hardwood"),
    ("WIC", "a walk-in closet"),
    ("F/P", "a fireplace"),
    ("gge", "a garage"),
    ("pkg", "a place to park"),
    ("blk", "a balcony"),
    ("lg gdn", "a large garden"),
)
RULES: Choices = (
    ("no pets", "pets are not allowed"),
    ("N/S", "for non-smokers only"),
    ("utils incl", "water and power are in the rent"),
    ("furn", "furnished"),
    ("unfurn", "without furniture"),
    ("avail immed", "free at once"),
    ("refs req", "references are asked for"),
    ("1st + dep", "a month's rent and a deposit are due"),
)


def make_advertisement(draw: random.Random) -> Pair:
    """Return such as `2 BR apt, W/D, no pets`."""
    size, feature, rule = _draw(draw, SIZES, FEATURES, RULES)
    return Pair(f"{size[0]}, {feature[0]}, {rule[0]}", f"{size[1]} with {feature[1]}; {rule[1]}.")


GENERATORS: dict[str, Callable[[random.Random], Pair]] = {
    "prescriptions": make_prescription,
    "weather": make_weather_report,
    "flats": make_advertisement,
}
"""What makes a pair of each domain."""


def make_pairs(domain: str, num_pairs: int, seed: int) -> list[Pair]:
    """Return that many different pairs of the domain."""
    draw = random.Random(seed)
    # A dict keeps order, which a set of strings does not from one process to the next.
    pairs: dict[Pair, None] = {}
    while len(pairs) < num_pairs:
        pairs[GENERATORS[domain](draw)] = None
    return list(pairs)


def _draw(draw: random.Random, *tables: Choices) -> list[tuple[str, str]]:
    return [draw.choice(table) for table in tables]
