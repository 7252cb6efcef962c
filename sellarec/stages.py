"""How each stage is carried out: what is built from its inputs, checked for room, trained or scored, and left."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from sellarec.ahead import check_model, check_prompts, check_tables, room_of
from sellarec.artifacts import Place
from sellarec.changes import windows
from sellarec.config import Distil, Language, Selection
from sellarec.data.log import Log, copy_log
from sellarec.data.prepare import check_expected, discard_work, in_words, prepare, rules_of
from sellarec.errors import StageFailed, TrainingPaused, TrainingStopped, UserError
from sellarec.run import Run, template_words
from sellarec.training.launch import run_task, run_workers, train
from sellarec.training.room import first_workers

WORK = "work"
"""Folder in an unfinished artifact for what its training reads beside its inputs."""

COUNTED_TEXTS = 20_000
"""Items by whose texts it is told how many lines are cut in pretrain."""

MODELS = ("collab", "text-only", "sella-rec")


def _prepare(this: Run) -> dict[str, Any]:
    def start_ray() -> None:
        if this.cluster is None:
            this.connect()

    data = this.config.data
    if data.source == "log":
        with this.artifact("prepare").writing() as folder:
            copy_log(this.given_log, folder)
        facts = this.given_log.facts
        check_expected(facts, data.expected)
        reads_histories = this.config.align.side != "items" and not this.config.reads_profiles
        for name in ("prompt", "collab", *["align"] * reads_histories):
            read = getattr(this.config, name).history
            if read > facts["history_cap"]:
                this.console.line(
                    f"prepare   note: {name}.history is {read}, but the log keeps only {facts['history_cap']} items a row"
                )
        return {**facts, "noun": data.noun or facts["noun"]}
    with this.artifact("prepare").writing() as folder:
        facts = prepare(
            this.source,
            rules_of(data, this.source),
            folder,
            hashes=this.hashes,
            bad_rows=data.bad_rows,
            start_ray=start_ray,
            say=this.console.line,
        )
        check_expected(facts, data.expected)
        discard_work(folder)
    for line in in_words(facts):
        this.console.line(f"prepare   {line}")
    return facts


def _pretrain(this: Run) -> dict[str, Any]:
    from sellarec.language.llm import LlmSource
    from sellarec.language.pretrain import build_decoder, make_lines
    from sellarec.training.stream import Order, row_groups

    log = this.log()
    settings = this.config.pretrain
    if settings.continued:
        start = this.given_llm.folder
    else:
        words = template_words(this.config.prompt.template)
        with this.artifact("pretrain").writing() as folder:
            build_decoder(
                log.items(["text"])["text"].to_pylist(), words, settings, this.config.seed, folder / "initial"
            )
        start = (this.artifact("pretrain") / "initial").local
        check_prompts(this, start())
    order = Order(tuple(row_groups([str(path) for path in log.paths("items")])), settings.batch, this.config.seed)
    source = LlmSource(str(start()), None, "initial")
    texts = pyarrow.dataset.dataset([str(path) for path in log.paths("items")]).head(COUNTED_TEXTS, columns=["text"])
    lines, cut = make_lines(start(), settings)[0].cut(texts["text"].to_pylist())
    if cut:
        this.console.line(
            f"pretrain  of the first {lines:,} lines of text {cut:,} are longer than {settings.context} tokens "
            "(pretrain.context), or than the model's context: what is beyond is not read"
        )
    build = partial(_build_pretrain, start, settings, this.config.llm.attention)
    return {**_train(this, "pretrain", build, order, source=source), "lines": {"counted": lines, "cut": cut}}


def _build_pretrain(start: Callable[[], Path], settings: Any, attention: str) -> Any:
    from sellarec.language.pretrain import build_pretrain

    return build_pretrain(start(), settings, attention)


def _adapt(this: Run) -> dict[str, Any]:
    from sellarec.language.adapt import build_adapt

    log, config = this.log(), this.config
    given = config.prompt, log.facts["noun"], config.adapt, config.fuse.loss
    build = partial(build_adapt, this.llm(), _titles(log), *given)
    facts = _train(this, "adapt", build, _prompts_order(this, "adapt", "train", config.adapt.batch, config.seed))
    return facts | (_adapter_of(this, "adapt") if config.adapt.method == "lora" else {})


def _adapter_of(this: Run, stage: str) -> dict[str, str]:
    """The hash of the adapter that a stage has left, and compared: what is used later is that."""
    from sellarec.language.llm import ADAPTER, adapter_hash

    with (this.artifact(stage) / ADAPTER).reading() as folder:
        return {"adapter_hash": adapter_hash(folder)}


def _collab(this: Run) -> dict[str, Any]:
    from sellarec.collab.unseen import unseen_shares

    settings, seed = this.config.collab, this.config.seed
    order = _order(this, "train", settings.batch, seed)
    if settings.train_on == "sequences":
        order = _sequences(this)
    origin = this.collab_start[0] if this.config.collab.init_from is not None else None
    build = _collab_builder(this, origin, trains="collab")
    task = build()
    facts = _train(this, "collab", build, order, task.tables)
    meanings = task.unseen()
    shares = unseen_shares(this.log(), meanings, settings.history + 1)
    for case, meaning in meanings.items():
        this.console.line(f"collab    {case}, {shares[case]:.1%} of the test rows: {meaning}")
    return {**facts, "test rows unseen": shares}


def _sequences(this: Run) -> Any:
    """The order of train sequences, which are put beside the artifact while it is made."""
    from sellarec.data.log import write_sequences
    from sellarec.training.stream import Order, row_groups

    place = this.artifact("collab") / WORK
    with place.writing() as folder:
        write_sequences(this.log(), folder / "sequences.parquet", this.config.collab.history + 1)
    groups = tuple(row_groups([str(place.local() / "sequences.parquet")]))
    return Order(groups, this.config.collab.batch, this.config.seed)


def _collab_builder(this: Run, origin: Place | None, trains: str | None = None) -> Callable[[], Any]:
    """Builds the collaborative model.

    Args:
        origin: the artifact whose tables and dense weights it starts from; None for fresh ones.
        trains: the stage that trains it, which may take negatives; None where it is only scored with.
    """
    from sellarec.collab.task import build_collab, reads_counts
    from sellarec.data.log import item_counts

    log, settings = this.log(), this.config.collab
    if trains != "collab":  # other stages go through the rows
        settings = dataclasses.replace(settings, train_on="rows")
    counts = None
    if trains is not None and reads_counts(settings):
        place = this.artifact(trains) / WORK
        with place.writing() as folder:
            np.save(folder / "counts.npy", item_counts(log))
        counts = place.local() / "counts.npy"
    start = None if origin is None else origin.local()
    given = _given_tables(this) if trains == "collab" else {}
    return partial(build_collab, log, settings, start, counts, this.config.seed, given)


def _given_tables(this: Run) -> dict[str, Path]:
    """Folders of the tables that start from vectors of a file, by name. They are put beside the artifact while it is made."""
    from sellarec.collab.task import build_collab
    from sellarec.collab.vectors import write_table

    collab, place = this.config.collab, this.artifact("collab") / WORK / "tables"
    files = {"user": collab.init_users, "item": collab.init_items}
    given = {name: path for name, path in files.items() if path is not None}
    if not given:
        return {}
    network = build_collab(this.log(), collab, None).network
    for name, path in given.items():
        (table,) = (table for table in network.tables if table.name == name)
        with place.writing() as folder:
            known = write_table(this.log(), table, path, network.has_biases, this.config.seed, folder)
        this.console.line(f"collab    {known:,} of {table.rows:,} {name}s start from {path}")
    return dict.fromkeys(given, place.local())


def _distil(this: Run) -> dict[str, Any]:
    from sellarec.language.distil import PROFILES, write_profiles

    config, log, settings, output = this.config, this.log(), this.config.distil, this.artifact("distil")
    check_model(this, "distil", this.llm())
    facts = _encode(this, [str(path) for path in log.paths("items")], settings, output)
    _tell_cut(this, "texts", facts, f"distil.max_tokens {settings.max_tokens}")
    if config.reads_profiles:
        work, users = output / WORK, output / PROFILES
        with work.writing() as texts, users.writing() as known:
            write_profiles(log, settings.profile_items, texts / "profiles.parquet", known / "users.parquet")
        of_users = dataclasses.replace(
            settings, text="text", prompt=settings.profile, max_tokens=settings.profile_tokens
        )
        found = _encode(this, [str(work.local() / "profiles.parquet")], of_users, users)
        _tell_cut(this, "profiles", found, f"distil.profile_tokens {settings.profile_tokens}")
        output.delete(WORK)
        facts["profiles"] = {name: found[name] for name in ("items", "texts_cut")}
    return facts


def _encode(this: Run, files: list[str], settings: Distil, output: Place) -> dict[str, Any]:
    """Encode the texts of files; gives how many items and of what width, of how many the text was cut, and how many stood."""
    from sellarec.language.distil import distil, items_in, rows_of_part, what_stands
    from sellarec.training.encoding import Encoding, encode_worker

    noun, mark, catalog = this.log().facts["noun"], this.marks["distil"], items_in(files)
    stood = what_stands(output, mark)["items"]
    if not settings.sharded:
        assert this.cluster is not None
        workers = first_workers("distil", this.group(), this.console)
        cores = sum(machine.places for machine in this.cluster.machines) or os.cpu_count() or 1
        run_task(
            distil, "distil", this.console, items=files, settings=settings, **this.adapted(), noun=noun, workers=workers,
            gpus=this.gpus(), output=output, mark=mark, threads=max(1, cores // workers),
        )  # fmt: skip
    elif stood < catalog:
        encoding = Encoding(
            files,
            catalog,
            settings,
            **this.adapted(),
            noun=noun,
            output=output,
            mark=mark,
            part_rows=rows_of_part(catalog),
        )
        run_workers(encode_worker, {"encoding": encoding}, "distil", this.group(), this.console, partial(_track, this))
    written = what_stands(output, mark)
    facts = {"items": catalog, "width": written["width"], "texts_cut": written["texts_cut"]}
    return {**facts, "items_that_stood": stood}


def _tell_cut(this: Run, what: str, facts: dict[str, Any], limit: str) -> None:
    if facts["texts_cut"]:
        this.console.line(
            f"distil    {facts['texts_cut']:,} of {facts['items']:,} {what} were longer than what is read of one, and cut at "
            f"their end ({limit}, or the model's context)"
        )


def _align(this: Run) -> dict[str, Any]:
    from sellarec.alignment.measures import draw_items, kept_metrics, summary
    from sellarec.language.distil import SavedVectors, read_profiles

    config, log, mark = this.config, this.log(), this.marks["distil"]
    distilled = this.artifact("distil").local()
    vectors = SavedVectors(distilled, mark)
    profiles = read_profiles(distilled, mark) if config.reads_profiles else None
    origin = this.artifact("collab") if config.align.init == "collab" else None
    collab = _collab_builder(this, origin, trains="align")
    order = _order(this, "train", config.align.batch, config.seed)
    measured = draw_items(log.items(["seen"])["seen"].to_numpy(), config.seed)
    arguments = (vectors.width, vectors.read, config.collab.dim, config.align, measured, config.seed, profiles)
    task = _build_align(collab, *arguments)
    users, path = _users_of_align(this, task.columns, order) if config.align.side != "items" else (0, None)
    facts = _train(this, "align", partial(_build_align, collab, *arguments, path), order, task.tables)
    # from scratch it is made without stage collab, whose artifact may not be there
    valid = {"align": kept_metrics(facts), "collab": collab_beside_align(this) if origin is not None else None}
    counts = {"items": len(measured)} | ({"users": users} if users else {})
    found = {**counts, **facts.pop("measured"), "valid": valid}
    where = this.artifact("align")
    this.persist(f"writing {where}/alignment.json", partial(where.write_json, "alignment.json", found))
    this.console.line(f"align     {summary(found)}")
    return {**facts, "alignment": found}


def _users_of_align(this: Run, columns: Sequence[str], order: Any) -> tuple[int, Path]:
    """Write the rows by whose users the two spaces are compared, beside the artifact while it is made: how many, and where."""
    from sellarec.alignment.measures import draw_rows_of_users
    from sellarec.language.distil import users_with_profiles

    known = users_with_profiles(this.artifact("distil").local()) if this.config.reads_profiles else None

    def has_vector(rows: pa.Table) -> np.ndarray:
        if known is None:
            return pc.list_value_length(rows["history"]).to_numpy() > 0
        return np.isin(rows["user"].to_numpy(), known)

    place = this.artifact("align") / WORK / "users"
    with place.writing() as folder:
        rows = draw_rows_of_users(order, columns, has_vector)
        pq.write_table(rows, folder / "rows.parquet")
    return len(rows), place.local() / "rows.parquet"


def collab_beside_align(this: Run) -> dict[str, float | None] | None:
    """The metrics on the valid split of what stage collab kept; None where align's are of other rows."""
    from sellarec.alignment.measures import kept_metrics

    collab, align, rows = this.config.collab, this.config.align, this.log().facts["rows"]["valid"]
    if collab.select_on not in ("auc", "uauc") or min(rows, collab.valid_rows) != min(rows, align.valid_rows):
        return None
    return kept_metrics(this.manifest("collab")["facts"])


