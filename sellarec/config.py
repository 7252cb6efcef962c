"""The one typed configuration: every field with its unit and default.

A field marked `runtime` changes how a run is carried out, never what it computes, so fingerprints leave it out.
"""

import dataclasses
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
import yaml

from sellarec.data.sources.tables import Columns

STAGES = ("prepare", "pretrain", "adapt", "collab", "distil", "align", "fuse", "evaluate")
EMBEDDED = "embedded"

FLASH_ATTENTION = "flash_attention_2"
"""Of `llm.attention`: the one that takes GPUs and a package of its own."""

DECODER_SETTINGS = ("vocabulary", "hidden", "layers", "heads")
"""Settings of `pretrain` that say what the embedded decoder is."""

DECODER_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
"""Names of the embedded decoder's linear layers."""

ALL_LINEAR = "all-linear"
"""Of `adapt.targets`: every linear layer but the output layer."""

MFU = 0.3
"""Share of a GPU's peak that is assumed to be reached (model FLOPs utilisation), where no other is given."""

WORKER_TIMEOUT = 600.0
"""Seconds without an answer after which a worker counts as lost, unless `worker_timeout` says otherwise."""

STORAGE_TIMEOUT = 300.0
"""Seconds for which storage that fails is tried again, unless `storage_timeout` says otherwise."""

NODE_TIMEOUT = 600.0
"""Seconds for which room for workers is waited for, unless `node_timeout` says otherwise."""

GROW_EVERY = 60.0
"""Seconds after which workers make place for more, unless `grow_every` says otherwise."""

SAMPLED = ("bpr", "softmax")
"""Losses of `collab` that rank a target above negatives."""

DENSE_TABLE_OPTIMIZERS = ("adam", "adamw")
"""Optimizers of tables that step all rows, on dense gradients."""

DENSE_SETTINGS = ("optimizer", "learning_rate", "weight_decay", "beta2", "clip")
"""Settings of `collab` that models with dense weights read."""

TABLE_SETTINGS = ("table_optimizer", "table_learning_rate", "table_weight_decay")
"""Settings of a stage that trains tables."""

LORA_SETTINGS = ("rank", "alpha", "rslora", "dora", "dropout", "targets")
"""Settings of `adapt` that method lora reads."""

CHANGEABLE = (
    *("learning_rate", "weight_decay", "clip", "table_learning_rate", "table_weight_decay"),
    *("dropout", "l2", "temperature", "weight", "rince_q", "rince_lambda", "mask_share", "unseen_dropout"),
)
"""Settings of stages that may change while they train: none that says what weights, optimizers or batches there are."""

CHANGING = ("adapt", "collab", "align", "fuse")
"""Stages that take such changes: those that are evaluated on the valid split on the way."""

MODEL_SETTINGS = ("user_rows", "layers", "heads", "hidden", "dropout", "history", *DENSE_SETTINGS)
"""Settings of `collab` that only some models read."""

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
    trained stays float32, and all is computed in `dtype`. Stage pretrain trains all of its weights, as does adapt with method
    full, so they hold float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = runtime("auto")
    """How attention is computed, by Transformers' names: sdpa by torch's fused kernels; eager step by step; flash_attention_2 by
    the package flash-attn, on GPUs with dtype bfloat16. auto: sdpa where the model has it, else eager. Stage distil, which
    computes short texts in float32, always takes auto."""


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
    with_history: bool = False
    """Leave out rows without a history where a language model is trained and its state is selected (train and valid in adapt and
    fuse), as SeLLa-Rec's code does. All test rows are scored."""


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
    changes: tuple[str, ...] = ()
    """Settings that change on the way: each a number of evaluations and what holds after them, as '3 learning_rate=0.001'."""


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
    on the worker that holds least; column-wise: each worker holds a range of every table's columns, with sgd, adagrad, adam
    or adamw; auto: row-wise or table-wise, as TorchRec's planner finds it best, and row-wise where a worker would else hold more
    than 1.25 times its equal share. grid and data-parallel are refused, with the reason."""
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
    compile: bool = runtime(False)
    """Whether torch.compile makes kernels of the decoder layers for the steps of training, which takes a C++ compiler, and some
    seconds to minutes at the first steps."""


@dataclass(frozen=True, kw_only=True)
class Pretrain(Steps, Dense, Backpropagation):
    """Pre-training on the catalog's own text: of the embedded decoder, or further of a given model."""

    continued: bool = False
    """Whether the model that --llm names is pre-trained further, with all its weights; the embedded one always is pre-trained."""
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
    """Longest sequence (tokens), never more than a given model's context."""
    hidden: int = 64
    """Width of the decoder."""
    layers: int = 3
    """Decoder layers."""
    heads: int = 4
    """Attention heads."""


