"""Causal language models: finding, checking, loading, and the adapters on them."""

import hashlib
import inspect
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sellarec.config import ALL_LINEAR, FLASH_ATTENTION
from sellarec.data.files import file_hash
from sellarec.errors import UserError

# PEFT asks transformers for what has another name there now, of each model that an adapter is put on
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_AT_ONCE = 8192
"""Token ids that are embedded at once where all of the vocabulary are."""

ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
"""An adapter's folder in an artifact or an export, and the files in it."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class LlmSource:
    """Where a language model comes from: a local folder, or a hub id with a commit.

    Attributes:
        identity: what fingerprints take for the model: hashes of its files, or the hub's commit.
        storage: type that its frozen weights are held in, float32 or bfloat16.
        attention: how attention is computed, as `llm.attention`.
    """

    name: str
    revision: str | None
    identity: str
    storage: str = "float32"
    attention: str = "auto"

    def folder(self, weights: bool = True) -> Path:
        """The local folder with the model; a hub id is downloaded once a machine, without its weights where they aren't asked
        for, or not read (`reading`)."""
        if self.revision is None:
            return Path(self.name)
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.model", "*.txt", "*.jinja", *["*.safetensors"] * (weights and _READS.get())]
        return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=patterns))


def find_llm(model: str, revision: str | None) -> LlmSource:
    """The source of `--llm`: a folder that exists, else a hub id, whose commit is looked up.

    Raises:
        UserError: a folder without config, weights or tokenizer; no such hub id, or no network.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        folder = folder.absolute()
        check_folder(folder)
        files = sorted(
            path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".model", ".txt", ".jinja")
        )
        hashes = [(path.name, file_hash(str(path))) for path in files]
        return LlmSource(str(folder), None, hashlib.sha256(json.dumps(hashes).encode()).hexdigest())
    if model.startswith(("/", ".", "~")) or model.count("/") > 1 or folder.exists():
        raise UserError(f"there is no folder {model} to take the language model from: give --llm a Hugging Face folder")
    from huggingface_hub import HfApi

    try:
        commit = HfApi().model_info(model, revision=revision).sha
    except Exception as error:  # the hub client raises many kinds, of several libraries
        raise UserError(
            f"--llm {model} is no folder here, and the Hugging Face hub gave no such model "
            f"({type(error).__name__}: {str(error).splitlines()[0]}): give a folder, or a hub id that can be reached"
        ) from error
    return LlmSource(model, commit, f"{model}@{commit}")


