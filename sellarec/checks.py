"""What settings are refused, and why: out of range, contradictory, or read by nothing in the mode they stand in."""

import dataclasses
import difflib
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from string import Formatter
from typing import Any

from sellarec.changes import windows
from sellarec.config import (
    ALL_LINEAR,
    CHANGING,
    DECODER_LINEAR,
    DECODER_SETTINGS,
    DENSE_SETTINGS,
    DENSE_TABLE_OPTIMIZERS,
    EMBEDDED,
    FLASH_ATTENTION,
    GROW_EVERY,
    LORA_SETTINGS,
    MODEL_SETTINGS,
    SAMPLED,
    STAGES,
    TABLE_SETTINGS,
    Adapt,
    Align,
    Collab,
    Config,
    Data,
    Dense,
    Distil,
    Fuse,
    Pretrain,
    leaves,
)
from sellarec.errors import UserError
from sellarec.language.llm import check_targets
from sellarec.language.prompts import CODE_BITS
from sellarec.language.templates import read_templates

MAX_INTEGER = 2**31 - 1
"""No count is above it."""

MAX_WORLD = 10_000_000
"""The generated world is made in memory."""


def check(config: Config) -> None:
    """Refuse settings that are out of range or contradict each other, before any work.

    Raises:
        UserError: naming the settings and their values.
    """
    check_bounds(config)
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
    check_fewest(config.min_workers, config.workers)
    if config.min_workers is None and config.grow_every != GROW_EVERY:
        raise UserError(
            f"grow_every is {config.grow_every:g}, but min_workers is not given, and without it workers never become more: "
            "leave out one of the two"
        )
    if config.profile.first < 2 or config.profile.steps < 1:
        raise UserError(
            f"profile.first is {config.profile.first} and profile.steps {config.profile.steps}: the first step that can be "
            "profiled is the second, and one step the least"
        )
    _check_pretrain(config)
    _check_attention(config)
    if config.llm.revision is not None and (config.llm.model == EMBEDDED or Path(config.llm.model).exists()):
        raise UserError(
            f"llm.revision is {config.llm.revision}, but llm.model is {config.llm.model}: only a hub id has revisions"
        )
    if config.pretrain.hidden % (2 * config.pretrain.heads):
        raise UserError(
            f"pretrain.hidden is {config.pretrain.hidden} and pretrain.heads {config.pretrain.heads}: "
            "the width must be a multiple of twice the heads (rotary embeddings take pairs)"
        )
    check_width("collab.dim", config.collab.dim)
    _check_collab(config)
    if not 0 <= config.adapt.dropout < 1:
        raise UserError(f"adapt.dropout is {config.adapt.dropout}: a share from 0 to below 1 is needed")
    _check_align(config)
    _check_dense(config)
    _check_adapt(config)
    _check_distil(config)
    _check_prompt(config)
    _check_fuse(config)
    for stage in CHANGING:
        for window in windows(config, stage)[1:]:
            others = {
                name: dataclasses.replace(getattr(config, name), changes=()) for name in CHANGING if name != stage
            }
            try:
                check(dataclasses.replace(window.config, **others))
            except UserError as error:
                raise UserError(f"{stage}.changes, after evaluation {window.first}: {error}") from error


def _check_pretrain(config: Config) -> None:
    settings, defaults, model = config.pretrain, Pretrain(), config.llm.model
    if settings.continued and model == EMBEDDED:
        raise UserError(
            f"pretrain.continued is True, but llm.model is {EMBEDDED}, which is pre-trained from nothing: leave it out, or give "
            "--llm the model to go on with"
        )
    changed = [name for name, value, _ in leaves(settings) if value != getattr(defaults, name)]
    if not config.pretrains and (changed or "pretrain" in config.stages):
        named = f"pretrain.{changed[0]} is {getattr(settings, changed[0])}" if changed else "stages names pretrain"
        raise UserError(
            f"{named}, but llm.model is {model}, which is taken as it is: leave out one of the two, or pre-train it further with "
            "--pretrain.continued True"
        )
    for name in changed:
        if settings.continued and name in DECODER_SETTINGS:
            raise UserError(
                f"pretrain.{name} is {getattr(settings, name)}, but pretrain.continued is True, and the model that llm.model "
                f"{model} names has its own: leave out one of the two"
            )


