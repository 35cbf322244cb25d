"""Hugging Face's data sets and the partitions of flwr-datasets, from local data alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from potara_lite import from_huggingface, from_tensors
from potara_lite.federation.text import encode_texts

datasets = pytest.importorskip("datasets", reason="needs the extra `datasets`")
PARTS = ("train", "calibration", "test")


class Words:
    """A tokenizer whose tokens are the words' lengths."""

    def __call__(self, text, truncation=True, max_length=64):
        return {"input_ids": [len(word) for word in text.split()][:max_length]}


def films(n=80):
    """Reviews of two shops; the number is in the text, too."""
    rows = [
        {"text": f"{'very ' * (i % 3)}number {'i' * i}", "number": i, "half": i / 2, "label": i // 2 % 2, "shop": i % 2}
        for i in range(1, n + 1)
    ]
    kinds = datasets.Features(
        text=datasets.Value("string"),
        number=datasets.Value("int64"),
        half=datasets.Value("float64"),
        label=datasets.ClassLabel(names=["poor", "good"]),
        shop=datasets.ClassLabel(names=["web", "book"]),
    )
    return datasets.Dataset.from_list(rows, features=kinds)


FILMS = films()
NUMBERS = FILMS.remove_columns(["text", "shop"])


def numbers(federation, client, part="train"):
    return sorted(getattr(federation, part).client(client)[0][:, 0].int().tolist())


def test_a_column_says_whose_each_row_is():
    federation = from_huggingface(FILMS, client="shop", features=["number", "half"], test_size=10, calibration_size=5)
    assert federation.client_names == ("web", "book") and federation.class_names == ("poor", "good")
    for client in range(2):
        assert sorted(sum((numbers(federation, client, part) for part in PARTS), [])) == [
            i for i in range(1, 81) if i % 2 == client
        ]
        for part in PARTS:
            x, y = getattr(federation, part).client(client)
            assert x.dtype == torch.float32 and torch.equal(x[:, 1], x[:, 0] / 2)
            assert torch.equal(y, x[:, 0].long() // 2 % 2)
            assert abs(int(y.sum()) - len(y) / 2) <= 1


def test_a_text_becomes_tokens_and_their_mask():
    federation = from_huggingface(
        FILMS, client="shop", text="text", tokenizer=Words(), max_length=3, calibration_size=5
    )
    for client in range(2):
        for part in PARTS:
            x, y = getattr(federation, part).client(client)
            lengths = x["attention_mask"].sum(1)
            assert x["input_ids"].shape[1] <= 3 and lengths.tolist() == (x["input_ids"] > 0).sum(1).tolist()
            assert y.dtype == torch.int64 and len(y) == len(lengths) and lengths.min() == 2


def test_texts_are_encoded_as_encode_texts_does():
    texts = FILMS.filter(lambda row: row["shop"] == 0)
    pair = encode_texts(Words(), texts["text"][:], 64), torch.tensor(texts["label"][:])
    expected = from_tensors({"web": pair}, calibration_size=5)
    found = from_huggingface(FILMS, client="shop", text="text", tokenizer=Words(), calibration_size=5).rows([0])
    assert torch.equal(found.train.client(0)[1], expected.train.client(0)[1])
    ids, other = found.train.client(0)[0]["input_ids"], expected.train.client(0)[0]["input_ids"]
    assert torch.equal(ids[:, : other.shape[1]], other)


def test_a_dictionary_of_splits_keeps_its_test_set():
    both = FILMS.train_test_split(0.25, seed=0, stratify_by_column="shop")
    federation = from_huggingface(both, client="shop", features=["number"], calibration_size=5)
    for client in range(2):
        mine = both["test"].filter(lambda row, client=client: row["shop"] == client)["number"][:]
        assert numbers(federation, client, "test") == sorted(mine)
    alone = from_huggingface(datasets.DatasetDict(train=FILMS), client="shop", features=["number"], calibration_size=5)
    assert alone.test.sizes.tolist() == [8, 8]


def test_a_data_set_for_each_client():
    parts = [NUMBERS.select(range(30)), NUMBERS.select(range(30, 80))]
    federation = from_huggingface(parts, calibration_size=5, test_size=3)
    assert federation.client_names is None and federation.train.sizes.tolist() == [22, 42]
    named = from_huggingface({"A": parts[0], "B": parts[1]}, calibration_size=5, test_size=3)
    assert named.client_names == ("A", "B")
    assert max(sum((numbers(named, 0, part) for part in PARTS), [])) == 30
    split = [part.train_test_split(0.2, seed=0) for part in parts]
    federation = from_huggingface(split, calibration_size=5)
    for client in range(2):
        assert numbers(federation, client, "test") == sorted(split[client]["test"]["number"][:])


def test_labels_without_names_are_numbered_in_sorted_order_for_all_clients():
    parts = [
        datasets.Dataset.from_dict({"x": [float(i) for i in range(40)], "label": labels})
        for labels in ([10, 9] * 20, [9, 2] * 20)
    ]
    federation = from_huggingface(parts, calibration_size=5)
    assert federation.class_names == ("2", "9", "10")
    assert set(federation.train.client(0)[1].tolist()) == {1, 2} and set(federation.train.client(1)[1].tolist()) == {
        0,
        1,
    }


def images(sizes=((6, 4),) * 60, **columns):
    pictures = [Image.new("RGB", size, (i, 2 * i, 255)) for i, size in enumerate(sizes)]
    return datasets.Dataset.from_dict({"img": pictures, "label": [0] * len(sizes), **columns}).cast_column(
        "img", datasets.Image()
    )


def test_images_become_floats_in_the_unit_range_and_other_columns_are_left_out():
    federation = from_huggingface(images(coarse=[0] * 60, user=["a", "b"] * 30), client="user", calibration_size=5)
    x, _ = federation.train.client(1)
    assert x.shape[1:] == (3, 4, 6) and x.dtype == torch.float32
    red = x[:, 0, 0, 0] * 255
    assert set(red.round().int().tolist()) <= set(range(1, 60, 2))
    torch.testing.assert_close(
        x, torch.stack([red / 255, 2 * red / 255, torch.ones_like(red)], 1)[..., None, None].expand_as(x)
    )


def test_a_column_of_arrays_is_one_tensor():
    rows = datasets.Dataset.from_dict({"x": [[[float(i), 1.0]] * 3 for i in range(40)], "label": [0] * 40})
    x, _ = from_huggingface([rows], calibration_size=5).train.client(0)
    assert x.shape == (27, 3, 2) and x.dtype == torch.float32 and (x[..., 1] == 1).all()
    assert from_huggingface([rows.with_format("torch")], calibration_size=5).train.client(0)[0].shape == (27, 3, 2)


def test_what_is_stored_is_read_whatever_was_set_to_change_it():
    changed = NUMBERS.with_transform(lambda rows: {name: [0.0] * len(rows["number"]) for name in rows})
    for one in (changed, NUMBERS.with_format("torch"), NUMBERS.with_format("pandas")):
        federation = from_huggingface([one], calibration_size=5)
        assert sorted(sum((numbers(federation, 0, part) for part in PARTS), [])) == list(range(1, 81))
        assert federation.class_names == ("poor", "good")
    changed = FILMS.with_transform(lambda rows: {name: ["same"] * len(column) for name, column in rows.items()})
    options = dict(client="shop", text="text", tokenizer=Words(), calibration_size=5)
    one, other = (from_huggingface(ds, **options).train.client(0)[0]["input_ids"] for ds in (FILMS, changed))
    assert torch.equal(one, other)


UNEVEN = images([(6, 4)] * 59 + [(5, 4)])
HOLES = FILMS.map(lambda row: {"label": -1} if row["number"] == 18 else row)
NO_LABEL = FILMS.map(lambda row: {"label": None} if row["number"] == 18 else row)
NO_NUMBER = FILMS.map(lambda row: {"half": None} if row["number"] == 18 else row)


@pytest.mark.parametrize(
    "ds, options, said",
    [
        (5, {}, "ds must be a Dataset, or a list or a dictionary of them, or a partitioner, not 5"),
        ([], {}, "ds must be a Dataset, or a list or a dictionary of them, or a partitioner, not"),
        ([5], {}, r"ds\[0\] must be a Dataset, or a DatasetDict with 'train', not 5"),
        (FILMS.to_iterable_dataset(), dict(client="shop"), "ds must be a Dataset"),
        (FILMS, {}, "client must be the name of the column that says whose each example is, not None"),
        (datasets.DatasetDict(train=FILMS), {}, "client must be the name of the column"),
        (datasets.DatasetDict(test=FILMS), dict(client="shop"), "ds must be .* with 'train', not"),
        ([NUMBERS], dict(client="shop"), "client must be None where ds has a data set for each client, not 'shop'"),
        ([NUMBERS, {"train": NUMBERS, "test": NUMBERS}], {}, "ds must have a split 'test' for all clients or for none"),
        (
            FILMS,
            dict(client="shp"),
            r"client must be a column, not 'shp': there are \['text', 'number', 'half', 'label'",
        ),
        (FILMS, dict(client="shop", label="x"), "label must be a column, not 'x'"),
        (FILMS, dict(client="shop", features=["x"]), "features and text must be among .*, unlike 'x'"),
        (FILMS, dict(client="shop", features=["label"]), "features and text must be among .*, unlike 'label'"),
        (FILMS, dict(client="shop", text="text"), "text and tokenizer must be given together"),
        (
            FILMS,
            dict(client="shop", text="half", tokenizer=Words()),
            r"client 'web': column 'half' must hold texts, not",
        ),
        (
            FILMS,
            dict(client="shop"),
            "client 'web': column 'text' holds Value string: name it in text, with a tokenizer",
        ),
        (
            FILMS.map(lambda row: {"text": " "}),
            dict(client="shop", text="text", tokenizer=Words()),
            "'web': text 0 is em",
        ),
        (HOLES, dict(client="shop", features=["half"]), "label: column 'label' is missing in row 17"),
        (NO_LABEL, dict(client="shop", features=["half"]), "label: column 'label' is missing in row 17"),
        (NO_NUMBER, dict(client="shop", features=["half"]), "client 'web': column 'half' has nan in row 8"),
        (
            [UNEVEN],
            {},
            r"client 0: example 59 is of shape \(3, 4, 5\), example 0 of \(3, 4, 6\): bring all to one size",
        ),
        ([images(n=[1] * 60)], dict(features=["img", "n"]), "column 'img' holds Image .*: it must be the only one of"),
        ([NUMBERS.select_columns(["label"])], {}, "client 0: there is no column besides client and label"),
        (
            {"A": NUMBERS, "B": NUMBERS.select(range(20))},
            {},
            "client 'B' has 20 examples: none is left if 4 are tested",
        ),
    ],
)
def test_from_huggingface_refuses(ds, options, said):
    with pytest.raises(ValueError, match=said) as caught:
        from_huggingface(ds, **options)
    assert "\n" not in str(caught.value)


# flwr-datasets


@pytest.fixture
def flower(monkeypatch):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    return pytest.importorskip("flwr_datasets", reason="needs flwr-datasets")


def test_partitions_are_clients(flower):
    dirichlet = flower.partitioner.DirichletPartitioner(
        num_partitions=3, partition_by="label", alpha=1.0, min_partition_size=15
    )
    dirichlet.dataset = NUMBERS
    federation = from_huggingface(dirichlet, calibration_size=5, test_size=3)
    assert federation.client_names is None and federation.class_names == ("poor", "good")
    for client in range(3):
        found = sum((numbers(federation, client, part) for part in PARTS), [])
        assert sorted(found) == sorted(dirichlet.load_partition(client)["number"][:])


def test_natural_ids_are_the_names_of_the_clients(flower):
    natural = flower.partitioner.NaturalIdPartitioner(partition_by="user")
    natural.dataset = NUMBERS.add_column("user", np.resize(["c", "a"], 80))
    federation = from_huggingface(natural, features=["number"], calibration_size=5)
    assert federation.client_names == ("a", "c")
    assert all(n % 2 == 0 for n in numbers(federation, 0)) and all(n % 2 for n in numbers(federation, 1))


@pytest.mark.parametrize("with_test", [False, True])
def test_a_federated_data_set_is_partitioned(flower, tmp_path, with_test):
    datasets.disable_progress_bars()
    NUMBERS.to_csv(tmp_path / "train.csv")
    NUMBERS.select(range(20)).to_csv(tmp_path / "test.csv")
    partitioners = {"train": 2, "test": flower.partitioner.IidPartitioner(2)} if with_test else {"train": 2}
    source = flower.FederatedDataset(
        dataset=str(tmp_path), partitioners=partitioners, cache_dir=str(tmp_path / "cache"), seed=0
    )
    federation = from_huggingface(source, calibration_size=5)
    assert federation.train.sizes.tolist() == ([35, 35] if with_test else [27, 27])
    assert federation.test.sizes.tolist() == ([10, 10] if with_test else [8, 8])