def _build_align(collab: Callable[[], Any], *arguments: Any) -> Any:
    from sellarec.alignment.align import build_align

    return build_align(collab(), *arguments)


def _fuse(this: Run) -> dict[str, Any]:
    config = this.config
    tokens, trained = (" and ".join(names) for names in (config.fuse.tokens, config.fuse.train))
    written = f"codes in text ({config.fuse.code})"
    what = {"collaborative": "tokens", "learned": "learned tokens", "codes": written}[config.fuse.represent]
    this.console.line(f"fuse      {f'{what} of {tokens}' if tokens else 'no tokens'}; trains {trained}")
    order = _prompts_order(this, "fuse", "train", config.fuse.batch, config.seed)
    facts = _train(this, "fuse", _fuse_builder(this, "align"), order, _tables_of_fuse(this))
    if "adapter" in config.fuse.train:
        facts |= _adapter_of(this, "fuse")
    return {**facts, **_weigh_language(this)}


def _weigh_language(this: Run) -> dict[str, Any]:
    """Choose, by the valid rows, what the language model's score is multiplied by before the collaborative one is added; gives
    the `language_weight`, and by weight the metric that was compared."""
    from sellarec.evaluation.metrics import auc, uauc
    from sellarec.training.scoring import Scoring, score_worker

    settings, where = this.config.fuse, this.artifact("fuse") / WORK / "weighing"
    if len(settings.language_weights) == 1:
        return {"language_weight": settings.language_weights[0]}
    collab, _ = _rows_of_fuse(this, "fuse")
    scoring = Scoring(
        "fuse", {"collab": collab, "sella-rec": _fuse_builder(this, "fuse")}, this.config.evaluate,
        _valid_order(this, "fuse", settings), where, dtype=this.config.llm.dtype, storage=this.config.tables,
    )  # fmt: skip
    where.make()  # workers take it that storage is away where it is missing
    run_workers(score_worker, {"scoring": scoring}, "fuse", this.group(), this.console, partial(_track, this))
    scored = pq.read_table(where.local() / "scores.parquet")
    valid = this.log().split("valid", ["row", "user", "label"])
    valid = valid.filter(pc.is_in(valid["row"], scored["row"].combine_chunks()))
    users, labels = (valid[name].to_numpy() for name in ("user", "label"))
    collaborative = scored["collab"].to_numpy().astype(np.float64)
    language = scored["sella-rec"].to_numpy() - collaborative
    found = {}
    for weight in sorted(settings.language_weights):
        scores = collaborative + weight * language
        found[weight] = auc(labels, scores) if settings.select_on == "auc" else uauc(users, labels, scores).value
    chosen = max(found, key=lambda weight: found[weight])  # of equals the smallest
    told = ", ".join(f"{weight:g}: {value:.4f}" for weight, value in found.items())
    this.console.line(
        f"fuse      the language model's score counts {chosen:g} times (valid {settings.select_on.upper()} by weight: {told})"
    )
    if chosen == 0:
        this.console.line(
            "fuse      so every score of sella-rec is the collaborative model's, as stage align left it: where it differs from "
            "collab's, that is what align has trained"
        )
    this.artifact("fuse").delete(WORK)
    return {
        "language_weight": chosen,
        "valid by language weight": {str(weight): value for weight, value in found.items()},
    }