def _check_attention(config: Config) -> None:
    llm = config.llm
    if llm.attention == FLASH_ATTENTION and llm.dtype == "float32":
        raise UserError(
            f"llm.attention is {llm.attention}, but llm.dtype is {llm.dtype}, for which its kernels are not made: take llm.dtype "
            "bfloat16, or llm.attention sdpa"
        )


def _check_align(config: Config) -> None:
    align, defaults = config.align, Align()
    of_pairs = ("info-nce", "rince", "rlmrec-con", "rlmrec-gen")
    for name, readers in (
        ("temperature", of_pairs),
        ("mask_equal", of_pairs),
        ("rince_q", ("rince",)),
        ("rince_lambda", ("rince",)),
        ("direction", ("info-nce", "rince")),
        ("mask_share", ("rlmrec-gen",)),
        ("centers", ("darec",)),
    ):
        value = getattr(align, name)
        if value != getattr(defaults, name) and align.contrastive not in readers:
            raise UserError(
                f"align.{name} is {value}, but align.contrastive is {align.contrastive}, which doesn't read it: leave out one of "
                "the two"
            )
    for name in ("rince_q", "rince_lambda"):
        value = getattr(align, name)
        if not 0 < value <= 1:
            raise UserError(f"align.{name} is {value}: a number above 0, at most 1, is needed")
    if not 0 < align.mask_share < 1:
        raise UserError(f"align.mask_share is {align.mask_share}: a share above 0 and below 1 is needed")
    if align.contrastive == "rlmrec-gen" and not _model(config.collab).uses_graph:
        raise UserError(
            f"align.contrastive is rlmrec-gen, but collab.model is {config.collab.model}, which smooths no rows over a graph: of "
            "an item whose row is masked nothing is left to tell its distilled vector by; take collab.model lightgcn, or "
            "align.contrastive rlmrec-con"
        )
    projects = config.fuse.represent == "collaborative" and config.fuse.tokens != ("semantic",)
    elsewhere = {
        "rlmrec-con": "distilled vectors to the width of rows",
        "darec": "rows and distilled vectors into a space of its own",
    }
    if align.contrastive in elsewhere and config.fuse.warm_start and projects:
        raise UserError(
            f"align.contrastive is {align.contrastive}, which projects {elsewhere[align.contrastive]}, but fuse.warm_start is "
            "True, which starts from a projection of rows to distilled vectors: take --fuse.warm-start False, or another "
            "align.contrastive"
        )
    if align.weight == 0 and align.semantic == "trained" and "semantic" in config.fuse.tokens:
        raise UserError(
            "align.weight is 0, but align.semantic is trained: without the contrastive loss nothing but weight decay moves the "
            "distilled vectors, of which fuse makes a token; take --align.semantic frozen"
        )
    if align.weight == 0 and config.fuse.warm_start and projects:
        raise UserError(
            "align.weight is 0, but fuse.warm_start is True: without the contrastive loss nothing but weight decay moves the "
            "projection, from which fuse would start; take --fuse.warm-start False"
        )
    if align.user_vectors != defaults.user_vectors and align.side == "items":
        raise UserError(
            f"align.user_vectors is {align.user_vectors}, but align.side is items, which aligns no users: leave out one of them"
        )
    reads_histories = align.side != "items" and align.user_vectors == "liked"
    if align.history != defaults.history and not reads_histories:
        raise UserError(
            f"align.history is {align.history}, but align.side is {align.side} and align.user_vectors {align.user_vectors}, "
            "which read no history: leave it out"
        )
    if align.contrastive == "rince" and align.rince_q / align.temperature > 40:
        raise UserError(
            f"align.rince_q is {align.rince_q} and align.temperature {align.temperature}: exp(q / temperature) overflows; raise "
            "the temperature or lower q"
        )
    if reads_histories and config.data.source != "log" and align.history > config.data.history_cap:
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
    adapt, defaults, targets = config.adapt, Adapt(), config.adapt.targets
    for name in LORA_SETTINGS if adapt.method == "full" else ():
        if getattr(adapt, name) != getattr(defaults, name):
            raise UserError(
                f"adapt.{name} is {getattr(adapt, name)}, but adapt.method is full, which makes no LoRA matrices: leave out one "
                "of the two"
            )
    if adapt.method == "full" and "adapter" in config.fuse.train:
        raise UserError(
            f"fuse.train is {' '.join(config.fuse.train)}, but adapt.method is full, which leaves a whole model and no adapter: "
            "leave out adapter, or take adapt.method lora"
        )
    for stage in ("adapt", "fuse"):
        if adapt.dora and getattr(config, stage).compile:
            raise UserError(
                f"{stage}.compile is True, but adapt.dora is True, which PEFT computes in a way that torch.compile can't: leave "
                "out one of the two"
            )
    if not targets:
        raise UserError("adapt.targets is empty: give names of linear layers, or all-linear")
    if ALL_LINEAR in targets and len(targets) > 1:
        raise UserError(f"adapt.targets is {', '.join(targets)}: {ALL_LINEAR} takes every layer, so it stands alone")
    if "lm_head" in targets and config.llm.dtype == "bfloat16":
        raise UserError(
            "adapt.targets names lm_head and llm.dtype is bfloat16: logits of an output layer with an adapter are rounded to "
            "that type, which leaves many prompts with one score; take other layers, or llm.dtype float32"
        )
    if config.llm.model == EMBEDDED:
        check_targets(targets, DECODER_LINEAR, "the embedded model")


