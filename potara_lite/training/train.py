"""Train and evaluate a stack of adapters, all clients at once, through ``torch.func``.

All clients share one frozen backbone, so one step for all of them is one batched program: ``vmap`` of the forward
pass over the stacked adapters, the sum of the clients' losses, one backward pass. A client's loss does not depend on
the other clients' adapters, so each row of the gradient of the sum is the gradient of one client.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import vmap
from tqdm.auto import tqdm

from ..adapters.lora import AdaptedBackbone, delta_added
from ..adapters.state import Adapter, Stack, check_count, check_models, flatten, select_clients, unflatten
from ..checks import AnyList, Count, Flag, List, NonNegative, Positive, Seed, Size, checked, lacks_memory
from ..federation.batches import batch_indices
from ..federation.display import displayed
from ..federation.inputs import MASK, Inputs, any_tensor, cut_texts, map_inputs, take, text_lengths
from ..federation.split import Split
from ..models.loss import mean_loss
from .batching import Execution, ExecutionPlan, Forward, map_clients, plan_execution, with_autocast
from .grouped_lora import GroupedLoRA, measured_once
from .history import Callback, History, history_table

if TYPE_CHECKING:
    import pandas as pd

Loss = Callable[[Tensor, Tensor], Tensor]
Objective = Callable[[Callable[[Adapter], Tensor], Adapter], Tensor]  # (loss of an adapter on the batch, tensors)


class DivergedError(ValueError):
    """A client's training loss is no longer a finite number: the first such ``client`` and its first such ``step``.

    ``trained`` is the finished run: training goes on to the last step before this is raised, and the other clients'
    adapters and losses are those that they would have without this client.
    """

    def __init__(self, client: int, step: int, trained: Trained):
        super().__init__(f"the training loss of client {client} is not finite at step {step}; try a lower lr or a clip")
        self.client, self.step, self.trained = client, step, trained


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """AdamW's state for a stack: first and second moment ``(C, P)`` and the steps each client has taken ``(C,)``."""

    mean: Tensor
    square: Tensor
    steps: Tensor

    @staticmethod
    def zeros(flat: Tensor) -> OptimizerState:
        return OptimizerState(torch.zeros_like(flat), torch.zeros_like(flat), torch.zeros_like(flat[:, 0]))

    def rows(self, index: Tensor | slice) -> OptimizerState:
        """The state of some clients, by their rows (on any device)."""
        return OptimizerState(**select_clients(vars(self), index))

    def to(self, device: str | torch.device) -> OptimizerState:
        """The same state on ``device``."""
        return OptimizerState(*(tensor.to(device) for tensor in vars(self).values()))

    def replace_rows(self, index: Tensor, rows: OptimizerState) -> OptimizerState:
        """This state with the rows of some clients replaced."""
        index = index.to(self.steps.device)
        pairs = zip(vars(self).values(), vars(rows).values())
        return OptimizerState(*(old.index_copy(0, index, new) for old, new in pairs))

    def check(self, clients: int, size: int) -> None:
        """Raise ``ValueError`` unless the state has ``clients`` rows of ``size`` numbers."""
        if len(self.steps) != clients:
            raise ValueError(f"state: the state of {len(self.steps)} clients for {clients}")
        if not self.mean.shape == self.square.shape == (clients, size):
            raise ValueError(f"state must have {size} numbers for each client, not shape {tuple(self.mean.shape)}")


@displayed
@dataclass(frozen=True, eq=False)
class Trained:
    """What ``train`` returns: the stack, the optimiser state to go on from, the loss of each step ``(C, steps)``, NaN
    behind a client's last one, and the ``evaluations`` on the way."""

    adapters: Adapter
    state: OptimizerState
    losses: Tensor
    evaluations: History

    def _title(self) -> str:
        return f"{len(self.losses)} clients, {self.losses.shape[1]} steps{mean_course(self.losses.T)}"

    def _columns(self) -> dict[str, Any]:
        taken = ~self.losses.isnan()
        first, last = (
            [row[ok][at].item() if ok.any() else None for row, ok in zip(self.losses, taken)] for at in (0, -1)
        )
        return {"client": self.evaluations.ids, "steps": taken.sum(1), "first loss": first, "last loss": last}

    @property
    def history(self) -> pd.DataFrame:
        """A row for each step and client: step, client, training loss, and loss and accuracy where it was evaluated."""
        steps = [{"step": step, "train_loss": self.losses[:, step - 1]} for step in range(1, self.losses.shape[1] + 1)]
        for record in self.evaluations.records:
            steps[record["step"] - 1] = record
        return history_table(self.evaluations.ids, steps)


