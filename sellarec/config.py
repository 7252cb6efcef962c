"""The one typed configuration: every field with its unit and default, recipes laid over it, checked before any work.

A field marked `runtime` changes how a run is carried out, never what it computes, so fingerprints leave it out.
"""

import contextlib
import dataclasses
import difflib
import importlib.resources
import io
import math
import pkgutil
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
import yaml

from sellarec.data.sources.tables import Columns
from sellarec.errors import UserError
from sellarec.language.templates import is_file, read_templates

STAGES = ("prepare", "pretrain", "adapt", "collab", "distil", "align", "fuse", "evaluate")
EMBEDDED = "embedded"

COLLAB_MODELS = tuple(
    module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "collab" / "models")])
)
if TYPE_CHECKING:
    CollabName = str
else:
    CollabName = Literal[COLLAB_MODELS]


def runtime(default: Any) -> Any:
    """A dataclass field that doesn't affect any result."""
    return field(default=default, metadata={"runtime": True})


def alias(*flags: str) -> Any:
    return tyro.conf.arg(aliases=flags)


@dataclass(frozen=True, kw_only=True)
class World:
    """The generated world: what `data.source: world` is made of."""

    users: int = 800
    """Users."""
    items: int = 400
    """Items in the catalog."""
    interactions: int = 20_000
    """Rows that are drawn, all splits together; repeats of a user and an item are left out."""
    genres: int = 6
    """Genres; each title carries words of one, and each user's taste is over them."""
    new_users: float = 0.3
    """Fraction of users whose first row falls into the test period."""
    new_items: float = 0.1
    """Fraction of items whose first row falls into the test period."""
    text_strength: float = 3.0
    """Standard deviation, in log-odds, of the part of the taste that titles tell."""
    behaviour_strength: float = 1.0
    """Standard deviation, in log-odds, of the part of the taste that only other users' behaviour tells."""
    quality_strength: float = 2.4
    """Standard deviation, in log-odds, of an item's quality, which no title tells."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the interactions come from and how they become the prepared log."""

    source: Literal["world", "movielens", "amazon", "collm", "lcrec", "recbole", "lightgcn", "tables", "log"] = "world"
    """Format of the source: a generated world, a published format, any tables (CSV, JSON lines, Parquet) by `columns`, or a log
    that jobs/prepare.py left."""
    path: Annotated[str | None, alias("--data", "--path")] = runtime(None)
    """Folder, file or URI of the source; not asked for where the prepared log already stands."""
    dataset: str | None = None
    """Which dataset of the format: of movielens ml-100k, ml-1m, ml-latest-small, ml-10m, ml-20m, ml-25m or ml-32m, of
    amazon its year 2014, 2018 or 2023."""
    categories: tuple[str, ...] = ()
    """Categories of amazon, as in its files' names (Books, Video_Games, ...)."""
    form: str | None = None
    """Which of amazon's published forms is read, where several lie there (reviews, 5core, 5core/rating_only, ...)."""
    period: tuple[str, str] | None = None
    """Dates of amazon's rows that are read: from the first on, before the second (UTC, as 2017-01-01)."""
    columns: Columns = field(default_factory=lambda: Columns(user="user", item="item"))
    """Which column of tables holds what."""
    items: str | None = runtime(None)
    """File or folder of tables that describes items, by `item_columns`."""
    item_columns: Columns = field(default_factory=lambda: Columns(item="item"))
    """Which column of the items' tables holds what."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """A row that can't be read is refused with its line, or dropped and counted."""
    positive_rating: float = 4.0
    """Lowest rating that counts as a positive, where the source gives ratings and no labels."""
    k_core: int = 0
    """Users and items with fewer rows are left out, again and again until none is left; 0 keeps all."""
    k_core_once: bool = False
    """Count rows for the k-core once, before any is left out."""
    split_by: Literal["auto", "given", "shares", "dates", "leave-one-out", "random"] = "auto"
    """given: by the source; shares: of all rows in time order; dates: at `split_dates`; leave-one-out: a user's last row is
    test, the one before valid; random: shares of each user's rows; auto: given where the source gives one, else shares."""
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Fractions of rows for train, valid and test."""
    split_dates: tuple[str, str] | None = None
    """First dates of valid and of test (UTC, as 2017-12-01)."""
    split_seed: int = 0
    """Seed of whatever is drawn while preparing, a generated world included."""
    history_cap: int = 50
    """Most recent positives kept in a row's history (items)."""
    noun: str | None = None
    """What an item is called in prompts; None takes the source's word."""
    expected: tuple[int, int, int, int, int] | None = runtime(None)
    """What a published dataset is known to hold: train, valid and test rows, users, items. A log with other counts is
    refused, as it is not that dataset; None takes any."""
    world: World = field(default_factory=World)


