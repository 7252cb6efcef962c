"""Interactions of any size in the shape of Amazon Reviews 2023, for benchmarks: long-tailed degrees, nothing to be learned.

    A user's number of interactions (the "degree") is 1 + Poisson(lambda), lambda log-normal with mean
    `interactions / users - 1` and spread `user_spread`, the standard deviation of its logarithm; likewise an item's among
    the rows of its category.

So the counts asked for are met exactly, every user and item occurs, and only the two spreads are fitted: on what is
published of all of Amazon's reviews up to July 2014. Of 20.36 M users 51.9%, and of 8.21 M items 43.3%, have a single one of
the 80.74 M ratings (M. Woolf, "Playing with 80 Million Amazon Product Review Ratings", 2017); mean and share of ones determine
a spread, 1.845 and 2.138. How well the curves fit was measured on logs whose rows are public, by maximum likelihood with the
degrees below the core unobserved (`benchmarks/data/fit_degrees.py FILE`), beside a power law cut off at the highest degree.
KS is the largest distance of the distribution functions; "top 1%" the rows of the most frequent hundredth.

    log                         side   spread   KS      top 1%: log, fit   likelihood: fit, power law   KS of the power law
    Games, 5-core (LC-Rec)      users  1.64     0.002    8.3%    7.8%      -2.353  -2.353               0.010
                                items  1.63     0.007   13.3%   15.8%      -3.868  -3.890               0.051
    Beauty, 5-core (S3-Rec)     users  1.70     0.004    7.4%    7.8%      -2.342  -2.342               0.005
                                items  1.80     0.009   10.5%   14.1%      -3.254  -3.257               0.020
    Books, 10-core (KGAT)       users  2.38     0.008   11.6%   13.9%      -3.507  -3.508               0.010
                                items  1.40     0.008   12.3%   12.9%      -4.463  -4.502               0.077

A core takes rows from the users and items that it keeps, so its spread is no estimate of the whole's: the table says that the
family of curves fits (with a heavier end than the logs' for items), not that 1.845 and 2.138 are exact. One number was left for
a test: with 2014's proportions (5 M rows) the 5-core of what is generated keeps 53.0% of the rows; of Amazon's reviews up to
July 2014 it kept 41.13 M of 82.83 M, 49.7%.

Assumed, not fitted: users and items meet at random, so there is no taste to learn; the same spread in 2014 and 2023, and in
all categories (which differ in their means, so that of all items more have a single row than of a category's); ratings and
times don't depend on who and what; times of a user's rows are spread over all years.

Published and taken over: the categories with their numbers of items and ratings, and the growth of the number of reviews
(2014: 82.83 M, 2018: 233.10 M, 2023: 571.54 M; Y. Hou et al., "Bridging Language and Items for Retrieval and Recommendation",
2024, and amazon-reviews-2023.github.io); between those dates the total grows by a constant rate, from 1 M at the end of 1996
(assumed: with it the rate before 2014 is about that after it). Shares of the five ratings are those of the 568,454 Amazon Fine
Food reviews (J. McAuley and J. Leskovec, "From Amateurs to Connoisseurs", 2013).

A block of rows is a function of the settings and its number alone, so any number of tasks in any order gives the same rows.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sellarec.data.raw import ATTRIBUTES, Dropped, Part, Source
from sellarec.errors import UserError

USER_SPREAD, ITEM_SPREAD = 1.845, 2.138
"""Standard deviations of the logarithm of lambda: see above."""

RATING_COUNTS = (52_268, 29_769, 42_640, 80_655, 363_122)
"""Reviews with 1 to 5 stars among the Amazon Fine Food reviews."""

GROWTH = (
    ((1996, 12), 1_000_000),
    ((2014, 7), 82_830_000),
    ((2018, 10), 233_100_000),
    ((2023, 9), 571_540_000),
)
"""Ends of months and the reviews written by then."""

FIRST_MONTH = (1996, 4)
"""The month before the first review."""

CATEGORIES = {
    "All_Beauty": (112_600, 701_500),
    "Amazon_Fashion": (825_900, 2_500_000),
    "Appliances": (94_300, 2_100_000),
    "Arts_Crafts_and_Sewing": (801_300, 9_000_000),
    "Automotive": (2_000_000, 20_000_000),
    "Baby_Products": (217_700, 6_000_000),
    "Beauty_and_Personal_Care": (1_000_000, 23_900_000),
    "Books": (4_400_000, 29_500_000),
    "CDs_and_Vinyl": (701_700, 4_800_000),
    "Cell_Phones_and_Accessories": (1_300_000, 20_800_000),
    "Clothing_Shoes_and_Jewelry": (7_200_000, 66_000_000),
    "Digital_Music": (70_500, 130_400),
    "Electronics": (1_600_000, 43_900_000),
    "Gift_Cards": (1_100, 152_400),
    "Grocery_and_Gourmet_Food": (603_200, 14_300_000),
    "Handmade_Products": (164_700, 664_200),
    "Health_and_Household": (797_400, 25_600_000),
    "Health_and_Personal_Care": (60_300, 494_100),
    "Home_and_Kitchen": (3_700_000, 67_400_000),
    "Industrial_and_Scientific": (427_500, 5_200_000),
    "Kindle_Store": (1_600_000, 25_600_000),
    "Magazine_Subscriptions": (3_400, 71_500),
    "Movies_and_TV": (747_800, 17_300_000),
    "Musical_Instruments": (213_600, 3_000_000),
    "Office_Products": (710_400, 12_800_000),
    "Patio_Lawn_and_Garden": (851_700, 16_500_000),
    "Pet_Supplies": (492_700, 16_800_000),
    "Software": (89_200, 4_900_000),
    "Sports_and_Outdoors": (1_600_000, 19_600_000),
    "Subscription_Boxes": (641, 16_200),
    "Tools_and_Home_Improvement": (1_500_000, 27_000_000),
    "Toys_and_Games": (890_700, 16_300_000),
    "Video_Games": (137_200, 4_600_000),
    "Unknown": (13_200_000, 63_800_000),
}
"""Published items and ratings of each category."""

TABLE_ROWS = 65_536
"""Rows of the tables that a part yields, and lines that are put together at once."""

ITEMS_PER_PART = 1 << 18

WORDS = {
    "brand": (
        "Alder Birchwood Calder Dunmore Eastgate Fenwick Greyling Harrow Ingleside Juniper Kestrel Larkspur Marlow "
        "Northfield Oakridge Pembroke Quillan Rowan Stonebridge Thornhill Umbra Verity Westmark Yarrow Zephyr Ashby "
        "Bramble Corvid Dovetail Elmstone Foxglove Gantry"
    ),
    "quality": (
        "Compact Classic Deluxe Durable Elegant Everyday Foldable Handy Heavy-Duty Insulated Large Lightweight Magnetic "
        "Mini Modern Non-Slip Original Portable Premium Quiet Rechargeable Reusable Rustic Slim Smooth Soft Stackable "
        "Sturdy Travel Vintage Waterproof Wireless"
    ),
    "thing": (
        "Adapter Backpack Basket Blanket Bottle Bracelet Brush Cable Candle Case Charger Clock Cover Cushion Drill Filter "
        "Frame Gloves Guide Headset Jacket Journal Kettle Lamp Lotion Mat Mug Notebook Novel Organizer Pan Pillow Planner "
        "Poster Puzzle Rack Razor Scarf Serum Shampoo Shelf Socks Speaker Stand Sweater Table Tape Tent Towel Toy Tray "
        "Trimmer Tumbler Vase Wallet Watch Wrench Album Game Keyboard Leash Magnet Mirror Whisk"
    ),
    "colour": "Amber Black Blue Brown Coral Gold Green Grey Ivory Navy Olive Pink Red Silver Teal White",
}
"""Words of titles: plain ASCII without quotes, so that lines of JSON need no escapes."""

OPINIONS = ("Not for me", "Could be better", "It is okay", "Good value", "Love it")
"""Titles of reviews with 1 to 5 stars."""

_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
_HALF = np.uint64(32)

# Keys of the permutations: of who is how popular, and of who is new in which row.
_USERS, _NEW_USERS, _ITEMS, _NEW_ITEMS = range(4)

_RANK_STEP, _RANK_END = 1 / 256, 10.0

# Standard normal quadrature for log-normal mixtures: points and weights.
_POINTS = np.linspace(-8, 8, 1601)
_WEIGHTS = np.exp(-(_POINTS**2) / 2) / np.exp(-(_POINTS**2) / 2).sum()


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """What is generated.

    Attributes:
        users, items: how many there are; each occurs at least once.
        interactions: rows. Some are repeats of a user and an item, as in the raw files of Amazon.
        seed: of everything that is drawn.
        user_spread, item_spread: standard deviation of the logarithm of lambda; 0 makes all alike.
        block_rows: rows that are drawn together; another number gives other rows.

    Raises:
        UserError: numbers that contradict each other.
    """

    users: int
    items: int
    interactions: int
    seed: int = 0
    user_spread: float = USER_SPREAD
    item_spread: float = ITEM_SPREAD
    block_rows: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("users", "items", "interactions", "block_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: at least 1 is needed")
            if getattr(self, name) >= 1 << 31:
                raise UserError(f"{name} is {getattr(self, name):,}: fewer than {1 << 31:,} can be generated")
        if self.block_rows > 1 << 24:
            raise UserError(f"block_rows is {self.block_rows:,}: at most {1 << 24:,} rows are drawn together")
        for name in ("users", "items"):
            if self.interactions < getattr(self, name):
                raise UserError(
                    f"{name} is {getattr(self, name):,}, but interactions only {self.interactions:,}: each occurs at least "
                    f"once, so raise interactions or lower {name}"
                )
        if self.interactions > self.users * self.items:
            raise UserError(
                f"interactions is {self.interactions:,}, but {self.users:,} users and {self.items:,} items make no more than "
                f"{self.users * self.items:,} pairs: lower interactions"
            )
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: a number from 0 is needed")
        for name in ("user_spread", "item_spread"):
            if not 0 <= getattr(self, name) <= 4:
                raise UserError(f"{name} is {getattr(self, name)}: a number from 0 to 4 is needed")


@dataclass(frozen=True)
class Category:
    """A category's items, `first_item` to `first_item + items`, and rows, likewise."""

    name: str
    first_item: int
    items: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class Block:
    """Rows of one category that are drawn together."""

    category: Category
    first_row: int
    rows: int


