"""A generated world: users, items with titles in words, and a time-ordered log whose best attainable AUC is known.

The log-odds that user u likes item i are

    0.2 + text * t_u[g_i] + behaviour * <v_u, z_i> + quality * q_i

with a taste t_u over genres, an item's genre g_i, a hidden trait z_i that no title tells, the user's liking v_u for it, and
the item's quality q_i. The genre stands in the title's words, so the first part can be read from the titles of a history;
the other two show only in the behaviour of many users. Labels are drawn from these odds, so ranking by them is the best
that any model can do on average.
"""

import numpy as np
import pyarrow as pa

from sellarec.config import World
from sellarec.data.raw import Source, part_of_table
from sellarec.errors import UserError

TRAITS = 4
"""Hidden traits of an item."""

NEW_USER_SHARE = 0.5
"""Share of the test period's rows that belong to users who weren't there before."""

NEW_ITEM_SHARE = 0.15
"""Share of the test period's rows that are about items which weren't there before."""

BASE = 0.2
"""Log-odds of a positive for an average user and item."""

START, DAY = 1_577_836_800, 86_400
"""The log begins on 2020-01-01 (seconds) and lasts 720 days."""

WORDS = {
    "sea": "anchor harbor tide sailor lighthouse coral reef captain storm voyage island whale mast pearl drift shore",
    "space": "orbit star comet galaxy rocket lunar nebula cosmos signal void planet meteor eclipse station gravity solar",
    "crime": "detective murder alibi suspect heist robber verdict witness sheriff evidence jail motive crook badge ransom cellar",
    "love": "kiss wedding heart letter rose darling bride promise waltz valentine honey sweet engaged dance embrace blush",
    "war": "battle trench soldier general siege cannon regiment armor victory treaty front march medal enemy bunker flag",
    "magic": "wizard spell dragon potion witch enchanted crystal amulet sorcerer rune prophecy unicorn wand curse elf phoenix",
    "sport": "champion goal coach league race boxing stadium marathon trophy rookie pitcher sprint referee medalist racket derby",
    "farm": "harvest barn meadow orchard tractor shepherd wheat cattle rooster plow stable valley hay dairy pasture fence",
    "city": "subway skyline taxi avenue rooftop traffic downtown tower plaza tenant neon alley market bridge metro corner",
    "snow": "glacier frost winter sled blizzard arctic avalanche ski icicle igloo mitten polar tundra penguin cabin aurora",
}
"""Genres and their words."""

ANY = (
    "last first silent golden broken little great lost hidden long final quiet secret distant bitter gentle crimson hollow "
    "restless wild ancient burning frozen empty perfect strange sudden brave lonely lucky midnight morning summer autumn "
    "velvet paper silver iron glass wooden crooked dusty early forgotten foreign honest humble invisible narrow noble "
    "northern ordinary patient proud rapid sacred scarlet seventh sleeping southern stubborn tender thirsty twisted upper"
)
"""Words that stand in titles of any genre."""

QUESTIONS = 24
"""Lines of an item's text that ask whether it goes with some titles: yes if one of them is of its genre."""

ALIKE, MIXED = 3, 8
"""Most titles in such a line: where all or none are of the genre, and where they are of half of the genres."""