def check_folder(folder: Path) -> None:
    """Refuse a folder that isn't a whole Hugging Face causal model.

    Raises:
        UserError: naming what is missing.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"the model folder {folder} has no config.json: give the folder of a Hugging Face causal model")
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise UserError(
            f"the model folder {folder} has no weights (*.safetensors; pickled .bin files aren't read), only {found}: "
            "save the model with `model.save_pretrained(folder)`"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"the model folder {folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}): "
            "save it there with `tokenizer.save_pretrained(folder)`"
        )


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder.

    Raises:
        UserError: its files can't be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the tokenizer in {folder} can't be read ({reason}): save it there anew") from error


_READS: ContextVar[bool] = ContextVar("reads", default=True)


@contextmanager
def reading(weights: bool) -> Iterator[None]:
    """Models that are loaded in it are without their weights, which lie on the device meta, unless `weights` are read: of workers
    that hold a model together one reads it, and the others get their shares of that one (`sellarec.training.dense.shard`)."""
    before = _READS.set(weights)
    try:
        yield
    finally:
        _READS.reset(before)


def load_model(folder: Path, storage: str = "float32", attention: str = "auto") -> "PreTrainedModel":
    """The causal model of a folder; within `reading(False)` its modules and buffers alone.

    Args:
        storage: type of its weights, float32 or bfloat16, whatever they were saved in.
        attention: as `llm.attention`; see `check_attention`.

    Raises:
        UserError: the folder holds something else than a causal language model, or its weights don't fit its config.
    """
    import torch
    from accelerate import init_empty_weights
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = causal_config(folder)
    architecture = config.architectures[0]
    form = {"dtype": getattr(torch, storage), "attn_implementation": None if attention == "auto" else attention}
    try:
        if not _READS.get():
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **form)
            model.tie_weights()  # which putting them on the device meta has undone
            return model.eval()
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **form
        )
    except ImportError as error:  # on a machine of a cluster, of which the driver knows nothing
        raise UserError(
            f"llm.attention is {attention}, which this machine has no package for ({str(error).splitlines()[0]}): install it on "
            "all machines, or take llm.attention auto"
        ) from error
    except (ValueError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"the weights in {folder} can't be read as those of its config.json ({str(error).splitlines()[0]}): "
            "save config and weights together with `model.save_pretrained(folder)`"
        ) from error
    # an output layer that is tied to the input embeddings isn't counted as missing
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise UserError(
            f"the weights in {folder}, saved from a {architecture}, lack {len(missing)} tensors of a causal language model, "
            f"{missing[0]} first"
        )
    return model


def causal_config(name: str | Path, revision: str | None = None) -> Any:
    """The config of a folder's or a hub id's model.

    Raises:
        UserError: it can't be read, or is of something else than a causal language model with position ids.
    """
    from transformers.models.auto import modeling_auto

    config = read_config(name, revision)
    architecture = (getattr(config, "architectures", None) or ["?"])[0]
    names = (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_MAPPING_NAMES)
    fitting = [known.get(config.model_type) for known in names]  # with its output layer, or without where that is tied
    # of an encoder, the causal class would load too, and look at what comes after
    encoder = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_decoder
    if fitting[0] is None or architecture not in fitting or encoder:
        raise UserError(f"{name} holds a {architecture}, which is no causal language model")
    context_length(config)
    return config


def check_attention(name: str | Path, revision: str | None, attention: str) -> None:
    """Refuse a way to compute attention that a model doesn't have, or that takes a package that isn't installed.

    Raises:
        UserError: with what Transformers says of it.
    """
    import torch

    config = causal_config(name, revision)
    if attention == FLASH_ATTENTION:
        config.dtype = torch.bfloat16
    try:
        without_weights(config, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"llm.attention is {attention}, which can't be had here of {name} ({' '.join(str(error).split())}): take "
            "llm.attention auto"
        ) from error


def without_weights(config: Any, **options: Any) -> Any:
    """The causal model of a config on the device meta: its layers, without a number in them.

    Args:
        options: of `AutoModelForCausalLM.from_config`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)


def linear_layers(model: Any) -> dict[str, Any]:
    """A model's linear layers by name, its output layer among them."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}


def check_targets(targets: Sequence[str], layers: Iterable[str], model: str) -> None:
    """Refuse `adapt.targets` that a model has no linear layers of.

    Args:
        layers: names of its linear layers, of which the last part counts.
        model: what to call it.

    Raises:
        UserError: naming them, and the layers that there are.
    """
    names = {layer.rpartition(".")[2] for layer in layers}
    missing = sorted(set(targets) - {ALL_LINEAR} - names)
    if missing:
        raise UserError(
            f"adapt.targets names {', '.join(missing)}, but the linear layers of {model} are {', '.join(sorted(names))}: name "
            f"some of these, or take {ALL_LINEAR}"
        )


def context_length(config: Any) -> int:
    """Longest sequence that the model was made for (tokens).

    Raises:
        UserError: its config names none, as of models without position ids (Bloom, Mamba), which prompts need.
    """
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        raise UserError(
            f"a model of type {config.model_type} has no max_position_embeddings: take one with position ids (Llama, Qwen, ...)"
        )
    return length


def decoder_depth(source: LlmSource) -> int:
    """How many decoder layers a model has, by its config alone; of a hub id nothing else is downloaded.

    Raises:
        UserError: its config can't be read.
    """
    return read_config(source.name, source.revision).num_hidden_layers


def hidden_width(source: LlmSource) -> int:
    """H, the width of a model's hidden states, by its config alone.

    Raises:
        UserError: its config can't be read.
    """
    return read_config(source.name, source.revision).hidden_size


def check_embeddings(model: Any, name: str) -> None:
    """Refuse a model whose input embeddings have another width than its hidden states (OPT-350m): a distilled vector, which is a
    hidden state, couldn't be projected to a token of its prompt.

    Args:
        model: on any device, the device meta too.
        name: what to call it.

    Raises:
        UserError: naming both widths.
    """
    embeddings, hidden = model.get_input_embeddings().embedding_dim, model.config.hidden_size
    if embeddings != hidden:
        raise UserError(
            f"the input embeddings of {name} are {embeddings} wide, but its hidden states {hidden}: tokens are injected in the "
            "width of both; take a model in which they are equal"
        )


def embedding_norm(model: Any) -> "Tensor":
    """The mean norm of the input embeddings of the vocabulary, as the decoder gets them (Gemma's embedding layer scales its
    weights): float32 [], on the model's device."""
    import torch

    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        ids = torch.arange(embeddings.num_embeddings, device=embeddings.weight.device)
        return torch.cat([embeddings(some).float().norm(dim=1) for some in ids.split(EMBEDDED_AT_ONCE)]).mean()


