"""Clients of very unequal size, and texts of very unequal length: the same numbers, at a cost that follows the data."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from potara_lite import Split, attach, estimate_calibrated, estimate_paper, evaluate, per_sample_gradients, train
from potara_lite.adapters.state import flatten, select_clients
from potara_lite.estimators import estimate_gauss_newton
from potara_lite.training.gradients import directional_derivatives

SIZES = [4, 300, 7, 9, 5, 6, 40, 8]
LENGTHS = [3, 4, 200, 5, 6, 3, 4, 90]


class Counted(nn.Module):
    """A network that counts what it is given: examples, or tokens."""

    def __init__(self, of_texts=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 6) if of_texts else None
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 3)
        self.seen = 0

    def forward(self, input_ids, attention_mask=None):
        x = input_ids
        if self.embedding is not None:
            self.seen += x.numel()
            mask = attention_mask.unsqueeze(-1)
            x = (self.embedding(x) * mask).sum(-2) / mask.sum(-2)
        else:
            self.seen += len(x)
        return self.fc2(torch.tanh(self.fc1(x)))


def images():
    generator = torch.Generator().manual_seed(1)
    shapes = [(n, 6) for n in SIZES]
    return Split([(torch.randn(shape, generator=generator).double(), labels(shape[0], generator)) for shape in shapes])


def texts():
    generator = torch.Generator().manual_seed(2)
    examples = []
    for length in LENGTHS:
        ids = torch.randint(1, 20, (5, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, length // 2 + 1 :] = 0  # the first text is the longest
        examples.append(({"input_ids": ids * mask, "attention_mask": mask}, labels(5, generator)))
    return Split(examples)


def texts_of_a_client():
    """Texts of very unequal length, in every client, behind which there is much padding."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for extra in range(4):
        rows = [torch.randint(1, 20, (k + extra,), generator=generator) for k in (3, 90, 5, 7, 4, 40, 9)]
        mask = torch.stack([torch.arange(120) < len(row) for row in rows]).long()
        ids = torch.zeros_like(mask).masked_scatter(mask.bool(), torch.cat(rows))
        examples.append(({"input_ids": ids, "attention_mask": mask}, labels(7, generator)))
    return Split(examples)


def labels(n, generator):
    return torch.randint(3, (n,), generator=generator)


@pytest.fixture(params=[images, texts, texts_of_a_client], ids=lambda split: split.__name__)
def unequal(request, random_stack):
    split = request.param()
    adapted = attach(Counted(request.param != images).double(), rank=2, targets=["fc1"], head="fc2")
    stacks = [random_stack(adapted, len(split), seed=seed, scale=0.5) for seed in (1, 2)]
    return adapted, split, stacks


def loss_and_accuracy(adapted, split, federated, local):
    return torch.stack(evaluate(adapted, local, split, batch_size=64), dim=1)


def trained(adapted, split, federated, local):
    return flatten(train(adapted, local, split, steps=3, batch_size=8).adapters)


def gradients(adapted, split, federated, local):
    return per_sample_gradients(adapted, local, split).sum(1)


def derivatives(adapted, split, federated, local):
    found = directional_derivatives(adapted, local, flatten(federated), split)
    return torch.stack([values.sum(1) for values in found], dim=1)


def of(estimator):
    def weight(adapted, split, federated, local):
        return estimator(adapted, federated, local, split).client_weight.unsqueeze(1)

    weight.__name__ = estimator.__name__
    return weight


FUNCTIONS = [loss_and_accuracy, trained, gradients, derivatives, of(estimate_paper), of(estimate_gauss_newton)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_clients_numbers_are_those_that_it_has_alone(unequal, function):
    adapted, split, stacks = unequal
    together = function(adapted, split, *stacks)
    for row in range(len(split)):
        alone = [select_clients(stack, slice(row, row + 1)) for stack in stacks]
        expected = function(adapted, split.rows([row]), *alone)
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "function, passes",
    [(loss_and_accuracy, 1), (gradients, 1), (of(estimate_paper), 2), (of(estimate_calibrated), 12)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_network_sees_less_than_twice_the_data(unequal, function, passes):
    """Padded to the largest client it would be 6 times the images, and 5 times the tokens."""
    adapted, split, stacks = unequal
    network = adapted.model.get_base_model()
    function(adapted, split, *stacks)  # measures what a client needs, on two examples
    network.seen = 0
    function(adapted, split, *stacks)
    data = sum(SIZES) if network.embedding is None else tokens(split)
    assert data * passes <= network.seen < 2 * data * passes


def tokens(split):
    return sum(int(x["attention_mask"].sum()) for x, _ in split.examples)


def test_training_does_not_take_the_padding_behind_a_batchs_longest_text(random_stack):
    split = texts_of_a_client().map(lambda x: {name: F.pad(tensor, (0, 400)) for name, tensor in x.items()})
    adapted = attach(Counted(of_texts=True).double(), rank=2, targets=["fc1"], head="fc2")
    stack = random_stack(adapted, len(split), seed=1)
    options = dict(steps=10, batch_size=1)
    losses = train(adapted, stack, split, **options).losses
    network = adapted.model.get_base_model()
    network.seen = 0
    train(adapted, stack, split, **options)
    assert network.seen < 2 * 10 * 4 * 93  # of 520 tokens each
    torch.testing.assert_close(losses, train(adapted, stack, texts_of_a_client(), **options).losses)


def test_texts_beside_other_inputs_are_not_cut():
    x, y = texts_of_a_client().client(0)
    parts = Split([(x | {"image": torch.rand(7, 3, 4)}, y)]).by_length()
    assert len(parts.split) == 1 and parts.split.client(0)[0]["input_ids"].shape == (7, 120)
    assert parts.numbers.tolist() == [list(range(7))] and parts.clients.tolist() == [0]


def test_training_does_not_fill_short_texts_up_to_the_longest(random_stack):
    adapted = attach(Counted(of_texts=True).double(), rank=2, targets=["fc1"], head="fc2")
    stack = random_stack(adapted, len(LENGTHS), seed=1)
    train(adapted, stack, texts(), steps=1)
    network = adapted.model.get_base_model()
    network.seen = 0
    train(adapted, stack, texts(), steps=10, batch_size=4)
    assert network.seen < 2 * 10 * 4 * sum(LENGTHS)


def test_a_split_takes_the_memory_of_its_examples():
    examples = [(torch.zeros(n, 1, 28, 28), torch.zeros(n, dtype=torch.int64)) for n in [4000] + [5] * 39]
    split = Split(examples)
    assert split.nbytes == sum(x.nbytes + y.nbytes for x, y in examples)
    assert all(x.data_ptr() == given.data_ptr() for (x, _), (given, _) in zip(split.examples, examples))  # no copy
    part = split.rows([0, 3]).to("cpu")
    assert part.examples[1][0].data_ptr() == examples[3][0].data_ptr()
    assert sum(x.nbytes for x, _ in split.map(lambda x: x.flatten(1)[:, :10]).examples) == 4 * 10 * 4195


def test_groups_of_clients_that_are_padded_together_waste_less_than_half():
    split = images()
    groups = split.alike()
    assert sorted(row for group in groups for row in group) == list(range(len(SIZES)))
    for group in groups:
        assert 2 * min(SIZES[row] for row in group) > max(SIZES[row] for row in group)
    assert split.alike(by_size=False) == [list(range(len(SIZES)))]
    for group in texts().alike(by_size=False):
        assert 2 * min(LENGTHS[row] for row in group) > max(LENGTHS[row] for row in group)