def _fuse_builder(this: Run, stage: str, language_weight: float = 1.0) -> Callable[[], Any]:
    """Builds the recommender from what stages before fuse left (align), or as stage fuse left it."""
    config, of = this.config, _parts_of_fuse(this, stage)
    collab, tables = _rows_of_fuse(this, stage) if config.fuse.tokens else (None, None)
    aligned = of.get("projections") == "align" and config.fuse.warm_start
    start = this.artifact("align").local() / "projection.safetensors" if aligned else None
    return partial(
        _build_fuse,
        collab,
        tables,
        **this.adapted(of["adapter"]),
        titles=_titles(this.log()),
        prompt=config.prompt,
        noun=this.log().facts["noun"],
        hidden=config.align.hidden,
        projection=start,
        trained=this.artifact("fuse").local() / "projection.safetensors" if of.get("projections") == "fuse" else None,
        settings=config.fuse,
        seed=config.seed,
        language_weight=language_weight,
        layers=config.align.layers,
    )


def _parts_of_fuse(this: Run, stage: str) -> dict[str, str]:
    """The stage that has made each part of what stage fuse starts from (align), or has left."""
    from sellarec.fusion.fuse import made_by

    settings = this.config.fuse
    return made_by(settings if stage == "fuse" else dataclasses.replace(settings, train=()))