@dataclass(frozen=True, kw_only=True)
class Llm:
    """The causal language model."""

    model: Annotated[str, alias("--llm")] = runtime(EMBEDDED)
    """Hugging Face folder or hub id; `embedded` is a small decoder pre-trained on the catalog's own text (stage pretrain)."""
    revision: str | None = runtime(None)
    """Revision of a hub id: a commit, branch or tag."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the language model (bfloat16 on GPUs; slow on CPUs). Trained weights stay float32."""
    storage: Literal["float32", "bfloat16"] = "float32"
    """Type that the frozen weights are held in: bfloat16 halves their memory and rounds them once, when they are loaded. What is
    trained stays float32, and all is computed in `dtype`. Stage pretrain trains all of its weights, so it holds float32."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """How a row becomes a prompt."""

    template: str = "auto"
    """Its words: a name in sellarec/templates (`full`; `compact` for short contexts; `sella` and `collm` as published), or a
    .yaml file in their form. `auto` takes `full` where it fits with some history, else `compact`."""
    chat: Literal["auto", "plain", "model"] = "auto"
    """Whether the language model's own chat template wraps the turns (model) or their texts stand line by line (plain); auto:
    model where the template has roles and the tokenizer has a chat template."""
    history: int = 10
    """Most recent positives whose titles are shown (items); fewer where they don't fit."""
    max_tokens: int = 256
    """Longest prompt (tokens), never more than the model's context."""
    title_tokens: int = 64
    """Longest title (tokens); the rest of a longer one is cut, and counted."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How long a stage trains, and how often it saves."""

    batch: int = 256
    """Rows of the global batch of one optimizer step, all workers together."""
    epochs: float = 1.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Optimizer steps at most; None leaves it to the epochs."""
    checkpoint_every: float = runtime(60.0)
    """Seconds between checkpoints to resume from."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which state of a stage's training is kept: the best on the valid split."""

    validate_every: float = 1.0
    """Epochs between evaluations on the valid split."""
    valid_rows: int = 4096
    """Rows of the valid split that are scored for it, or users that are ranked for, at most: every so many-th, so half as many
    at least; all where there are no more."""
    patience: int = 5
    """Evaluations without a better metric before the stage stops early."""
    select_on: Literal["auc", "uauc"] = "auc"
    """Metric of the valid split by which the kept state is chosen."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """The optimizer of the dense weights, and the schedule of all learning rates of a stage."""

    optimizer: Literal["adamw", "adam"] = "adamw"
    """adamw decouples the weight decay from the gradient's moments; adam adds it to the gradient."""
    learning_rate: float = 1e-3
    """Peak learning rate of the dense weights."""
    weight_decay: float = 0.01
    """Weight decay of the dense weights."""
    beta2: float = 0.999
    """How much of its mean squared gradient a dense weight keeps at each step, and tables with adam or adamw."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """How the learning rates go on after the warm-up: down to 0 in a half cosine; as they are; or (wsd: warm-up, stable, decay)
    as they are until the last steps, and there down to 0 in a line."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rates rise."""
    decay: float = 0.1
    """Fraction of the steps, the last ones, over which the learning rates of schedule wsd fall."""
    clip: float = 1.0
    """Largest norm of the dense gradient, all weights together."""


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """The optimizer of the embedding tables. All but adam and adamw are fused into the backward pass and change no row
    without a gradient."""

    table_optimizer: Literal["rowwise-adagrad", "adagrad", "sgd", "adam", "adamw"] = "rowwise-adagrad"
    """rowwise-adagrad keeps one number a row, adagrad one a column, sgd none; adam and adamw two, and step all rows each time,
    as torch.optim.Adam and AdamW do."""
    table_learning_rate: float = 0.1
    """Learning rate of the tables."""
    table_weight_decay: float = 0.0
    """What of a row is added to its gradient; with adam of all rows, else of those that have a gradient. With adamw all rows are
    multiplied by 1 - table_learning_rate * table_weight_decay instead."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """How embedding tables are stored, and shared out over the workers."""

    sharding: Literal["row-wise", "table-wise", "column-wise", "auto", "grid", "data-parallel"] = runtime("row-wise")
    """row-wise: each worker holds a block of every table's rows; table-wise: a table lies on one worker, the next larger one
    on the worker that holds least; column-wise: each worker holds a range of every table's columns, with sgd, adagrad or
    adam; auto: row-wise or table-wise, as TorchRec's planner finds it best. grid and data-parallel are refused, with the
    reason."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type that rows are stored in; vectors, gradients and optimizer states are float32."""
    placement: Literal["device", "uvm", "uvm-caching"] = runtime("device")
    """On GPUs: rows in the GPU's memory, in the host's (unified virtual memory), or there with a cache on the GPU."""


@dataclass(frozen=True, kw_only=True)
class Language:
    """What any stage needs that runs the language model."""

    micro_batch: int = runtime(16)
    """Rows of one worker that go through the language model at once; a step accumulates over as many as it needs."""


@dataclass(frozen=True, kw_only=True)
class Backpropagation(Language):
    """What stages need beside, whose gradients go through the language model."""

    checkpoint_activations: bool = runtime(False)
    """Whether only the inputs of the decoder layers are kept for the backward pass, and a layer's activations are computed again
    there: much less memory, for about a third more computing."""


@dataclass(frozen=True, kw_only=True)
class Pretrain(Steps, Dense, Backpropagation):
    """The embedded decoder and its pre-training on the catalog's own text."""

    batch: int = 16
    """Texts of the global batch of one optimizer step, all workers together."""
    epochs: float = 48.0
    """Passes over the catalog's texts."""
    max_steps: int | None = 1200
    """Optimizer steps at most; None leaves it to the epochs."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW."""
    vocabulary: int = 1024
    """Largest size of the byte-level BPE vocabulary (tokens)."""
    context: int = 256
    """Longest sequence (tokens)."""
    hidden: int = 64
    """Width of the decoder."""
    layers: int = 3
    """Decoder layers."""
    heads: int = 4
    """Attention heads."""


@dataclass(frozen=True, kw_only=True)
class Adapt(Steps, Selection, Dense, Backpropagation):
    """LoRA tuning of the language model on text-only prompts."""

    epochs: float = 1.0
    """Passes over the training rows."""
    max_steps: int | None = 500
    """Optimizer steps at most; None leaves it to the epochs."""
    batch: int = 64
    """Rows of the global batch of one optimizer step, all workers together."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW."""
    loss: Literal["answer", "answer-tokens", "sequence"] = "answer"
    """answer: the logistic loss of the score, which sets the two answers against each other; answer-tokens: next-token
    cross-entropy over the vocabulary on the answer; sequence: on the whole prompt and the answer, as published. A mean over rows,
    or tokens."""
    rank: int = 16
    """Rank of the LoRA matrices."""
    alpha: float = 32.0
    """LoRA scale: the update is multiplied by alpha / rank."""
    rslora: bool = False
    """Whether it is multiplied by alpha / sqrt(rank) instead, so that its size does not shrink as the rank grows (rsLoRA)."""
    dora: bool = False
    """Whether the norm of each row of an adapted weight is trained by itself, and LoRA turns its direction (DoRA)."""
    dropout: float = 0.0
    """Dropout on the LoRA path."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get LoRA matrices; `all-linear`: every one but the output layer."""


