"""The Flower app in one process computes what the engine computes, and a fault costs only the client that has it."""

import json
import os
import random
import signal
import threading
import time
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("flwr", reason="needs the extra `flower`")

from flwr.app import Array, Context, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from local_grid import LocalGrid

from potara_lite import Setting, compare, estimate_calibrated, evaluate, load_adapter, merge_exact, prepare, train
from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import flatten, repeat_adapter, select_clients
from potara_lite.baselines import rounds
from potara_lite.baselines.algorithms import ALGORITHMS, FEDIT
from potara_lite.baselines.privacy import Privacy
from potara_lite.baselines.rounds import run_algorithm
from potara_lite.deployment import ClientState, RunConfig, Timeouts, client_app, play, server_app
from potara_lite.experiment import MODEL_PAIR_METHODS, training_options
from potara_lite.files import FileError

ROUNDS = dict(rounds=3, **{"round-steps": 2, "local-steps": 4, "batch-size": 4, "lr": 1e-2})
CONFIG = {"clients": 3, "method": "FedIT", "seed": 6} | ROUNDS
QUICK = Timeouts(join=0.2, answer=5.0, pause=0.01)


class World:
    """The tiny federation in float64: a run of it with Flower, and the same run by the engine."""

    def __init__(self, adapted, federation):
        self.adapted, self.federation = adapted, federation

    def __call__(self, method="FedIT", clients=(2, 0, 1), *, load=None, node=(), config=(), algorithms=ALGORITHMS,
                 grid=LocalGrid, **options):  # fmt: skip
        """A grid, and a function that plays a run on it."""
        config = CONFIG | {"method": method} | dict(config)
        app = client_app(load or (lambda _, i, node: (self.adapted, self.federation.rows([i]))), algorithms)
        self.grid = grid(app, {client: dict(node) for client in clients}, config, **options)
        self.run_config = RunConfig.of(config, algorithms)
        return self.grid, lambda timeouts=QUICK: play(self.grid, self.run_config, self.adapted, timeouts)

    def engine(self):
        """The algorithm's result and the local models."""
        setting, seed = self.run_config.setting, self.run_config.seed
        options = training_options(setting)
        reference = run_algorithm(
            self.run_config.algorithm, self.adapted, self.federation.train,
            rounds=setting.rounds, local_steps=setting.round_steps, seed=seed, **options,
        )  # fmt: skip
        start = repeat_adapter(self.adapted.initial, len(self.federation))
        local = train(self.adapted, start, self.federation.train, steps=setting.local_steps, seed=(seed, 1), **options)
        return reference, local.adapters

    def engine_with(self, parts, monkeypatch):
        """The same with these clients in each round."""
        monkeypatch.setattr(rounds, "participants", lambda ids, share, seed, number: torch.tensor(parts[number]))
        return self.engine()

    def assert_weights(self, result, federated, local):
        """The weights are those of the estimator on all clients' models. Returns its estimate."""
        estimate = estimate_calibrated(self.adapted, federated, local, self.federation.calibration)
        np.testing.assert_allclose([result.weight[i] for i in range(3)], estimate.client_weight, rtol=1e-9)
        return estimate

    def assert_losses(self, result, method, adapted, models):
        loss, accuracy = evaluate(adapted, models, self.federation.test)
        rows = result.rows[result.rows.method == method]
        np.testing.assert_allclose(rows.loss, loss, rtol=1e-9)
        assert rows.accuracy.tolist() == accuracy.tolist() and rows.client.tolist() == [0, 1, 2]
        return rows


@pytest.fixture
def world(adapted64, federation64):
    return World(adapted64, federation64)


def assert_close(found, wanted):
    for name in found.keys() & wanted.keys():
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ALGORITHMS)
def test_every_algorithm_is_what_the_engine_plays(method, world):
    _, run = world(method)
    result, (reference, local) = run(), world.engine()
    assert result.events == []
    assert_close(result.message, reference.tensors)
    if result.federated is not None:
        assert_close(result.federated, reference.federated)
        assert result.federated.keys() == reference.federated.keys()
    rows = world.assert_losses(result, "federated", reference.adapted, reference.personal)
    for column, paid in (("bytes_up", "up"), ("bytes_down", "down"), ("steps", "steps")):
        assert rows[column].tolist() == getattr(reference.ledger, paid).tolist(), column
    if method in ("FedEx-LoRA", "FLoRA", "APFL", "FedDPA-T", "FedALT"):  # their models are no adapters of rank r
        assert set(result.rows.method) == {"federated"} and result.weight == {}
        return
    estimate = world.assert_weights(result, reference.personal, local)
    merged = merge_exact(reference.personal, local, estimate.weight)
    world.assert_losses(result, "potara-calibrated", world.adapted, merged)