def read_config(name: str | Path, revision: str | None = None) -> Any:
    """The config of a folder's or a hub id's model.

    Raises:
        UserError: it can't be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{name}/config.json is no model's config ({str(error).splitlines()[0]})") from error


def logits_of(model: Any, found: Any, hidden: "Tensor") -> "Tensor":
    """What a causal model makes of some last hidden states, [n, H] -> [n, V]: its output layer's logits, and what it does to them
    beside, as to scale (Cohere, Granite) or to cap them (Gemma).

    The model's own forward pass makes them, but for its decoder, which isn't run.

    Args:
        found: what its decoder has given.
    """
    given, decoder = type(found)(**{**found, "last_hidden_state": hidden[None]}), model.base_model
    decoder.forward = lambda *_, **__: given
    try:
        return model(inputs_embeds=hidden[None], use_cache=False).logits[0]
    finally:
        del decoder.forward


def check_logits(model: Any) -> None:
    """Refuse a model whose logits are made of more than its decoder's last hidden states. One without weights isn't looked at.

    Raises:
        UserError: the loss over tokens, which makes logits for some positions at a time, can't be taken of it.
    """
    import torch

    if model.device.type == "meta":
        return
    attention = model.config._attn_implementation
    if attention == FLASH_ATTENTION:  # which computes neither on CPUs nor in float32
        model.set_attn_implementation("eager")
    with torch.no_grad():
        tokens = torch.arange(2, device=model.device)[None]
        logits = model(input_ids=tokens, use_cache=False).logits
        found = model.base_model(input_ids=tokens, use_cache=False)
        made = logits_of(model, found, found.last_hidden_state[0])
        alike = torch.allclose(made.float(), logits[0].float(), rtol=1e-4, atol=1e-4)
        if model.get_output_embeddings() is None or not alike:
            raise UserError(
                f"a model of type {model.config.model_type} doesn't make its logits of its decoder's last hidden states alone, "
                "so a loss over tokens can't be taken of it: take adapt.loss and fuse.loss answer, and leave out "
                "pretrain.continued"
            )
    if attention == FLASH_ATTENTION:
        model.set_attn_implementation(attention)


def decoder_layers(model: Any) -> list[Any]:
    """The model's decoder layers, which are gathered, checkpointed and computed one at a time: as its class names them, or else
    the one list of so many modules that its config tells of. None where there is no such list; see `check_layers`."""
    from torch import nn

    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    return layers or (list(lists[0]) if len(lists) == 1 else [])


def check_layers(model: Any, name: str) -> None:
    """Raises UserError where a model's decoder layers can't be told: it couldn't be sharded, checkpointed or computed by them.

    Args:
        model: on any device, the device meta too.
        name: what to call it.
    """
    if not decoder_layers(model):
        raise UserError(
            f"the decoder layers of {name} ({type(model).__name__}) can't be told: its class names none, and it has no single "
            "list of modules for them; take another model"
        )


def has_full_attention(model: Any) -> bool:
    """Whether each layer reads all keys and values before a position, and takes them from a cache, so that those of a prefix can
    be computed apart."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    if "local" in getattr(model.config, "attention_layers", ()):  # GPT-Neo's windows, of which its cache says nothing
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def compute_in(model: Any, dtype: Any) -> None:
    """Have layers that hold their weights in another type cast them while they run, as FSDP2 does where weights are sharded.

    For inference only. No more than one layer's weights are held in `dtype` at a time.
    """

    def cast(module: Any, arguments: Any) -> None:
        held[module] = {name: weight.data for name, weight in module.named_parameters(recurse=False)}
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.to(dtype)

    def restore(module: Any, arguments: Any, output: Any) -> None:
        for name, data in held.pop(module).items():
            module.get_parameter(name).data = data

    held: dict[Any, dict[str, Any]] = {}
    for module in model.modules():
        if any(weight.dtype != dtype for weight in module.parameters(recurse=False)):
            module.register_forward_pre_hook(cast)
            module.register_forward_hook(restore)