@dataclass(frozen=True, kw_only=True)
class Collab(Steps, Selection, Dense, Sparse):
    """The collaborative model."""

    model: Annotated[CollabName, alias("--collab")] = "mf"
    """mf: matrix factorisation; svdpp: in which the items of a user's history add to the user's row (SVD++); lightgcn: rows
    smoothed over the graph of train positives; sasrec: a transformer over the history; din: the history weighed by how it
    matches the candidate; fism: history and item by vectors that are learnt from who consumes what. Each is a file in
    sellarec/collab/models."""
    loss: Literal["bce", "bpr", "softmax", "full-softmax"] = "bce"
    """bce: logistic loss of the labels; the others rank positives above other items: bpr and softmax above drawn negatives
    (softmax corrects for how likely each was drawn), full-softmax above the whole catalog. Those tell nothing of how users
    compare, so they can't select_on auc."""
    train_on: Literal["rows", "sequences"] = "rows"
    """rows: a row's item is the target; sequences (sasrec): every item of a user's train sequence after the first is one."""
    negatives: Literal["uniform", "popularity", "in-batch"] = "uniform"
    """What bpr and softmax rank positives above: items of the train split drawn uniformly or by their positive rows, none
    of them the row's target or in its history; or the items of other users' positives in the global batch."""
    negatives_per_row: int = 8
    """Items drawn for each target."""
    shared_negatives: bool = False
    """Whether a positive is ranked above the items drawn for all positives of the global batch, but its own item, not for it
    alone: thousands of negatives for the lookups of one a row. Some may be in its history."""
    init_from: str | None = runtime(None)
    """Folder of an earlier artifact of stage collab, whose rows and dense weights training starts from. Users and items that it
    doesn't have yet get fresh rows: prepare the log with --init-from the earlier one, so that ids go on."""
    init_users: str | None = runtime(None)
    """Parquet file of `id` (as the source has it) and `vector` (as wide as `dim`, or without the bias), from which users' rows
    start; users that it doesn't have get fresh rows."""
    init_items: str | None = runtime(None)
    """The same for items' rows."""
    dim: int = 32
    """Width of an embedding row, its bias included (a multiple of 4)."""
    init_std: float = 0.05
    """Standard deviation of the initial rows."""
    biases: bool = True
    """Whether users and items have biases: the last columns of their rows."""
    global_mean: bool = True
    """Whether the log-odds of the training positives are added to every score."""
    temperature: float | None = None
    """What cosines of a user's and an item's vector are divided by to make the score; None: their plain product."""
    user_rows: bool = True
    """Whether sasrec adds a row of the user's own to what it makes of the history."""
    layers: int = 2
    """Layers of sasrec's transformer, or over which lightgcn smooths rows."""
    heads: int = 1
    """Attention heads of sasrec."""
    hidden: tuple[int, ...] = (200, 80)
    """Widths of din's hidden layers."""
    dropout: float = 0.0
    """Dropout in sasrec and din; in fism, of items of the history."""
    history: int = 50
    """Most recent positives that svdpp, sasrec, din and fism read (items)."""
    l2: float = 0.1
    """Weight of half the squared norm of a target's vectors in its loss (of several negatives, or items of a history,
    their mean)."""
    learning_rate: float = 1e-3
    """Peak learning rate of the dense weights, which sasrec, din and fism have."""
    schedule: Literal["cosine", "constant", "wsd"] = "constant"
    """How the learning rates go on after the warm-up: down to 0 in a half cosine; as they are; or (wsd: warm-up, stable, decay)
    as they are until the last steps, and there down to 0 in a line."""
    warmup: float = 0.0
    """Fraction of the steps over which the learning rates rise."""
    table_learning_rate: float = 0.2
    """Learning rate of the tables."""
    epochs: float = 20.0
    """Passes over the training rows, at most."""
    select_on: Literal["auc", "uauc", "ndcg@10", "ndcg@20", "recall@10", "recall@20"] = "auc"  # type: ignore[assignment]
    # mypy takes no wider type than the base class's, as if the field could be written
    """Metric of the valid split by which the kept state is chosen: of the scores of its rows, or of ranking for its users the
    whole catalog but for what they have in train."""


@dataclass(frozen=True, kw_only=True)
class Distil(Language):
    """One semantic vector per item, from the adapted language model."""

    text: Literal["title", "text"] = "title"
    """What the language model reads of an item: its title, or its longer text."""
    prompt: str = "{Noun}: {text}"
    """What stands around that text: {text} is the text, {noun} and {Noun} what an item is called."""
    layer: int = -1
    """Which of the hidden states is taken: 0 the input embeddings, 1 the first layer's, ...; -1 the last layer's after the final
    normalisation, -2 the one before, ..."""
    pooling: Literal["last", "mean"] = "last"
    """Of a text's tokens the last one's state, or the mean of all."""


@dataclass(frozen=True, kw_only=True)
class Align(Steps, Selection, Dense, Sparse):
    """Collaborative training with bidirectional contrastive alignment to the distilled vectors."""

    init: Literal["scratch", "collab"] = "collab"
    """Start from fresh tables (as published) or from the trained collaborative model."""
    weight: float = 0.3
    """Weight of the contrastive loss beside the collaborative one."""
    temperature: float = 0.2
    """Temperature of the contrastive loss (cosines are divided by it)."""
    contrastive: Literal["info-nce", "rince"] = "info-nce"
    """info-nce: cross-entropy of a row's own vector among those of the global batch; rince: the loss of the published code,
    which for small `rince_q` is close to it."""
    rince_q: float = 0.01
    """The power q of rince."""
    rince_lambda: float = 0.1
    """What rince multiplies the sum over positive and negatives by."""
    direction: Literal["both", "semantic-to-collab"] = "both"
    """both: the mean of finding the distilled vector by the projected row, and the other way round; semantic-to-collab: a
    distilled vector finds its projected row (as published)."""
    mask_equal: bool = True
    """Whether rows of the same item (or user) are left out of each other's negatives; false counts them, as published."""
    semantic: Literal["trained", "frozen"] = "trained"
    """Whether the distilled vectors are trained too (as published), or stay as they are."""
    side: Literal["items", "users", "both"] = "items"
    """What is aligned: items' rows to their distilled vectors (as published), users' vectors to the mean of the distilled
    vectors of what the row's history holds, or both, their losses added."""
    history: int = 50
    """Most recent positives of whose distilled vectors the mean is taken for users (items)."""
    block: int = runtime(1024)
    """Rows of the global batch that the contrastive loss compares at once with a worker's own: more take more memory."""
    hidden: int = 128
    """Width of the projection's hidden layer."""
    epochs: float = 10.0
    """Passes over the training rows, at most."""


