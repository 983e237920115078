"""What the word problems are made of: openings, events, and the story forms that chain them. Data only.

A template may hold {P} (the main person), {S} and {s} (that person as subject, starting a sentence and inside one), {Q}
(another person), {o} (the objects), {c} (a container or vehicle), {v} (the verb), {a} {b} {k} (the numbers drawn), {n}
(the count so far), {m} (a result in between) and {r} (the new count). Every calculation in an answer is written
`x op y = z`.
"""

from dataclasses import dataclass

NAMES = ("Anna", "Mia", "Eva", "Zoe", "Amy", "Lea", "Kim", "Sue", "Rosa", "Ida")
NAMES += ("Tom", "Ben", "Leo", "Max", "Sam", "Tim", "Dan", "Rob", "Nick", "Jan")
SHE = frozenset(NAMES[:10])
FOODS = frozenset({"apples", "plums", "nuts", "eggs", "pears"})
OBJECTS = ("apples", "plums", "nuts", "eggs", "pears", "pens", "books", "coins", "cards", "balls", "cups", "hats")
OBJECTS += ("shells", "stamps", "beads", "toys")
CONTAINERS = ("basket", "drawer", "chest")
VEHICLES = ("bus", "train", "boat")


@dataclass(frozen=True, kw_only=True)
class Event:
    """One sentence of a story, the arithmetic it stands for, and the sentence that works it out."""

    operation: str
    """Key of `problems.OPERATIONS`."""
    prompt: str
    """Template of the sentence in the problem."""
    answer: str
    """Template of the sentence in the answer."""
    question: str = ""
    """Template of the question a problem ends with, if this event is the last one to have a question."""
    verbs: tuple[str, ...] = ("",)
    """Interchangeable values of {v}; "eats" is used with foods alone."""
    subject: str = ""
    """Template of {S} and {s} from this event on, where a pronoun would be unclear."""


HOW_MANY = "How many {o} does {P} have now?"
ON_BOARD = "How many people are on the {c} now?"
INSIDE = "How many {o} are in the {c} now?"
MONEY = "How many dollars does {P} have now?"
TO_PAY = "How many dollars does {P} pay?"
TOGETHER = "How many {o} do {P} and {Q} have together?"
TWO_SUMS = "{n} + {m} = {r}."

OPENINGS = {
    "has": Event(operation="start", prompt="{P} has {a} {o}.", answer="{P} starts with {a} {o}.", question=HOW_MANY),
    "packs": Event(
        operation="product",
        prompt="{P} {v} {k} boxes with {a} {o} in each box.",
        answer="{k} boxes with {a} {o} hold {k} * {a} = {r}.",
        question=HOW_MANY,
        verbs=("buys", "gets"),
    ),
    "daily": Event(
        operation="product",
        prompt="{P} {v} {a} {o} each day for {k} days.",
        answer="{P} {v} {a} {o} for {k} days: {k} * {a} = {r}.",
        question=HOW_MANY,
        verbs=("finds", "buys", "gets"),
    ),
    "rows": Event(
        operation="product",
        prompt="{P} makes {k} rows with {a} {o} in each row.",
        answer="{k} rows with {a} {o} hold {k} * {a} = {r}.",
        question=HOW_MANY,
    ),
    "more": Event(
        operation="sum",
        prompt="{Q} has {a} {o}. {P} has {b} more {o} than {Q}.",
        answer="{P} has {b} more {o} than {Q}: {a} + {b} = {r}.",
        question=HOW_MANY,
        subject="{P}",
    ),
    "fewer": Event(
        operation="difference",
        prompt="{Q} has {a} {o}. {P} has {b} fewer {o} than {Q}.",
        answer="{P} has {b} fewer {o} than {Q}: {a} - {b} = {r}.",
        question=HOW_MANY,
        subject="{P}",
    ),
    "times": Event(
        operation="product",
        prompt="{Q} has {a} {o}. {P} has {k} times as many {o} as {Q}.",
        answer="{P} has {k} times as many as {Q}: {k} * {a} = {r}.",
        question=HOW_MANY,
        subject="{P}",
    ),
    "colors": Event(
        operation="sum",
        prompt="{P} has {a} red {o} and {b} blue {o}.",
        answer="{P} has {a} red and {b} blue {o}: {a} + {b} = {r}.",
        question=HOW_MANY,
    ),
    "ride": Event(
        operation="start",
        prompt="A {c} starts with {a} people.",
        answer="The {c} starts with {a} people.",
        question=ON_BOARD,
    ),
    "there": Event(
        operation="start",
        prompt="There are {a} {o} in the {c}.",
        answer="The {c} starts with {a} {o}.",
        question=INSIDE,
    ),
    "money": Event(
        operation="start", prompt="{P} has {a} dollars.", answer="{P} starts with {a} dollars.", question=MONEY
    ),
    "weekly": Event(
        operation="product",
        prompt="{P} {v} {a} dollars each week for {k} weeks.",
        answer="{P} {v} {a} dollars for {k} weeks: {k} * {a} = {r}.",
        question=MONEY,
        verbs=("saves", "gets"),
    ),
    "shop": Event(
        operation="product",
        prompt="{P} buys {k} {o} for {a} dollars each.",
        answer="{k} {o} for {a} dollars each cost {k} * {a} = {r}.",
        question=TO_PAY,
    ),
}