def _check_distil(config: Config) -> None:
    distil, defaults = config.distil, Distil()
    for name in ("prompt", "profile"):
        _check_form(f"distil.{name}", getattr(distil, name))
    for name in ("profile", "profile_items", "profile_tokens"):
        if getattr(distil, name) != getattr(defaults, name) and not config.reads_profiles:
            raise UserError(
                f"distil.{name} is {getattr(distil, name)}, but align.side is {config.align.side} and align.user_vectors "
                f"{config.align.user_vectors}, which read no profiles: take --align.side users (or both) --align.user-vectors "
                "profile, or leave it out"
            )
    if config.llm.model == EMBEDDED:
        check_layer(config.distil.layer, config.pretrain.layers, "the embedded model (pretrain.layers)")


def _check_form(name: str, form: str) -> None:
    try:
        pieces = list(Formatter().parse(form))
        fields = [field for _, field, _, _ in pieces if field is not None]
    except ValueError as error:
        raise UserError(f"{name} is '{form}', whose braces don't close ({error}): write {{text}}") from error
    unknown = [field for field in fields if field not in ("text", "noun", "Noun")]
    if unknown or fields.count("text") != 1:
        raise UserError(
            f"{name} is '{form}', with the fields {', '.join(fields) or 'none'}: {{text}} once is needed, {{noun}} and {{Noun}} "
            "are allowed"
        )
    if any(written or conversion for _, _, written, conversion in pieces):
        raise UserError(f"{name} is '{form}': its fields are written plainly, as {{text}}")
    if not "".join(literal for literal, _, _, _ in pieces).strip():
        raise UserError(f"{name} is '{form}', which makes no token of what has no text: put words around {{text}}")


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
    if not fuse.tokens and (fuse.train != ("adapter",) or fuse.represent != "collaborative" or fuse.collab_score):
        raise UserError(
            f"fuse.tokens names none, but fuse.train is {' '.join(fuse.train)}, fuse.represent {fuse.represent} and "
            f"fuse.collab_score {fuse.collab_score}: without tokens the adapter alone is there to be trained on (--fuse.train "
            "adapter, the other two left out); or name some of user, item, semantic"
        )
    if not fuse.train:
        raise UserError("fuse.train names nothing to train: name some of tables, projections, adapter")
    for name in ("tokens", "train"):
        named = getattr(fuse, name)
        if len(set(named)) < len(named):
            raise UserError(f"fuse.{name} is {' '.join(named)}: name each once")
    if fuse.tokens == ("semantic",) and fuse.semantic == "frozen" and "tables" in fuse.train and not fuse.collab_score:
        raise UserError(
            f"fuse.train is {' '.join(fuse.train)}, but fuse.tokens is semantic and fuse.semantic frozen: no table is left to "
            "train; leave tables out, or fuse.semantic"
        )
    learned, coded = fuse.represent == "learned", fuse.represent == "codes"
    if (learned or coded) and "semantic" in fuse.tokens:
        raise UserError(
            f"fuse.represent is {fuse.represent}, but fuse.tokens is {' '.join(fuse.tokens)}: only users and items have "
            f"{'codes' if coded else 'rows of their own'}; take --fuse.tokens user item, or one of them"
        )
    if coded:
        _check_codes(config)
    if learned and ("projections" in fuse.train or "tables" not in fuse.train):
        raise UserError(
            f"fuse.represent is learned, but fuse.train is {' '.join(fuse.train)}: the tokens are rows of tables, which start at "
            "random, and are not projected; take --fuse.train tables, or tables adapter"
        )
    if fuse.projections == "separate" and not {"user", "item"} <= set(fuse.tokens):
        raise UserError(
            f"fuse.projections is separate, but fuse.tokens is {' '.join(fuse.tokens)}: user and item have a projection each "
            "only where both are injected; leave out one of the two"
        )
    if fuse.collab_score and fuse.loss != "answer":
        raise UserError(
            f"fuse.collab_score is True, but fuse.loss is {fuse.loss}: the collaborative score is added to the score of the "
            "answers, which a loss over tokens doesn't read; take fuse.loss answer, or leave fuse.collab_score out"
        )
    weights = fuse.language_weights
    if not weights or len(set(weights)) < len(weights) or not all(0 <= weight < math.inf for weight in weights):
        raise UserError(
            f"fuse.language_weights is {' '.join(map(str, weights)) or 'none'}: name one or more finite numbers from 0 on, "
            "each once"
        )
    if fuse.collab_score and (learned or coded):
        raise UserError(
            f"fuse.collab_score is True, but fuse.represent is {fuse.represent}: what is trained then has no collaborative "
            "model; leave out one of the two"
        )
    unread: dict[str, str] = {}
    if fuse.tokens == ("semantic",):
        of_rows = ("experts", "warm_start", *(() if fuse.collab_score else ("unseen_dropout",)))
        unread |= dict.fromkeys(of_rows, "fuse.tokens is semantic, which takes no collaborative row")
    if learned or coded:
        unread |= dict.fromkeys(
            ("projections", "experts", "norm", "warm_start"),
            f"fuse.represent is {fuse.represent}, which projects nothing",
        )
    if not fuse.tokens:
        of_tokens = ("projections", "experts", "norm", "warm_start", "unseen_dropout")
        unread |= dict.fromkeys(of_tokens, "fuse.tokens names none")
    if not fuse.collab_score:
        unread["language_weights"] = "fuse.collab_score is False, so no other score is added to the language model's"
    if not coded:
        unread["code"] = f"fuse.represent is {fuse.represent}, without codes"
    if "semantic" not in fuse.tokens:
        unread["semantic"] = f"fuse.tokens is {' '.join(fuse.tokens)}, without it"
    if "tables" not in fuse.train:
        unread["semantic"] = f"fuse.train is {' '.join(fuse.train)}, without the tables"
        unread |= dict.fromkeys(TABLE_SETTINGS, f"fuse.train is {' '.join(fuse.train)}, without the tables")
    trains_network = not learned and ("user" in fuse.tokens or fuse.collab_score)
    if fuse.train == ("tables",) and not (trains_network and _has_dense_weights(config.collab)):
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