def test_the_numbers_that_travel_are_those_of_the_estimate(world):
    grid, run = world()
    result, (reference, local) = run(), world.engine()
    floats = world.assert_weights(result, reference.personal, local).floats
    for client in range(3):
        found = {"up": 0, "down": 0}
        for kind, who, sent, reply in grid.log:
            if who == client:
                for way, content in (("down", sent), ("up", reply)):
                    values = content.get(way, {}).values()
                    found[way] += sum(len(v) if isinstance(v, list) else 1 for v in values)
                tensors = [kind for content in (sent, reply) if "tensors" in content]
                assert not tensors or kind in ("train", "query.finish")
        assert (found["up"], found["down"]) == floats == (13, 3)
    asked, queries = [kind for kind, who, *_ in grid.log if who == 0], ("finish", "curve", "slope", "offset", "merge")
    assert asked == ["query.join", *["train"] * 3, *(f"query.{name}" for name in queries), "evaluate"]


SMALL = Setting(clients=3, train_size=20, calibration_size=10, test_size=20, rounds=2, round_steps=2, local_steps=4)


def test_the_app_writes_what_the_command_writes(tmp_path, monkeypatch):
    """Server app and client apps as Flower calls them, on shipped data: rows and PEFT folders are the command's."""
    names = ("clients", "train_size", "calibration_size", "test_size", "rounds", "round_steps", "local_steps")
    config = {name.replace("_", "-"): getattr(SMALL, name) for name in names} | {"out": str(tmp_path), "seed": 1}
    monkeypatch.setattr("potara_lite.experiment.prepare", cache(prepare))  # read the images once
    grid = LocalGrid(client_app(), {i: {"folder": str(tmp_path)} for i in range(3)}, config)
    server_app()(grid, Context(1, 0, {}, RecordDict(), config))
    found = pd.read_csv(tmp_path / "results.csv")
    methods = {name: MODEL_PAIR_METHODS[name] for name in ("federated", "local", "potara-calibrated")}
    pd.testing.assert_frame_equal(
        found.drop(columns="seconds"), compare(SMALL, [1], methods).drop(columns="seconds"), rtol=1e-5
    )
    assert json.loads((tmp_path / "events.json").read_text()) == []
    adapted, federation = prepare(SMALL, 1)
    folder = tmp_path / "adapters" / "seed-1"
    assert load_adapter(adapted, folder / "federated").keys() == adapted.initial.keys()
    for client in range(3):
        for name in ("local", "potara-calibrated"):
            model = load_adapter(adapted, folder / f"client-{client}" / name)
            loss, _ = evaluate(adapted, repeat_adapter(model, 1), federation.test.rows([client]))
            row = found[(found.client == client) & (found.method == name)]
            np.testing.assert_allclose(loss, row.loss, rtol=1e-5)


def test_private_rounds_are_those_of_the_engine(world):
    private = replace(ALGORITHMS["FFA-LoRA"], privacy=Privacy(clip=0.05, noise_multiplier=0.5, seed=3))
    _, run = world("private", algorithms={"private": private})
    assert_close(run().message, world.engine()[0].tensors)


# Faults. The engine is told who takes part in which round; its run is then what must come out.


def trained(grid, total=3):
    """The clients whose update came in each round."""
    found = [[] for _ in range(total)]
    for kind, client, sent, reply in grid.log:
        if kind == "train" and reply is not None:
            found[int(sent["config"]["number"])].append(client)
    return [sorted(some) for some in found]


def first_row(stack):
    return {name: tensor[0] for name, tensor in stack.items()}


def in_round(number, kind="train"):
    """Whether a message is that of a round."""
    return lambda message: message.metadata.message_type == kind and message.content["config"]["number"] == number


def not_a_number(message):
    """The answer of a client whose numbers are broken: what it received, one of them NaN."""
    tensors = message.content["tensors"]
    name = next(iter(tensors))
    tensors[name] = Array(np.full_like(tensors[name].numpy(), np.nan))
    return Message(RecordDict({"tensors": tensors, "metrics": message.content["config"]}), reply_to=message)


