"""What all tests share. The markers are in pyproject.toml."""

import os
from pathlib import Path

import hypothesis
import pytest

# Machines that run several things at once are slow at times; what hangs is ended by pytest's faulthandler_timeout.
hypothesis.settings.register_profile("sellarec", deadline=None)
hypothesis.settings.load_profile("sellarec")

TITLES = [
    "the harbor sea",
    "golden anchor and tide",
    "lunar orbit space",
    "detective alibi crime",
    "Toy Story (1995)",
    "M*A*S*H",
    "Été à la plage",
    "2001",
    "the last voyage of the very long winter of the silent sailor and the golden whale part 2",
    "x",
]
"""Short and long titles, with digits, punctuation and letters outside ASCII."""


@pytest.fixture(scope="session")
def sellarec_data() -> Path:
    """The folder of real data named by SELLAREC_DATA; the test is skipped where the variable is unset."""
    folder = os.environ.get("SELLAREC_DATA")
    if not folder:
        pytest.skip("needs real data: SELLAREC_DATA names no folder")
    if not Path(folder).is_dir():
        pytest.fail(f"SELLAREC_DATA is '{folder}', which is no folder: correct it or unset it")
    return Path(folder)


@pytest.fixture(scope="session")
def titles() -> list[str]:
    return TITLES


@pytest.fixture(scope="session")
def decoder(tmp_path_factory) -> Path:
    """A fresh embedded decoder, as stage pretrain builds it but small: 16 wide, 2 layers, its tokenizer of the titles."""
    import torch

    from sellarec.config import Pretrain
    from sellarec.language.pretrain import build_decoder
    from sellarec.language.templates import AUTO, read_template

    torch.set_num_threads(1)
    words = [text for name in AUTO for text in read_template(name).words()]
    folder = tmp_path_factory.mktemp("decoder")
    settings = Pretrain(vocabulary=400, context=256, hidden=16, layers=2, heads=2)
    build_decoder(TITLES * 3, words, settings, 0, folder)
    return folder


@pytest.fixture(scope="session")
def models(decoder, tmp_path_factory) -> dict[str, Path]:
    """Small random models without dropout, with the embedded decoder's tokenizer: llama with an output layer of its own, qwen2
    and gpt2 with tied embeddings."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from sellarec.language.llm import load_tokenizer

    torch.manual_seed(3)
    tokenizer = load_tokenizer(decoder)
    common: dict = {"vocab_size": len(tokenizer), "initializer_range": 0.2}
    wide: dict = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    wide |= {"max_position_embeddings": 256}
    narrow: dict = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
    narrow |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**common, **wide)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**common, **wide, num_key_value_heads=1, tie_word_embeddings=True)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**common, **narrow)),
    }
    folders = {}
    for name, model in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders
