"""Federations: who gets which example, and what is refused."""

import gzip
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from potara_lite.federation import sources
from potara_lite.federation.partition import dirichlet_proportions, draw, partition, partition_options, shift_images
from potara_lite.federation.sources import fashion_mnist, from_tensors, from_torchvision
from potara_lite.federation.split import Federation, Split
from potara_lite.files import check_file, data_path


def numbered_pool(per_class, classes=10, start=0):
    """Images that carry their own number in every pixel, and the labels ``0 … classes - 1`` in turn."""
    number = torch.arange(per_class * classes) + start
    return number.double().view(-1, 1, 1, 1).expand(-1, 1, 2, 2), torch.arange(per_class * classes) % classes


def numbers(split):
    return torch.cat([split.client(i)[0][:, 0, 0, 0] for i in range(len(split))]).long().tolist()


def client_of(n, label=0):
    return torch.zeros(n, 2), torch.full((n,), label)


@settings(max_examples=25, deadline=None)
@given(
    clients=st.integers(1, 6), alpha=st.sampled_from([0.1, 0.5, 1.0, np.inf]), seed=st.integers(0, 999), data=st.data()
)
def test_no_example_is_dealt_twice_and_every_split_draws_from_its_own_pool(clients, alpha, seed, data):
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=clients, max_size=clients))
    pool, test_pool = numbered_pool(120), numbered_pool(60, start=5000)
    federation = partition(
        pool, test_pool, 10, clients=clients, train_size=sizes, calibration_size=5, test_size=9, alpha=alpha, seed=seed
    )
    train, calibration, test = map(numbers, (federation.train, federation.calibration, federation.test))
    assert len({*train, *calibration}) == len(train) + len(calibration) == sum(sizes) + 5 * clients
    assert len(set(test)) == len(test) == 9 * clients
    assert max(train + calibration) < 1200 and min(test) >= 5000
    for split in (federation.train, federation.calibration, federation.test):
        labels = torch.cat([split.client(i)[1] for i in range(clients)]).tolist()
        assert labels == [n % 10 for n in numbers(split)]  # each image kept its own label
    assert federation.train.sizes.tolist() == sizes


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 999))
def test_draw_gives_whole_sizes_and_class_counts_within_one_of_the_proportions(sizes, seed):
    rng = np.random.default_rng(seed)
    labels, proportions = rng.permutation(np.repeat(np.arange(6), 250)), rng.dirichlet(np.full(6, 0.5), len(sizes))
    for rows, share, size in zip(draw(labels, proportions, sizes, rng), proportions, sizes):
        counts = np.bincount(labels[rows], minlength=6)
        assert counts.sum() == size == len(set(rows.tolist()))
        assert (np.abs(counts - share * size) < 1).all()


def test_dirichlet_proportions_have_the_mean_and_variance_of_the_dirichlet():
    shares = dirichlet_proportions(20_000, 4, 0.5, np.random.default_rng(0))
    variance = 0.25 * 0.75 / (4 * 0.5 + 1)  # of Dirichlet(0.5, 0.5, 0.5, 0.5), in each coordinate
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(shares.mean(0), 0.25, atol=4 * (variance / 20_000) ** 0.5)
    np.testing.assert_allclose(shares.var(0), variance, rtol=0.04)  # four standard errors of a variance, about


def test_infinite_alpha_gives_all_classes_alike():
    np.testing.assert_array_equal(dirichlet_proportions(3, 5, np.inf, np.random.default_rng(0)), np.full((3, 5), 0.2))


def test_a_client_keeps_its_class_proportions_in_all_three_splits():
    federation = partition(
        numbered_pool(1000), numbered_pool(1000), 10, clients=2, train_size=400, calibration_size=400, test_size=400
    )
    for client in range(2):
        shares = [
            torch.bincount(split.client(client)[1], minlength=10) / 400
            for split in (federation.train, federation.calibration, federation.test)
        ]
        # train and calibration are a random half of the same 800 each: 5 standard deviations of that draw are 0.09
        torch.testing.assert_close(shares[0], shares[2], rtol=0, atol=0.09)
        torch.testing.assert_close(shares[1], shares[2], rtol=0, atol=0.09)
        assert (shares[2] - 0.1).abs().max() > 0.1  # and they are skewed at all