@lru_cache(maxsize=8)
def categories(settings: Synthetic) -> tuple[Category, ...]:
    """The categories that have items, with items and rows shared out as published."""
    items = _share_out(settings.items, [items for items, _ in CATEGORIES.values()])
    # A row for each item, so that each occurs; the others in the proportion of the published others.
    others = [max(ratings - count, 0) if items[i] else 0 for i, (count, ratings) in enumerate(CATEGORIES.values())]
    rows = items + _share_out(settings.interactions - settings.items, others)
    first_items, first_rows = np.cumsum(items) - items, np.cumsum(rows) - rows
    return tuple(
        Category(name, int(first_items[i]), int(items[i]), int(first_rows[i]), int(rows[i]))
        for i, name in enumerate(CATEGORIES)
        if items[i]
    )


def _share_out(total: int, weights: list[int]) -> np.ndarray:
    """`total` in whole parts that are nearest to the proportions of `weights`: int64 [weights]."""
    bounds = np.cumsum(np.asarray(weights, np.float64))
    return np.diff(np.rint(bounds / bounds[-1] * total).astype(np.int64), prepend=0)


@lru_cache(maxsize=8)
def blocks(settings: Synthetic) -> tuple[Block, ...]:
    """All blocks, in the order of rows."""
    return tuple(
        Block(category, start, min(settings.block_rows, category.first_row + category.rows - start))
        for category in categories(settings)
        for start in range(category.first_row, category.first_row + category.rows, settings.block_rows)
    )