def another_shape(message):
    """The answer of a client with another rank."""
    tensors = message.content["tensors"]
    name = next(iter(tensors))
    tensors[name] = Array(np.zeros((3, *tensors[name].shape[1:])))
    return Message(RecordDict({"tensors": tensors, "metrics": message.content["config"]}), reply_to=message)


def gone(message):
    """The answer of the SuperLink in the name of a node that is gone: it comes from node 1."""
    reply = Message(Error(3, "Error: Node Unavailable"), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = 1
    return reply


def failing(message):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    "answer, said",
    [
        (not_a_number, "train: not finite: base_model.model.blocks.0.attn.qkv.lora_A.weight"),
        (another_shape, "train: update must be of this base"),
        (failing, "train: error 1: RuntimeError: out of memory"),
        (gone, "train: error 3: Error: Node Unavailable"),
        (lambda message: "silence", "train: no answer within 5 s"),
    ],
)
@pytest.mark.parametrize("method", ["FedIT", "Ditto"])
def test_a_client_with_a_fault_misses_its_round_and_no_other(method, answer, said, world, monkeypatch):
    second = in_round(1)
    _, run = world(method, fault=lambda client, m: answer(m) if client == 1 and second(m) else None)
    result = run()
    (event,) = result.events
    assert event["client"] == 1 and event["what"].startswith(said)
    reference, _ = world.engine_with([[0, 1, 2], [0, 2], [0, 1, 2]], monkeypatch)
    assert_close(first_row(result.message), first_row(reference.tensors))
    rows = world.assert_losses(result, "federated", world.adapted, reference.personal)
    assert rows.steps.tolist() == reference.ledger.steps.tolist()


def test_a_client_that_comes_late_gets_the_result_and_uploads_no_tensor(world, monkeypatch):
    second = in_round(1)  # and a round follows, in which it still takes no part

    def arrive(client, message):
        if second(message) and 102 not in grid.nodes:
            grid.add(102, {"partition-id": 2})

    grid, run = world(clients=(0, 1), fault=arrive)
    result = run()
    assert [(event["client"], event["what"][:11]) for event in result.events] == [(2, "joined late")]
    reference, local = world.engine_with([[0, 1]] * 3, monkeypatch)
    assert_close(first_row(result.message), first_row(reference.tensors))
    world.assert_weights(result, reference.personal, local)
    late = result.rows[(result.rows.client == 2) & (result.rows.method == "potara-calibrated")].iloc[0]
    message = reference.by_round.down[-1, 0].item()
    assert (late.bytes_up, late.bytes_down, late.steps) == (13 * 4, message + 3 * 4, 4)
    assert not [kind for kind, client, _, reply in grid.log if client == 2 and "tensors" in (reply or {})]


def test_a_client_with_another_rank_is_refused(world, backbone64, monkeypatch):
    other = attach(backbone64, rank=3, alpha=4.5)
    grid, run = world(load=lambda _, i, node: (other if i == 1 else world.adapted, world.federation.rows([i])))
    result = run()
    assert [(event["client"], event["what"]) for event in result.events] == [
        (1, "refused: another backbone, rank, setting or seed than the server's")
    ]
    assert trained(grid) == [[0, 2]] * 3
    reference, _ = world.engine_with([[0, 2]] * 3, monkeypatch)
    assert_close(first_row(result.message), first_row(reference.tensors))


@pytest.mark.parametrize("client, said", [(0, "another node already is this client"), (3, "its number is outside 0")])
def test_a_node_that_is_no_further_client_is_refused(client, said, world):
    part = world.federation.train.rows([0])
    parts = {name: replace(part, ids=(client,)) for name in ("train", "calibration", "test")}
    odd = replace(world.federation, **parts)
    grid, run = world(load=lambda _, i, node: (world.adapted, odd if node.get("odd") else world.federation.rows([i])))
    grid.get_node_ids = lambda: list(grid.nodes)
    grid.add(200, {"partition-id": client, "odd": True})
    result = run()
    assert any(event["what"].startswith(f"refused: {said}") for event in result.events)
    assert len(result.rows) == 9