def test_the_same_seed_deals_the_same_and_another_seed_another():
    def deal(seed):
        return numbers(partition(numbered_pool(200), numbered_pool(300), 10, clients=3, seed=seed).train)

    assert deal(4) == deal(4) != deal(5)


def test_shift_turns_and_inverts_images_by_client():
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shift_images(x, 0, 4), x)
    quarter = x.rot90(1, (2, 3))  # counter-clockwise
    torch.testing.assert_close(shift_images(x, 1, 4), 1 - quarter, rtol=0, atol=1e-4)
    torch.testing.assert_close(shift_images(x, 2, 4), x.rot90(2, (2, 3)), rtol=0, atol=1e-4)


def test_feature_shift_changes_the_images_and_not_who_gets_them():
    x = torch.rand(600, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    pool = (x, torch.arange(600) % 10)
    options = dict(clients=3, train_size=10, calibration_size=4, test_size=8, seed=2)
    plain, shifted = (partition(pool, pool, 10, shift=shift, **options) for shift in (False, True))
    for part in ("train", "calibration", "test"):
        before, after = getattr(plain, part), getattr(shifted, part)
        assert torch.equal(before.y, after.y)
        for client in range(3):
            assert torch.equal(after.x[client], shift_images(before.x[client], client, 3))


def test_split_pads_with_the_label_that_cross_entropy_ignores():
    split = Split([(torch.ones(2, 3), torch.tensor([1, 2])), (torch.ones(4, 3), torch.tensor([3, 0, 1, 2]))])
    assert split.x.shape == (2, 4, 3) and split.sizes.tolist() == [2, 4] and split.ids == (0, 1)
    assert split.y.tolist() == [[1, 2, -100, -100], [3, 0, 1, 2]]
    assert split.x[0, 2:].abs().sum() == 0
    assert split.client(0)[0].shape == (2, 3) and split.client(0)[1].tolist() == [1, 2]


def test_rows_keep_the_ids_of_their_clients(federation):
    turned = federation.train.rows([2, 0])
    assert turned.ids == (2, 0) and turned.sizes.tolist() == [9, 5]
    assert torch.equal(turned.client(0)[0], federation.train.client(2)[0])
    assert federation.rows(slice(1, 3)).test.ids == (1, 2)
    assert turned.rows([1]).ids == (0,)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(6, 20), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_from_tensors_withholds_calibration_examples_from_training(sizes, seed):
    starts = np.cumsum([0, *sizes])
    train = [(torch.arange(s, s + n).double().view(-1, 1, 1, 1), torch.zeros(n).long()) for s, n in zip(starts, sizes)]
    federation = from_tensors(train, train, calibration_size=5, classes=2, seed=seed)
    for client, (start, n) in enumerate(zip(starts, sizes)):
        kept = federation.train.client(client)[0].flatten().tolist()
        withheld = federation.calibration.client(client)[0].flatten().tolist()
        assert len(withheld) == 5 and sorted(kept + withheld) == list(range(start, start + n))


def test_classes_default_to_the_largest_label_plus_one():
    train, test = [client_of(6, 1)], [client_of(3, 4)]
    assert from_tensors(train, test, calibration_size=2).classes == 5


def test_an_empty_client_is_refused_by_name():
    for train, test in (
        ([client_of(40), client_of(0)], [client_of(2)] * 2),
        ([client_of(40)] * 2, [client_of(2), client_of(0)]),
    ):
        with pytest.raises(ValueError, match="client 1 has no examples"):
            from_tensors(train, test)


def test_inputs_and_labels_of_different_length_are_refused_by_name():
    crooked = (torch.zeros(40, 2), torch.zeros(41))
    with pytest.raises(ValueError, match="client 1 has 40 inputs and 41 labels"):
        Split([client_of(3), crooked])
    with pytest.raises(ValueError, match="client 1 has 40 inputs and 41 labels"):
        from_tensors([client_of(40), crooked], [client_of(2)] * 2)


def test_no_clients_at_all_are_refused():
    with pytest.raises(ValueError, match=r"must be a list .*at least 1 entry, not \[\]"):
        from_tensors([], [])


@pytest.mark.parametrize("label", [-1, -100, 3])
@pytest.mark.parametrize("part", ["train", "test", "calibration"])
def test_a_label_outside_the_classes_is_refused_by_client_and_split(label, part):
    splits = {name: [client_of(4), client_of(4)] for name in ("train", "test", "calibration")}
    splits[part][1][1][2] = label
    with pytest.raises(ValueError, match=f"client 1: ({part} label {label} is outside 0 … 2|label {label} is below 0)"):
        from_tensors(**splits, classes=3)


def test_splits_of_different_clients_are_refused():
    two, one = Split([client_of(2)] * 2), Split([client_of(2)])
    with pytest.raises(ValueError, match="calibration has clients"):
        Federation(two, one, two, classes=1)


def test_a_client_too_small_to_withhold_from_is_refused():
    with pytest.raises(ValueError, match="client 1 has 30 examples: none is left if 30 calibrate"):
        from_tensors([client_of(31), client_of(30)], [client_of(1)] * 2)
    federation = from_tensors([client_of(31)], [client_of(1)])
    assert federation.train.sizes.tolist() == [1]


ALIKE = np.eye(10)[[0] * 10]  # ten clients of class 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(alpha=0), "alpha must be above 0, not 0"),
        (dict(alpha=-0.5), "alpha must be above 0, not -0.5"),
        (dict(alpha=float("nan")), "alpha must be above 0, not nan"),
        (dict(clients=0), "clients must be at least 1, not 0"),
        (dict(train_size=0), "train_size must be at least 1, not 0"),
        (dict(calibration_size=0), "calibration_size must be at least 1, not 0"),
        (dict(test_size=0), "test_size must be at least 1, not 0"),
        (dict(train_size=[3, 0, 3], clients=3), r"train_size\[1\] must be at least 1, not 0"),
        (dict(train_size=[3, 3], clients=3), "train_size names 2 clients, not 3"),
        (dict(train_size=500), "pool runs out: 10 clients ask for 5300 training and .* examples, there are 2000"),
        (dict(test_size=500, train_size=1), "pool runs out: 10 clients ask for 5000 test examples, there are 2000"),
        (dict(proportions=ALIKE, test_size=9), "class 0 runs out: 1300 examples are asked for, there are 200"),
        (dict(proportions=ALIKE, train_size=5, calibration_size=5, test_size=100), "class 0 runs out: 1000 .* are 200"),
    ],
)
def test_partition_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        partition(numbered_pool(200), numbered_pool(200), 10, **{"clients": 10, "test_size": 99, **options})