@dataclass(frozen=True)
class Rows:
    """Rows as numbers, each array of shape [rows].

    Attributes:
        user, item: int64, from 0 to below `users` and `items`.
        rating: int8, 1 to 5.
        time: int64, milliseconds since 1970.
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray


def draw_block(settings: Synthetic, number: int) -> Rows:
    """The rows of block `number`, the same whichever blocks were drawn before."""
    block = blocks(settings)[number]
    category, count = block.category, block.rows
    generator = np.random.default_rng([settings.seed, number])
    user = _frequent(generator, count, settings.users, settings.user_spread, (settings.seed, _USERS))
    rows, found = _new(block.first_row, count, settings.interactions, settings.users, (settings.seed, _NEW_USERS))
    user[rows] = found
    item = _frequent(generator, count, category.items, settings.item_spread, (settings.seed, _ITEMS))
    first = block.first_row - category.first_row
    rows, found = _new(first, count, category.rows, category.items, (settings.seed, _NEW_ITEMS))
    item[rows] = found
    bounds = np.cumsum(RATING_COUNTS) / sum(RATING_COUNTS)
    drawn = generator.random(count)
    rating = np.ones(count, np.int8)
    for bound in bounds[:-1]:
        rating += drawn >= bound
    return Rows(
        user, category.first_item + item, rating, _between(_time_table(), generator.random(count)).astype(np.int64)
    )


def _frequent(generator: np.random.Generator, count: int, size: int, spread: float, key: tuple[int, int]) -> np.ndarray:
    """Ids below `size`, drawn by log-normal weights: int64 [count].

    Whoever is drawn by weight exp(spread * x), x standard normal, has an x that is normal around `spread`; so the share of
    those who are more frequent is Phi(z - spread) with z standard normal, and that share is the rank. No table of all is kept.
    """
    z = generator.standard_normal(count)
    share = _between(_rank_table(spread), (z + _RANK_END).clip(0, 2 * _RANK_END) / (2 * _RANK_END))
    rank = (share * size).astype(np.int64)
    return permutation(np.minimum(rank, size - 1), size, key)


def _new(first: int, count: int, rows: int, size: int, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Which of the rows `first` to `first + count` of `rows` each bring an id that they alone have to bring, and the ids.

    They are evenly spaced: over all rows it is every id below `size` (at most `rows`) once. Rows count from `first`.
    """
    # Number k stands in row ceil(k * rows / size).
    number = np.arange((first - 1) * size // rows + 1, (first + count - 1) * size // rows + 1, dtype=np.int64)
    return -(-number * rows // size) - first, permutation(number, size, key)


def permutation(number: np.ndarray, size: int, key: tuple[int, int]) -> np.ndarray:
    """The places of `number` (int64 [n], 0 to below `size`) in a shuffle of all `size` numbers: int64 [n].

    A Feistel network over pairs (left, right), size <= lefts * rights; the few results beyond `size` go through it again
    until they are below (J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
        key: chooses the shuffle.
    """
    lefts = math.isqrt(size - 1) + 1 if size > 1 else 1
    rights = -(-size // lefts)
    keys = np.random.SeedSequence(key).generate_state(4, np.uint64)

    def shuffle(value: np.ndarray) -> np.ndarray:
        left = value // rights
        right = value - left * rights
        for turn in range(0, 4, 2):
            left = left + ((right + keys[turn]) * _ODD[0] >> _HALF)
            left -= left // lefts * lefts  # unlike %, division by one number is quick in numpy
            right = right + ((left + keys[turn + 1]) * _ODD[1] >> _HALF)
            right -= right // rights * rights
        return left * rights + right

    found = shuffle(number.astype(np.uint64))
    while len(beyond := np.flatnonzero(found >= size)):
        found[beyond] = shuffle(found[beyond])
    return found.astype(np.int64)


def _between(table: np.ndarray, place: np.ndarray) -> np.ndarray:
    """`table`, evenly spaced over 0 to 1, between its entries: float64 [n] at `place` [n]."""
    scaled = place * (len(table) - 1)
    left = np.minimum(scaled.astype(np.int64), len(table) - 2)
    return table[left] + (scaled - left) * np.diff(table)[left]


@lru_cache(maxsize=8)
def _rank_table(spread: float) -> np.ndarray:
    """Phi(z - spread) for z from -_RANK_END to _RANK_END."""
    z = np.linspace(-_RANK_END, _RANK_END, round(2 * _RANK_END / _RANK_STEP) + 1)
    return np.array([math.erfc((spread - x) / math.sqrt(2)) / 2 for x in z])


@lru_cache(maxsize=1)
def _time_table() -> np.ndarray:
    """When an even share of all reviews had been written, in milliseconds since 1970."""

    def start_of(year: int, month: int) -> float:
        return datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC).timestamp()  # of the month after

    ends, counts = [start_of(*month) for month, _ in GROWTH], [count for _, count in GROWTH]
    total = np.linspace(0, counts[-1], 4097)
    constant_rate = np.interp(np.log(np.maximum(total, counts[0])), np.log(counts), ends)
    opening = start_of(*FIRST_MONTH) + total / counts[0] * (ends[0] - start_of(*FIRST_MONTH))
    return np.rint(1000 * np.where(total < counts[0], opening, constant_rate))


def degree_probabilities(degrees: np.ndarray, mean: float, spread: float) -> np.ndarray:
    """The probabilities of `degrees` (int64 [n], 1 or more) in a log of `mean` rows a user (or item), above 1."""
    extra = degrees - 1
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, extra.max() + 1)))])
    log_rate = np.log(mean - 1) - spread**2 / 2 + spread * _POINTS
    found = np.empty(len(degrees))
    for start in range(0, len(degrees), 4096):
        part = extra[start : start + 4096, None]
        found[start : start + 4096] = np.exp(part * log_rate - np.exp(log_rate) - log_factorial[part]) @ _WEIGHTS
    return found