def _check_codes(config: Config) -> None:
    fuse, collab = config.fuse, config.collab
    if fuse.train != ("adapter",):
        raise UserError(
            f"fuse.represent is codes, but fuse.train is {' '.join(fuse.train)}: codes are text, of rows that stay as stage "
            "collab left them, and are not projected; take --fuse.train adapter"
        )
    if not _model(collab).is_binary:
        raise UserError(
            f"fuse.represent is codes, but collab.model is {collab.model}, whose rows are more than their signs: take "
            "collab.model binary_mf, or another fuse.represent"
        )
    if collab.dim % CODE_BITS:
        raise UserError(
            f"fuse.represent is codes, but collab.dim is {collab.dim}: codes are written {CODE_BITS} bits at a time, so a "
            f"multiple of {CODE_BITS} is needed"
        )


def _has_dense_weights(collab: Collab) -> bool:
    return "learning_rate" in _model(collab).reads


def _model(collab: Collab) -> Any:
    from importlib import import_module  # a model's file loads torch

    return import_module(f"sellarec.collab.models.{collab.model}").Model


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
        ("log_q", collab.loss != "softmax"),
    ):
        if unread and getattr(collab, name) != getattr(defaults, name):
            raise UserError(
                f"collab.{name} is {getattr(collab, name)}, but collab.loss is {collab.loss} and collab.negatives "
                f"{collab.negatives}, for which it means nothing: leave out one of them"
            )
    if collab.plain_score and collab.temperature is None:
        raise UserError(
            "collab.plain_score is True, but collab.temperature is None, with which the loss takes plain products too: leave it "
            "out, or give a temperature"
        )
    if collab.plain_score and collab.biases and "plain_score" not in _model(collab).ignores:
        raise UserError(
            "collab.plain_score and collab.biases are True: biases that are learnt beside cosines have another scale than the "
            "plain products that they would be added to; take --collab.biases False"
        )
    if not collab.hidden or min(collab.hidden) < 1:
        raise UserError(f"collab.hidden is {collab.hidden}: one width or more, each at least 1, are needed")
    if not 0 <= collab.dropout < 1:
        raise UserError(f"collab.dropout is {collab.dropout}: a share from 0 to below 1 is needed")
    changed = [name for name in MODEL_SETTINGS if getattr(collab, name) != getattr(defaults, name)]
    if collab.model == "mf" and not changed and collab.train_on == "rows":
        return
    model = _model(collab)
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