def save_model(
    model: "PreTrainedModel", weights: "dict[str, Tensor]", tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> None:
    """Write a Hugging Face folder of a model's config, these weights, which are all that it has, and its tokenizer."""
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def with_adapter(model: "PreTrainedModel", folder: Path | None, trains: bool = False) -> "PreTrainedModel | PeftModel":
    """The model with a saved adapter on it; of its weights the adapter's are trained where it `trains`, else none. Without a
    folder the model as it is.

    Raises:
        UserError: as `check_adapter`.
    """
    from peft import set_peft_model_state_dict

    if folder is None:
        model.requires_grad_(False)
        return model.eval()
    adapted, saved = _fitting(model, folder, trains)
    if model.device.type != "meta":
        set_peft_model_state_dict(adapted, saved)
    if not trains:
        adapted.requires_grad_(False)
    return adapted.eval()


def check_adapter(model: "PreTrainedModel", folder: Path) -> None:
    """Refuse an adapter that isn't whole, or not of this model.

    Args:
        model: on any device, the device meta too.

    Raises:
        UserError: the folder's weights are missing, damaged, or not an adapter of this model; no tensor is silently left out.
    """
    _fitting(model, folder, trains=False)


def adapter_hash(folder: Path) -> str:
    """SHA-256 of an adapter's settings and weights; both change what it does."""
    found = [file_hash(str(folder / name)) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    return hashlib.sha256(" ".join(found).encode()).hexdigest()


def check_left_adapter(folder: Path, facts: Mapping[str, Any], stage: str, source: LlmSource) -> str:
    """The hash of the adapter that a stage has left in its artifact. At the stage's end it was compared with what other
    programs load, so it has to be that one still.

    Args:
        facts: of the stage's manifest.
        source: of the base model.

    Raises:
        UserError: as `check_adapter`; or it is another one than the stage left, or not known to be that one.
    """
    check_adapter(without_weights(causal_config(source.folder(weights=False))), folder)
    found = adapter_hash(folder)
    left = facts.get("adapter_hash")
    if left is None:
        raise UserError(
            f"stage {stage} has left the adapter in {folder} without its hash, as before that was recorded, so it can't be told "
            f"from another one: delete {folder.parent} and run the stage again"
        )
    if found != left:
        raise UserError(
            f"the adapter in {folder} isn't the one that stage {stage} left (hash {found[:12]} now, {left[:12]} then): bring "
            f"that back, or delete {folder.parent} and run the stage again"
        )
    return found


def _fitting(model: "PreTrainedModel", folder: Path, trains: bool) -> "tuple[PeftModel, dict[str, Tensor]]":
    """The model with an adapter as a folder's config has it, and the weights of the folder's, which fit it."""
    from peft import PeftConfig, PeftModelForCausalLM, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"the adapter in {folder} is missing: there is no {ADAPTER_CONFIG}; copy the folder whole, or make the adapter anew "
            "(of a run: delete the artifact that the folder is in, and run the same command again)"
        )
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = not trains
        adapted = PeftModelForCausalLM(model, settings)
    except ValueError as error:  # no adapter at all, or the model lacks the layers that it is for
        raise UserError(f"the adapter in {folder} isn't one of this model: {error}") from error
    file = folder / ADAPTER_WEIGHTS
    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the adapter in {folder} has an adapter_config.json, but its weights, {file.name}, can't be read "
            f"({str(error).splitlines()[0]}): copy the folder whole, or make the adapter anew (of a run: delete the "
            "artifact that the folder is in, and run the same command again)"
        ) from error
    # compared before loading, which passes over what is missing or too much
    found = {name: tuple(weight.shape) for name, weight in saved.items()}
    needed = {name: tuple(weight.shape) for name, weight in get_peft_model_state_dict(adapted).items()}
    odd = sorted(name for name in {*found, *needed} if found.get(name) != needed.get(name))
    if odd:
        raise UserError(
            f"the adapter in {folder} isn't one of this model: {odd[0]} has shape {found.get(odd[0])} in the file and "
            f"{needed.get(odd[0])} in the model (None: not there), and {len(odd) - 1} more differ"
        )
    return adapted, saved
