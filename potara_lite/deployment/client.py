"""The client of a federation as a Flower ``ClientApp``: it trains, and keeps data, local model and optimiser at home.

A message is a process of its own, which may be killed: what must survive is in ``ClientState``. The exchanges after the rounds
are those of ``docs/deployment.md``; the numbers that travel are computed by the functions of ``estimators.calibrated``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors import safe_open
from safetensors.torch import save

from ..adapters.files import save_adapter
from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, client_adapter, select_clients
from ..baselines.algorithms import ALGORITHMS
from ..baselines.rounds import Algorithm, client_step, finetune_step
from ..checks import door, function, kind, named, path, whole
from ..estimators.calibrated import POINTS, STEP, offset_weights, parabolas
from ..estimators.curve import client_losses, segment_losses
from ..experiment import train_local
from ..federation.split import Federation
from ..files import reading, write_atomically
from ..merging.connectivity import weight_grid
from ..merging.merge import merge_exact
from ..training.train import OptimizerState, evaluate
from .run_config import Config, LoadClient, RunConfig, from_record, load_lab_client, to_record

State = dict[str, torch.Tensor]  # "part/name": tensor


class ClientState:
    """What a client keeps between messages of one run: stacks of one client, by the part that they are.

    Kept in ``state/client-NUMBER-run-RUN.safetensors`` in the node's ``folder``, replaced in one step, so that a killed
    and restarted node goes on with the last finished message; without a folder in Flower's ``context.state``, which
    lives as long as the node does.
    """

    def __init__(self, context: Context):
        folder, client = _folder(context.node_config), context.node_config["partition-id"]
        self.path = folder / "state" / f"client-{client}-run-{context.run_id}.safetensors" if folder else None
        self.context = context

    def load(self) -> dict[str, Adapter]:
        """The parts that are there."""
        parts: dict[str, Adapter] = {}
        for key, tensor in self._read().items():
            part, name = key.split("/", 1)
            parts.setdefault(part, {})[name] = tensor
        return parts

    def save(self, parts: Mapping[str, Adapter]) -> None:
        """Replace everything by ``parts``."""
        flat = {f"{part}/{n}": t.detach().cpu().clone(memory_format=torch.contiguous_format)
                for part, stack in parts.items() for n, t in stack.items()}  # fmt: skip
        if self.path is None:
            self.context.state["home"] = ArrayRecord(flat)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, save(flat, metadata={"order": json.dumps(list(flat))}))  # the file sorts by name

    def _read(self) -> State:
        if self.path is None:
            record = self.context.state.get("home")
            return {} if record is None else {name: t.clone() for name, t in record.to_torch_state_dict().items()}
        if not self.path.is_file():
            return {}
        with reading(self.path), safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in json.loads(file.metadata()["order"])}


@dataclass
class Client:
    """A client while it answers one message: what the run is, what the client has, and what it holds."""

    run_config: RunConfig
    number: int
    adapted: AdaptedBackbone
    data: Federation
    home: ClientState
    parts: dict[str, Adapter]
    folder: Path | None

    @property
    def tensors(self) -> Adapter:
        """What it holds: the algorithm's initial tensors before its first message."""
        if "tensors" not in self.parts:
            initial = {n: t.expand(self.run_config.setting.clients, *t.shape) for n, t in self.adapted.initial.items()}
            every = self.run_config.algorithm.init(initial)
            self.parts["tensors"] = select_clients(every, torch.tensor([self.number]))
        return self.part("tensors")

    @property
    def models(self) -> tuple[Adapter, Adapter]:
        """The two models that are merged."""
        return self.part("federated"), self.part("local")

    def optimizers(self, tensors: Adapter) -> list[OptimizerState]:
        """The optimiser state of every phase."""
        new = self.run_config.algorithm.new_optimizers(tensors)
        kept = [self.parts.get(f"optimizer-{i}") for i in range(len(new))]
        return [OptimizerState(**one).to(self.adapted.device) if one else first for one, first in zip(kept, new)]

    def save(self, **parts: Adapter) -> None:
        """Keep these parts beside the others."""
        self.parts |= parts
        self.home.save(self.parts)

    def save_models(self, **models: Adapter) -> None:
        """Write models as PEFT folders, laid out as the command does, where the node has a folder."""
        if self.folder:
            place = self.folder / "adapters" / f"seed-{self.run_config.seed}" / f"client-{self.number}"
            for name, stack in models.items():
                save_adapter(self.adapted, client_adapter(stack, 0), place / name.replace("_", "-"))

    def part(self, name: str) -> Adapter:
        """One of the parts, on the backbone's device."""
        return {tensor_name: tensor.to(self.adapted.device) for tensor_name, tensor in self.parts[name].items()}