def generate_world(world: World, split: tuple[float, float, float], seed: int) -> Source:
    """The world of these settings; the same for the same seed.

    Args:
        split: fractions of rows for train, valid, test; new users and items appear in the last one.

    Raises:
        UserError: the world's settings can't be met.
    """
    if world.genres > len(WORDS):
        raise UserError(f"data.world.genres is {world.genres}, but there are words for {len(WORDS)} genres")
    for name in ("new_users", "new_items"):
        if not 0 <= getattr(world, name) <= 0.5:
            raise UserError(f"data.world.{name} is {getattr(world, name)}: a fraction from 0 to 0.5 is needed")
    generator = np.random.default_rng([seed, 2020])
    users, items, rows = world.users, world.items, world.interactions
    genre = generator.integers(world.genres, size=items)
    if world.genres < 2 or len(np.unique(genre)) < world.genres:
        raise UserError(
            f"data.world.genres is {world.genres} and data.world.items {items}: two genres or more are needed, and enough "
            "items that each genre has one"
        )
    # each user likes half of the genres and dislikes the others
    taste = np.sign(generator.permuted(np.tile(np.arange(world.genres) * 2 - world.genres + 1, (users, 1)), axis=1))
    liking = generator.standard_normal((users, TRAITS))
    trait = generator.standard_normal((items, TRAITS)) / np.sqrt(TRAITS)
    quality = generator.standard_normal(items)

    new_user = np.arange(users) >= users - round(users * world.new_users)
    new_item = generator.permutation(items) >= items - round(items * world.new_items)
    # Activity and popularity have long tails; good items are seen more often.
    activity = generator.lognormal(0, 0.6, users)
    popularity = np.exp(generator.standard_normal(items) * 0.8 + 0.4 * quality)
    old_users, new_users = _draw(generator, activity, new_user, rows, NEW_USER_SHARE)
    old_items, new_items = _draw(generator, popularity, new_item, rows, NEW_ITEM_SHARE)
    first_test_row = rows - round(rows * split[2])
    while True:
        in_test = np.arange(rows) >= first_test_row
        user, item = np.where(in_test, new_users, old_users), np.where(in_test, new_items, old_items)
        user, item, kept = _without_repeats(user, item)
        is_new = new_user[user] | new_item[item]
        early = round(len(user) * (split[0] + split[1])) - int(np.argmax(is_new))
        if early <= 0 or not is_new.any():
            break
        first_test_row += early  # repeats left out have moved the test split's start beyond the first new row
    log_odds = (
        BASE
        + world.text_strength * taste[user, genre[item]]
        + world.behaviour_strength * (liking[user] * trait[item]).sum(1)
        + world.quality_strength * quality[item]
    )
    expected = 1 / (1 + np.exp(-log_odds))
    label = generator.random(len(user)) < expected
    time = START + np.sort(generator.integers(0, 720 * DAY, size=rows))[kept]
    titles, texts = _titles(genre, world.genres, generator)
    interactions = pa.table(
        {
            "user": user.astype(np.int64),
            "item": item.astype(np.int64),
            "label": label.astype(np.int8),
            "timestamp": time,
            "expected": expected.astype(np.float32),
        }
    )
    catalog = pa.table({"item": np.arange(items), "title": titles, "text": texts})
    return Source(
        interactions=(part_of_table("the world's rows", interactions, {"repeated user and item": rows - len(user)}),),
        items=(part_of_table("the world's items", catalog),),
        files=(),
        noun="movie",
        label_rule="drawn from the planted probability",
    )


def _draw(
    generator: np.random.Generator, weight: np.ndarray, new: np.ndarray, rows: int, new_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """One id a row, by weight: among the old ones, and the same with a new one instead with probability `new_share`."""
    old_ids = generator.choice(len(weight), size=rows, p=weight * ~new / (weight * ~new).sum())
    if not new.any():
        return old_ids, old_ids
    new_ids = generator.choice(len(weight), size=rows, p=weight * new / (weight * new).sum())
    return old_ids, np.where(generator.random(rows) < new_share, new_ids, old_ids)


def _without_repeats(user: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first row of each (user, item), in order; also their positions."""
    _, first = np.unique(user * (item.max() + 1) + item, return_index=True)
    kept = np.sort(first)
    return user[kept], item[kept], kept


def _titles(genre: np.ndarray, genres: int, generator: np.random.Generator) -> tuple[list[str], list[str]]:
    """A distinct title for each item, a word and its genre's name, and its text: what it is about, then questions."""
    names = list(WORDS)[:genres]
    titles = [""] * len(genre)
    for number, name in enumerate(names):
        words = generator.permutation([*ANY.split(), *WORDS[name].split()])
        for place, item in enumerate(np.flatnonzero(genre == number).tolist()):
            part, word = divmod(place, len(words))
            titles[item] = f"{words[word]} {name}" + (f" {part + 1}" if part else "")
    texts = []
    for item, number in enumerate(genre.tolist()):
        x, y = generator.choice(WORDS[names[number]].split(), size=2, replace=False)
        lines = [f"Movie: {titles[item]}. A {names[number]} story with {x} and {y}."] * 2
        for question in range(QUESTIONS):
            lines.append(_question(item, question % 2 == 0, question % 4 < 2, titles, genre, genres, generator))
        texts.append("\n".join(lines))
    return titles, texts


def _question(
    item: int,
    alike: bool,
    mixed: bool,
    titles: list[str],
    genre: np.ndarray,
    genres: int,
    generator: np.random.Generator,
) -> str:
    """One line: some titles, then this item's, and whether one of them is of its genre; it tells nothing of any label."""
    if mixed:
        others = generator.permutation(np.delete(np.arange(genres), genre[item]))[: genres // 2]
        kinds = [genre[item], *others[1:]] if alike else others
        liked = generator.choice(np.flatnonzero(np.isin(genre, kinds)), size=generator.integers(2, MIXED + 1))
        if alike:
            liked[generator.integers(len(liked))] = generator.choice(np.flatnonzero(genre == genre[item]))
    else:
        liked = generator.choice(np.flatnonzero((genre == genre[item]) == alike), size=generator.integers(1, ALIKE + 1))
    shown = "; ".join(titles[i] for i in liked)
    return f"Liked: {shown}. Next: {titles[item]}. Good? {'Yes' if alike else 'No'}."
