"""On a GPU: the same numbers as on the CPU. Without one: that no operation mixes devices, with tensors without data.

No GPU was at hand when the tests marked ``gpu`` were written (``docs/machines.md``).
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from potara_lite import (
    Execution,
    client_adapter,
    combine_adapters,
    compress,
    delta,
    evaluate,
    merge_exact,
    merge_factors,
    per_sample_gradients,
    repeat_adapter,
    train,
)

OF_ADAPTERS = {
    "delta": lambda f, loc, adapted: delta(f, adapted.scaling),
    "merge_exact": lambda f, loc, adapted: merge_exact(f, loc, 0.3),
    "merge_factors": lambda f, loc, adapted: merge_factors(f, loc, 0.3),
    "combine_adapters": lambda f, loc, adapted: combine_adapters([f, loc], [0.3, 0.7]),
    "compress": lambda f, loc, adapted: compress(merge_exact(f, loc, 0.3), 2)[0],
    "repeat_adapter": lambda f, loc, adapted: repeat_adapter(f, 3),
    "client_adapter": lambda f, loc, adapted: client_adapter(repeat_adapter(f, 3), 1),
}


@pytest.fixture
def pair(adapted, random_adapter):
    return random_adapter(adapted, 0), random_adapter(adapted, 1)


@pytest.mark.skipif(torch.version.cuda is None, reason="fake tensors of a GPU need torch with CUDA")
@pytest.mark.parametrize("name", OF_ADAPTERS)
def test_functions_of_adapters_stay_on_their_device(name, pair, adapted, monkeypatch):
    for module in ("checks", "adapters.state", "merging.merge"):  # there are no values to look at
        monkeypatch.setattr(f"potara_lite.{module}.all_finite", lambda tensor: True)
    with FakeTensorMode():
        f, loc = ({key: torch.empty(t.shape, device="cuda") for key, t in one.items()} for one in pair)
        found = OF_ADAPTERS[name](f, loc, adapted)
    assert {t.device.type for t in found.values()} == {"cuda"}


@pytest.mark.skipif(torch.version.cuda is None, reason="fake tensors of a GPU need torch with CUDA")
def test_a_forward_pass_stays_on_its_device(adapted, pair):
    model = copy.deepcopy(adapted.model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    tensors[key] = None if tensor is None else torch.empty_like(tensor, device="cuda")
        on_gpu = replace(adapted, model=model)
        stack = {key: torch.empty(3, *t.shape, device="cuda") for key, t in pair[0].items()}
        x = torch.empty(3, 5, 1, 28, 28)
        assert torch.func.vmap(on_gpu)(stack, x.to("cuda")).device.type == "cuda"
        with pytest.raises(RuntimeError, match="same device|different devices"):
            torch.func.vmap(on_gpu)(stack, x)


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("data_on", ["cpu", "cuda"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_has_the_cpus_numbers(adapted, federation, random_stack, dtype, rtol, data_on):
    """Training, evaluation and per-sample gradients: a difference of at most ``rtol`` of the largest number."""
    execution = Execution(autocast=None if dtype == torch.float32 else dtype)
    stack = random_stack(adapted, 3, seed=0)

    def numbers(adapted, split, execution):
        trained = train(adapted, stack, split, steps=5, batch_size=4, execution=execution)
        loss, _ = evaluate(adapted, stack, split, execution=execution)
        gradients = per_sample_gradients(adapted, stack, split, execution=execution)
        return [*trained.adapters.values(), trained.losses, loss, gradients]

    expected = numbers(adapted, federation.train, Execution())
    found = numbers(copy.deepcopy(adapted).to("cuda"), federation.train.to(data_on), execution)
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu().float() - other).abs().max() <= rtol * other.abs().max()