def test_a_node_that_restarts_continues_with_what_it_had(world, tmp_path):
    """Between rounds the node of client 1 ends and comes back as another, with an empty memory and the same folder."""
    grid, run = world("Ditto", node={"folder": str(tmp_path)})
    looks = []

    def restart():
        looks.append(1)
        if len(looks) == 3:  # before the second round
            del grid.nodes[101]
            grid.add(301, {"partition-id": 1, "folder": str(tmp_path)})
        return list(grid.nodes)

    grid.get_node_ids = restart
    result = run()
    assert [(event["client"], event["what"]) for event in result.events] == [(1, "is back")]
    reference, _ = world.engine()
    assert_close(first_row(result.message), first_row(reference.tensors))
    world.assert_losses(result, "federated", world.adapted, reference.personal)
    assert trained(grid) == [[0, 1, 2]] * 3


def test_a_state_that_is_damaged_is_refused_by_name(tmp_path):
    context = SimpleNamespace(node_config={"partition-id": 1, "folder": str(tmp_path)}, run_id=7)
    state = ClientState(context)
    state.save(local={"b": torch.ones(2), "a": torch.zeros(3)})
    assert list(ClientState(context).parts["local"]) == ["b", "a"]
    assert [path.suffix for path in state.path.parent.iterdir()] == [".safetensors"]
    content = state.path.read_bytes()
    for damaged in (b"", content[:20], content[:-1], bytes(8) + content[8:]):
        state.path.write_bytes(damaged)
        with pytest.raises(FileError, match="cannot read .*client-1-run-7.safetensors"):
            ClientState(context)


def test_a_run_does_not_continue_with_what_another_one_left(world, tmp_path):
    one, two = (world(node={"folder": str(tmp_path)}, run_id=run)[1]() for run in (1, 2))
    assert torch.equal(flatten(one.message), flatten(two.message))
    assert len(list(tmp_path.glob("state/*.safetensors"))) == 6


@pytest.mark.parametrize("method", ["FedEx-LoRA", "FLoRA"])
def test_where_the_state_is_the_sum_of_all_messages_who_missed_one_is_out(method, world, monkeypatch):
    first = in_round(0)
    grid, run = world(method, fault=lambda client, m: "silence" if client == 2 and first(m) else None)
    result = run()
    assert trained(grid) == [[0, 1]] * 3 and result.rows.client.tolist() == [0, 1]
    assert_close(result.federated, world.engine_with([[0, 1]] * 3, monkeypatch)[0].federated)


def test_messages_that_differ_by_client_wait_for_all_clients(world):
    first = in_round(0)
    grid, run = world("FedALT", fault=lambda client, m: "silence" if client == 2 and first(m) else None)
    result = run()
    assert [event["what"][:16] for event in result.events] == ["train: no answer", "the message stay"]
    assert trained(grid) == [[0, 1], [0, 1, 2], [0, 1, 2]] and len(result.rows) == 3


def test_too_few_clients_are_an_error_and_not_a_wait(world):
    _, run = world(clients=(0,))
    with pytest.raises(RuntimeError, match="1 clients joined within 0.1 s, at least 2 are needed"):
        run(Timeouts(join=0.1, pause=0.01, least=2))
    _, run = world(fault=lambda client, m: "silence" if m.metadata.message_type == "query.finish" else None)
    with pytest.raises(RuntimeError, match="no client was left"):
        run()


def test_a_wrong_configuration_is_refused():
    with pytest.raises(ValueError, match="method 'FedItt' is none of"):
        RunConfig.of({"method": "FedItt"})
    with pytest.raises(ValueError, match="clients must be at least 1"):
        RunConfig.of({"clients": 0})
    assert Timeouts.of({"timeout": 3.0, "min-clients": 2}) == Timeouts(answer=3.0, least=2)


def garbage(**records):
    """The answer of a client that sends these instead of what it was asked for."""
    from flwr.app import ConfigRecord, MetricRecord

    kinds = {"config": ConfigRecord}
    return lambda message: Message(
        RecordDict({name: kinds.get(name, MetricRecord)(found) for name, found in records.items()}), reply_to=message
    )