@dataclass(frozen=True, kw_only=True)
class Adapt(Steps, Selection, Dense, Backpropagation):
    """Tuning of the language model on text-only prompts."""

    method: Literal["lora", "full"] = "lora"
    """lora: small matrices beside the weights are trained, and saved as an adapter; full: all weights of the model, which is
    saved whole, and takes the place of the one that was tuned."""
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
    matches the candidate; fism: history and item by vectors that are learnt from who consumes what; binary_mf: the product of
    rows' signs, which stage fuse can write as codes. Each is a file in sellarec/collab/models."""
    loss: Literal["bce", "bpr", "softmax", "full-softmax"] = "bce"
    """bce: logistic loss of the labels; the others rank positives above other items: bpr and softmax above drawn negatives
    (softmax corrects for how likely each was drawn, unless `log_q` is False), full-softmax above the whole catalog. Those tell
    nothing of how users compare, so they can't select_on auc."""
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
    """What cosines of a user's and an item's vector are divided by, in the loss and (unless `plain_score`) in scores; None: their
    plain product."""
    plain_score: bool = False
    """Whether the temperature's cosines are for the loss alone, and candidates are scored by the plain product of the vectors,
    whose lengths the loss leaves free."""
    log_q: bool = True
    """Whether softmax takes off a negative's score the logarithm of how likely it was drawn, as an estimate of the softmax over
    the whole catalog needs; without that, what is drawn often is pushed down."""
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
    """One semantic vector per item (and, where align reads them, per user), from the adapted language model."""

    text: Literal["title", "text"] = "title"
    """What the language model reads of an item: its title, or its longer text."""
    prompt: str = "{Noun}: {text}"
    """What stands around that text: {text} is the text, {noun} and {Noun} what an item is called."""
    layer: int = -1
    """Which of the hidden states is taken: 0 the input embeddings, 1 the first layer's, ...; -1 the last layer's after the final
    normalisation, -2 the one before, ..."""
    pooling: Literal["last", "mean"] = "last"
    """Of a text's tokens the last one's state, or the mean of all."""
    max_tokens: int = 64
    """Longest text (tokens), with what stands around it: a longer one is cut at its end. The default is as published; a model
    with a shorter context reads as much as that."""
    profile: str = "{Noun}s that one user liked: {text}"
    """With `align.user_vectors profile`, what the language model reads of a user: {text} are titles that the user liked in train,
    one after the other with semicolons between."""
    profile_items: int = 20
    """Titles of a profile at most, the most recent ones (items)."""
    profile_tokens: int = 256
    """Longest profile (tokens), as `max_tokens`."""
    sharded: bool = runtime(False)
    """Have the workers hold the language model together, each a share, as in adapt, instead of each the whole: for one that no
    device holds. Layers are gathered for every micro-batch, so it is slower where the model fits."""