def spread_from_ones(mean: float, ones: float) -> float:
    """The spread at which a share `ones` of the users (or items) has a single row, where they have `mean` rows each."""
    low, high = 0.0, 10.0
    for _ in range(60):  # the share rises with the spread
        middle = (low + high) / 2
        low, high = (middle, high) if degree_probabilities(np.array([1]), mean, middle)[0] < ones else (low, middle)
    return middle


def user_names(user: np.ndarray) -> pa.StringArray:
    """Ids of Amazon's kind for user numbers (int64 [n]): "A" and 27 characters of base 32; distinct for distinct numbers."""
    low = _mix(user.astype(np.uint64))  # reversible, and all of its bits are spelled out
    high = _mix(low ^ _ODD[0])
    pairs = np.array([a + b for a in _BASE_32 for b in _BASE_32], "S2").view(np.uint16)
    text = np.empty((len(user), 14), np.uint16)
    text[:, 0] = np.array(["A" + a for a in _BASE_32], "S2").view(np.uint16)[high >> np.uint64(59)]
    for column in range(13):
        bits = (low, high)[column // 7] >> np.uint64(min(10 * (column % 7), 54))
        text[:, column + 1] = pairs[bits & np.uint64(1023)]
    return _strings(text)


def item_names(item: np.ndarray) -> pa.StringArray:
    """Ids of Amazon's kind for item numbers (int64 [n]): "B0" and 8 characters of base 36; distinct for distinct numbers."""
    # The factor is a prime, so the product stays distinct modulo a power of 36.
    number = (item.astype(np.uint64) * np.uint64(2_654_435_761)) % np.uint64(36**8)
    pairs = np.array([a + b for a in _BASE_36 for b in _BASE_36], "S2").view(np.uint16)
    text = np.empty((len(item), 5), np.uint16)
    text[:, 0] = np.frombuffer(b"B0", np.uint16)
    for column in range(4, 0, -1):
        rest = number // np.uint64(1296)
        text[:, column] = pairs[number - rest * np.uint64(1296)]
        number = rest
    return _strings(text)


_BASE_32 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_BASE_36 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _strings(text: np.ndarray) -> pa.StringArray:
    """Strings of one length from their characters in pairs: uint16 [n, pairs]."""
    ends = np.arange(len(text) + 1, dtype=np.int32) * np.int32(2 * text.shape[1])
    return pa.StringArray.from_buffers(len(text), pa.py_buffer(ends), pa.py_buffer(text))


def _mix(number: np.ndarray) -> np.ndarray:
    """A reversible hash of uint64 (the end of SplitMix64)."""
    number = (number + _ODD[0]) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ number >> np.uint64(30)) * np.uint64(0x94D049BB133111EB)
    return number ^ number >> np.uint64(31)