WHO = dict(client=1, train=13, calibration=6)
GARBAGE = [
    ("query.join", garbage(), "no proper handshake: KeyError"),
    ("query.join", garbage(metrics=WHO), "no proper handshake: KeyError"),
    ("query.join", garbage(metrics=WHO | {"train": -1}, config={}), "train must be at least 1, not -1"),
    ("query.join", garbage(metrics=WHO | {"train": np.nan}, config={}), "train must be a whole number, not nan"),
    ("query.join", garbage(metrics=WHO | {"client": 0.5}, config={}), "client must be a whole number, not 0.5"),
    ("query.join", garbage(metrics=WHO, config={"fingerprint": 3}), "another backbone"),
    ("query.join", garbage(metrics=WHO, config={}, more={"x": 1}), "another backbone"),
    ("query.join", garbage(metrics=WHO | {"x": 1}, config={}), "no proper handshake: Handshake got an unexpected"),
    ("train", garbage(), "train: no proper answer: KeyError"),
    ("train", garbage(tensors={"x": 1.0}), "train: no proper answer: AttributeError"),
    ("query.curve", garbage(), "query.curve: no proper answer: KeyError"),
    ("query.curve", garbage(up={"losses": [1.0] * 3}), "losses must be 9 finite numbers"),
    ("query.curve", garbage(up={"losses": [float("nan")] * 9}), "losses must be 9 finite numbers"),
    ("query.curve", garbage(up={"losses": 1.0}), "losses must be 9 finite numbers, not 1.0"),
    ("query.curve", garbage(up={"losses": [1.0] * 9}), "query.curve: no proper answer: KeyError"),
    ("query.slope", garbage(up={"variance": float("inf")}), "variance must be 1 finite numbers, not inf"),
    ("query.slope", garbage(up={"variance": -1.0}), "variance must be 1 finite numbers, not -1.0"),
    ("query.offset", garbage(up=dict(slope=[1.0], curvature=1.0, variance=1.0)), "no proper answer: TypeError"),
    ("query.offset", garbage(up={"variance": 1.0}), "query.offset: no proper answer: KeyError"),
    ("query.offset", garbage(up=dict(slope=1.0, curvature=np.nan, variance=1.0)), "curvature must be 1 finite"),
    ("evaluate", garbage(), "evaluate: no proper answer: KeyError"),
    ("evaluate", garbage(metrics={"local-loss": 1.0}), "evaluate: no proper answer: KeyError"),
    (
        "evaluate",
        garbage(metrics={"federated-loss": np.nan, "federated-accuracy": 1.0}),
        "federated-loss must be 1 finite numbers",
    ),
]


@pytest.mark.parametrize("kind, answer, said", GARBAGE, ids=[f"{kind}: {said}" for kind, _, said in GARBAGE])
def test_what_comes_over_the_network_is_checked_where_it_arrives(kind, answer, said, world):
    _, run = world(fault=lambda client, m: answer(m) if client == 1 and m.metadata.message_type == kind else None)
    result = run()
    assert any(said in event["what"] for event in result.events), result.events
    others = result.rows[result.rows.client != 1]
    assert len(others) == 6 and np.isfinite(others[["loss", "accuracy", "weight"]]).to_numpy().all()


def test_another_precision_is_no_update(world):
    def half(message):
        tensors = message.content["tensors"]
        name = next(iter(tensors))
        tensors[name] = Array(tensors[name].numpy().astype("f2"))
        return Message(RecordDict({"tensors": tensors}), reply_to=message)

    _, run = world(fault=lambda client, m: half(m) if client == 1 and m.metadata.message_type == "train" else None)
    assert {event["what"][-36:] for event in run().events} == {"is of torch.float16, not torch.float64"[-36:]}


WRONG = [
    (lambda: RunConfig.of({"seed": "x"}), "seed must be a whole number, not 'x'"),
    (lambda: RunConfig.of({"seed": -1}), "seed must be at least 0, not -1"),
    (lambda: RunConfig.of({"rounds": 1.5}), "rounds must be a whole number, not 1.5"),
    (lambda: RunConfig.of({"lr": "fast"}), "lr must be a number, not 'fast'"),
    (lambda: RunConfig(None, FEDIT), "setting must be an instance of Setting, not None"),
    (lambda: RunConfig(Setting(), "FedIT"), "algorithm must be an instance of Algorithm, not 'FedIT'"),
    (lambda: Timeouts.of({"timeout": 0}), "answer must be above 0, not 0"),
    (lambda: Timeouts.of({"join-timeout": "x"}), "join must be a number, not 'x'"),
    (lambda: Timeouts.of({"min-clients": 0}), "least must be at least 1, not 0"),
    (lambda: Timeouts(pause=float("nan")), "pause must be at least 0, not nan"),
    (lambda: client_app(3), "load must be a function, not 3"),
    (lambda: client_app(len, {"x": 3}), "algorithms['x'] must be an instance of Algorithm, not 3"),
    (lambda: server_app("x"), "load must be a function, not 'x'"),
    (lambda: play(None, {}, None), "grid must be an instance of Grid, not None"),
]


