"""What a stage's language model takes of a worker's memory, by arithmetic, before anything is loaded.

Counted: weights as they are stored, whole on the one worker that loads them (which hands them to the others, and to a GPU,
some at a time) and sharded after that; what is trained, with gradients and the optimizer's state; layers that are gathered to
compute; activations of a micro-batch of the longest prompts; logits. Not counted: projections, the prompts' own tensors,
buffers of NCCL or gloo, what an allocator keeps, and the process itself (`sellarec.training.cluster.WORKER_MEMORY`). The
tables of a stage are counted elsewhere (`sellarec.training.plan`), and added.
`benchmarks/language/memory.py` compares it with processes.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sellarec.config import ALL_LINEAR, Adapt
from sellarec.errors import UserError
from sellarec.language.llm import LlmSource, causal_config, decoder_layers, linear_layers, without_weights
from sellarec.training.plan import GIB

SAVED_NUMBERS = 1.25
"""Numbers that a decoder layer keeps of a token for its backward pass, over those that its linear layers take and give: 0.9 to
1.3 were counted in Llama and Qwen2, with an adapter on two or on all of its linear layers; 1.5 to 1.9 in GPT-2."""

SMALL_BLOCK = 256 << 10
"""Layers of fewer bytes are gathered all at once (`sellarec.training.dense`)."""

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """What of a language model its memory depends on.

    Attributes:
        weights: of the whole model; adapter: of LoRA on it; layer: of its largest decoder layer.
        layers: decoder layers.
        features: numbers that the linear layers of one decoder layer take and give, of one token.
        keys: numbers that one decoder layer keeps of a token for those after it.
    """

    weights: int
    adapter: int
    layer: int
    layers: int
    hidden: int
    features: int
    keys: int
    vocabulary: int


def shape_of(source: LlmSource, adapter: Adapt | None) -> Shape:
    """The shape of a model, by its config alone, with an adapter or without.

    Raises:
        UserError: its config can't be read, or is of no causal language model.
    """
    import torch

    config = causal_config(source.name, source.revision)
    model = without_weights(config)
    output = model.get_output_embeddings()
    linear = {name: module for name, module in linear_layers(model).items() if module is not output}
    targets: Collection[str] = () if adapter is None else adapter.targets
    adapted = [m for n, m in linear.items() if ALL_LINEAR in targets or n.rpartition(".")[2] in targets]
    lora = 0
    if adapter is not None:
        # of DoRA a norm more for each number that a layer gives
        given = [m.out_features if isinstance(m, torch.nn.Linear) else m.nf for m in adapted]
        lora = adapter.rank * sum(sum(m.weight.shape) for m in adapted) + adapter.dora * sum(given)
    layers = decoder_layers(model) or [model]
    inside = [m for m in layers[0].modules() if m in set(linear.values())]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        weights=sum(weight.numel() for weight in model.parameters()),
        adapter=lora,
        layer=max(sum(weight.numel() for weight in layer.parameters()) for layer in layers),
        layers=len(layers),
        hidden=config.hidden_size,
        features=sum(sum(m.weight.shape) for m in inside),
        keys=2 * heads * width,
        vocabulary=config.vocab_size,
    )


@dataclass(frozen=True)
class Use:
    """How a stage uses the model.

    Attributes:
        workers: that share its weights, where they are sharded.
        micro_batch, tokens: rows that go through it at once, and how long they may be.
        storage, dtype: types of its frozen weights, and of computing.
        trains: what gradients are of: the whole model, its adapter, or nothing of it.
        backward: whether gradients go through it.
        checkpoints: whether layers are computed again in the backward pass.
        logits: what has some: the two answers at the last position (answer), some positions at a time (tokens), or none.
        compares: whether one worker loads the whole model once more at the end.
        validates: whether prompts are scored between steps.
        sharded: whether FSDP2 holds the weights and gathers them, a single worker's too.
        tables: bytes of a worker's part of the stage's tables, which are made before the weights are sharded.
        on_gpu: whether a GPU's memory is meant: what is whole at the start or at the end is in its machine's.
        beside: workers on the machine with the fewest of them, which share out its memory, of which one may load the whole model;
            None: all are on one.
    """

    workers: int
    micro_batch: int
    tokens: int
    storage: str
    dtype: str
    trains: str = "nothing"
    backward: bool = False
    checkpoints: bool = False
    logits: str = "answer"
    compares: bool = False
    validates: bool = False
    sharded: bool = True
    tables: int = 0
    on_gpu: bool = False
    beside: int | None = None


def phases(shape: Shape, use: Use) -> dict[str, dict[str, int]]:
    """By phase of a stage what a worker holds then, in bytes by name."""
    stored, computed = BYTES[use.storage], BYTES[use.dtype]
    whole = shape.weights * stored + shape.adapter * 4
    share = whole // use.workers
    trained = {"model": shape.weights, "adapter": shape.adapter, "nothing": 0}[use.trains]
    state = trained * 12 // use.workers
    outside = shape.weights - shape.layers * shape.layer
    at_root = shape.layers if shape.layer * stored < SMALL_BLOCK else 0
    at_once = at_root or min(2, shape.layers)
    gathered = (outside + at_once * shape.layer) * computed if use.sharded or stored != computed else 0
    if use.sharded and use.workers > 1:  # what a collective gives is copied into weights, and held meanwhile
        gathered += max(outside + at_root * shape.layer, shape.layer) * computed
    rows = use.micro_batch * use.tokens
    of_layer = int(SAVED_NUMBERS * shape.features)
    # keys and values, where what prompts begin with is read once
    scored = shape.features + shape.layers * shape.keys * (use.logits != "none")
    if not use.backward:
        numbers = scored
    elif use.checkpoints:
        numbers = of_layer + shape.layers * shape.hidden
    else:
        numbers = of_layer * shape.layers
    if use.validates:
        numbers = max(numbers, scored)
    logits = {
        "answer": 24 * use.micro_batch,
        "tokens": 4 * min(LOGIT_BYTES, 4 * rows * shape.vocabulary),
        "none": 0,
    }[use.logits]
    held = {"weights": share, "gradients and optimizer": state, "tables": use.tables}
    of_each = whole // (use.beside or use.workers)
    loaded = {"the whole model": of_each if use.sharded else whole, "weights": share if use.sharded else 0}
    if use.sharded and use.workers > 1:
        loaded["a tensor of the one that loads"] = outside * stored
    if use.on_gpu and use.sharded:
        loaded = {"weights": share, "a layer": max(shape.layer, outside) * stored}
    found = {
        "while it is loaded": loaded | {"tables": use.tables},
        "at a micro-batch": held
        | {"gathered layers": gathered, "activations": rows * numbers * computed, "logits": logits},
    }
    if use.compares and not use.on_gpu:
        found["at the end, where it is loaded again to be compared"] = held | {"the whole model": of_each}
    return found


def check_loading_fits(shape: Shape, use: Use, readers: int, free: int) -> None:
    """Refuse a model that so many workers, each the whole of it, read into their machine's memory, from which GPUs take their
    shares, where that has less free.

    Args:
        readers: one of each group of workers that share a model, each of those that do not.

    Raises:
        UserError: with the product, and what to do about it.
    """
    whole = shape.weights * BYTES[use.storage] + shape.adapter * 4
    if readers * whole <= free:
        return
    hints = [] if use.storage == "bfloat16" else ["take llm.storage bfloat16"]
    if readers > 1 and not use.sharded:
        hints.append("set distil.sharded")
    if readers > 1:
        hints.append("have fewer of them at once here")
    raise UserError(
        f"{readers} of the workers read the whole language model, {_amount(whole)} each, into this machine's memory, before GPUs "
        f"take their shares of it: {_amount(readers * whole)}, but {_amount(free)} are free: "
        f"{', or '.join([*hints, 'take a smaller model or a machine with more memory'])}"
    )


LOGIT_BYTES = 64 << 20
"""As `sellarec.language.scorer`, which loads torch, has it."""


def largest(found: dict[str, dict[str, int]]) -> tuple[str, dict[str, int]]:
    """The phase that takes most."""
    return max(found.items(), key=lambda phase: sum(phase[1].values()))


def summary(found: dict[str, dict[str, int]]) -> str:
    """One line: what is needed, and of what it is made."""
    when, parts = largest(found)
    return f"{_amount(sum(parts.values()))} {when} ({_sum(parts)})"


def check_model_fits(found: dict[str, dict[str, int]], room: int, whose: str, advice: dict[str, str]) -> None:
    """Refuse a model that takes more, with its stage's tables, than there is room for.

    Args:
        room: bytes that one worker has for both.
        whose: what has that room, for the message.
        advice: by name of a part what makes it smaller.

    Raises:
        UserError: with the sum, and what to do about its largest parts.
    """
    when, parts = largest(found)
    if sum(parts.values()) <= room:
        return
    ordered = sorted(parts, key=lambda name: -parts[name])
    hints = list(
        dict.fromkeys(advice[name] for name in ordered if name in advice and parts[name] * 4 > sum(parts.values()))
    )
    beside = " and the tables" if parts["tables"] else ""
    raise UserError(
        f"the language model{beside} would take about {_amount(sum(parts.values()))} of each worker {when} ({_sum(parts)}), but "
        f"{whose} has room for {_amount(room)}: {', or '.join([*hints, 'take a smaller model or a larger machine'])}"
    )


def _amount(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


def _sum(parts: dict[str, int]) -> str:
    shown = {name: size for name, size in parts.items() if size}
    return " + ".join(f"{name} {_amount(size)}" for name, size in shown.items())


def use_of(stage: str, config: Any, context: int) -> Use:
    """How a stage of a run uses the model.

    Args:
        context: the model's, in tokens.
    """
    settings, llm = getattr(config, stage), config.llm
    tokens = min(config.prompt.max_tokens, context)
    common = {
        "workers": config.least_workers,
        "micro_batch": settings.micro_batch,
        "storage": llm.storage,
        "dtype": llm.dtype,
    }
    if stage == "distil":
        tokens = min(max(settings.max_tokens, settings.profile_tokens * config.reads_profiles), context)
        workers = config.least_workers if settings.sharded else 1
        common |= {"workers": workers, "dtype": "float32"}
        return Use(**common, tokens=tokens, logits="none", sharded=settings.sharded)
    if stage == "evaluate":
        return Use(**common, tokens=tokens)
    common["checkpoints"] = settings.checkpoint_activations
    if stage == "pretrain":
        common["storage"] = "float32"
        context = min(settings.context, context)
        return Use(**common, tokens=context, trains="model", backward=True, logits="tokens")
    trains = "adapter" if stage == "adapt" or "adapter" in settings.train else "nothing"
    if stage == "adapt" and settings.method == "full":
        trains, common["storage"] = "model", "float32"
    logits = "answer" if settings.loss == "answer" else "tokens"
    compares = trains != "nothing"  # with what other programs load
    return Use(**common, tokens=tokens, trains=trains, backward=True, logits=logits, compares=compares, validates=True)


def advice_of(stage: str, config: Any) -> dict[str, str]:
    """By name of a part the settings that make it smaller, with what they are now."""
    settings = getattr(config, stage)
    batch = f"lower {stage}.micro_batch ({settings.micro_batch})"
    shorter = "" if stage == "pretrain" else f" or prompt.max_tokens ({config.prompt.max_tokens})"
    if stage == "distil":
        shorter = f" or distil.max_tokens ({settings.max_tokens})"
    again = "" if getattr(settings, "checkpoint_activations", True) else f", set {stage}.checkpoint_activations"
    advice = {"activations": batch + shorter + again, "logits": batch + shorter}
    tunes_all = stage == "adapt" and settings.method == "full"
    if config.llm.storage == "float32" and stage != "pretrain" and not tunes_all:
        advice |= dict.fromkeys(("the whole model", "weights"), "take llm.storage bfloat16 (now float32)")
    if config.llm.dtype == "float32" and stage != "distil":  # which computes in float32 always
        advice["gathered layers"] = "compute in llm.dtype bfloat16 (now float32)"
    if stage == "distil" and not settings.sharded and config.least_workers > 1:
        advice["weights"] = (
            f"{advice['weights']} or set distil.sharded" if "weights" in advice else "set distil.sharded"
        )
    if stage == "fuse":
        kinds = f"tables.dtype {config.tables.dtype}, fuse.table_optimizer {settings.table_optimizer}"
        advice["tables"] = f"take a smaller type of rows or an optimizer with less state ({kinds})"
    return advice