EVENTS = {
    "gain": Event(
        operation="add",
        prompt="{S} {v} {a} more {o}.",
        answer="{S} {v} {a} more: {n} + {a} = {r}.",
        verbs=("buys", "finds", "gets", "wins"),
    ),
    "lose": Event(
        operation="subtract",
        prompt="{S} {v} {a} {o}.",
        answer="{S} {v} {a}: {n} - {a} = {r}.",
        verbs=("loses", "sells", "uses", "eats"),
    ),
    "give": Event(
        operation="subtract",
        prompt="{S} gives {a} {o} to {Q}.",
        answer="{S} gives {a} to {Q}: {n} - {a} = {r}.",
    ),
    "double": Event(
        operation="double",
        prompt="Then {s} doubles the number of {o}.",
        answer="{S} doubles the number: {n} * 2 = {r}.",
    ),
    "half": Event(
        operation="halve",
        prompt="{S} gives half of the {o} to {Q}.",
        answer="{S} gives half to {Q}: {n} / 2 = {r}.",
    ),
    "piles": Event(
        operation="divide",
        prompt="{S} makes {k} equal piles and keeps one pile.",
        answer="{S} keeps one of {k} piles: {n} / {k} = {r}.",
    ),
    "bags": Event(
        operation="add_product",
        prompt="{S} {v} {k} bags with {a} {o} in each bag.",
        answer="{k} bags with {a} {o} hold {k} * {a} = {m}. " + TWO_SUMS,
        verbs=("buys", "finds", "gets", "wins"),
    ),
    "each": Event(
        operation="subtract_product",
        prompt="{S} gives {a} {o} to each of {k} friends.",
        answer="{S} gives {a} to each of {k} friends: {k} * {a} = {m}. {n} - {m} = {r}.",
    ),
    "share": Event(
        operation="divide",
        prompt="{S} shares the {o} equally among {k} friends.",
        answer="{S} shares among {k} friends: {n} / {k} = {r}.",
        question="How many {o} does each friend get?",
    ),
    "fill": Event(
        operation="divide",
        prompt="{S} puts {k} {o} in each bag.",
        answer="{S} puts {k} in each bag: {n} / {k} = {r}.",
        question="How many bags does {P} fill?",
    ),
    "price": Event(
        operation="multiply",
        prompt="{S} sells all the {o} for {a} dollars each.",
        answer="{S} sells {n} {o} for {a} dollars each: {n} * {a} = {r}.",
        question="How many dollars does {P} get?",
    ),
    "total_more": Event(
        operation="add_larger",
        prompt="{Q} has {a} more {o} than {P}.",
        answer="{Q} has {a} more {o} than {P}: {n} + {a} = {m}. " + TWO_SUMS,
        question=TOGETHER,
    ),
    "total_fewer": Event(
        operation="add_smaller",
        prompt="{Q} has {a} fewer {o} than {P}.",
        answer="{Q} has {a} fewer {o} than {P}: {n} - {a} = {m}. " + TWO_SUMS,
        question=TOGETHER,
    ),
    "total": Event(
        operation="add",
        prompt="{Q} has {a} {o}.",
        answer="{Q} has {a}: {n} + {a} = {r}.",
        question=TOGETHER,
    ),
    "gap": Event(
        operation="subtract",
        prompt="{Q} has {a} {o}.",
        answer="{Q} has {a}: {n} - {a} = {r}.",
        question="How many more {o} does {P} have than {Q}?",
    ),
    "want": Event(
        operation="subtract_from",
        prompt="{S} wants to have {a} {o}.",
        answer="{S} wants to have {a}: {a} - {n} = {r}.",
        question="How many more {o} does {P} need?",
    ),
    "board": Event(
        operation="add",
        prompt="{a} more people get on.",
        answer="{a} more people get on: {n} + {a} = {r}.",
    ),
    "leave": Event(
        operation="subtract",
        prompt="{a} people get off.",
        answer="{a} people get off: {n} - {a} = {r}.",
    ),
    "groups": Event(
        operation="add_product",
        prompt="{k} groups of {a} people get on.",
        answer="{k} groups of {a} people get on: {k} * {a} = {m}. " + TWO_SUMS,
    ),
    "half_off": Event(
        operation="halve",
        prompt="Half of the people get off.",
        answer="Half of the people get off: {n} / 2 = {r}.",
    ),
    "put": Event(
        operation="add",
        prompt="{Q} puts {a} more {o} in the {c}.",
        answer="{Q} puts {a} more in the {c}: {n} + {a} = {r}.",
    ),
    "take": Event(
        operation="subtract",
        prompt="{Q} takes {a} {o} out of the {c}.",
        answer="{Q} takes {a} out of the {c}: {n} - {a} = {r}.",
    ),
    "put_bags": Event(
        operation="add_product",
        prompt="{Q} puts {k} bags with {a} {o} in the {c}.",
        answer="{k} bags with {a} {o} hold {k} * {a} = {m}. " + TWO_SUMS,
    ),
    "half_out": Event(
        operation="halve",
        prompt="{Q} takes half of the {o} out of the {c}.",
        answer="{Q} takes half out of the {c}: {n} / 2 = {r}.",
    ),
    "earn": Event(
        operation="add",
        prompt="{S} {v} {a} more dollars.",
        answer="{S} {v} {a} more: {n} + {a} = {r}.",
        verbs=("gets", "finds", "wins"),
    ),
    "spend": Event(
        operation="subtract",
        prompt="{S} {v} {a} dollars.",
        answer="{S} {v} {a}: {n} - {a} = {r}.",
        verbs=("loses", "pays"),
    ),
    "buys": Event(
        operation="subtract_product",
        prompt="{S} buys {k} {o} for {a} dollars each.",
        answer="{k} {o} for {a} dollars each cost {k} * {a} = {m}. {n} - {m} = {r}.",
    ),
    "works": Event(
        operation="add_product",
        prompt="{S} works {k} days for {a} dollars each day.",
        answer="{k} days for {a} dollars each give {k} * {a} = {m}. " + TWO_SUMS,
    ),
    "half_money": Event(
        operation="halve",
        prompt="{S} gives half of the dollars to {Q}.",
        answer="{S} gives half to {Q}: {n} / 2 = {r}.",
    ),
    "double_money": Event(
        operation="double",
        prompt="Then {s} doubles the number of dollars.",
        answer="{S} doubles the number: {n} * 2 = {r}.",
    ),
    "extra": Event(
        operation="add",
        prompt="{S} buys a box for {a} dollars.",
        answer="{S} buys a box for {a}: {n} + {a} = {r}.",
    ),
    "also": Event(
        operation="add_product",
        prompt="{S} buys {k} bags for {a} dollars each.",
        answer="{k} bags for {a} dollars each cost {k} * {a} = {m}. " + TWO_SUMS,
    ),
    "gift": Event(
        operation="subtract",
        prompt="{Q} pays {a} dollars of this.",
        answer="{Q} pays {a} of this: {n} - {a} = {r}.",
    ),
    "change": Event(
        operation="subtract_from",
        prompt="{S} pays with {a} dollars.",
        answer="{S} pays with {a}: {a} - {n} = {r}.",
        question="How many dollars does {P} get back?",
    ),
}