def mean_course(losses: Tensor) -> str:
    """The clients' mean loss of the first and the last step or round ``(steps, C)``, in words."""
    means = losses.double().nanmean(1)
    means = means[~means.isnan()]
    return f"; training loss {means[0]:.3f} → {means[-1]:.3f}" if len(means) else ""


def adamw_step(
    flat: Tensor,
    grad: Tensor,
    state: OptimizerState,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensor, OptimizerState]:
    """One step of AdamW (Loshchilov & Hutter, 2019) on a matrix with a client per row, each at its own step count."""
    steps = state.steps + 1
    mean = torch.lerp(state.mean, grad, 1 - betas[0])
    square = (betas[1] * state.square).add_((grad**2).mul_(1 - betas[1]))
    root = (square / (1 - betas[1] ** steps).unsqueeze(1)).sqrt_().add_(eps)
    step = (mean / (1 - betas[0] ** steps).unsqueeze(1)).mul_(lr).div_(root)
    return (flat * (1 - lr * weight_decay)).sub_(step), OptimizerState(mean, square, steps)


def plain_loss(f: Callable[[Adapter], Tensor], adapter: Adapter) -> Tensor:
    """The usual objective: the loss ``f`` of the adapter that trains, and nothing else."""
    return f(adapter)


def losses(
    forward: Forward,
    adapters: Adapter,
    x: Inputs,
    y: Tensor,
    loss: Loss = mean_loss,
    objective: Objective = plain_loss,
    *,
    vectorize: bool = True,
) -> Tensor:
    """The loss ``(C,)`` of each client's adapter on its batch, ``x`` of ``(C, B, ...)`` and ``y`` of ``(C, B)``.

    ``objective(f, tensors)`` is the loss of a client's tensors, where ``f`` is the loss of an adapter on the batch.
    """

    if objective is plain_loss and isinstance(forward, GroupedLoRA):  # the same, in fewer calls
        return vmap(loss)(forward.logits(adapters, x), y)

    def client_loss(tensors: Adapter, client_x: Inputs, client_y: Tensor) -> Tensor:
        return objective(lambda adapter: loss(forward(adapter, client_x), client_y), tensors)

    return map_clients(client_loss, adapters, x, y, vectorize=vectorize)


@cache
def compiled_losses() -> Callable[..., Tensor]:
    """``losses``, compiled for every combination of shapes, backbone and objective that it meets."""
    return torch.compile(losses, dynamic=False)


def check_clients(adapted: AdaptedBackbone, adapters: Adapter, split: Split) -> Adapter:
    """The stack in the order of the backbone's tensors.

    Raises ``ValueError`` unless there is an adapter of this backbone for every client, whose inputs the backbone takes.
    """
    (adapters,) = check_models(adapted, split, adapters=adapters)
    check_inputs(adapted, split)
    return adapters


def check_inputs(adapted: AdaptedBackbone, split: Split) -> None:
    """Raise ``ValueError`` naming the first client with inputs that the backbone does not take."""
    for client, (x, _) in zip(split.ids, split.examples):
        adapted.check_inputs(x, client)
    _check_runs(adapted, split)
    check_independence(adapted, split)


@torch.no_grad()
def _check_runs(adapted: AdaptedBackbone, split: Split) -> None:
    """Raise ``ValueError`` for inputs of a shape or dtype on which the network fails; tried once for each kind."""
    x, _ = split.examples[0]

    def run() -> bool:
        try:
            adapted(adapted.initial, map_inputs(lambda tensor: tensor[:1].clone().to(adapted.device), x))
        except (RuntimeError, IndexError) as error:
            if lacks_memory(error):
                raise
            reason = textwrap.shorten(str(error), 200, placeholder=" …")
            raise ValueError(f"split: the backbone does not take {split._inputs()}: {reason}") from error
        return True

    if not (adapted.model.training or adapted.gated_layers):
        measured_once(adapted, ("runs", split._inputs()), run)


