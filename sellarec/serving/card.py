"""The model card of an export: what was trained, on what, how well it does, and what its user has to check."""

from collections.abc import Mapping, Sequence
from typing import Any

from sellarec.config import STAGES, Config
from sellarec.evaluation.results import format_table

TEMPLATE = """\
# {run}

A [SeLLa-Rec](https://arxiv.org/abs/2504.10107) recommender: a language model {tuned}{beside}. It
scores pairs of a user and an item.{weighed}

    import sellarec
    recommender = sellarec.load("PATH/OF/THIS/FOLDER")
    recommender.score(users=["..."], items=["..."]).scores  # log-odds, ids as in the source

## Data

Source: {source}. {users:,} users, {items:,} items; {train:,} train rows ({positives:,} positive), {valid:,} valid, {test:,} test.

- Positive: {label_rule}.
- Split: {split_rule}.
- Users' last positives: {histories}.

## Results

    {results}

`results.json` has all cuts.

## Training

Collaborative model: {collab}. Prompt: {template}. Seed {seed}. `config.yaml` has every setting, and `jobs/train.py` takes it.

| stage | steps | kept step |
|---|---|---|
{stages}

## Base model

{base}

## Licences

The base model and the data have licences of their own, which may restrict what this folder may be used for and whether it may be
handed on: the {made}, the projections and the rows are made from both, and the catalog holds ids and titles of the data. They
weren't looked at when this was written: check them.
"""


def _weighed(config: Config, weight: float) -> str:
    """How much the language model counts in a score, where a collaborative one is added to its own."""
    if not config.fuse.collab_score:
        return ""
    if weight == 0:
        return (
            "\nThe language model's score counts 0 times in it, as the valid rows chose: every score is that of the\n"
            "collaborative model, as stage align left it."
        )
    return f"\nIts score is {weight:g} times the language model's plus that of the collaborative model."


def model_card(
    facts: Mapping[str, Any],
    config: Config,
    data: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    manifests: Mapping[str, Mapping[str, Any]],
) -> str:
    """README.md of an export.

    Args:
        facts: of export.json.
        data: the prepared log's facts.
        results: the records of results.json.
        manifests: of the run's artifacts, by stage.
    """
    base = facts["base_model"]
    is_tuned, represent = config.adapt.method == "full", config.fuse.represent
    learned = represent == "learned"
    if base["copied"]:
        tuned = ", pre-trained further on the catalog's texts" if config.pretrain.continued else ""
        tuned += ", all weights tuned" if is_tuned else ""
        described = f"`{base['name']}`{tuned} ({base['identity']}), in `model/`."
    elif base["revision"] is not None:
        described = (
            f"`{base['name']}` of the Hugging Face hub, commit `{base['revision']}`. It is not part of this folder."
        )
    else:
        described = (
            f"The folder `{base['name']}`, whose files have the SHA-256 `{base['identity']}` together. It is not part of this "
            'folder: where it lies elsewhere, `sellarec.load(..., llm="FOLDER")`.'
        )
    trained = [
        f"| {stage} | {training['steps']:,} | {training['kept_step']:,} |"
        for stage in STAGES
        if "steps" in (training := manifests.get(stage, {}).get("facts", {}))
    ]
    beside = f" that reads {data['noun']} titles"
    if config.fuse.tokens:
        rows = "a row of each user and item" if learned else "a collaborative model's rows of users and items"
        if config.fuse.tokens == ("semantic",):
            rows = "a distilled vector of each item"
        read_as = f"codes in text ({config.fuse.code})" if represent == "codes" else "soft tokens"
        beside = f", and {rows}\nthat it reads as {read_as} beside {data['noun']} titles"
    return TEMPLATE.format(
        run=facts["run"],
        beside=beside,
        weighed=_weighed(config, facts["language_weight"]),
        tuned="whose weights were all tuned" if is_tuned else "with an adapter",
        made="tuned model" if is_tuned else "adapter",
        source=config.data.source if config.data.dataset is None else f"{config.data.source}, {config.data.dataset}",
        users=data["users"],
        items=data["items"],
        **data["rows"],
        positives=data["positives"]["train"],
        label_rule=data["label_rule"],
        split_rule=data["split_rule"],
        histories="in `histories/`" if facts["histories"] else "left out, so they are given with each call",
        results=format_table(results).replace("\n", "\n    ").replace("\n    \n", "\n\n"),
        collab="none" if learned or not config.fuse.tokens else config.collab.model,
        template=manifests["fuse"]["facts"]["template"],
        seed=config.seed,
        stages="\n".join(trained),
        base=described,
    )