@dataclass(frozen=True, kw_only=True)
class Fuse(Steps, Selection, Dense, Sparse, Backpropagation):
    """Hybrid projection: tokens (user, item, distilled item) in the prompt of the adapted model."""

    tokens: tuple[Literal["user", "item", "semantic"], ...] = ("user", "item", "semantic")
    """Soft tokens of the prompt: the user's row, the item's row, the item's distilled vector (user item is CoLLM's set). The
    text speaks of no other; tables that none takes are not read."""
    train: tuple[Literal["tables", "projections", "adapter"], ...] = ("tables", "projections")
    """What is trained: the tables (with the collaborative model's dense weights), the projections with their gains, the LoRA
    weights that adapt left. The rest stays as it is read; CoLLM trains the projections alone."""
    projections: Literal["shared", "separate"] = "shared"
    """Whether user and item take one projection (SeLLa-Rec) or each its own."""
    experts: int = 1
    """Projections of which a collaborative token is the sum, weighed by a softmax of a linear gate on the row."""
    norm: Literal["match", "none"] = "match"
    """match: a token has the mean norm of the model's input embeddings, times a learned gain; none: the norm that its projection
    gives it (as published)."""
    epochs: float = 2.0
    """Passes over the training rows."""
    max_steps: int | None = 500
    """Optimizer steps at most; None leaves it to the epochs."""
    batch: int = 64
    """Rows of the global batch of one optimizer step, all workers together."""
    learning_rate: float = 8e-3
    """Peak learning rate of the dense weights that are trained: projections, adapter."""
    table_learning_rate: float = 0.1
    """Learning rate of the tables."""
    loss: Literal["answer", "answer-tokens", "sequence"] = "answer"
    """answer: the logistic loss of the score, which sets the two answers against each other; answer-tokens: next-token
    cross-entropy over the vocabulary on the answer; sequence: on the whole prompt and the answer, as published. A mean over rows,
    or tokens."""
    warm_start: bool = True
    """Start the collaborative projection (both of them, and every expert) from the one that align trained, else from random
    weights."""
    unseen_dropout: float = 0.35
    """Share of training rows whose user (and, drawn apart, whose item) is treated as unseen, that is as a row of zeros: the
    dropout of collaborative tokens."""
    semantic: Literal["trained", "frozen"] = "trained"
    """Whether the items' distilled vectors, as align left them, are trained with the tables, or stay as they are."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Language):
    """Scoring the test split, metrics and their intervals."""

    batch: int = runtime(512)
    """Rows scored at once, all workers together."""
    replicates: int = 1000
    """Bootstrap samples of users behind each 95% interval."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a SeLLa-Rec recommender: prepare, pretrain, adapt, collab, distil, align, fuse, evaluate."""

    workers: int = runtime(2)
    """Training processes; each holds 1/workers of every table and of the language model."""
    seed: int = 1
    """Seed of initial weights, order of rows and dropout. Never changes the prepared data."""
    stages: tuple[str, ...] = runtime(())
    """Stages to run, separated by commas (default: all); others must already stand in the workspace."""
    workspace: str = runtime("runs")
    """Folder or URI (s3://, gs://) for artifacts and runs."""
    name: str | None = runtime(None)
    """Name of the run (default: the names of the recipes)."""
    data: Data = field(default_factory=Data)
    llm: Llm = field(default_factory=Llm)
    prompt: Prompt = field(default_factory=Prompt)
    tables: Tables = field(default_factory=Tables)
    pretrain: Pretrain = field(default_factory=Pretrain)
    adapt: Adapt = field(default_factory=Adapt)
    collab: Collab = field(default_factory=Collab)
    distil: Distil = field(default_factory=Distil)
    align: Align = field(default_factory=Align)
    fuse: Fuse = field(default_factory=Fuse)
    evaluate: Evaluate = field(default_factory=Evaluate)


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted name, value, field) of every setting below a config dataclass."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value, f


def result_settings(settings: Any) -> dict[str, Any]:
    """The settings that affect results, by dotted name: what fingerprints and comparisons of runs are made of."""
    return {name: value for name, value, f in leaves(settings) if not f.metadata.get("runtime")}


def to_yaml(config: Config) -> str:
    """The resolved config as a recipe: `jobs/train.py THIS_FILE` runs it again."""
    return yaml.safe_dump(dataclasses.asdict(config, dict_factory=_plain), sort_keys=False)


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in pairs}


def recipe_folder() -> Path:
    return Path(str(importlib.resources.files("sellarec") / "recipes"))


def built_in_recipes() -> list[str]:
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def read_recipe(recipe: str) -> tuple[str, dict[str, Any]]:
    """The name of a recipe and its settings by dotted name, from a built-in name or a YAML file.

    Raises:
        UserError: no such recipe, not YAML, or a name in it that is no setting.
    """
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else recipe_folder() / f"{recipe}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(recipe, built_in_recipes(), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise UserError(
            f"there is no recipe '{recipe}': {hint}give a .yaml file that exists or one of {', '.join(built_in_recipes())}"
        )
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"recipe {path} is not readable YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"recipe {path} must hold settings by name, like 'align: {{temperature: 0.2}}', not {content!r}"
        )
    known = [name for name, _, _ in leaves(Config())]
    sections = {name.rpartition(".")[0] for name in known} - {""}
    settings: dict[str, Any] = {}

    def flatten(mapping: dict[str, Any], prefix: str) -> None:
        for key, value in mapping.items():
            name = f"{prefix}{key}"
            if name in sections and value is None:
                continue
            if name in sections and isinstance(value, dict):
                flatten(value, f"{name}.")
            elif name in known:
                settings[name] = value
            elif name in sections:
                raise UserError(
                    f"recipe {path}: {name} is a section of settings, not a setting: give it as '{name}: {{...}}'"
                )
            else:
                near = difflib.get_close_matches(name, [*known, *sections], n=3, cutoff=0.5)
                hint = f"did you mean {', '.join(near)}?" if near else "`--help` lists every setting"
                raise UserError(f"recipe {path}: there is no setting '{name}'; {hint}")

    flatten(content, "")
    name = path.parent.name if path.name == "config.yaml" else path.stem
    return name, settings


def parse(arguments: Sequence[str], program: str = "train.py") -> Config:
    """The config of a command line `[RECIPE ...] [--flag value ...]`, checked.

    Recipes are laid over the defaults from left to right, then the flags.

    Raises:
        UserError: an unknown recipe or setting, or settings that contradict each other.
        SystemExit: a flag that doesn't parse (status 2, the message on stderr), or `--help` (status 0).
    """
    names, flags = _with_recipes(arguments, "demo")
    if any(flag in ("--stages", "--stages=") for flag in arguments) and not _has_stages(list(arguments)):
        raise UserError(f"--stages names none: give some of {', '.join(STAGES)}, separated by commas, or leave it out")
    description = (
        f"usage: {program} [RECIPE ...] [OPTIONS]\n\n{Config.__doc__}\n\nA RECIPE is a .yaml file or one of: "
        f"{', '.join(built_in_recipes())} (default: demo). Later ones are laid over earlier ones, then the flags."
    )
    config = tyro.cli(
        Config, args=_split_stages(flags), prog=program, description=description, config=(tyro.conf.FlagConversionOff,)
    )
    if config.name is None:
        config = dataclasses.replace(config, name="-".join(names))
    if is_file(config.prompt.template):
        # workers, which read it too, are in another folder
        path = str(Path(config.prompt.template).expanduser().absolute())
        config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, template=path))
    check(config)
    return config


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Write the prepared log of a dataset."""

    out: Path
    """Folder to write into; on a cluster, one that all nodes share."""
    init_from: Path | None = None
    """A prepared log whose ids are kept, with the codes and descriptions that go with them: what is new gets ids after
    them. Its rows are not taken over: where histories are to go on, give the earlier rows again, with the new ones."""
    downloads: Path = Path("downloads")
    """Folder for files that the publisher serves, which are fetched where --path is not given (MovieLens, Amazon)."""
    data: Data = field(default_factory=Data)


def parse_prepare(arguments: Sequence[str]) -> Prepare:
    """The settings of a command line `DATASET [--flag value ...]` of jobs/prepare.py, checked. A DATASET is a data recipe.

    Raises:
        UserError: an unknown recipe or setting, or settings that contradict each other.
        SystemExit: a flag that doesn't parse (status 2, the message on stderr), or `--help` (status 0).
    """
    if arguments and arguments[0].startswith("-") and not {"-h", "--help"} & set(arguments):
        raise UserError(f"the dataset comes first, before {arguments[0]}: one of {', '.join(built_in_recipes())}")
    _, flags = _with_recipes(arguments, "demo", only="data.")
    description = (
        f"usage: prepare.py DATASET [--path PATH] --out DIR [OPTIONS]\n\n{Prepare.__doc__}\n\nA DATASET is a .yaml file or one "
        f"of: {', '.join(built_in_recipes())}."
    )
    settings = tyro.cli(
        Prepare, args=flags, prog="prepare.py", description=description, config=(tyro.conf.FlagConversionOff,)
    )
    _check_bounds(settings)
    check_data(settings.data)
    # tasks of a cluster don't run in this process's folder
    earlier = None if settings.init_from is None else settings.init_from.absolute()
    data = dataclasses.replace(settings.data, path=_absolute(settings.data.path), items=_absolute(settings.data.items))
    return dataclasses.replace(settings, out=settings.out.absolute(), init_from=earlier, data=data)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Score a split's rows with a trained collaborative model or an exported recommender, and rank items for its users."""

    artifact: Path
    """Folder of the model: WORKSPACE/artifacts/collab-... or align-..., or what jobs/export.py wrote."""
    data: Path
    """Folder of a prepared log: that of jobs/prepare.py, or WORKSPACE/artifacts/prepare-... An export may be evaluated on any:
    users and items are matched by the source's ids."""
    out: Path
    """File for the records (JSON, as results.json)."""
    ranking: str = "none"
    """full ranks the whole catalog but for what the user had before; candidates:N the relevant items among N drawn ones; none
    scores the rows alone."""
    cutoffs: tuple[int, ...] = (5, 10, 20)
    """Places of a ranking that count."""
    split: Literal["valid", "test"] = "test"
    """Split that is evaluated."""
    workers: int = 2
    """Processes that share the tables and the work; an export is scored with by one."""
    batch: int = 512
    """Rows scored, or users ranked for, at once, all workers together."""
    replicates: int = 1000
    """Bootstrap samples of users behind each 95% interval."""
    seed: int = 1
    """Seed of the bootstrap and of drawn candidates."""