def _rows_of_fuse(this: Run, stage: str) -> tuple[Callable[[], Any], Path]:
    """Builds what represents users and items in tokens, and the folder of its tables; of no language model more than its width
    is read."""
    from sellarec.collab.task import build_collab
    from sellarec.fusion.fuse import represented, token_rows

    settings, of = this.config.fuse, _parts_of_fuse(this, stage)
    rows = token_rows(settings, this.config.collab, this.adapted(of["adapter"])["source"])
    folder = this.artifact(of["tables"]).local()
    origin = None if settings.represent == "learned" and stage != "fuse" else folder
    return partial(build_collab, this.log(), rows, origin, represented=represented(settings)), folder / "tables"


def _tables_of_fuse(this: Run) -> tuple[Any, ...]:
    """The tables that stage fuse looks up in."""
    from sellarec.fusion.fuse import semantic_table, tables_of

    if not this.config.fuse.tokens:
        return ()
    collab, tables = _rows_of_fuse(this, "align")
    return tables_of(collab(), semantic_table(tables, this.config.fuse), this.config.fuse)


def _build_fuse(collab: Callable[[], Any] | None, tables: Path | None, **arguments: Any) -> Any:
    from sellarec.fusion.fuse import build_fuse, semantic_table

    semantic = None if tables is None else semantic_table(tables, arguments["settings"])
    return build_fuse(collab=None if collab is None else collab(), semantic=semantic, **arguments)


def _evaluate(this: Run) -> dict[str, Any]:
    from sellarec.evaluation.baselines import fit_means, item_mean, item_user_mean
    from sellarec.evaluation.report import BEST_ATTAINABLE
    from sellarec.evaluation.results import evaluate_scores
    from sellarec.language.adapt import build_adapted
    from sellarec.training.scoring import Scoring, score_worker

    log, config = this.log(), this.config
    check_model(this, "evaluate", this.llm())
    build: dict[str, Callable[[], Any]] = {
        "collab": _collab_builder(this, this.artifact("collab")),
        "text-only": partial(
            build_adapted, **this.adapted(), titles=_titles(log), prompt=config.prompt, noun=log.facts["noun"],
            loss=config.adapt.loss,
        ),
        "sella-rec": _fuse_builder(this, "fuse", this.manifest("fuse")["facts"]["language_weight"]),
    }  # fmt: skip
    order = _order(this, "test", config.evaluate.batch, None)
    output = this.artifact("evaluate")
    scoring = Scoring("evaluate", build, config.evaluate, order, output, dtype=config.llm.dtype, storage=config.tables)
    run_workers(score_worker, {"scoring": scoring}, "evaluate", this.group(), this.console, partial(_track, this))
    scored = pq.read_table(this.artifact("evaluate").local() / "scores.parquet")
    test, training = log.split("test"), log.split("train", ["user", "item", "label"])
    if not np.array_equal(scored["row"].to_numpy(), test["row"].to_numpy()):
        raise RuntimeError(f"evaluate: {len(scored)} rows were scored, but the test split has {len(test)} others")
    user, item = test["user"].to_numpy(), test["item"].to_numpy()
    means = fit_means(*(training[name].to_numpy() for name in ("user", "item", "label")))
    scores = {"item mean": item_mean(means, item), "item + user mean": item_user_mean(means, user, item)}
    scores |= {name: scored[name].to_numpy() for name in MODELS}
    if test["expected"].null_count == 0:
        scores[BEST_ATTAINABLE] = test["expected"].to_numpy()
    for name, values in scores.items():
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise StageFailed(f"stage evaluate: {bad} of the {len(test)} scores of {name} are not finite")
    records = evaluate_scores(
        test, scores, pairs=[("sella-rec", "collab"), ("sella-rec", "text-only")], seed=config.seed,
        protocol="pointwise", replicates=config.evaluate.replicates,
    )  # fmt: skip
    where = this.artifact("evaluate")
    this.persist(f"writing {where}/results.json", partial(where.write_json, "results.json", records))
    found = this.persist(f"reading {where}/scoring.json", partial(where.read_json, "scoring.json"))
    assert found is not None
    _tell_shortened(this, "evaluate", found["histories"])
    return {"rows": len(test), **found}


