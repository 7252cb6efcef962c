"""What published methods were trained with."""

from typing import Any

# SeLLa-Rec's paper and code, MovieLens-1M: by stage what its scripts set, and by the recipe's names.
SELLA: dict[str, dict[str, Any]] = {
    "prompt": {"template": "sella", "history": 10, "max_tokens": 768, "with_history": True},
    "llm": {"dtype": "bfloat16", "storage": "bfloat16"},
    "adapt": {
        "loss": "sequence", "rank": 64, "alpha": 16, "dropout": 0.05, "rslora": False, "dora": False,
        "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "batch": 128, "epochs": 1, "max_steps": 254,
        "optimizer": "adamw", "learning_rate": 8e-5, "beta2": 0.95, "weight_decay": 0.01,
        "schedule": "cosine", "warmup": 0.01, "checkpoint_activations": True,
    },
    "distil": {"text": "title", "prompt": "{Noun}: {text}", "layer": -1, "pooling": "last", "max_tokens": 64},
    "collab": {
        "model": "mf", "loss": "bce", "l2": 0.0,
        "dim": 256, "biases": False, "global_mean": False, "init_std": 1.0, "batch": 1024,
        "table_optimizer": "adam", "table_learning_rate": 1e-2, "table_weight_decay": 1e-4,
        "epochs": 3000, "validate_every": 1, "patience": 50, "select_on": "auc",
    },
    "align": {
        "init": "scratch", "weight": 1.0, "contrastive": "rince", "direction": "semantic-to-collab", "mask_equal": False,
        "temperature": 0.2, "rince_q": 0.01, "rince_lambda": 0.1, "semantic": "trained", "side": "items", "hidden": 1024,
        "batch": 1024, "epochs": 3000, "validate_every": 1, "patience": 50, "select_on": "auc",
        "optimizer": "adam", "learning_rate": 1e-2,
        "weight_decay": 1e-4, "clip": 1e9,
        "schedule": "constant", "warmup": 0.0, "table_optimizer": "adam", "table_learning_rate": 1e-2,
        "table_weight_decay": 1e-4,
    },
    "fuse": {
        "tokens": ("user", "item", "semantic"), "projections": "shared", "experts": 1, "norm": "none", "warm_start": True,
        "train": ("tables", "projections"), "unseen_dropout": 0.0, "semantic": "trained", "loss": "sequence", "batch": 128,
        "max_steps": 254, "optimizer": "adamw", "learning_rate": 2e-4, "beta2": 0.95, "weight_decay": 0.01,
        "schedule": "cosine", "warmup": 0.0, "table_optimizer": "adamw", "table_learning_rate": 2e-4,
        "table_weight_decay": 0.01, "checkpoint_activations": True,
    },
}  # fmt: skip

# What its scripts set for Amazon-Book, where they set something else for movies. Steps are those of the checkpoints they name.
SELLA_BOOK: dict[str, dict[str, Any]] = {
    "prompt": {"template": "sella-book"},
    "adapt": {"max_steps": 300},
    "collab": {"batch": 10_240, "table_learning_rate": 1e-1, "table_weight_decay": 1e-6},
    "align": {
        "batch": 10_240, "learning_rate": 1e-1, "weight_decay": 1e-6, "table_learning_rate": 1e-1, "table_weight_decay": 1e-6,
    },
    "fuse": {"batch": 1024, "max_steps": 656, "learning_rate": 8e-4, "table_learning_rate": 8e-4},
}  # fmt: skip

# What CoLLM states of its other collaborative models for MovieLens-1M, settings of stage collab.
COLLM: dict[str, dict[str, Any]] = {
    "mf": {
        "model": "mf", "loss": "bce", "dim": 256, "batch": 1024, "select_on": "auc", "schedule": "constant", "l2": 0.0,
        "biases": False, "table_optimizer": "adam", "table_learning_rate": 1e-3, "table_weight_decay": 1e-4,
    },
    "lightgcn": {
        "model": "lightgcn", "loss": "bce", "dim": 64, "layers": 2, "select_on": "auc", "schedule": "constant", "l2": 0.0,
        "biases": False, "table_optimizer": "adam", "table_learning_rate": 1e-2, "table_weight_decay": 1e-4,
    },
    "din": {"model": "din", "loss": "bce", "history": 10, "select_on": "auc", "schedule": "constant", "l2": 0.0},
}  # fmt: skip

# SASRec as CoLLM's script baseline_train_sasrec.py trains it on MovieLens-1M, settings of stage collab.
COLLM_SASREC: dict[str, Any] = {
    "model": "sasrec", "loss": "bce", "user_rows": False, "layers": 2, "heads": 1, "dropout": 0.2, "history": 25,
    "dim": 64, "init_std": 1.0, "batch": 2048, "select_on": "auc", "schedule": "constant", "l2": 0.0,
    "optimizer": "adam", "learning_rate": 1e-2, "weight_decay": 1e-2,
    "table_optimizer": "adam", "table_learning_rate": 1e-2, "table_weight_decay": 1e-2,
}  # fmt: skip