@dataclass(frozen=True, kw_only=True)
class Align(Steps, Selection, Dense, Sparse):
    """Collaborative training with alignment to the distilled vectors."""

    init: Literal["scratch", "collab"] = "collab"
    """Start from fresh tables (as published) or from the trained collaborative model."""
    weight: float = 0.3
    """Weight of the contrastive loss beside the collaborative one."""
    temperature: float = 0.2
    """Temperature of the contrastive loss (cosines are divided by it); darec has none."""
    contrastive: Literal["info-nce", "rince", "rlmrec-con", "rlmrec-gen", "darec"] = "info-nce"
    """info-nce: cross-entropy of a row's own vector among those of the global batch; rince: the loss of the published code,
    which for small `rince_q` is close to it. RLMRec's: rlmrec-con finds by a row its distilled vector, projected down to the
    width of rows; rlmrec-gen (lightgcn) masks rows before they are smoothed, and finds by what their neighbours make of them the
    distilled vector. darec: projects a shared and a specific part out of either, and aligns how the shared parts of the batch
    lie to each other."""
    rince_q: float = 0.01
    """The power q of rince."""
    rince_lambda: float = 0.1
    """What rince multiplies the sum over positive and negatives by."""
    mask_share: float = 0.15
    """Share of users and items whose rows rlmrec-gen masks at a step."""
    centers: int = 4
    """Centres that darec clusters the shared parts of the global batch around, on either side."""
    direction: Literal["both", "semantic-to-collab"] = "both"
    """Of info-nce and rince. both: the mean of finding the distilled vector by the projected row, and the other way round;
    semantic-to-collab: a distilled vector finds its projected row (as published)."""
    mask_equal: bool = True
    """Whether rows of the same item (or user) are left out of each other's negatives; false counts them, as published. For
    darec an item (or user) of the batch always counts once."""
    semantic: Literal["trained", "frozen"] = "trained"
    """Whether the distilled vectors are trained too (as published), or stay as they are."""
    side: Literal["items", "users", "both"] = "items"
    """What is aligned: items' rows to their distilled vectors (as published), users' vectors to what `user_vectors` says, or
    both, their losses added."""
    user_vectors: Literal["liked", "profile"] = "liked"
    """What users' vectors are aligned to. liked: the mean of the distilled vectors of what the row's history holds; profile: what
    the language model makes of a text of what the user liked in train (RLMRec, whose profiles a language model has written)."""
    history: int = 50
    """Most recent positives of whose distilled vectors the mean is taken for users (items)."""
    block: int = runtime(512)
    """Rows of the global batch that the loss of alignment compares at once with a worker's own: more take more memory."""
    hidden: int = 128
    """Width of the projection's hidden layers."""
    layers: int = 1
    """Hidden layers of the projection."""
    epochs: float = 10.0
    """Passes over the training rows, at most."""