@pytest.mark.parametrize("make, said", WRONG, ids=[said for _, said in WRONG])
def test_a_wrong_argument_is_refused_in_one_line(make, said):
    with pytest.raises(ValueError) as caught:
        make()
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("node, said", [({}, "partition_id must be a whole number, not None"),
                                        ({"partition-id": "x"}, "partition_id must be a whole number, not 'x'"),
                                        ({"partition-id": 0, "folder": 3.5}, "folder must be")])  # fmt: skip
def test_a_node_that_does_not_say_who_it_is_is_told_so(node, said, world):
    grid, run = world(clients=(0, 1, 2))
    grid.get_node_ids = lambda: list(grid.nodes)
    grid.add(200, node)
    assert any(said in event["what"] for event in run().events)


class KillingGrid(LocalGrid):
    """Every message is answered by a process of its own, as Flower does it; ``kills`` of them, those of a random half
    of the messages of rounds, are killed at a random moment of their life."""

    def __init__(self, *args, kills, **options):
        super().__init__(*args, **options)
        self.left, self.random, self.moments, self.usual = kills, random.Random(0), [], 0.1

    def handle(self, message, context):
        aimed = self.left > 0 and message.metadata.message_type == "train" and self.random.random() < 0.5
        (read_end, write_end), began, process = os.pipe(), time.perf_counter(), os.fork()
        if process == 0:
            try:
                reply = self.app(message, context)
                with open(write_end, "wb") as pipe:
                    pipe.write(recorddict_to_proto(reply.content).SerializeToString())
            finally:
                if aimed:  # a kill that comes after the work was done finds the process still there
                    signal.pause()
                os._exit(0)
        os.close(write_end)
        timer = threading.Timer(self.random.uniform(0, self.usual), os.kill, (process, signal.SIGKILL))
        if aimed:
            timer.start()
        with open(read_end, "rb") as pipe:
            answer = pipe.read()
        status = os.waitpid(process, 0)[1]
        timer.cancel()
        if os.WIFSIGNALED(status):
            self.left -= 1
            self.moments.append(time.perf_counter() - began)
            raise RuntimeError("killed")
        self.usual = time.perf_counter() - began
        proto = type(recorddict_to_proto(RecordDict())).FromString(answer)
        return Message(recorddict_from_proto(proto), reply_to=message)


def test_twenty_kills_cost_the_rounds_of_those_killed_and_nothing_else(world, tmp_path):
    """AdamW begins every round anew. So a client that is killed after it kept its state and before it answered has,
    like one killed earlier, nothing that the engine's run without it has not."""
    options = dict(algorithms={"afresh": replace(FEDIT, keep_optimizer=False)}, grid=KillingGrid, kills=20)
    grid, run = world("afresh", node={"folder": str(tmp_path)}, config={"rounds": 25}, **options)
    result = run()
    parts = trained(grid, 25)
    assert len(grid.moments) == 20 and sum(map(len, parts)) == 25 * 3 - 20 and max(grid.moments) > 2 * min(grid.moments)
    assert sum(event["what"] == "train: error 1: RuntimeError: killed" for event in result.events) == 20
    message = replay(parts, world)
    assert_close(result.message, message)
    world.assert_weights(result, message, world.engine()[1])


def replay(parts, world):
    """The last message of FedIT when these clients take part in each round; one without any changes nothing."""
    algorithm, training = world.run_config.algorithm, world.run_config.training
    message = repeat_adapter(world.adapted.initial, 3)
    for number, some in enumerate(parts):
        if some:
            mine, split = select_clients(message, torch.tensor(some)), world.federation.train.rows(some)
            new = algorithm.new_optimizers(mine)
            mine, _, _ = rounds.client_step(algorithm, world.adapted, split, mine, new, number=number, **training)
            message = rounds.server_step(algorithm, mine, split.sizes, 3, sent=message, number=number)
    return message