@torch.no_grad()
def check_independence(adapted: AdaptedBackbone, split: Split) -> None:
    """Raise ``ValueError`` for a backbone in which an example's logits depend on the others of its batch, or those of a
    text on the padding behind its end: a client's numbers would depend on who else is there. So they would where it
    draws random numbers or changes its inputs. And for one that reads an adapted layer's weight without a call of it.

    It is measured once, on one example and, where there is one, on one text with padding; not in training mode, where
    batch norm is meant to see the batch.
    """

    if adapted.model.training or adapted.gated_layers:
        return
    for x, _ in split.examples:
        is_padded = isinstance(x, dict) and MASK in x and not bool(x[MASK].all())
        row = int(x[MASK].flatten(1).sum(1).argmin()) if is_padded else 0
        others = "the padding behind it or the other texts of its batch" if is_padded else "the others of its batch"
        if len(any_tensor(x)) > 1 and (
            fault := measured_once(adapted, ("fault", others), partial(_fault, adapted, x, row, others))
        ):
            raise ValueError(fault)


def _fault(adapted: AdaptedBackbone, x: Inputs, row: int, others: str) -> str:
    """Why the example in a row has other logits alone, without its padding, than beside ``others``; empty if it has the
    same, or none that are numbers."""

    def differs(one: Tensor, other: Tensor) -> bool:  # by more than rounding
        bound = torch.finfo(adapted.dtype).eps ** 0.5 * one.double().abs().max()
        return bool((one.double() - other.double()).abs().max() > bound)

    generator = torch.Generator().manual_seed(0)  # an untrained head gives zeros, whatever goes in
    noise = {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in adapted.initial.items()}
    adapter = {name: tensor + noise[name].to(tensor) for name, tensor in adapted.initial.items()}
    given = map_inputs(lambda tensor: tensor[[row, row - 1]].to(adapted.device), x)
    both = map_inputs(torch.clone, given)
    together = adapted(adapter, both)
    if not together.isfinite().all():
        return ""
    if not all(map(torch.equal, *(one.values() if isinstance(one, dict) else [one] for one in (given, both)))):
        return "the backbone changes its inputs in place: write x = x + 1, say, for x += 1"
    if differs(together, adapted(adapter, both)):
        return "the backbone draws random numbers in eval mode, by which the clients would depend on each other"
    called: set[str] = set()
    layers = {name: adapted.model.get_submodule(name) for name in adapted.scaling}
    hooks = [layer.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()]
    try:
        adapted(adapter, both)
    finally:
        for hook in hooks:
            hook.remove()
    for name in adapted.scaling.keys() - called:
        with delta_added(adapted, {f"{name}.weight": torch.ones_like(layers[name].get_base_layer().weight)}):
            if differs(together, adapted(adapter, both)):
                layer = name.removeprefix("base_model.model.")
                return f"{layer} is adapted, but the backbone reads its weight without a call of it: LoRA does nothing"
    alone = map_inputs(lambda tensor: tensor[:1], both)
    if isinstance(x, dict) and MASK in x:
        length, longest = int(alone[MASK].sum()), alone[MASK].shape[1]
        alone = {name: t[:, :length] if t.shape[1:2] == (longest,) else t for name, t in alone.items()}
    single = adapted(adapter, alone)
    if single.dim() != together.dim():
        return f"the backbone returns logits of shape {tuple(single.shape)} for one example: keep the batch's dimension"
    beside = together[0][: single.shape[1]]  # token by token, without the padding
    return f"in this backbone an example's logits depend on {others}" if differs(single[0], beside) else ""