def train_round(client: Client, message: RecordDict) -> RecordDict:
    """A round: take the server's tensors, train, send back what is uploaded."""
    began, run_config, number = time.perf_counter(), client.run_config, int(message["config"]["number"])
    algorithm, model = run_config.algorithm, run_config.algorithm.backbone(client.adapted)
    received = client.tensors | from_record(message["tensors"], client.adapted.device)
    tensors = algorithm.on_receive(received, number)
    optimizers = client.optimizers(tensors)
    tensors, optimizers = client_step(
        algorithm, model, client.data.train, tensors, optimizers, number=number, **run_config.training
    )
    kept = {f"optimizer-{i}": vars(one) for i, one in enumerate(optimizers)} if algorithm.keep_optimizer else {}
    client.save(tensors=tensors, **kept)
    metrics = MetricRecord({"seconds": time.perf_counter() - began})
    return RecordDict({"tensors": to_record(algorithm.upload(tensors)), "metrics": metrics})


def finish(client: Client, message: RecordDict) -> RecordDict:
    """The last message: the client's model of the algorithm, once it has taken its steps after the rounds."""
    run_config, algorithm = client.run_config, client.run_config.algorithm
    received = client.tensors | from_record(message["tensors"], client.adapted.device)
    tensors = algorithm.on_receive(received, run_config.setting.rounds)
    personal, model = algorithm.personal_model(tensors), algorithm.backbone(client.adapted)
    if algorithm.finetune_steps:
        options = dict(number=run_config.setting.rounds, **run_config.training)
        tensors, personal = finetune_step(algorithm, model, client.data.train, tensors, personal, **options)
    client.save(tensors=tensors, federated=personal)
    return RecordDict({"metrics": MetricRecord({"steps": algorithm.local_cost(algorithm.finetune_steps)})})


def curve(client: Client, message: RecordDict) -> RecordDict:
    """Exchange 1: train the local model, send the mean held-out loss at each weight of the grid."""
    began, run_config, adapted = time.perf_counter(), client.run_config, client.adapted
    federated = client.part("federated")
    initial = {name: tensor.unsqueeze(0) for name, tensor in adapted.initial.items()}
    start = federated if run_config.setting.local_from_federated else initial
    local, _, _ = train_local(adapted, start, client.data, run_config.setting, run_config.seed)
    client.save(local=local)
    client.save_models(local=local)
    losses = segment_losses(adapted, federated, local, client.data.calibration, weight_grid(POINTS))
    mean = losses[0].double().cpu().sum(1) / int(client.data.calibration.sizes)
    return RecordDict({"up": MetricRecord({"losses": mean.tolist()}),
                       "metrics": MetricRecord({"seconds": time.perf_counter() - began})})  # fmt: skip


def slope_variance(client: Client, message: RecordDict) -> RecordDict:
    """Exchange 2: the place of the pool's lowest loss came down; send the variance of its samples' slopes there."""
    grid, place = weight_grid(POINTS), int(message["down"]["place"])
    held = client.data.calibration
    three = segment_losses(client.adapted, *client.models, held, grid[place - 1 : place + 2]).unbind(1)
    variance = parabolas(*three, held.sizes, float(grid[1] - grid[0]))[2]
    return RecordDict({"up": MetricRecord({"variance": float(variance)})})