@pytest.fixture(scope="module")
def shipped_labels():
    with np.load(check_file(data_path("fashion_mnist.npz")), allow_pickle=False) as file:
        return [torch.from_numpy(file[f"{split}_labels"]).long() for split in ("train", "test")]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("clients, train_size", [(8, 100), (8, 1000), (20, 300)])
def test_the_shipped_images_suffice_for_the_usual_federations(shipped_labels, clients, train_size, alpha, seed):
    pools = [(torch.arange(len(y)), y) for y in shipped_labels]
    federation = partition(*pools, 10, clients=clients, train_size=train_size, alpha=alpha, seed=seed)
    assert federation.train.sizes.tolist() == [train_size] * clients


def test_fashion_mnist_has_images_in_the_unit_range_from_its_own_splits():
    federation = fashion_mnist(clients=8, train_size=1000)
    assert federation.train.x.shape == (8, 1000, 1, 28, 28) and federation.test.x.shape == (8, 250, 1, 28, 28)
    assert federation.train.x.dtype == torch.float32 and federation.classes == 10
    assert len(federation.class_names) == 10 and federation.class_names[8] == "bag"
    assert federation.train.x.min() == 0 and federation.train.x.max() == 1
    images = torch.cat([split.x.flatten(0, 1).flatten(1) for split in (federation.train, federation.calibration)])
    assert len(images.unique(dim=0)) >= len(images) - 20  # Fashion-MNIST itself holds a few images twice