@torch.no_grad()
def check_labels(adapted: AdaptedBackbone, adapters: Adapter, split: Split, labels: Tensor | None = None) -> None:
    """Raise ``ValueError`` for targets of another kind than those of the backbone's task, and for a label, of the split
    or of ``labels`` instead, that it has no logit of.

    The number of logits is measured once, on the first client's first example.
    """
    task = adapted.task
    is_real = split.examples[0][1].is_floating_point()
    if is_real == task.has_classes:
        kinds = ["numbers of classes", "real numbers"]
        way_out = " (see the task of attach)" if is_real else ": make them floats, y.float()"
        found, wanted = kinds[is_real], kinds[not is_real]
        raise ValueError(f"split has targets that are {found}, {task.name} takes {wanted}{way_out}")
    if is_real:
        return

    def count_logits() -> int:
        one = {name: tensor[0].to(adapted.device) for name, tensor in adapters.items()}
        x, _ = split.examples[0]
        return adapted(one, map_inputs(lambda tensor: tensor[:1].to(adapted.device), x)).shape[-1]

    classes = measured_once(adapted, ("classes",), count_logits)
    largest = max(int(y.max()) for _, y in split.examples) if labels is None else int(labels.max())
    if largest >= classes:
        name = "split has" if labels is None else "labels:"
        raise ValueError(f"{name} label {largest}, the backbone has classes 0 … {classes - 1}")


@checked
def train(
    adapted: AdaptedBackbone,
    adapters: Stack,
    split: Split,
    *,
    steps: Count | List[Count],
    batch_size: Size = 8,
    lr: Positive = 1e-3,
    weight_decay: NonNegative = 0.0,
    clip: Positive | None = None,
    seed: Seed | List[Seed] = 0,
    start: Count | List[Count] = 0,
    state: OptimizerState | None = None,
    loss: Loss = mean_loss,
    objective: Objective = plain_loss,
    fixed: Mapping[str, Tensor] | None = None,
    eval_split: Split | None = None,
    eval_every: Size = 10,
    callbacks: AnyList[Callback] = (),
    execution: Execution = Execution(),
    progress: Flag = False,
) -> Trained:
    """Train each client's adapter on its own examples with AdamW, all clients in one batched program.

    ``adapters``: a stack, a row per client of ``split``. ``steps`` optimiser steps of ``batch_size`` examples each, or
    as many as each client's number in a list (``epoch_steps`` gives those of whole epochs); ``start``: the steps of the
    batch stream that are already done, of all or of each client (see ``batch_indices``); ``state``: the optimiser state
    of an earlier run to go on from. ``clip`` bounds each client's gradient norm. A client's batches depend on ``(seed,
    split.ids[client])`` alone. ``objective`` is that of ``losses``; it also gets the tensors of the stack ``fixed``,
    which do not train. Adapters, data and state may be on the CPU; each chunk of clients is moved to the backbone's
    device for its steps (see ``Execution``).

    Every ``eval_every`` steps and at the end the models are evaluated on ``eval_split``, which changes nothing in the
    training; ``Trained.history`` has the numbers, and each of the ``callbacks`` gets the new rows of it at once.

    Raises ``ValueError`` for adapters, data, a state or numbers that do not fit, and ``DivergedError`` (a subclass)
    naming the client and the step when a loss is not finite; the result for the other clients is in its ``trained``.
    """
    fixed = {name: tensor.detach() for name, tensor in (fixed or {}).items()}
    loss = adapted.task.mean_loss if loss is mean_loss else loss
    adapters = _checked_tensors(adapted, adapters, split, loss, objective, fixed)
    history = History(split.ids, eval_split, eval_every, callbacks)
    if eval_split is not None:
        check_clients(adapted, adapters, eval_split)
    flat = flatten(adapters).detach().to(adapted.dtype)
    like = {name: tensor[0] for name, tensor in adapters.items()}
    if state is not None:
        state.check(*flat.shape)
    state = OptimizerState.zeros(flat) if state is None else state.rows(torch.arange(len(split)))  # a copy
    last_steps = for_each_client("steps", steps, len(split))
    first_steps = for_each_client("start", start, len(split))
    most = max(last_steps)
    curves = flat.new_full((len(split), most), torch.nan)

    def stack() -> Adapter:
        return {name: tensor.to(like[name].dtype) for name, tensor in unflatten(flat, like).items()}

    def train_until(begin: int, end: int) -> None:
        """Steps ``begin … end - 1`` of the clients that have so many, in place: all clients' results exist once."""
        training = [row for row, last in enumerate(last_steps) if last > begin]
        part = split.rows(training)
        tensors = select_clients(adapters | fixed, torch.tensor(training))
        for rows, step_losses in _planned_chunks(adapted, tensors, part, batch_size, loss, objective, execution):
            chunk = torch.tensor(training)[rows]
            chunk_fixed = {name: tensor.to(adapted.device) for name, tensor in select_clients(fixed, chunk).items()}
            now = flat[chunk].to(adapted.device)
            now_state = state.rows(chunk).to(adapted.device)
            done = [first_steps[training[row]] + begin for row in rows]
            batches = _batches(part.rows(rows).to(adapted.device), seed, done, end - begin, batch_size)
            for step, (x, y) in enumerate(batches, begin):
                now.requires_grad_()
                values = step_losses(unflatten(now, like) | chunk_fixed, x, y)  # (K,)
                (grad,) = torch.autograd.grad(values.sum(), now)
                now, now_state = adamw_step(now.detach(), _clipped(grad, clip), now_state, lr, weight_decay)
                curves[chunk, step] = values.detach().to(curves)
                bar.update(len(now))
            flat[chunk] = now.to(flat.device)
            for all_rows, chunk_rows in zip(vars(state).values(), vars(now_state).values()):
                all_rows[chunk] = chunk_rows.to(all_rows.device)

    stops = {*last_steps, *(step for step in range(most) if history.is_due(step, most))} - {0}
    with tqdm(total=sum(last_steps), disable=not progress, unit="step", desc="training") as bar:
        begin = 0
        for end in sorted(stops):
            train_until(begin, end)
            if history.is_due(end, most):
                measure = partial(evaluate, adapted, stack(), execution=execution)
                bar.set_postfix(history.add(measure, step=end, train_loss=curves[:, end - 1]))
            begin = end
    return _check_finite(Trained(stack(), state, curves, history), split.ids, first_steps, last_steps)