def parse_evaluation(arguments: Sequence[str]) -> Evaluation:
    """The settings of jobs/evaluate.py, checked.

    Raises:
        UserError: settings that are out of range.
        SystemExit: a flag that doesn't parse (status 2, the message on stderr), or `--help` (status 0).
    """
    settings = tyro.cli(Evaluation, args=list(arguments), prog="evaluate.py")
    _check_bounds(settings)
    if not re.fullmatch(r"none|full|candidates:[1-9]\d{0,8}", settings.ranking):
        raise UserError(f"--ranking is '{settings.ranking}', but must be none, full or candidates:N, as candidates:100")
    if not settings.cutoffs or min(settings.cutoffs) < 1 or len(set(settings.cutoffs)) < len(settings.cutoffs):
        raise UserError(f"--cutoffs are {settings.cutoffs}: different numbers from 1 on are needed")
    return settings


@dataclass(frozen=True, kw_only=True)
class Planning:
    """Print which worker would hold which rows of a user and an item table, and the memory that takes."""

    workers: int
    """Processes that share the tables."""
    users: int
    """Rows of the user table."""
    items: int
    """Rows of the item table."""
    dim: int = 64
    """Width of a row (a multiple of 4)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the workers run. No GPU is needed to plan for some."""
    memory_per_worker: float | None = None
    """Memory for tables on each worker (GiB; of its GPU, or with uvm of its share of the host). Default: on CPUs an equal share
    of what is free on this machine, beside the worker itself."""
    tables: Tables = field(default_factory=Tables)
    table_optimizer: Literal["rowwise-adagrad", "adagrad", "sgd", "adam", "adamw"] = "rowwise-adagrad"
    """Optimizer of the tables: its state lies beside the rows."""


def parse_planning(arguments: Sequence[str]) -> Planning:
    """The settings of jobs/plan.py, checked.

    Raises:
        UserError: settings that are out of range.
        SystemExit: a flag that doesn't parse (status 2, the message on stderr), or `--help` (status 0).
    """
    settings = tyro.cli(Planning, args=list(arguments), prog="plan.py")
    _check_bounds(settings)
    _check_width("dim", settings.dim)
    return settings


def _check_width(name: str, dim: int) -> None:
    if dim % 4:
        raise UserError(f"{name} is {dim}: the table kernels need a multiple of 4")


def _absolute(path: str | None) -> str | None:
    return path if path is None or "://" in path else str(Path(path).absolute())


def _with_recipes(arguments: Sequence[str], default: str, only: str = "") -> tuple[list[str], list[str]]:
    """The names of a command line's recipes, and its flags after those that the recipes stand for."""
    first_flag = next((i for i, text in enumerate(arguments) if text.startswith("-")), len(arguments))
    recipes, flags = list(arguments[:first_flag]), list(arguments[first_flag:])
    settings: dict[str, Any] = {}
    names = []
    for recipe in recipes or [default]:
        name, laid_over = read_recipe(recipe)
        _check_values(recipe, laid_over)
        names.append(name)
        settings.update(laid_over)
    chosen = {name: value for name, value in settings.items() if name.startswith(only)}
    return names, [argument for name, value in chosen.items() for argument in _as_flag(name, value)] + flags


def _has_stages(flags: list[str]) -> bool:
    split = _split_stages(flags)
    after = split[split.index("--stages") + 1 :]
    return bool(after) and not after[0].startswith("-")


def _check_values(recipe: str, settings: dict[str, Any]) -> None:
    """Refuse a value of a recipe that its setting can't take."""
    if not _parses([argument for name, value in settings.items() for argument in _as_flag(name, value)]):
        for name, value in settings.items():
            if not _parses(_as_flag(name, value)):
                kind = next(f.type for other, _, f in leaves(Config()) if other == name)
                raise UserError(
                    f"recipe {recipe}: {name} is {value!r}, which is none of {kind}: `--help` tells what it takes"
                )


def _parses(flags: list[str]) -> bool:
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            tyro.cli(Config, args=_split_stages(flags), config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        return False
    return True


def _as_flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]  # a value may begin with a dash


def _split_stages(flags: list[str]) -> list[str]:
    """`--stages a,b` as `--stages a b`, which is how a tuple is given."""
    out: list[str] = []
    for flag in flags:
        if flag.startswith("--stages="):
            out += ["--stages", *(part.strip() for part in flag.removeprefix("--stages=").split(",") if part.strip())]
        elif out and out[-1] == "--stages":
            out += [part.strip() for part in flag.split(",") if part.strip()]
        else:
            out.append(flag)
    return out