def block_table(settings: Synthetic, number: int) -> pa.Table:
    """The rows of block `number` as a source gives them: user, item, rating, timestamp (s), domain (the category)."""
    rows = draw_block(settings, number)
    return pa.table(
        {
            "user": user_names(rows.user),
            "item": item_names(rows.item),
            "rating": rows.rating.astype(np.float32),
            "timestamp": rows.time // 1000,
            "domain": pa.repeat(blocks(settings)[number].category.name, len(rows.user)),
        }
    )


@dataclass(frozen=True)
class Items:
    """What is known of n items, each a string [n]; the price, in dollars, is null for every other."""

    name: pa.StringArray
    title: pa.Array
    store: pa.Array
    thing: pa.Array
    price: pa.Array


def describe_items(first: int, count: int) -> Items:
    """Items `first` to `first + count`, each described by its number alone."""
    number = np.arange(first, first + count)
    bits = _mix(number.astype(np.uint64))

    def words(kind: str, shift: int) -> pa.Array:
        choice = WORDS[kind].split()
        return pa.array(choice).take(pa.array((bits >> np.uint64(shift)) % np.uint64(len(choice))))

    store, thing = words("brand", 0), words("thing", 10)
    with_thing = words("thing", 16)
    title = pc.binary_join_element_wise(
        store, words("quality", 5), thing, "with", with_thing, "in", words("colour", 22), " "
    )
    dollars = pa.array((bits >> np.uint64(26)) % np.uint64(200) + np.uint64(3)).cast(pa.string())
    price = pc.if_else(pa.array(bits >> np.uint64(63) == 0), pc.binary_join_element_wise(dollars, "99", "."), None)
    return Items(item_names(number), title, store, thing, price)