def _checked_tensors(
    adapted: AdaptedBackbone, adapters: Adapter, split: Split, loss: Loss, objective: Objective, fixed: Adapter
) -> Adapter:
    """What trains: an adapter of the backbone in the order of its tensors, or whatever an objective makes one of."""
    if objective is plain_loss and not fixed:
        adapters = check_clients(adapted, adapters, split)
        if loss == adapted.task.mean_loss:
            check_labels(adapted, adapters, split)
        return adapters
    check_models(adapted, split)
    check_inputs(adapted, split)
    check_count("adapters", adapters, len(split))
    if fixed:
        check_count("fixed", fixed, len(split))
    return adapters


def for_each_client(name: str, number: int | Sequence[int], clients: int) -> list[int]:
    """A number of steps for each client. Raises ``ValueError`` for as many numbers as there are no clients."""
    if isinstance(number, int):
        return [number] * clients
    if len(number) != clients:
        raise ValueError(f"{name}: {len(number)} of them for {clients} clients")
    return list(number)


@checked
def epoch_steps(split: Split, epochs: Positive, batch_size: Size) -> list[int]:
    """The steps of each client in so many epochs of its own examples, at least one.

    >>> epoch_steps(Split([(torch.zeros(n, 2), torch.zeros(n).long()) for n in (8, 20)]), epochs=2, batch_size=4)
    [4, 10]
    """
    return [max(1, round(epochs * size / batch_size)) for size in split.sizes.tolist()]