def check(config: Config) -> None:
    """Refuse settings that are out of range or contradict each other, before any work.

    Raises:
        UserError: naming the settings and their values.
    """
    _check_bounds(config)
    for name, value, _ in leaves(config):
        if name.rpartition(".")[2] == "warmup" and value > 1:
            raise UserError(f"{name} is {value}: a fraction of the steps from 0 to 1 is needed")
    if config.name is not None and not re.fullmatch(r"\w[\w.-]*", config.name, re.ASCII):
        raise UserError(
            f"name is '{config.name}', but it names a folder below runs/: letters, digits, '.', '_' and '-' are allowed, "
            "beginning with a letter or digit; give --name"
        )
    for name in config.stages:
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"there is no stage '{name}': {hint}the stages are {', '.join(STAGES)}")
    check_data(config.data)
    data = config.data
    if data.source != "log" and data.history_cap < config.prompt.history:
        raise UserError(
            f"prompt.history is {config.prompt.history}, but data.history_cap keeps only {data.history_cap} items a row: "
            "raise data.history_cap or lower prompt.history"
        )
    defaults = {name: value for name, value, _ in leaves(Config())}
    for name, value, _ in leaves(config):
        if value != defaults[name] and name.startswith("pretrain.") and config.llm.model != EMBEDDED:
            raise UserError(
                f"{name} is {value}, but llm.model is {config.llm.model}: only the embedded model is pre-trained here; "
                "leave out one of the two"
            )
    if config.llm.revision is not None and (config.llm.model == EMBEDDED or Path(config.llm.model).exists()):
        raise UserError(
            f"llm.revision is {config.llm.revision}, but llm.model is {config.llm.model}: only a hub id has revisions"
        )
    if config.stages and "pretrain" in config.stages and config.llm.model != EMBEDDED:
        raise UserError(
            f"stages names pretrain, but llm.model is {config.llm.model}: only the embedded model is pre-trained here; "
            "leave out one of the two"
        )
    if config.pretrain.hidden % (2 * config.pretrain.heads):
        raise UserError(
            f"pretrain.hidden is {config.pretrain.hidden} and pretrain.heads {config.pretrain.heads}: "
            "the width must be a multiple of twice the heads (rotary embeddings take pairs)"
        )
    _check_width("collab.dim", config.collab.dim)
    _check_collab(config)
    if not 0 <= config.adapt.dropout < 1:
        raise UserError(f"adapt.dropout is {config.adapt.dropout}: a share from 0 to below 1 is needed")
    _check_align(config)
    _check_dense(config)
    _check_adapt(config)
    _check_distil(config)
    _check_prompt(config)
    _check_fuse(config)


def _check_align(config: Config) -> None:
    align, defaults = config.align, Align()
    for name in ("rince_q", "rince_lambda"):
        value = getattr(align, name)
        if value != getattr(defaults, name) and align.contrastive != "rince":
            raise UserError(
                f"align.{name} is {value}, but align.contrastive is {align.contrastive}, which doesn't read it: leave out one of "
                "the two"
            )
        if not 0 < value <= 1:
            raise UserError(f"align.{name} is {value}: a number above 0, at most 1, is needed")
    if align.history != defaults.history and align.side == "items":
        raise UserError(
            f"align.history is {align.history}, but align.side is items, which reads no history: leave out one of the two"
        )
    if align.contrastive == "rince" and align.rince_q / align.temperature > 40:
        raise UserError(
            f"align.rince_q is {align.rince_q} and align.temperature {align.temperature}: exp(q / temperature) overflows; raise "
            "the temperature or lower q"
        )
    if align.side != "items" and config.data.split_by == "random":
        raise UserError(
            f"align.side is {align.side}, but data.split_by is random: histories of train rows then hold positives of valid and "
            "test, to which users would be drawn; take align.side items, or another split"
        )
    if align.side != "items" and config.data.source != "log" and align.history > config.data.history_cap:
        raise UserError(
            f"align.history is {align.history}, but data.history_cap keeps only {config.data.history_cap} items a row: raise "
            "data.history_cap or lower align.history"
        )


def _check_dense(config: Config) -> None:
    for section in dataclasses.fields(config):
        settings = getattr(config, section.name)
        if not isinstance(settings, Dense):
            continue
        name = section.name
        if settings.beta2 >= 1:
            raise UserError(f"{name}.beta2 is {settings.beta2}: a share from 0 to below 1 is needed")
        if settings.schedule != "wsd" and settings.decay != Dense.decay:
            raise UserError(
                f"{name}.decay is {settings.decay}, but {name}.schedule is {settings.schedule}, for which it means nothing: "
                "leave out one of the two"
            )
        if settings.schedule == "wsd" and settings.warmup + settings.decay > 1:
            raise UserError(
                f"{name}.warmup is {settings.warmup} and {name}.decay {settings.decay}: of schedule wsd they are fractions of "
                "the steps that don't overlap, at most 1 together"
            )


def _check_adapt(config: Config) -> None:
    targets = config.adapt.targets
    if not targets:
        raise UserError("adapt.targets is empty: give names of linear layers, or all-linear")
    if ALL_LINEAR in targets and len(targets) > 1:
        raise UserError(f"adapt.targets is {', '.join(targets)}: {ALL_LINEAR} takes every layer, so it stands alone")


ALL_LINEAR = "all-linear"
"""Of `adapt.targets`: every linear layer but the output layer."""


def _check_distil(config: Config) -> None:
    prompt = config.distil.prompt
    try:
        pieces = list(Formatter().parse(prompt))
        fields = [name for _, name, _, _ in pieces if name is not None]
    except ValueError as error:
        raise UserError(f"distil.prompt is '{prompt}', whose braces don't close ({error}): write {{text}}") from error
    unknown = [name for name in fields if name not in ("text", "noun", "Noun")]
    if unknown or fields.count("text") != 1:
        raise UserError(
            f"distil.prompt is '{prompt}', with the fields {', '.join(fields) or 'none'}: {{text}} once is needed, {{noun}} and "
            "{Noun} are allowed"
        )
    if any(form or conversion for _, _, form, conversion in pieces):
        raise UserError(f"distil.prompt is '{prompt}': its fields are written plainly, as {{text}}")
    if not "".join(literal for literal, _, _, _ in pieces).strip():
        raise UserError(
            f"distil.prompt is '{prompt}', which makes no token of an item without a text: put words around {{text}}"
        )
    if config.llm.model == EMBEDDED:
        check_layer(config.distil.layer, config.pretrain.layers, "the embedded model (pretrain.layers)")


def check_layer(layer: int, layers: int, model: str) -> None:
    """Raises UserError where a model of so many layers has no hidden states of distil.layer."""
    if not -layers - 1 <= layer <= layers:
        raise UserError(
            f"distil.layer is {layer}, but {model} has {layers} layers: {-layers - 1} to {layers} is needed, where 0 is the "
            "input embeddings"
        )


