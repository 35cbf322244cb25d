"""What type checkers and editors see of the public names: ``mypy`` (pyproject.toml) reads this file, nothing runs it.

A line with an ``ignore`` is a mistake that the checker has to find: mypy reports an ignore that is not needed.
"""

from pathlib import Path
from typing import assert_type

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import potara_lite
from potara_lite import (
    AdaptedBackbone,
    Estimate,
    Federation,
    Moments,
    Setting,
    attach,
    estimate_calibrated,
    evaluate,
    from_dataframe,
    from_datasets,
    from_huggingface,
    from_tensors,
    merge_exact,
    prepare,
    save_adapter,
    train,
    train_pair,
)

setting = Setting(clients=8, lr=1e-3)
adapted, federation = prepare(setting, seed=0)
assert_type(adapted, AdaptedBackbone)
assert_type(federation, Federation)
pair = train_pair(adapted, federation, setting, seed=0)
estimate = estimate_calibrated(adapted, pair.federated, pair.local, federation.calibration)
assert_type(estimate, Estimate)
merged = merge_exact(pair.federated, pair.local, estimate.weight)
assert_type(merged, dict[str, Tensor])
loss, accuracy = evaluate(adapted, merged, federation.test)
assert_type(loss, Tensor)
assert_type(save_adapter(adapted, merged, "folder"), Path)
trained = train(adapted, pair.local, federation.train, steps=10, lr=1e-3, clip=None, seed=[0, 1])
assert_type(trained.losses, Tensor)
assert_type(attach(nn.Linear(2, 2), targets=["0"], head=None), AdaptedBackbone)
assert_type(from_tensors([(torch.ones(1), torch.ones(1))], []), Federation)
assert_type(from_tensors({"A": (np.ones(1), np.ones(1))}, test_size=0.2), Federation)
assert_type(from_dataframe(pd.DataFrame(), client="ward", label=0, features=["age"]), Federation)
assert_type(from_datasets({"A": TensorDataset(torch.ones(1))}, test_size=5), Federation)
assert_type(from_huggingface([], text="text", tokenizer=len), Federation)
assert_type(Moments(torch.ones(1), torch.ones(1), torch.ones(1)).weight, Tensor)

train(adapted, pair.local, federation.train, steps="ten")  # type: ignore[arg-type]
train(adapted, pair.local, federation.train)  # type: ignore[call-arg]
train(adapted, pair.local, federation.train, steps=1, learning_rate=0.1)  # type: ignore[call-arg]
evaluate(federation, pair.local, federation.train)  # type: ignore[arg-type]
Setting(clients="8")  # type: ignore[arg-type]
from_datasets(5)  # type: ignore[arg-type]
Setting(client=8)  # type: ignore[call-arg]
unknown = potara_lite.no_such_name  # type: ignore[attr-defined]