@dataclass(frozen=True, kw_only=True)
class Fuse(Steps, Selection, Dense, Sparse, Backpropagation):
    """Hybrid projection: tokens (user, item, distilled item) in the prompt of the adapted model."""

    tokens: tuple[Literal["user", "item", "semantic"], ...] = ("user", "item", "semantic")
    """Soft tokens of the prompt: the user's row, the item's row, the item's distilled vector (user item is CoLLM's set). The
    text speaks of no other; tables that none takes are not read. None of them: the adapter is trained on (TALLRec)."""
    represent: Literal["collaborative", "learned", "codes"] = "collaborative"
    """What stands for user and item: their projected rows of the collaborative model; learned: tokens that are rows of their own,
    as wide as the model's input embeddings, that start from small random numbers and know no collaborative model (PersonPrompt);
    codes: no soft tokens, but the signs of their rows in stage collab's model, written as text (BinLLM)."""
    code: Literal["binary", "dotted"] = "binary"
    """Of codes how they are written: binary: a digit a bit; dotted, which is shorter: eight bits as a number from 0 to 255, with
    dots between."""
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
    collab_score: bool = False
    """Add the collaborative model's own score of the row to the language model's, which then learns what that one leaves to be
    told. Not with a loss over tokens."""
    language_weights: tuple[float, ...] = (1.0,)
    """With `collab_score`: by what the language model's score may be multiplied before the other is added, once it is trained. Of
    several, that is kept by which `select_on` is best on the valid rows; with 0 the language model is not heard."""
    unseen_dropout: float = 0.35
    """Share of training rows whose user (and, drawn apart, whose item) is treated as unseen, that is as a row of zeros, or
    without a code: the dropout of collaborative tokens."""
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
class Profile:
    """Traces of torch's profiler, of each worker, in `profile/` of the run's folder."""

    stages: tuple[Literal["pretrain", "adapt", "collab", "align", "fuse"], ...] = runtime(())
    """Stages of which some steps are profiled (default: none)."""
    first: int = runtime(10)
    """The first step that is profiled, counted from where the workers start, or take up, the stage; from 2 on, as the first
    step starts things up."""
    steps: int = runtime(5)
    """Steps that are profiled."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a SeLLa-Rec recommender: prepare, pretrain, adapt, collab, distil, align, fuse, evaluate."""

    workers: int = runtime(2)
    """Training processes; each holds 1/workers of every table and of the language model."""
    device: Literal["auto", "cuda", "cpu"] = runtime("auto")
    """What training processes run on: auto: a GPU each where there are any, and CPUs where there are none; cuda: a GPU each,
    refused where there are none; cpu: CPUs. With GPUs for some of them alone a job is refused."""
    worker_timeout: float = runtime(WORKER_TIMEOUT)
    """Seconds without an answer after which a worker counts as lost, and the stage goes on from its checkpoint. More than
    downloading and loading a language model takes, which worker 0 does for all, or writing one."""
    min_workers: int | None = runtime(None)
    """On a cluster, with how many training processes a stage starts, or goes on, where no more than these find room; as nodes
    join, they become more after a checkpoint, up to `workers` (default: as many as `workers`)."""
    grow_every: float = runtime(GROW_EVERY)
    """With `min_workers`: seconds after which workers that are fewer than `workers` become more, where there is room."""
    node_timeout: float = runtime(NODE_TIMEOUT)
    """Seconds for which a stage that has lost workers, or begins on fewer nodes than hold them, waits for room for them, as on a
    node that takes the place of another; then it fails, and the same command goes on from its newest checkpoint. With
    `autoscaler` also those for which nodes are waited for at the start."""
    autoscaler: bool = runtime(False)
    """Whether a cluster that is joined has an autoscaler: nodes that the run lacks are then asked for and waited for, at its
    start and where a stage waits for room. It isn't waited for more than hold `min_workers`."""
    storage_timeout: float = runtime(STORAGE_TIMEOUT)
    """Seconds for which writing a checkpoint or an artifact is tried again while storage fails; then the stage fails, and the
    same command goes on from its newest checkpoint."""
    seed: int = 1
    """Seed of initial weights, order of rows and dropout. Never changes the prepared data."""
    stages: tuple[str, ...] = runtime(())
    """Stages to run, separated by commas (default: all); others must already stand in the workspace."""
    workspace: str = runtime("runs")
    """Folder for artifacts and runs; on one machine also a URI (s3://, gs://)."""
    name: str | None = runtime(None)
    """Name of the run (default: the names of the recipes)."""
    trackers: tuple[Literal["mlflow", "wandb"], ...] = runtime(())
    """Where the run's numbers go beside TensorBoard (default: nowhere). Both packages read their own environment variables."""
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
    profile: Profile = field(default_factory=Profile)

    @property
    def least_workers(self) -> int:
        """Training processes that a stage needs at least."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def reads_profiles(self) -> bool:
        """Whether users have distilled vectors too: of their profiles."""
        return self.align.side != "items" and self.align.user_vectors == "profile"

    @property
    def pretrains(self) -> bool:
        """Whether the language model is what stage pretrain makes, of nothing or of what --llm names."""
        return self.llm.model == EMBEDDED or self.pretrain.continued


@dataclass(frozen=True, kw_only=True)
class Sweep(Config):
    """Train one stage many times with settings that are drawn, and compare the trials on the valid split."""

    stage: Literal["adapt", "collab", "align", "fuse"] = runtime("align")
    """Stage whose trials are compared. What it reads is made once, before them; the test split is not read."""
    space: str | None = runtime(None)
    """Settings that are drawn, and from what: a name in sellarec/spaces, or a .yaml file in their form; None: the one that is
    named as the stage."""
    search: Literal["asha", "random", "optuna", "pbt"] = runtime("asha")
    """random: drawn independently, and each trial trains to its end; asha: drawn so too, but after 1, 3, 9, ... evaluations those
    below the best third of the trials that came as far are stopped (asynchronous successive halving, arXiv 1810.05934); optuna:
    drawn near what did well so far (a tree-structured Parzen estimator), and each trains to its end; pbt: drawn independently,
    and after every `perturb_every` evaluations the worst quarter goes on from copies of the best quarter, with settings near
    theirs (population-based training, arXiv 1711.09846)."""
    perturb_every: int = runtime(1)
    """Evaluations between two comparisons of pbt."""
    metric: Literal["auc", "uauc"] | None = runtime(None)
    """Metric of the valid split that trials are compared by, and by which each keeps its best state; None: the stage's
    `select_on`."""
    trials: int = runtime(16)
    """Trials; of pbt, its population."""
    concurrent: int = runtime(1)
    """Trials that run at a time, of `workers` training processes each."""
    share: float = runtime(1.0)
    """What each worker of a trial takes of a CPU, or of a GPU where there are some: 0.5 lets two workers share one."""
    max_failures: int = runtime(2)
    """How often a trial that failed, or was lost, is taken up again."""

    def base(self) -> Config:
        """The config that trials' settings are laid over."""
        return Config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Config)})


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


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Score a split's rows with a trained collaborative model or an exported recommender, and rank items for its users."""

    artifact: Path
    """Folder of the model: WORKSPACE/artifacts/collab-... or align-..., or what jobs/export.py wrote."""
    data: Path
    """Folder of a prepared log: that of jobs/prepare.py, or WORKSPACE/artifacts/prepare-... For an artifact its ids have to be
    those of the log that it was trained on; an export may be evaluated on any, as users and items are matched by the source's
    ids."""
    out: Path
    """File for the records (JSON, as results.json)."""
    ranking: str = "none"
    """full ranks the whole catalog but for what the user had before; candidates:N the relevant items among N drawn ones; none
    scores the rows alone."""
    cutoffs: tuple[int, ...] = (5, 10, 20)
    """Places of a ranking that count."""
    split: Literal["train", "valid", "test"] = "test"
    """Split that is evaluated; of train the rows alone, without a ranking."""
    llm: str | None = None
    """Folder of an export's base model, where that no longer lies where the export says."""
    workers: int = 2
    """Processes that share the tables and the work; an export is scored with by one."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """What they run on, as for jobs/train.py."""
    batch: int = 512
    """Rows scored, or users ranked for, at once, all workers together."""
    replicates: int = 1000
    """Bootstrap samples of users behind each 95% interval."""
    seed: int = 1
    """Seed of the bootstrap and of drawn candidates."""


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Check the cluster that RAY_ADDRESS names for a run, without starting one."""

    workers: int = 2
    """Training processes that the run, or each trial of a sweep, would have."""
    min_workers: int | None = None
    """With how many the run would start where no more find room (default: as many as `workers`)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """What they would run on, as for jobs/train.py."""
    concurrent: int = 1
    """Trials that a sweep would run at a time."""
    share: float = 1.0
    """What each worker of a trial would take of a CPU, or of a GPU."""
    autoscaler: bool = False
    """Whether nodes that the run lacks are asked for, as for jobs/train.py."""
    node_timeout: float = NODE_TIMEOUT
    """Seconds for which they are waited for."""
    workspace: str = "runs"
    """Folder that the run would write to; on one machine also a URI (s3://, gs://)."""


@dataclass(frozen=True, kw_only=True)
class Planning:
    """Print which worker would hold which rows of the tables of the recipes' collaborative model, or of a user and an item table,
    and the memory that takes."""

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
    """Memory for tables on each worker (GiB; with --device cuda of its GPU). Default: on CPUs an equal share of what is free on
    this machine, beside the worker itself."""
    host_memory_per_worker: float | None = None
    """Memory of its host for the tables of each worker (GiB), where their rows lie there (tables.placement uvm, uvm-caching)."""
    tables: Tables = field(default_factory=Tables)
    table_optimizer: Literal["rowwise-adagrad", "adagrad", "sgd", "adam", "adamw"] = "rowwise-adagrad"
    """Optimizer of the tables: its state lies beside the rows."""
    llm: str | None = None
    """Folder or hub id of a language model, or the path of its config.json: what the stages that run it take is planned too.
    Nothing but its config is read."""
    recipe: tuple[str, ...] = ()
    """Recipes, laid over each other from left to right, whose settings those stages have, and of whose collaborative model and
    optimizer the tables are. Without one: a table of users and one of items."""
    rows: int | None = None
    """Rows of the train split, where the recipe's dataset is none whose counts are known. Valid and test are taken to be as large
    beside it as `data.split` says."""
    gpu: Literal["L4", "L40S", "A100-40GB", "A100-80GB", "H100", "H200"] | None = None
    """GPU that each worker has, of which memory and hours are told; None: each of them."""
    mfu: float = MFU
    """Share of a GPU's peak that is assumed to be reached (model FLOPs utilisation)."""