def _check_prompt(config: Config) -> None:
    prompt = config.prompt
    for template in read_templates(prompt.template).values():
        template.turns("fused", config.fuse.tokens)
    if prompt.chat == "model" and config.llm.model == EMBEDDED:
        raise UserError(
            f"prompt.chat is model, but llm.model is {EMBEDDED}, whose tokenizer has no chat template: take prompt.chat "
            "plain, or give --llm a model that was tuned for chats"
        )


def _check_fuse(config: Config) -> None:
    fuse, defaults = config.fuse, Fuse()
    if not 0 <= fuse.unseen_dropout < 1:
        raise UserError(f"fuse.unseen_dropout is {fuse.unseen_dropout}: a share from 0 to below 1 is needed")
    if not fuse.tokens:
        raise UserError(
            "fuse.tokens names none: the model without soft tokens is the one that stage adapt trains, which stage evaluate "
            "scores as text-only beside the others; name some of user, item, semantic"
        )
    if not fuse.train:
        raise UserError("fuse.train names nothing to train: name some of tables, projections, adapter")
    for name in ("tokens", "train"):
        named = getattr(fuse, name)
        if len(set(named)) < len(named):
            raise UserError(f"fuse.{name} is {' '.join(named)}: name each once")
    if fuse.tokens == ("semantic",) and fuse.semantic == "frozen" and "tables" in fuse.train:
        raise UserError(
            f"fuse.train is {' '.join(fuse.train)}, but fuse.tokens is semantic and fuse.semantic frozen: no table is left to "
            "train; leave tables out, or fuse.semantic"
        )
    if fuse.projections == "separate" and not {"user", "item"} <= set(fuse.tokens):
        raise UserError(
            f"fuse.projections is separate, but fuse.tokens is {' '.join(fuse.tokens)}: user and item have a projection each "
            "only where both are injected; leave out one of the two"
        )
    unread: dict[str, str] = {}
    if fuse.tokens == ("semantic",):
        of_rows = ("experts", "warm_start", "unseen_dropout")
        unread |= dict.fromkeys(of_rows, "fuse.tokens is semantic, which takes no collaborative row")
    if "semantic" not in fuse.tokens:
        unread["semantic"] = f"fuse.tokens is {' '.join(fuse.tokens)}, without it"
    if "tables" not in fuse.train:
        unread["semantic"] = f"fuse.train is {' '.join(fuse.train)}, without the tables"
        unread |= dict.fromkeys(TABLE_SETTINGS, f"fuse.train is {' '.join(fuse.train)}, without the tables")
    if fuse.train == ("tables",) and ("user" not in fuse.tokens or not _has_dense_weights(config.collab)):
        of_tables = ("beta2",) if fuse.table_optimizer in DENSE_TABLE_OPTIMIZERS else ()
        dense = [name for name in DENSE_SETTINGS if name not in of_tables]
        unread |= dict.fromkeys(dense, "fuse.train is tables, which have no dense weights here")
    for name, reason in unread.items():
        if getattr(fuse, name) != getattr(defaults, name):
            raise UserError(f"fuse.{name} is {getattr(fuse, name)}, but {reason}: leave out one of the two")
    if "projections" not in fuse.train:
        drawn = [
            f"fuse.{name} is {value}"
            for name, value, is_drawn in (
                ("tokens", " ".join(fuse.tokens), "semantic" in fuse.tokens),
                ("warm_start", fuse.warm_start, not fuse.warm_start),
                ("experts", fuse.experts, fuse.experts > 1),
                ("projections", fuse.projections, fuse.projections == "separate"),
            )
            if is_drawn
        ]
        if drawn:
            raise UserError(
                f"fuse.train is {' '.join(fuse.train)}, without projections, but {drawn[0]}: weights that "
                "align doesn't leave would stay as they were drawn, and two projections be one; add projections to fuse.train, "
                "or take one collaborative projection from align"
            )


def _has_dense_weights(collab: Collab) -> bool:
    from importlib import import_module  # a model's file loads torch

    return "learning_rate" in import_module(f"sellarec.collab.models.{collab.model}").Model.reads


def _check_collab(config: Config) -> None:
    collab, defaults = config.collab, Collab()
    for name in ("init_users", "init_items"):
        if getattr(collab, name) is not None and collab.init_from is not None:
            raise UserError(
                f"collab.{name} is {getattr(collab, name)} and collab.init_from {collab.init_from}: rows start from one of them"
            )
    for name in ("collab", "align"):
        if collab.loss != "bce" and getattr(config, name).select_on == "auc":
            raise UserError(
                f"collab.loss is {collab.loss}, which ranks the items of one user, but {name}.select_on is auc, which compares "
                f"users: take --{name}.select-on uauc"
            )
    for name, unread in (
        ("negatives", collab.loss not in SAMPLED),
        ("negatives_per_row", collab.loss not in SAMPLED or collab.negatives == "in-batch"),
        ("shared_negatives", collab.loss not in SAMPLED or collab.negatives == "in-batch"),
    ):
        if unread and getattr(collab, name) != getattr(defaults, name):
            raise UserError(
                f"collab.{name} is {getattr(collab, name)}, but collab.loss is {collab.loss} and collab.negatives "
                f"{collab.negatives}, for which it means nothing: leave out one of them"
            )
    if not collab.hidden or min(collab.hidden) < 1:
        raise UserError(f"collab.hidden is {collab.hidden}: one width or more, each at least 1, are needed")
    if not 0 <= collab.dropout < 1:
        raise UserError(f"collab.dropout is {collab.dropout}: a share from 0 to below 1 is needed")
    changed = [name for name in MODEL_SETTINGS if getattr(collab, name) != getattr(defaults, name)]
    if collab.model == "mf" and not changed and collab.train_on == "rows":
        return
    from importlib import import_module  # a model's file loads torch

    model = import_module(f"sellarec.collab.models.{collab.model}").Model
    for whose in ("users", "items"):
        path = getattr(collab, f"init_{whose}")
        if path is not None and (whose not in model.init_from_vectors or (whose == "users" and not collab.user_rows)):
            raise UserError(
                f"collab.init_{whose} is {path}, but collab.model is {collab.model} with collab.user_rows {collab.user_rows}, "
                f"which has no rows of {whose} to start: leave it out"
            )
    ignored = [name for name in model.ignores if getattr(collab, name) != getattr(defaults, name)]
    dense_tables = collab.table_optimizer in DENSE_TABLE_OPTIMIZERS
    for name in (*changed, *ignored):
        if name not in model.reads and not (name == "beta2" and dense_tables):
            raise UserError(
                f"collab.{name} is {getattr(collab, name)}, but collab.model is {collab.model}, which doesn't read it: leave out "
                "one of the two"
            )
    if config.data.source != "log" and "history" in model.reads and collab.history > config.data.history_cap:
        raise UserError(
            f"collab.history is {collab.history}, but data.history_cap keeps only {config.data.history_cap} items a row: raise "
            "data.history_cap or lower collab.history"
        )
    if collab.loss not in model.losses:
        raise UserError(
            f"collab.loss is {collab.loss}, but collab.model is {collab.model}, which is trained with {' or '.join(model.losses)}"
        )
    if "heads" in model.reads and collab.dim % collab.heads:
        raise UserError(
            f"collab.dim is {collab.dim} and collab.heads {collab.heads}: the width must be a multiple of the heads"
        )
    if not model.is_product and (
        collab.loss == "full-softmax"
        or collab.shared_negatives
        or (collab.loss != "bce" and collab.negatives == "in-batch")
    ):
        raise UserError(
            f"collab.model is {collab.model}, whose score is no product of a user's and an item's vector, but collab.loss "
            f"{collab.loss} (collab.negatives {collab.negatives}, collab.shared_negatives {collab.shared_negatives}) scores "
            "many items at once: draw negatives for each row (collab.negatives uniform or popularity, not shared)"
        )
    if not model.is_product and collab.select_on not in ("auc", "uauc"):
        raise UserError(
            f"collab.model is {collab.model}, whose score is no product of a user's and an item's vector, but collab.select_on "
            f"{collab.select_on} ranks the whole catalog: take auc or uauc"
        )
    if collab.train_on == "sequences":
        if not model.has_positions:
            raise UserError(
                f"collab.train_on is sequences, but collab.model is {collab.model}, which scores rows: take rows"
            )
        if collab.loss == "bce" or collab.negatives == "in-batch" or collab.shared_negatives or collab.user_rows:
            raise UserError(
                f"collab.train_on is sequences, collab.loss {collab.loss}, collab.negatives {collab.negatives}, "
                f"collab.shared_negatives {collab.shared_negatives} and collab.user_rows {collab.user_rows}: sequences take a "
                "ranking loss with negatives drawn for each target or the full softmax, and no rows of users"
            )