def _train(
    this: Run, stage: str, build: Callable[[], Any], train_order: Any, tables: Sequence[Any] = (), source: Any = None
) -> dict[str, Any]:
    """Train a stage on a worker group; gives the facts that the workers leave.

    Args:
        tables: the embedding tables that it will make: refused here where they can't be held.
        source: of the language model that it trains whole; None for the run's own.

    Raises:
        TrainingPaused: where the run's window ends.
    """
    from sellarec.training.loop import Training

    settings = getattr(this.config, stage)
    dtype = this.config.llm.dtype if isinstance(settings, Language) else "float32"
    in_epochs = settings.epochs * train_order.steps_per_epoch
    if settings.max_steps is not None and settings.max_steps < in_epochs:
        done = settings.max_steps / train_order.steps_per_epoch
        this.console.line(
            f"{stage:<9} {stage}.max_steps {settings.max_steps} ends it after {done:.2f} of {settings.epochs:g} epochs"
        )
    held = check_tables(this, tables, settings, room_of(this)) if tables else 0
    if isinstance(settings, Language):
        check_model(this, stage, this.llm() if source is None else source, held)
    valid = None
    if isinstance(settings, Selection):
        valid = _valid_order(this, stage, settings)
    training = Training(
        stage, build, settings, this.config.seed, train_order, valid, this.artifact(stage),
        dtype=dtype, storage=this.config.tables, window=this.window, pause_after=this.pause_after,
    )  # fmt: skip
    training = dataclasses.replace(training, profiled=_profiled(this, stage, training.steps))
    on_record = this.on_record or partial(_track, this)
    assert this.cluster is not None
    try:
        paused = train(training, this.group(), this.console, on_record, this.stop)
    except TrainingStopped:
        this.artifact(stage).delete(*(name for name in this.artifact(stage).names() if name != "lease.json"))
        raise
    if paused is not None:
        raise TrainingPaused(paused)
    where = this.artifact(stage)
    this.persist(f"deleting {where / WORK}", partial(where.delete, WORK))
    found = this.persist(f"reading {where}/training.json", partial(where.read_json, "training.json"))
    assert found is not None
    _tell_shortened(this, stage, found.get("histories", {}))
    if isinstance(settings, Language) and valid is not None and this.config.prompt.with_history:
        found["rows with a history"] = {"train": train_order.rows, "valid": valid.rows}
    return found


def _order(this: Run, split: str, batch: int, seed: int | None) -> Any:
    from sellarec.training.stream import Order, row_groups

    return Order(tuple(row_groups([str(path) for path in this.log().split_paths(split)])), batch, seed)


