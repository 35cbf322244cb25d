"""Potara (arXiv 2602.18658), the reference implementation: plain PyTorch and PEFT, one client at a time.

Every client gets a model merged from a *federated* LoRA model (general knowledge, one for all clients) and a *local*
one (personal knowledge, one for each client). The mixing weight λ is that of the federated model. Read this file from
top to bottom. It is slow: the library does the same for all clients at once, and its tests compare it with this file.

    python -m potara_lite.potara     # three clients, in seconds on a CPU
"""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from .federation.batches import batch_indices
from .federation.sources import fashion_mnist
from .models.vit import lab_vit

Weights = dict[str, Tensor]  # what is trained: LoRA's factors A (r, in) and B (out, r), and the new head
Examples = tuple[Tensor, Tensor]  # inputs x (n, ...) and labels y (n,) of one client
TaskVector = dict[str, Tensor]  # θ: ΔW (out, in) of every adapted layer, and the new head


# LoRA in a linear layer with the frozen weight W (out, in); scaling = alpha / rank. PEFT's forward pass is
#     y = x @ W.T + bias + scaling * (x @ A.T) @ B.T  =  x @ (W + ΔW).T + bias,  ΔW = scaling * B @ A
def lora_model(backbone: nn.Module, rank: int = 4, seed: int = 0) -> PeftModel:
    """A copy of the frozen backbone with LoRA in its blocks, B = 0, and a new head, which is 0 as well."""
    torch.manual_seed(seed)
    layers = ["qkv", "proj", "fc1", "fc2"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, modules_to_save=["head"])
    return get_peft_model(copy.deepcopy(backbone), config).eval()


def trained(model: PeftModel) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def get_weights(model: PeftModel) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in trained(model).items()}


def set_weights(model: PeftModel, weights: Weights) -> None:
    for name, parameter in trained(model).items():
        parameter.data.copy_(weights[name])


# 1. Two models for every client, trained independently from the same frozen backbone.
def train(model: PeftModel, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, batches: Tensor) -> Weights:
    """A step for every row of ``batches`` (steps, batch size), which are indices. Alone, this trains a local model."""
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return get_weights(model)


def fedit(model: PeftModel, clients: list[Examples], rounds: int, steps: int, lr: float, seed: int = 0) -> Weights:
    """The federated model: FedAvg of the factors A and B and the head, weighted by the clients' sizes; batches of 8."""
    models = [copy.deepcopy(model) for _ in clients]
    optimizers = [torch.optim.AdamW(trained(client_model).values(), lr, weight_decay=0) for client_model in models]
    sizes = [len(y) for _, y in clients]
    shared = get_weights(model)
    for number in range(rounds):
        uploads = []
        for i, (x, y) in enumerate(clients):
            set_weights(models[i], shared)  # download
            batches = batch_indices(len(y), number * steps, steps, 8, (seed, 0, i))
            uploads.append(train(models[i], optimizers[i], x, y, batches))
        shared = {name: sum(n / sum(sizes) * up[name] for n, up in zip(sizes, uploads)) for name in shared}
    return shared


# 2. The merge: θ_m = λ θ_F + (1 - λ) θ_L, exactly, on the task vectors.
def task_vector(model: PeftModel, weights: Weights) -> TaskVector:
    theta = {}
    for name, weight in weights.items():
        if ".lora_A." in name:
            layer = name.split(".lora_A.")[0]
            A, B = weight, weights[name.replace("lora_A", "lora_B")]  # (r, in), (out, r)
            theta[f"{layer}.base_layer.weight"] = model.get_submodule(layer).scaling["default"] * (B @ A)  # (out, in)
        elif ".lora_B." not in name:
            theta[name] = weight  # the head
    return theta


def merge(theta_F: TaskVector, theta_L: TaskVector, weight: Tensor | float) -> TaskVector:
    """In a layer [λ B_F, (1-λ) B_L] [A_F; A_L], of rank 2r: still an ordinary LoRA adapter (``merging/merge.py``)."""
    return {name: weight * theta_F[name] + (1 - weight) * theta_L[name] for name in theta_F}


# 3. The mixing weight: errors e about the client's optimum, a = E|e_F|², b = E|e_L|², c = E[e_F · e_L].
def per_sample_gradients(model: PeftModel, weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of every example's loss, (n, P), with respect to all P trained numbers."""
    set_weights(model, weights)
    parameters = list(trained(model).values())
    rows = []
    for i in range(len(y)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def moments(g_F: Tensor, g_L: Tensor, damping: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Our reading of the paper's estimator: a = tr Σ_F, b = tr Σ_L, c = tr Σ_FL with Σ ≈ inverse diagonal Fisher."""
    g_F = g_F.double()
    g_L = g_L.double()
    fisher_F = g_F.square().mean(0)  # (P,): the square of each example's gradient, then the mean
    fisher_L = g_L.square().mean(0)
    correlation = ((g_F * g_L).mean(0) / (fisher_F * fisher_L).sqrt().clamp_min(1e-300)).clamp(0, 1)
    ridge = damping * (fisher_F.mean() + fisher_L.mean()) / 2
    variance_F = 1 / (fisher_F + ridge)
    variance_L = 1 / (fisher_L + ridge)
    covariance = correlation * (variance_F * variance_L).sqrt()
    return variance_F.sum(), variance_L.sum(), covariance.sum()


def bound(weight: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The variance-trace bound E|λ e_F + (1-λ) e_L|²; the excess loss is at most half the smoothness times it."""
    return weight**2 * a + (1 - weight) ** 2 * b + 2 * weight * (1 - weight) * c


def mixing_weight(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The closed form: the λ of the smallest bound, (ab - c²) / (a + b - 2c), which is at most a and at most b."""
    return ((b - c) / (a + b - 2 * c)).clamp(0, 1)


@torch.no_grad()
def evaluate(model: PeftModel, theta: TaskVector, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss (nats) and accuracy of the backbone plus θ; ``model`` is untrained, so its B and head are 0."""
    model = copy.deepcopy(model)
    for name, change in theta.items():
        model.get_parameter(name).add_(change)
    logits = model(x)
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


def main(clients: int = 3, rounds: int = 20, steps: int = 5, local_steps: int = 100, lr: float = 4e-3) -> None:
    backbone = lab_vit()
    federation = fashion_mnist(clients=clients).map(backbone.embed)  # ten kinds of clothing, another mix at each client
    model = lora_model(backbone)
    data = [federation.train.client(i) for i in range(clients)]
    federated = fedit(model, data, rounds, steps, lr)
    print("client: loss (nats) and accuracy of the federated, the local and the merged model on its test images; λ")
    for i, (x, y) in enumerate(data):
        local_model = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(trained(local_model).values(), lr, weight_decay=0)
        local = train(local_model, optimizer, x, y, batch_indices(len(y), 0, local_steps, 8, (0, 1, i)))
        g_F = per_sample_gradients(local_model, federated, x[:30], y[:30])
        g_L = per_sample_gradients(local_model, local, x[:30], y[:30])
        weight = mixing_weight(*moments(g_F, g_L))
        theta_F = task_vector(model, federated)
        theta_L = task_vector(model, local)
        models = theta_F, theta_L, merge(theta_F, theta_L, weight)
        scores = [evaluate(model, theta, *federation.test.client(i)) for theta in models]
        print(f"{i}:", *(f"  {loss:.3f} {accuracy:.3f}" for loss, accuracy in scores), f"  {weight:.2f}")


if __name__ == "__main__":
    main()