def item_table(category: Category, first: int, count: int) -> pa.Table:
    """Items `first` to `first + count` of a category as a source gives them: item, title, text, attributes."""
    items = describe_items(first, count)
    shown = category.name.replace("_", " ")
    text = pc.binary_join_element_wise(items.title, ". By ", items.store, f". {shown}, ", items.thing, ".", "")
    # Four pairs an item, in turn, of which the price is left out where it is unknown.
    values = pa.concat_arrays([pa.repeat(shown, count), items.thing, items.store, items.price])
    values = values.take(pa.array(np.arange(4 * count).reshape(4, count).T.ravel()))
    names = pa.array(["category", "category", "store", "price"]).take(pa.array(np.tile(np.arange(4), count)))
    known = values.is_valid()
    pairs = pa.StructArray.from_arrays([names.filter(known), values.filter(known)], names=["name", "value"])
    ends = np.cumsum(items.price.is_valid().to_numpy(zero_copy_only=False) + 3, dtype=np.int32)
    attributes = pa.ListArray.from_arrays(pa.array(np.concatenate([np.zeros(1, np.int32), ends])), pairs)
    attributes = attributes.cast(ATTRIBUTES)
    return pa.table({"item": items.name, "title": items.title, "text": text, "attributes": attributes})


def synthetic_source(settings: Synthetic) -> Source:
    """The source of these settings: parts that make their rows when they are read; there are no files."""
    return Source(
        interactions=tuple(
            Part(f"block {number} ({block.category.name})", partial(_read_block, settings, number))
            for number, block in enumerate(blocks(settings))
        ),
        items=tuple(
            Part(f"items from {first} ({category.name})", partial(_read_items, category, first, count))
            for category in categories(settings)
            for first, count in _item_ranges(category, ITEMS_PER_PART)
        ),
        files=(),
        noun="product",
        rating_range=(1.0, 5.0),
        rows_about=settings.interactions,
    )


def _read_block(settings: Synthetic, number: int, dropped: Dropped) -> Iterator[pa.Table]:
    table = block_table(settings, number)
    for start in range(0, table.num_rows, TABLE_ROWS):
        yield table.slice(start, TABLE_ROWS)


def _read_items(category: Category, first: int, count: int, dropped: Dropped) -> Iterator[pa.Table]:
    for start in range(first, first + count, TABLE_ROWS):
        yield item_table(category, start, min(TABLE_ROWS, first + count - start))


def _item_ranges(category: Category, length: int) -> Iterator[tuple[int, int]]:
    end = category.first_item + category.items
    return ((first, min(length, end - first)) for first in range(category.first_item, end, length))


def raw_files(settings: Synthetic, compress: bool = False) -> dict[str, tuple[str, int]]:
    """Paths of the raw files below their folder -> what each holds ("reviews" or "meta") and the position of its category."""
    end = ".jsonl.gz" if compress else ".jsonl"
    numbered = list(enumerate(categories(settings)))
    return {f"raw/review_categories/{one.name}{end}": ("reviews", number) for number, one in numbered} | {
        f"raw/meta_categories/meta_{one.name}{end}": ("meta", number) for number, one in numbered
    }