def test_a_damaged_or_missing_data_file_is_refused(tmp_path, monkeypatch):
    good = data_path("fashion_mnist.npz")
    content = bytearray(good.read_bytes())
    content[len(content) // 2] ^= 1
    monkeypatch.setattr(sources, "data_path", lambda name="": tmp_path / name)
    with pytest.raises(ValueError, match="fashion_mnist.npz is missing"):
        fashion_mnist()
    (tmp_path / good.name).write_bytes(content)
    (tmp_path / "fashion_mnist.sha256").write_text(good.with_suffix(".sha256").read_text())
    with pytest.raises(ValueError, match="fashion_mnist.npz is damaged"):
        fashion_mnist()
    (tmp_path / good.name).write_bytes(content[:1000])
    with pytest.raises(ValueError, match="fashion_mnist.npz is damaged"):
        fashion_mnist()


def write_cifar(root, kind, images, labels):
    """The published folder of CIFAR-10 or CIFAR-100: pickled dictionaries with rows of 3072 bytes, channels first."""
    rows = images.reshape(len(images), -1)
    if kind == "CIFAR10":
        folder = root / "cifar-10-batches-py"
        parts = {f"data_batch_{i + 1}": slice(i * 40, i * 40 + 40) for i in range(5)} | {"test_batch": slice(200, 300)}
        meta, key = ("batches.meta", {"label_names": [str(i) for i in range(10)]}), "labels"
    else:
        folder = root / "cifar-100-python"
        parts = {"train": slice(0, 200), "test": slice(200, 300)}
        meta, key = ("meta", {"fine_label_names": [str(i) for i in range(100)]}), "fine_labels"
    folder.mkdir()
    for name, part in parts.items():
        (folder / name).write_bytes(pickle.dumps({"data": rows[part], key: labels[part].tolist()}))
    (folder / meta[0]).write_bytes(pickle.dumps(meta[1]))


def write_fashion(root, images, labels):
    """The published idx files of Fashion-MNIST, packed and, as torchvision leaves them, unpacked."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, part in (("train", slice(0, 200)), ("t10k", slice(200, 300))):
        x, y = images[part], labels[part]
        idx = {
            "images-idx3-ubyte": bytes([0, 0, 8, 3]) + np.array(x.shape, ">i4").tobytes() + x.tobytes(),
            "labels-idx1-ubyte": bytes([0, 0, 8, 1]) + np.array(y.shape, ">i4").tobytes() + y.tobytes(),
        }
        for name, content in idx.items():
            (folder / f"{prefix}-{name}").write_bytes(content)
            (folder / f"{prefix}-{name}.gz").write_bytes(gzip.compress(content))


@pytest.mark.parametrize(
    "kind, shape, classes",
    [("FashionMNIST", (28, 28), 10), ("CIFAR10", (3, 32, 32), 10), ("CIFAR100", (3, 32, 32), 100)],
)
def test_torchvision_data_sets_are_read_from_their_real_format(tmp_path, monkeypatch, kind, shape, classes):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (300, *shape), dtype=np.uint8), (np.arange(300) % classes).astype(np.uint8)
    if kind == "FashionMNIST":
        write_fashion(tmp_path, images, labels)
    else:
        write_cifar(tmp_path, kind, images, labels)
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # ours have other checksums
    options = dict(clients=1, train_size=20, calibration_size=5, test_size=15, alpha=float("inf"))
    federation = from_torchvision(kind, str(tmp_path), download=False, **options)
    assert federation.classes == classes == len(federation.class_names) and federation.name == kind
    assert federation.class_names[3] == ("Dress" if kind == "FashionMNIST" else "3")
    channels = (1, *shape) if len(shape) == 2 else shape
    known = {image.reshape(channels).tobytes(): n for n, image in enumerate(images)}
    for split, belongs in (
        (federation.train, range(200)),
        (federation.calibration, range(200)),
        (federation.test, range(200, 300)),
    ):
        x, y = split.client(0)
        assert x.shape[1:] == channels and x.dtype == torch.float32
        found = [known[image.tobytes()] for image in (x * 255).round().to(torch.uint8).numpy()]
        assert all(n in belongs for n in found)
        assert y.tolist() == [int(labels[n]) for n in found]


def test_an_unknown_torchvision_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'MNIST'"):
        from_torchvision("MNIST", str(tmp_path), download=False)


def test_options_are_checked_before_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda *_, **__: pytest.fail("downloaded"))
    for options, error, message in (
        (dict(alpha=-1), ValueError, "alpha must be above 0, not -1"),
        (dict(train_size=[3, 0]), ValueError, r"train_size\[1\] must be at least 1, not 0"),
        (dict(client=3), TypeError, "client"),
    ):
        with pytest.raises(error, match=message):
            from_torchvision("CIFAR10", str(tmp_path), **options)
    assert partition_options(clients=np.int64(3), name="x") == dict(
        clients=3, train_size=100, calibration_size=30, test_size=250, alpha=0.5, proportions=None, shift=False, seed=0,
        name="x",
    )  # fmt: skip