def _planned_chunks(
    adapted: AdaptedBackbone,
    tensors: Adapter,
    split: Split,
    batch_size: int,
    loss: Loss,
    objective: Objective,
    execution: Execution,
) -> Iterator[tuple[list[int], Callable[[Adapter, Inputs, Tensor], Tensor]]]:
    """The rows of each chunk of clients, with the function from its tensors and batch to its clients' losses.

    Clients whose texts are much longer than others' are in chunks of their own.
    """
    alone = with_autocast(adapted, execution.autocast)

    def total_logits(client_tensors: Adapter, x: Inputs) -> Tensor:
        return objective(lambda adapter: alone(adapter, x).sum(), client_tensors)

    function = None if objective is plain_loss else total_logits
    groups = split.alike(by_size=False)
    options: dict[str, Any] = dict(batch_size=batch_size, backward=True, repeats=True, function=function)
    for group, plan in planned_groups(adapted, tensors, split, groups, execution=execution, **options):
        compiled = plan.vectorize and execution.compile
        forward = alone if compiled else plan.forward
        all_losses = compiled_losses() if compiled else losses
        how: dict[str, Any] = dict(loss=loss, objective=objective, vectorize=plan.vectorize)
        for chunk in plan.chunks:
            yield group[chunk], partial(all_losses, forward, **how)


def planned_groups(
    adapted: AdaptedBackbone,
    adapters: Adapter,
    split: Split,
    groups: Sequence[Sequence[int]],
    *,
    batch_size: int,
    execution: Execution,
    repeats: bool = False,
    **options,
) -> Iterator[tuple[Sequence[int], ExecutionPlan]]:
    """Each group of clients (see ``Split.alike``) with its plan, whose chunks are slices of the group.

    A batch has no more examples than the group's largest client, unless it ``repeats`` them, as batches of training do.
    ``options`` go to ``plan_execution``.
    """
    for group in groups:
        longest = max(group, key=split.lengths.__getitem__)
        x, _ = split.examples[longest]
        most = batch_size if repeats else min(batch_size, int(split.sizes[list(group)].max()))
        plan = plan_execution(
            adapted,
            adapters,
            map_inputs(lambda tensor: tensor.unsqueeze(0), x),
            batch_size=most,
            execution=execution,
            clients=len(group),
            **options,
        )
        if not plan.vectorize:  # and so for the other groups, without a second warning
            execution = replace(execution, vectorize=False)
        yield group, plan


def _batches(
    split: Split, seed: int | Sequence[int], start: Sequence[int], steps: int, batch_size: int
) -> Iterator[tuple[Inputs, Tensor]]:
    """The clients' batches of every step, ``(K, B, ...)`` and ``(K, B)``, each from its own step ``start``."""
    seeds = [seed] if isinstance(seed, int) else list(seed)
    x, y, starts = split.joined()
    clients = zip(split.sizes.tolist(), start, split.ids)
    streams = [batch_indices(n, done, steps, batch_size, [*seeds, i]) for n, done, i in clients]
    examples = torch.stack(streams) + starts.view(-1, 1, 1)  # (K, steps, B)
    lengths = text_lengths(x)
    longest = [] if lengths is None else torch.tensor(lengths)[examples].amax((0, 2)).tolist()
    examples = examples.to(y.device)
    for step in range(steps):
        batch = take(x, examples[:, step]), y[examples[:, step]]
        yield cut_texts(*batch, _halved(x[MASK].shape[1], longest[step])) if longest else batch


def _halved(width: int, length: int) -> int:
    """A width, halved as often as it still holds ``length``: so batches have few different widths."""
    while 2 * length <= width:
        width = (width + 1) // 2
    return width


def _clipped(grad: Tensor, clip: float | None) -> Tensor:
    """Each client's gradient, a row, with a norm of at most ``clip``, as ``clip_grad_norm_`` does it."""
    return grad if clip is None else grad * (clip / (grad.norm(dim=1, keepdim=True) + 1e-6)).clamp_max(1)


def _check_finite(trained: Trained, ids: Sequence[int], start: Sequence[int], last_steps: Sequence[int]) -> Trained:
    """The run itself. Raises ``DivergedError`` if a loss, or an adapter after the last update, is not finite."""
    finite_adapters = flatten(trained.adapters).isfinite().all(1, keepdim=True)
    is_over = torch.arange(max(last_steps)) >= torch.tensor(last_steps).unsqueeze(1)
    is_finite = trained.losses.isfinite() | is_over.to(trained.losses.device)
    finite = torch.cat([is_finite, finite_adapters], dim=1)  # (C, steps + 1)
    if not finite.all():
        row = int((~finite.all(1)).nonzero()[0])
        raise DivergedError(ids[row], start[row] + int((~finite[row]).nonzero()[0]), trained)
    return trained


