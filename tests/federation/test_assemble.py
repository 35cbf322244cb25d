"""Data of one's own: what becomes of it, how it is split, and what is refused."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset, random_split

from potara_lite import from_dataframe, from_datasets, from_tensors
from potara_lite.federation.assemble import stratified
from potara_lite.federation.split import Federation

PARTS = ("train", "calibration", "test")


def numbered(n, labels=2, start=0):
    """Examples that carry their own number, and labels in turn."""
    return torch.arange(start, start + n).float().unsqueeze(1), torch.arange(n) % labels


def rows_of(federation, client):
    """The numbers of a client's examples in each split, sorted."""
    return {part: sorted(getattr(federation, part).client(client)[0][:, 0].int().tolist()) for part in PARTS}


def patients(n=120, **columns):
    """A table of two features that tell the row, three wards and a label."""
    rng = np.random.default_rng(0)
    table = {"row": np.arange(n), "fever": rng.random(n) > 0.5, "ward": np.resize(list("CAB"), n)}
    return pd.DataFrame(table | {"sick": np.where(np.arange(n) // 3 % 4 == 0, "yes", "no")} | columns)


# The splits of a client.


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=st.integers(0, 99), data=st.data())
def test_stratified_parts_have_each_class_within_one_of_its_share(counts, seed, data):
    counts[0] += 2  # so that something is left of two parts
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    size = st.integers(1, (len(labels) - 1) // 2)
    sizes = data.draw(st.lists(size, min_size=1, max_size=2))
    parts = stratified(labels, sizes, np.random.default_rng(seed))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert [len(rows) for rows in parts[:-1]] == sizes
    left = np.array(counts)
    for rows, size in zip(parts, sizes):
        found = np.bincount(labels[rows], minlength=len(counts))
        pool = np.where(left > 1, left, 0)  # single examples go to the rest
        if (left - 1).clip(0).sum() >= size and (size * pool / pool.sum() <= left - 1).all():
            assert (np.abs(found - size * pool / pool.sum()) < 1 + 1e-9).all()
        left -= found
    if sum(sizes) <= sum(counts) - len(counts):
        assert set(labels[parts[-1]]) == set(labels)  # every class can be learned


def test_a_class_with_one_example_is_trained_on():
    labels = np.array([0] * 30 + [1] * 30 + [2])
    for seed in range(20):
        test, calibration, train = stratified(labels, [10, 10], np.random.default_rng(seed))
        assert 60 in train
        assert np.bincount(labels[test]).tolist() == np.bincount(labels[calibration]).tolist() == [5, 5]
        few = np.array([0] * 5 + [1])
        assert few[stratified(few, [4], np.random.default_rng(seed))[1]].tolist() in ([0, 1], [1, 0])


def test_ties_between_classes_are_broken_at_random():
    labels = np.repeat(np.arange(6), 2)
    found = [labels[stratified(labels, [1], np.random.default_rng(seed))[0]][0] for seed in range(200)]
    assert (np.bincount(found, minlength=6) > 15).all()  # 33 each are expected


@pytest.mark.parametrize("test_size, expected", [(0.25, 20), (7, 7), (1, 1), (0.001, 1)])
def test_a_test_set_is_a_fraction_or_a_number_and_no_example_is_in_two_splits(test_size, expected):
    federation = from_tensors([numbered(80)], test_size=test_size, calibration_size=10)
    rows = rows_of(federation, 0)
    assert len(rows["test"]) == expected and len(rows["calibration"]) == 10
    assert sorted(sum(rows.values(), [])) == list(range(80))
    for part in PARTS:
        x, y = getattr(federation, part).client(0)
        assert torch.equal(y, x[:, 0].long() % 2)  # each example kept its label


def test_splits_depend_on_the_seed_and_the_client_alone():
    clients = {name: numbered(80) for name in "ABC"}
    one, again, other = (from_tensors(clients, seed=seed) for seed in (0, 0, 1))
    without = from_tensors({name: clients[name] for name in "CA"}, seed=0)
    assert rows_of(one, 2) == rows_of(again, 2) == rows_of(without, 0)
    assert rows_of(one, 0) == rows_of(without, 1) != rows_of(one, 1)
    assert rows_of(one, 0) != rows_of(other, 0)
    larger = from_tensors(clients, seed=0, calibration_size=20)
    assert rows_of(one, 0)["test"] == rows_of(larger, 0)["test"]
    listed = from_tensors(list(clients.values()), seed=0)
    assert rows_of(listed, 0) != rows_of(listed, 1) and listed.client_names is None


def test_test_and_calibration_sets_of_ones_own_are_taken_as_they_are():
    train, test, held = ({name: numbered(9, start=start) for name in "AB"} for start in (0, 100, 200))
    turned = dict(reversed(test.items()))
    turned["A"] = numbered(5, start=300)
    federation = from_tensors(train, turned, calibration=held)
    assert rows_of(federation, 0)["train"] == list(range(9))
    assert rows_of(federation, 0)["test"] == list(range(300, 305))
    assert rows_of(federation, 1)["test"] == list(range(100, 109))
    assert rows_of(federation, 1)["calibration"] == list(range(200, 209))


def test_token_level_targets_are_split_too():
    x = {"input_ids": torch.arange(1, 61).view(20, 3), "attention_mask": torch.ones(20, 3).long()}
    y = torch.randint(1, 9, (20, 3))
    federation = from_tensors([(x, y)], test_size=5, calibration_size=5)
    assert [getattr(federation, part).sizes.tolist() for part in PARTS] == [[10], [5], [5]]


# Tensors, arrays and tables.


def test_arrays_and_tables_give_the_federation_that_tensors_give():
    x, y = torch.rand(50, 3), torch.arange(50) % 2
    table = pd.DataFrame(x.numpy().astype(np.float64), columns=list("abc"))
    names = pd.Series(np.where(y == 1, "yes", "no"))
    expected = from_tensors([(x, y)])
    for inputs in (x.numpy(), x.double().numpy(), table):
        for labels in (y.numpy(), y.bool(), y.bool().numpy(), pd.Series(y), names, names.to_numpy(), y.to(torch.uint8)):
            found = from_tensors([(inputs, labels)])
            for part in PARTS:
                for one, other in zip(getattr(found, part).client(0), getattr(expected, part).client(0)):
                    assert torch.equal(one, other) and one.dtype == other.dtype
            assert found.classes == 2
            named = getattr(labels, "dtype", None) in (names.dtype, names.to_numpy().dtype)
            assert found.class_names == (("no", "yes") if named else None)


def test_tensors_keep_their_dtype_and_arrays_of_tokens_theirs():
    x, y = numbered(50)
    assert from_tensors([(x.double(), y)]).train.client(0)[0].dtype == torch.float64
    assert from_tensors([(np.ones((50, 4), np.int64), y)]).train.client(0)[0].dtype == torch.int64
    array = np.zeros((50, 1), np.float32)
    federation = from_tensors([(array, y)])
    array += 1
    assert not federation.train.client(0)[0].any()  # a copy
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of a tensor that shares what cannot be written
        from_tensors([(array, y.numpy())])


def test_classes_have_one_number_in_all_clients_and_splits():
    train = [(torch.rand(40, 1), np.array(["b", "d"] * 20)), (torch.rand(40, 1), np.array(["c"] * 40))]
    test = [(torch.rand(1, 1), np.array(["a"])), (torch.rand(1, 1), np.array(["d"]))]
    federation = from_tensors(train, test)
    assert federation.class_names == ("a", "b", "c", "d") and federation.classes == 4
    assert set(federation.train.client(0)[1].tolist()) == {1, 3}
    assert set(federation.train.client(1)[1].tolist()) == {2}
    assert [federation.test.client(i)[1].tolist() for i in range(2)] == [[0], [3]]
    assert from_tensors([numbered(40)], class_names=["no", "yes", "never"]).classes == 3


def test_names_are_kept_by_rows_map_and_to():
    federation = from_tensors({name: numbered(40) for name in "ABC"}, class_names=["no", "yes"])
    for one in (federation.to("cpu"), federation.map(lambda x: 2 * x)):
        assert one.client_names == ("A", "B", "C") and one.class_names == ("no", "yes")
    assert from_tensors({7: numbered(40), 8: numbered(40)}).client_names == ("7", "8")
    for index, names in (([2, 0], ("C", "A")), (slice(1, 3), ("B", "C")), (slice(None, None, 2), ("A", "C"))):
        assert federation.rows(index).client_names == names
        assert federation.rows(index).train.ids == tuple("ABC".index(name) for name in names)
    with pytest.raises(ValueError, match=r"index\[1\] must be at most 2, not 3"):
        federation.rows([0, 3])
    split = federation.train
    with pytest.raises(ValueError, match=r"client_names: 2 of them, not 3: \('A', 'B'\)"):
        Federation(split, split, split, 2, client_names=["A", "B"])
    with pytest.raises(ValueError, match="class_names: 1 of them, not 2"):
        Federation(split, split, split, 2, class_names=["A"])


PAIR = numbered(40)


@pytest.mark.parametrize(
    "train, options, said",
    [
        (5, {}, "train must be a list or a dictionary with at least 1 entry, not 5"),
        ([], {}, r"train must be a list or a dictionary with at least 1 entry, not \[\]"),
        ({}, {}, "train must be a list or a dictionary with at least 1 entry, not {}"),
        ({"A": PAIR, "B": 3}, {}, r"train\['B'\] must be a pair of inputs and labels, not 3"),
        ([TensorDataset(*PAIR)], {}, r"train\[0\] must be a pair .* \(for a Dataset, see from_datasets\)"),
        ({"A": PAIR, "B": numbered(20)}, {}, "client 'B' has 20 examples: none is left if 4 are tested on and 30"),
        ({"A": PAIR, "B": (PAIR[0], PAIR[1] - 1)}, {}, "client 'B': label -1 is below 0"),
        ({"A": PAIR, "B": (torch.rand(40, 2), PAIR[1])}, {}, r"client 'B' has inputs of shape \(2,\), client 'A' of"),
        ({"A": PAIR}, dict(test=[PAIR]), "test must be a dictionary like train"),
        ([PAIR], dict(test={"A": PAIR}), "test must be a list like train"),
        ({"A": PAIR}, dict(test={"B": PAIR}), "test must have the clients of train: only one of the two has 'A'"),
        ({"A": PAIR, "B": (PAIR[0], ["x"] * 40)}, {}, "client 'B': labels must be tensors"),
        (
            {"A": PAIR, "B": (PAIR[0], np.array(["x"] * 40))},
            {},
            "labels must be names for all clients and splits, or n",
        ),
        ([(PAIR[0], np.array(["x", None] * 20))], {}, "client 0: the label is missing in row 1"),
        ([(PAIR[0], pd.Series([1.0, np.nan] * 20))], {}, "client 0: the label is missing in row 1"),
        ([(np.array(["x"] * 40), PAIR[1])], {}, "client 0: inputs must be tensors"),
        ([(pd.DataFrame({"a": ["x"] * 40}), PAIR[1])], {}, "client 0: column 'a' holds (str|object), not numbers"),
        ([PAIR], dict(test_size=1.5), r"test_size must be a whole number of at least 1, or a fraction in \(0, 1\)"),
        ([PAIR], dict(class_names=["no"]), "class_names: 1 of them, not 2"),
    ],
)
def test_from_tensors_refuses(train, options, said):
    with pytest.raises(ValueError, match=said) as caught:
        from_tensors(train, **options)
    assert "\n" not in str(caught.value)


# Tables.


def test_a_table_becomes_clients_classes_and_features():
    table = patients()
    federation = from_dataframe(table, client="ward", label="sick", test_size=0.25, calibration_size=8, seed=3)
    assert federation.client_names == ("A", "B", "C") and federation.class_names == ("no", "yes")
    assert [getattr(federation, part).sizes.tolist() for part in PARTS] == [[22] * 3, [8] * 3, [10] * 3]
    seen = []
    for client, ward in enumerate("ABC"):
        for part, share in (("calibration", 2), ("test", 2.5)):
            assert abs(int(getattr(federation, part).client(client)[1].sum()) - share) < 1  # a quarter is sick
        for part in PARTS:
            x, y = getattr(federation, part).client(client)
            rows = table.iloc[x[:, 0].int().tolist()]
            assert x.dtype == torch.float32 and (rows.ward == ward).all()
            assert x[:, 1].tolist() == rows.fever.tolist() and y.tolist() == (rows.sick == "yes").tolist()
            seen += rows.row.tolist()
    assert sorted(seen) == list(range(120))


@pytest.mark.parametrize(
    "labels, names",
    [
        (np.resize([5, 2, 9], 120), ("2", "5", "9")),
        (np.resize([5.0, 2.0], 120), ("2", "5")),
        (np.resize([True, False], 120), ("False", "True")),
        (pd.Categorical(np.resize(["lo", "hi"], 120), ["lo", "mid", "hi"], ordered=True), ("lo", "mid", "hi")),
        (pd.array(np.resize([5, 2], 120), dtype="Int64"), ("2", "5")),
        (pd.array(np.resize(["b", "a"], 120), dtype="string"), ("a", "b")),
        (pd.to_datetime(np.resize(["2020-02-01", "2020-01-01"], 120)), ("2020-01-01 00:00:00", "2020-02-01 00:00:00")),
    ],
)
def test_labels_of_any_type_become_classes(labels, names):
    table = patients(sick=labels)
    federation = from_dataframe(table, client="ward", label="sick", calibration_size=8)
    assert federation.class_names == names and federation.classes == len(names)
    x, y = federation.train.client(1)
    of_row = table.sick.astype("int64") if table.sick.dtype.kind == "f" else table.sick
    assert [str(of_row[row]) for row in x[:, 0].int().tolist()] == [names[label] for label in y.tolist()]


def test_clients_are_in_the_order_of_their_values_whatever_the_index():
    table = patients(ward=np.resize([10, 9, 2], 120)).set_index(pd.Index(["same"] * 120))
    federation = from_dataframe(table, client="ward", label="sick", features=["row"], calibration_size=8)
    assert federation.client_names == ("2", "9", "10")
    assert set(federation.train.client(0)[0][:, 0].int().tolist()) <= set(range(2, 120, 3))
    kinds = pd.Categorical(table.ward, [9, 2, 10, 7])
    federation = from_dataframe(table.assign(ward=kinds), client="ward", label="sick", calibration_size=8)
    assert federation.client_names == ("9", "2", "10")


def test_a_test_table_has_the_same_clients_and_classes():
    table = patients()
    test = patients(12, sick=["maybe"] * 12)
    federation = from_dataframe(table, client="ward", label="sick", test=test, calibration_size=8)
    assert federation.class_names == ("maybe", "no", "yes")
    assert federation.test.sizes.tolist() == [4, 4, 4] and federation.train.sizes.tolist() == [32] * 3
    assert federation.test.client(0)[0][:, 0].tolist() == [1, 4, 7, 10]
    with pytest.raises(ValueError, match="test must have the clients of train: only one of the two has 'C'"):
        from_dataframe(table, client="ward", label="sick", test=test[test.ward != "C"])


TABLE = patients()
LARGE = pd.concat([TABLE, TABLE[:3].assign(ward="tiny")])


@pytest.mark.parametrize(
    "table, options, said",
    [
        (
            TABLE,
            dict(client="wrad"),
            r"client must be a column of df, not 'wrad': there are \['row', 'fever', 'ward', 'sick'\]",
        ),
        (TABLE, dict(label="x"), "label must be a column of df, not 'x'"),
        (TABLE, dict(features=["row", "x"]), "features must be a column of df, not 'x'"),
        (TABLE, dict(features=["row", "sick"]), "client, label and features must be different columns"),
        (TABLE, dict(label="ward"), "client, label and features must be different columns"),
        (TABLE[["ward", "sick"]], {}, "features must be at least one column besides client and label"),
        (TABLE[:0], {}, "df must be a table with rows"),
        (
            pd.concat([TABLE, TABLE[["row"]]], axis=1),
            {},
            "df must be a table with rows, whose columns have different n",
        ),
        (TABLE.assign(kind="x"), {}, r"column 'kind' holds (str|object), .*pd.get_dummies\(df, columns=\['kind'\]\)"),
        (TABLE.assign(kind=pd.Categorical(["x"] * 120)), {}, "column 'kind' holds category, not numbers"),
        (TABLE.assign(when=pd.Timestamp("2020")), {}, "column 'when' holds datetime64"),
        (TABLE.assign(wave=1j), {}, "column 'wave' holds complex128"),
        (
            TABLE.assign(row=TABLE.row.astype(float).where(TABLE.row != 17)),
            {},
            "column 'row' has nan in row 17: fill or",
        ),
        (
            TABLE.assign(row=TABLE.row.astype("Int64").where(TABLE.row != 17)),
            {},
            "column 'row' has nan in row 17: fill",
        ),
        (TABLE.assign(row=TABLE.row.astype(float).where(TABLE.row != 17, 1e300)), {}, "column 'row' has inf in row 17"),
        (TABLE.assign(sick=TABLE.sick.where(TABLE.row != 17)), {}, "label: column 'sick' is missing in row 17"),
        (TABLE.assign(ward=TABLE.ward.where(TABLE.row != 17)), {}, "client: column 'ward' is missing in row 17"),
        (
            TABLE.assign(sick=TABLE.row / 8),
            {},
            r"label: column 'sick' must be names or whole numbers, not 0.125 \(row 1\)",
        ),
        (TABLE.assign(sick=[1, "a"] * 60), {}, "label: column 'sick' has values of several types, such as 1 and 'a'"),
        (TABLE.assign(sick=[[1]] * 120), {}, r"label: column 'sick' must be names or whole numbers, not \[1\]"),
        (LARGE, {}, "client 'tiny' has 3 examples: none is left if 1 are tested on and 30 calibrate"),
    ],
)
def test_from_dataframe_refuses(table, options, said):
    with pytest.raises(ValueError, match=said) as caught:
        from_dataframe(table, **dict(client="ward", label="sick") | options)
    assert "\n" not in str(caught.value)


# Data sets of torch.


class Items(Dataset):
    """Examples from a list."""

    def __init__(self, items, classes=None):
        self.items = items
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_data_sets_give_the_federation_that_their_tensors_give():
    clients = {name: numbered(60, start=100 * i) for i, name in enumerate("AB")}
    expected = from_tensors(clients, test_size=0.3, seed=1)
    as_items = {
        name: Items([(row.numpy(), label.item()) for row, label in zip(*pair)]) for name, pair in clients.items()
    }
    mappings = {n: Items([({"x": row}, label) for row, label in zip(*pair)]) for n, pair in clients.items()}
    for sets in ({name: TensorDataset(*pair) for name, pair in clients.items()}, as_items, mappings):
        found = from_datasets(sets, test_size=0.3, seed=1)
        assert found.client_names == ("A", "B") and found.classes == 2
        for part in PARTS:
            for client in range(2):
                x, y = getattr(found, part).client(client)
                other, labels = getattr(expected, part).client(client)
                assert torch.equal(x["x"] if isinstance(x, dict) else x, other) and torch.equal(y, labels)


def test_a_test_set_of_each_client_and_a_list_without_names():
    halves = [random_split(TensorDataset(*numbered(60)), [0.5, 0.5]) for _ in range(2)]
    federation = from_datasets([one for one, _ in halves], [other for _, other in halves], calibration_size=10)
    assert federation.client_names is None and federation.train.sizes.tolist() == [20, 20]
    for client, (one, other) in enumerate(halves):
        rows = rows_of(federation, client)
        assert sorted(rows["train"] + rows["calibration"]) == sorted(one.indices) and rows["test"] == sorted(
            other.indices
        )


def folder(root, **colours):
    """A folder of images, as ``ImageFolder`` reads it: 40 of each class, of one colour."""
    for kind, colour in colours.items():
        (root / kind).mkdir(parents=True)
        for i in range(40):
            Image.new("RGB", (6, 4), colour).save(root / kind / f"{i}.png")
    return root


def test_image_folders_with_other_classes_agree_on_their_numbers(tmp_path):
    from torchvision.datasets import ImageFolder

    one = ImageFolder(folder(tmp_path / "one", cat=(255, 0, 0), dog=(0, 51, 0)))
    two = ImageFolder(folder(tmp_path / "two", ant=(0, 0, 102), dog=(0, 51, 0)))
    federation = from_datasets({"one": one, "two": Subset(two, range(80))}, test_size=10, calibration_size=10)
    assert federation.class_names == ("ant", "cat", "dog")
    colours = torch.tensor([[0, 0, 0.4], [1, 0, 0], [0, 0.2, 0]])
    for part in PARTS:
        for client, classes in ((0, {1, 2}), (1, {0, 2})):
            x, y = getattr(federation, part).client(client)
            assert x.shape[1:] == (3, 4, 6) and set(y.tolist()) == classes
            torch.testing.assert_close(x, colours[y][:, :, None, None].expand_as(x))


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("1", 1)])
def test_images_become_floats_in_the_unit_range(mode, channels):
    image = Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode)
    x, _ = from_datasets([Items([(image, 0)] * 40)]).train.client(0)
    assert x.shape[1:] == (channels, 4, 5) and x.dtype == torch.float32 and (x == 1).all()