SAMPLED = ("bpr", "softmax")
"""Losses of `collab` that rank a target above negatives."""

DENSE_TABLE_OPTIMIZERS = ("adam", "adamw")
"""Optimizers of tables that step all rows, on dense gradients."""

DENSE_SETTINGS = ("optimizer", "learning_rate", "weight_decay", "beta2", "clip")
"""Settings of `collab` that models with dense weights read."""

TABLE_SETTINGS = ("table_optimizer", "table_learning_rate", "table_weight_decay")
"""Settings of a stage that trains tables."""

MODEL_SETTINGS = ("user_rows", "layers", "heads", "hidden", "dropout", "history", *DENSE_SETTINGS)
"""Settings of `collab` that only some models read."""


def _check_bounds(settings: Any) -> None:
    for name, value, _ in leaves(settings):
        if isinstance(value, float | int) and not isinstance(value, bool):
            low = _LOWEST.get(name.rpartition(".")[2], 0)
            if not value >= low or math.isinf(value):
                raise UserError(f"{name} is {value}, but must be a finite number, at least {low}")
            high = MAX_WORLD if name.startswith("data.world.") else MAX_INTEGER
            if isinstance(value, int) and value > high:
                raise UserError(f"{name} is {value}, but must be at most {high:,}")


def check_data(data: Data) -> None:
    """Refuse settings of data that contradict each other.

    Raises:
        UserError: naming the settings and their values.
    """
    if data.source == "world" and data.path is not None:
        raise UserError(
            f"data.source is world, which is generated, but data.path is {data.path}: "
            "leave the path out, or name the recipe of your data (for instance `train.py ml-latest-small --data ...`)"
        )
    defaults = {name: value for name, value, _ in leaves(Data(), "data.")}
    mapped = [name for name, value, _ in leaves(data.item_columns, "data.item_columns.") if value != defaults[name]]
    if mapped and data.items is None:
        raise UserError(
            f"{mapped[0]} names a column of the items' tables, but data.items names no tables: give --data.items"
        )
    for name, value, _ in leaves(data, "data."):
        sources = next((found for beginning, found in _ONLY_FOR.items() if name.startswith(beginning)), None)
        if value != defaults[name] and sources is not None and data.source not in sources:
            raise UserError(
                f"{name} is {value}, but data.source is {data.source}, for which it means nothing: leave out one of the two"
            )
    if data.source == "log":
        for name, value, _ in leaves(data, "data."):
            if value != defaults[name] and name not in ("data.source", "data.path", "data.noun", "data.expected"):
                raise UserError(
                    f"{name} is {value}, but data.source is log, which is prepared already: leave out one of the two"
                )
    if not (abs(sum(data.split) - 1) <= 1e-6 and min(data.split) > 0):
        raise UserError(f"data.split is {data.split}: three fractions above 0 that add up to 1 are needed")
    if (data.split_by == "dates") != (data.split_dates is not None):
        raise UserError(
            f"data.split_by is {data.split_by} and data.split_dates {data.split_dates}: a split by dates needs both, "
            "another one neither"
        )
    for name in ("period", "split_dates"):
        dates = getattr(data, name)
        if dates is not None and seconds(dates[0]) >= seconds(dates[1]):
            raise UserError(f"data.{name} is {dates[0]} and {dates[1]}: the second date must come after the first")


MAX_INTEGER = 2**31 - 1
"""No count is above it."""

MAX_WORLD = 10_000_000
"""The generated world is made in memory."""


def seconds(date: str) -> int:
    """Seconds since 1970 of a date, or a date and time, in UTC.

    Raises:
        UserError: it is none.
    """
    try:
        found = datetime.fromisoformat(date)
    except ValueError as error:
        raise UserError(f"'{date}' is no date as 2017-12-01 or 2017-12-16T12:00") from error
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())


# Settings that say something of some sources only, by the beginning of their names.
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "data.world.": ("world",),
    "data.dataset": ("movielens", "amazon"),
    "data.categories": ("amazon",),
    "data.form": ("amazon",),
    "data.period": ("amazon",),
    "data.columns.": ("tables",),
    "data.items": ("tables",),
    "data.item_columns.": ("tables",),
    "data.positive_rating": ("movielens", "amazon", "recbole", "tables"),
}

# Lowest values that make sense, by the last part of the name; 0 where a name isn't listed.
_LOWEST: dict[str, float] = {
    **dict.fromkeys(
        ("workers", "batch", "micro_batch", "max_steps", "patience", "valid_rows", "history_cap", "history"), 1
    ),
    **dict.fromkeys(("users", "items", "interactions", "genres", "rank", "layers", "heads", "hidden", "replicates"), 1),
    **dict.fromkeys(("negatives_per_row", "block", "experts"), 1),
    "layer": -MAX_INTEGER,
    **dict.fromkeys(("max_tokens", "title_tokens", "context", "vocabulary", "dim"), 1),
    **dict.fromkeys(("epochs", "validate_every", "temperature", "clip", "decay", "memory_per_worker"), 1e-6),
    "seed": 0,
}