def offset_parabola(client: Client, message: RecordDict) -> RecordDict:
    """Exchange 3: the client's weight came down; send the parabola of its loss in the offset between head and body."""
    weight, held = float(message["down"]["weight"]), client.data.calibration
    models = client.models
    client.save(weight={"client": torch.tensor([weight], dtype=torch.float64)})
    three = (
        merge_exact(*models, offset_weights(models[1], client.parts["weight"]["client"], o)) for o in (-STEP, 0.0, STEP)
    )
    found = parabolas(*(client_losses(client.adapted, one, held) for one in three), held.sizes, STEP)
    return RecordDict({"up": MetricRecord(dict(zip(("slope", "curvature", "variance"), map(float, found))))})


def merge(client: Client, message: RecordDict) -> RecordDict:
    """The last number came down, the weight or the offset: merge, keep the model, send nothing."""
    down, models = message["down"], client.models
    if "offset" in down:
        weight = offset_weights(models[1], client.parts["weight"]["client"], float(down["offset"]))
    else:
        weight = torch.tensor([float(down["weight"])], dtype=torch.float64)
    merged = merge_exact(*models, weight)
    client.save(merged=merged)
    client.save_models(potara_calibrated=merged)
    return RecordDict({"metrics": MetricRecord({"merged": 1})})


def score(client: Client, message: RecordDict) -> RecordDict:
    """Loss and accuracy of each model of the client on its own test examples, for the table alone."""
    found = {}
    for part in ("federated", "local", "merged"):
        if part in client.parts:
            model = client.run_config.algorithm.backbone(client.adapted) if part == "federated" else client.adapted
            loss, accuracy = evaluate(model, client.part(part), client.data.test)
            found |= {f"{part}-loss": float(loss), f"{part}-accuracy": float(accuracy)}
    return RecordDict({"metrics": MetricRecord(found)})


def join(client: Client, message: RecordDict) -> RecordDict:
    """Who the client is: its number, how many examples it has, and the fingerprint of what all must share."""
    sizes = {"train": int(client.data.train.sizes), "calibration": int(client.data.calibration.sizes)}
    facts = ConfigRecord({"fingerprint": client.run_config.fingerprint(client.adapted)})
    return RecordDict({"metrics": MetricRecord({"client": client.number, **sizes}), "config": facts})


QUERIES = {
    "join": join,
    "finish": finish,
    "curve": curve,
    "slope": slope_variance,
    "offset": offset_parabola,
    "merge": merge,
}


@door(load=function, algorithms=named(kind("Algorithm")))
def client_app(load: LoadClient = load_lab_client, algorithms: Mapping[str, Algorithm] = ALGORITHMS) -> ClientApp:
    """The ``ClientApp`` of clients whose backbone and data ``load(run_config, client, node_config)`` gives.

    The node's configuration says which client it is (``partition-id``) and, if it is to keep its state and its models
    on disk, in which ``folder``. What ``load`` returns is the client's federation of one, whose id is the client's.
    """
    app = ClientApp()

    def answer(exchange, message: Message, context: Context) -> Message:
        run_config = RunConfig.of(context.run_config, algorithms)
        number = whole(0)("partition-id", context.node_config.get("partition-id"), {})
        adapted, data = load(run_config, number, context.node_config)
        if data.train.ids != (number,):
            raise ValueError(f"client {number} was given the data of clients {list(data.train.ids)}")
        home, folder = ClientState(context), _folder(context.node_config)
        client = Client(run_config, number, adapted, data, home, home.load(), folder)
        return Message(exchange(client, message.content), reply_to=message)

    app.train()(lambda message, context: answer(train_round, message, context))
    app.evaluate()(lambda message, context: answer(score, message, context))
    for name, exchange in QUERIES.items():
        app.query(name)(lambda message, context, exchange=exchange: answer(exchange, message, context))
    return app


def _folder(node_config: Config) -> Path | None:
    return Path(path("folder", node_config["folder"], {})) if node_config.get("folder") else None
