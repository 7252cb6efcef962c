"""RecBole's side of recbole.py, which runs it in RecBole's own environment: takes commands as lines of JSON."""

import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

torch.set_num_threads(1)


def start(source, given, case):
    chosen = dict(given["cases"][case])
    model = chosen.pop("model")
    items = 3_707  # a user's scores of all items are a row of the batch for general models
    settings = {
        "data_path": str(source.parent),
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "TIME_FIELD": "timestamp",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "train_batch_size": given["batch"],
        "eval_batch_size": given["queries"] * (1 if model == "SASRec" else items),
        "MAX_ITEM_LIST_LENGTH": given["history"],
        "topk": [given["k"]],
        "metrics": ["Hit", "Recall", "NDCG", "MRR"],
        "valid_metric": f"NDCG@{given['k']}",
        "use_gpu": False,
        "show_progress": False,
        "state": "WARNING",
        **chosen,
    }
    if model == "SASRec":
        settings["train_neg_sample_args"] = None  # cross entropy over the catalog draws none
    sys.argv = sys.argv[:1]  # which it would read settings from
    config = Config(model=model, dataset=source.name, config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    train_data, valid_data, _ = data_preparation(config, create_dataset(config))
    network = get_model(model)(config, train_data.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, network)
    trainer.eval_collector.data_collect(train_data)
    epochs = itertools.count()
    batches = itertools.chain.from_iterable(train_data for _ in epochs)

    def train(number):
        taken = 0

        def counted():
            nonlocal taken
            for batch in itertools.islice(batches, number or len(train_data)):
                taken += len(batch)
                yield batch

        trainer._train_epoch(counted(), 0)
        return {"targets": taken}

    def rank():
        found = trainer.evaluate(valid_data, load_best_model=False)
        return {"users": len(valid_data.dataset if model == "SASRec" else valid_data.uid_list), **found}

    return train, rank


def main():
    source, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what RecBole prints is no answer
    cases = {}
    for line in sys.stdin:
        case, what, batches = json.loads(line)
        if case not in cases:
            cases[case] = start(source, given, case)
        wall, cpu = time.perf_counter(), time.process_time()
        found = cases[case][0](batches) if what == "train" else cases[case][1]()
        found |= {"seconds": time.perf_counter() - wall, "CPU seconds": time.process_time() - cpu}
        print(json.dumps(found, default=float), file=out, flush=True)


if __name__ == "__main__":
    main()