def test_a_data_set_is_read_once_so_that_augmentation_is_frozen():
    class Noisy(Items):
        reads = 0

        def __getitem__(self, i):
            Noisy.reads += 1
            return torch.rand(1), 0

    federation = from_datasets([Noisy([None] * 40)])
    assert Noisy.reads == 40
    assert torch.equal(federation.train.client(0)[0], federation.train.client(0)[0])


GREY, WIDE = Image.new("L", (4, 4)), Image.new("L", (5, 4))


@pytest.mark.parametrize(
    "dataset, said",
    [
        (iter([PAIR]), "client 'A': a data set must have a length and examples by number"),
        (Items([]), "client 'A' has no examples"),
        (Items([(torch.rand(1), 0, 0)] * 40), "client 'A': a data set must give pairs of an input and a label, not"),
        (Items([torch.rand(1)] * 40), "client 'A': a data set must give pairs of an input and a label, not"),
        (
            Items([(GREY, 0)] * 39 + [(WIDE, 0)]),
            r"client 'A': example 39 is of shape \(1, 4, 5\), example 0 of \(1, 4, 4\)",
        ),
        (Items([(GREY, 0), (GREY.convert("RGB"), 0)] * 20), r"example 1 is of shape \(3, 4, 4\)"),
        (Items([(GREY.convert("F"), 0)] * 40), "client 'A': images must be grey or RGB, not of PIL's mode 'F'"),
        (Items([("text", 0)] * 40), "client 'A': inputs must be tensors, arrays, numbers or images, not 'text'"),
        (Items([(torch.zeros(1, 4, 4, dtype=torch.uint8), 0)] * 40), "client 'A': images must be floating numbers"),
    ],
)
def test_from_datasets_refuses(dataset, said):
    with pytest.raises(ValueError, match=said) as caught:
        from_datasets({"A": dataset})
    assert "\n" not in str(caught.value)