def write_raw(
    settings: Synthetic, folder: str | Path, compress: bool = False, on_file: Callable[[str, int], None] | None = None
) -> list[Path]:
    """Write the files of Amazon Reviews 2023 into `folder`, a task of Ray for each; Ray is connected already.

    The folder is one that all nodes of the cluster share. A file that stands under its name is whole. Fields that nothing
    here knows (votes, pictures, an item's mean rating) hold zeros, empty lists or null.

    Args:
        compress: write .jsonl.gz.
        on_file: told of each file when it stands: its path in the folder and its bytes.

    Returns:
        The files.

    Raises:
        UserError: files stand there already, or can't be written.
    """
    import ray

    folder = Path(folder).expanduser().absolute()
    files = raw_files(settings, compress)
    standing = [name for name in files if (folder / name).exists()]
    if standing:
        raise UserError(f"{folder / standing[0]} stands already: give another folder, or remove what is in this one")
    all_categories = categories(settings)
    task = ray.remote(num_cpus=1)(write_raw_file)
    # The longest first, so that none of them is waited for alone at the end.
    longest_first = sorted(
        files, key=lambda name: -(all_categories[files[name][1]].rows if files[name][0] == "reviews" else 0)
    )
    waiting = {task.remote(settings, folder, name, compress): name for name in longest_first}
    try:
        while waiting:
            done, _ = ray.wait(list(waiting))
            size = ray.get(done[0])
            name = waiting.pop(done[0])
            if on_file is not None:
                on_file(name, size)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError):
            raise UserError(f"Cannot write {folder}: {error.cause}.") from error
        raise
    finally:
        for reference in waiting:
            ray.cancel(reference)
    return [folder / name for name in files]


def write_raw_file(settings: Synthetic, folder: Path, name: str, compress: bool = False) -> int:
    """Write one of `raw_files`, whole or not at all; its bytes.

    Raises:
        OSError: it can't be written.
    """
    kind, position = raw_files(settings, compress)[name]
    category = categories(settings)[position]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}.{os.getpid()}")
    lines = _review_lines(settings, category) if kind == "reviews" else _meta_lines(category)
    try:
        with open(partial_path, "wb") as file:
            # Without name and time, equal content gives equal bytes.
            stream = gzip.GzipFile("", "wb", 1, file, mtime=0) if compress else file
            for text in lines:
                stream.write(text)
            if compress:
                stream.close()
        os.replace(partial_path, path)
    finally:
        partial_path.unlink(missing_ok=True)
    return path.stat().st_size


def _review_lines(settings: Synthetic, category: Category) -> Iterator[pa.Buffer]:
    titles = pa.array(OPINIONS)
    for number, block in enumerate(blocks(settings)):
        if block.category != category:
            continue
        rows = draw_block(settings, number)
        for start in range(0, block.rows, TABLE_ROWS):
            part = slice(start, start + TABLE_ROWS)
            stars = rows.rating[part]
            opinion, item = titles.take(pa.array(stars - 1)), item_names(rows.item[part])
            yield _join(
                '{"rating": ', pa.array(stars).cast(pa.string()), '.0, "title": "', opinion, '", "text": "', opinion,
                '.", "images": [], "asin": "', item, '", "parent_asin": "', item, '", "user_id": "',
                user_names(rows.user[part]), '", "timestamp": ', pa.array(rows.time[part]).cast(pa.string()),
                ', "helpful_vote": 0, "verified_purchase": true}\n',
            )  # fmt: skip


def _meta_lines(category: Category) -> Iterator[pa.Buffer]:
    shown = category.name.replace("_", " ")
    for first, count in _item_ranges(category, TABLE_ROWS):
        items = describe_items(first, count)
        yield _join(
            f'{{"main_category": "{shown}", "title": "', items.title,
            '", "average_rating": null, "rating_number": null, "features": [], "description": [], "price": ',
            pc.fill_null(items.price, "null"), ', "images": [], "videos": [], "store": "', items.store,
            f'", "categories": ["{shown}", "', items.thing, '"], "details": {"Brand": "', items.store,
            '"}, "parent_asin": "', items.name, '", "bought_together": null}\n',
        )  # fmt: skip


def _join(*pieces: str | pa.Array) -> pa.Buffer:
    """The pieces of each row one after the other, and row after row, as bytes."""
    joined = pc.binary_join_element_wise(*pieces, "")
    _, ends, text = joined.buffers()
    return text.slice(0, int(np.frombuffer(ends, np.int32)[len(joined)]))