FAMILIES = (
    (
        ("has", "packs", "daily", "rows", "more", "fewer", "times", "colors"),
        ("gain", "lose", "give", "double", "half", "piles", "bags", "each"),
        ("", "share", "fill", "price", "total_more", "total_fewer", "total", "gap", "want"),
    ),
    (("ride",), ("board", "leave", "groups", "half_off"), ("",)),
    (("there",), ("put", "take", "put_bags", "half_out"), ("",)),
    (("money", "weekly"), ("earn", "spend", "buys", "works", "half_money", "double_money"), ("",)),
    (("shop",), ("extra", "also", "gift"), ("", "change")),
)
"""What goes together: openings, events in between, endings ("" for none). Half of the training problems are composed
of these at random, none beginning as a held-out form does: fixed sequences alone would be learnt by heart."""

TRAINED_FORMS = (
    "has gain lose",
    "has lose gain double",
    "has bags give",
    "has gain give share",
    "has double lose total",
    "has each gain fill",
    "has half gain price",
    "has gain half total_more",
    "packs lose share",
    "packs gain each",
    "packs give double gap",
    "packs half bags want",
    "daily lose fill",
    "daily gain total_fewer",
    "daily each half gain",
    "daily piles gain lose",
    "rows give gain share",
    "rows lose want",
    "rows gain piles bags",
    "more gain lose",
    "more lose share",
    "more double give gap",
    "more bags half",
    "fewer bags lose",
    "fewer gain total",
    "fewer double each",
    "times lose gain",
    "times give total_more",
    "times gain piles",
    "colors lose fill",
    "colors gain gap",
    "colors double each",
    "colors piles gain price",
    "ride board leave board",
    "ride leave groups",
    "ride board half_off leave",
    "ride groups leave half_off",
    "there put take",
    "there put_bags take put",
    "there half_out put_bags",
    "there put half_out take",
    "money earn spend",
    "money buys earn",
    "money works spend buys",
    "money double_money spend works",
    "weekly spend buys",
    "weekly half_money earn",
    "shop also change",
    "shop extra change",
    "shop gift also",
    "shop also extra change",
    "shop extra gift",
)
"""Half of the training problems, and all validation problems and 160 test problems, are of these forms."""

HELD_OUT_FORMS = (
    "has double give gain",
    "packs each bags",
    "more half gain fill",
    "rows bags total",
    "ride leave board half_off",
    "there take half_out put_bags",
    "weekly double_money earn buys",
    "shop gift extra change",
)
"""40 test problems are of these forms: events and words known from training, in sequences that never occur there."""