def _prompts_order(this: Run, stage: str, split: str, batch: int, seed: int | None) -> Any:
    """The order of a split's rows of which a stage makes prompts: of all, or of those with a history, which are put beside the
    artifact while it is made."""
    from sellarec.data.log import write_with_history
    from sellarec.training.stream import Order, row_groups

    if not this.config.prompt.with_history:
        return _order(this, split, batch, seed)
    place = this.artifact(stage) / WORK / split
    with place.writing() as folder:
        write_with_history(this.log(), split, folder / "rows.parquet")
    order = Order(tuple(row_groups([str(place.local() / "rows.parquet")])), batch, seed)
    this.console.line(f"{stage:<9} {order.rows:,} of {this.log().facts['rows'][split]:,} {split} rows have a history")
    return order


def _titles(log: Log) -> list[str]:
    return log.items(["title"])["title"].to_pylist()


def _valid_order(this: Run, stage: str, settings: Selection) -> Any:
    """The rows, or queries, by which a stage's state is selected."""
    from sellarec.training.stream import Order, row_groups

    batch = this.config.evaluate.batch
    if settings.select_on in ("auc", "uauc"):
        makes_prompts = isinstance(settings, Language)
        valid = (
            _prompts_order(this, stage, "valid", batch, None) if makes_prompts else _order(this, "valid", batch, None)
        )
        return dataclasses.replace(valid, every=-(-valid.rows // settings.valid_rows))
    from sellarec.evaluation.queries import write_queries

    place = this.artifact(stage) / WORK
    with place.writing() as folder:
        write_queries(this.log(), "valid", folder / "queries.parquet", settings.valid_rows)
    return Order(tuple(row_groups([str(place.local() / "queries.parquet")])), batch, None)


def _profiled(this: Run, stage: str, steps: int) -> Any:
    from sellarec.training.loop import Profiled

    asked = this.config.profile
    if stage not in asked.stages:
        return None
    if asked.first > steps:
        raise UserError(f"profile.first is {asked.first}, but stage {stage} takes {steps} steps: lower it")
    return Profiled(asked.first, asked.steps, this.place / "profile")


def _track(this: Run, record: dict[str, Any]) -> None:
    """The numbers of a progress record, to the run's trackers."""
    if "step" not in record:
        return
    shown = {
        name: value
        for name, value in record.items()
        if isinstance(value, float) and name not in ("step", "steps", "seconds left")
    }
    shown |= {f"valid {name.upper()}": value for name, value in record.get("valid", {}).items() if value is not None}
    titles = {name.replace("/s", " per s").replace(" %", " (%)"): value for name, value in shown.items()}
    for tracker in this.trackers:
        tracker.scalars(record["stage"], record["step"], titles)


def _tell_shortened(this: Run, stage: str, histories: dict[str, dict[str, int]]) -> None:
    from sellarec.training.stream import counts_in_words

    if any(found["shortened"] for found in histories.values()):
        this.console.line(f"{stage:<9} histories cut to fit: {counts_in_words(histories)}")


def carry_out(this: Run, stage: str) -> dict[str, Any]:
    """Make a stage's artifact, all but its manifest; gives the facts that stand there. Where settings change on the way, it is
    trained a part at a time, each from the checkpoint of the one before.

    Raises:
        TrainingPaused: the run is to pause there.
    """
    make: Callable[[Run], dict[str, Any]] = {
        "prepare": _prepare,
        "pretrain": _pretrain,
        "adapt": _adapt,
        "collab": _collab,
        "distil": _distil,
        "align": _align,
        "fuse": _fuse,
        "evaluate": _evaluate,
    }[stage]
    whole, parts, behind = this.config, windows(this.config, stage), 0
    try:
        while True:
            part = next(part for part in reversed(parts) if part.first <= behind)
            this.config, this.window = part.config, (part.first, part.last)
            if part.first:
                this.console.line(f"{stage:<9} {part.in_words()}")
            try:
                facts = make(this)
            except TrainingPaused as paused:
                behind = len(paused.evaluations)
                if this.pause_after is not None and behind >= this.pause_after:
                    raise
                continue
            if len(parts) > 1:
                facts["optimizers"]["changes"] = "; ".join(each.in_words() for each in parts[1:])
                if part is not parts[-1]:
                    this.console.line(
                        f"{stage:<9} note: it ended before evaluation {parts[-1].first} of {stage}.changes"
                    )
            return facts
    finally:
        this.config, this.window = whole, (0, None)