@torch.no_grad()
@checked
def evaluate(
    adapted: AdaptedBackbone,
    adapters: Stack,
    split: Split,
    *,
    batch_size: Size = 128,
    execution: Execution = Execution(),
) -> tuple[Tensor, Tensor]:
    """Mean loss (nats) and accuracy (a fraction), ``(C,)`` each, of each client's adapter on its own examples; of
    another ``task`` than classification, its loss and its metric.

    Both are means over examples; that of a text with a target per token is the mean over its tokens (see ``loss.py``).
    Raises ``ValueError`` for adapters that do not fit and for a client whose loss is not finite.
    """
    values = torch.zeros(2, len(split), int(split.sizes.max()), device=adapted.device, dtype=torch.float64)
    blocks = example_logits(adapted, adapters, split, batch_size=batch_size, execution=execution)
    for clients, numbers, logits, y in blocks:
        both = adapted.task.losses(logits, y), adapted.task.metrics(logits, y)
        values[:, clients, numbers] = torch.stack([each.double() for each in both])
    loss, accuracy = values.sum(2) / split.sizes.to(values)
    check_losses(loss, split)
    return loss, accuracy


def check_losses(losses: Tensor, split: Split) -> None:
    """Raise ``ValueError`` naming the first client that has a loss ``(C, ...)``, or a logit or a gradient of it,
    that is not finite."""
    finite = losses.isfinite().reshape(len(losses), -1).all(1)
    if not finite.all():
        client = split.ids[int((~finite).nonzero()[0])]
        raise ValueError(f"the loss of client {client} is not finite: its examples or its logits are not numbers")


def example_logits(
    adapted: AdaptedBackbone, adapters: Adapter, split: Split, *, batch_size: int, execution: Execution
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """All examples in blocks of M: the rows ``(M,)`` of their clients, their numbers there ``(M,)``, their logits ``(M,
    ..., classes)`` and their ``y``. Texts are run beside others of about their length, and cut to the longest."""
    adapters = check_clients(adapted, adapters, split)
    check_labels(adapted, adapters, split)
    parts = split.by_length()
    of_parts = select_clients(adapters, parts.clients)
    blocks = batched_logits(adapted, of_parts, parts.split, batch_size=batch_size, execution=execution)
    for rows, columns, logits, y in blocks:
        is_there, clients, numbers = parts.places(rows, columns)
        yield clients, numbers, logits[is_there], y[is_there]


def batched_logits(
    adapted: AdaptedBackbone, adapters: Adapter, split: Split, *, batch_size: int, execution: Execution
) -> Iterator[tuple[Tensor, slice, Tensor, Tensor]]:
    """The split, which has been checked, in blocks of clients and examples: the rows ``(K,)`` of the clients, the slice
    of their examples, the logits ``(K, B, ..., classes)`` and their ``y``, -100 where a client has no more examples.

    ``B`` is ``batch_size``, or what fits: a language model's logits are as many as its vocabulary for every token.
    Clients are in a block with others that have about as many examples, of about the same length.
    """
    options: dict[str, Any] = dict(batch_size=batch_size, backward=False, execution=execution)
    for group, plan in planned_groups(adapted, adapters, split, split.alike(), **options):
        size = min(batch_size, plan.examples)
        for chunk in plan.chunks:
            rows = torch.tensor(group[chunk])
            part = split.rows(rows.tolist()).to(adapted.device)
            stack = {name: tensor.to(adapted.device) for name, tensor in select_clients(adapters, rows).items()}
            all_x, all_y = part.x, part.y
            for start in range(0, all_y.shape[1], size):
                columns = slice(start, min(start + size, all_y.shape[1]))
                x = take(all_x, (slice(None), columns))
                yield rows, columns, map_clients(plan.forward, stack, x, vectorize=plan.vectorize), all_y[:, columns]