def check_same_model(collab: Collab, earlier: dict[str, Any]) -> None:
    """Refuse a model that starts from another one's rows and weights: where their widths agree it would train on in silence.

    Args:
        earlier: the settings of `collab` that the model of `collab.init_from` was trained with, as its manifest has them.

    Raises:
        UserError: naming the setting with both values.
    """
    of_training = ("dropout", *DENSE_SETTINGS)
    shaping = [name for name in _model(collab).reads if name not in of_training]
    for name in ("model", "dim", "biases", "temperature", "plain_score", *shaping):
        mine, theirs = getattr(collab, name), earlier[name]
        if name == "temperature" and (mine is None) == (theirs is None):
            continue  # rows of cosines stay such
        if isinstance(mine, tuple):
            mine, theirs = (" ".join(map(str, value)) for value in (mine, theirs))
        if mine != theirs:
            raise UserError(
                f"collab.{name} is {mine}, but the model of collab.init_from {collab.init_from} was trained with {theirs}, and "
                f"goes on as what it is: take --collab.{name.replace('_', '-')} {theirs}, or leave collab.init_from out"
            )


def check_bounds(settings: Any) -> None:
    for name, value, _ in leaves(settings):
        if isinstance(value, float | int) and not isinstance(value, bool):
            low = _LOWEST.get(name.rpartition(".")[2], 0)
            if not value >= low or math.isinf(value):
                raise UserError(f"{name} is {value}, but must be a finite number, at least {low}")
            high = MAX_WORLD if name.startswith("data.world.") else MAX_INTEGER
            if isinstance(value, int) and value > high:
                raise UserError(f"{name} is {value}, but must be at most {high:,}")


def check_fewest(min_workers: int | None, workers: int) -> None:
    if min_workers is not None and min_workers > workers:
        raise UserError(
            f"min_workers is {min_workers} and workers {workers}: the fewest can't be more than all; lower one or raise the other"
        )


def check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise UserError(f"share is {share}: a number above 0, at most 1, is needed")


def check_width(name: str, dim: int) -> None:
    if dim % 4:
        raise UserError(f"{name} is {dim}: the table kernels need a multiple of 4")


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
        (
            "workers",
            "min_workers",
            "batch",
            "micro_batch",
            "max_steps",
            "patience",
            "valid_rows",
            "history_cap",
            "history",
        ),
        1,
    ),
    **dict.fromkeys(("users", "items", "interactions", "genres", "rank", "layers", "heads", "hidden", "replicates"), 1),
    **dict.fromkeys(("negatives_per_row", "block", "experts", "centers"), 1),
    **dict.fromkeys(("trials", "concurrent", "perturb_every", "rows"), 1),
    "layer": -MAX_INTEGER,
    **dict.fromkeys(("max_tokens", "title_tokens", "context", "vocabulary", "dim"), 1),
    **dict.fromkeys(
        (
            "epochs",
            "validate_every",
            "temperature",
            "clip",
            "decay",
            "memory_per_worker",
            "host_memory_per_worker",
            "mfu",
        ),
        1e-6,
    ),
    "seed": 0,
    "worker_timeout": 5,
    "grow_every": 1,
}
