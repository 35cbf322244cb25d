"""The client of a federation as a Flower ``ClientApp``: it trains, and keeps its data, local model and optimiser.

Every message is answered by a process of its own, which may be killed: what must survive is in ``ClientState``. The
exchanges after the rounds are those of ``docs/deployment.md``; ``estimators.calibrated`` computes the numbers that
travel.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
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
from ..checks import Count, Named, PathLike, checked
from ..estimators.calibrated import POINTS, STEP, offset_weights, parabolas
from ..estimators.curve import client_losses, segment_losses
from ..experiment import train_local
from ..federation.split import Federation
from ..files import reading, write_atomically
from ..merging.connectivity import weight_grid
from ..merging.merge import merge_exact
from ..training.train import OptimizerState, evaluate
from .run_config import LoadClient, RunConfig, from_record, load_lab_client, to_record

RECORD = "potara"  # of the client's tensors in Flower's context


@checked
def _node(partition_id: Count, folder: PathLike | None) -> tuple[int, Path | None]:
    return partition_id, Path(folder) if folder else None


class ClientState:
    """Which client this is, and what it keeps between the messages of one run: ``parts``, its stacks by what they are.

    They are in ``state/client-NUMBER-run-RUN.safetensors`` in the node's ``folder``, which is replaced in one step, so
    that a node that was killed and restarted continues after the last finished message. Without a folder they are in
    Flower's ``context.state``, which lives as long as the node does.
    """

    def __init__(self, context: Context):
        self.context, config = context, context.node_config
        self.number, self.folder = _node(config.get("partition-id"), config.get("folder") or None)
        name = f"client-{self.number}-run-{context.run_id}.safetensors"
        self.path = self.folder / "state" / name if self.folder else None
        self.parts: dict[str, Adapter] = {}
        for key, tensor in self._read().items():
            part, name = key.split("/", 1)
            self.parts.setdefault(part, {})[name] = tensor

    def _read(self) -> dict[str, torch.Tensor]:
        if self.path is None:
            record = self.context.state.get(RECORD, ArrayRecord())
            return {key: tensor.clone() for key, tensor in record.to_torch_state_dict().items()}
        if not self.path.is_file():
            return {}
        with reading(self.path), safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in json.loads(file.metadata()["order"])}

    def save(self, **parts: Adapter) -> None:
        """Keep these parts beside the others."""
        self.parts |= parts
        stacks = [(f"{part}/{name}", tensor) for part, stack in self.parts.items() for name, tensor in stack.items()]
        flat = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in stacks}
        if self.path is None:
            self.context.state[RECORD] = ArrayRecord(flat)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, save(flat, metadata={"order": json.dumps(list(flat))}))  # the file sorts by name


@dataclass
class Client:
    """A client while it answers one message: the run, its backbone and data, and its state."""

    run_config: RunConfig
    adapted: AdaptedBackbone
    data: Federation
    state: ClientState

    def part(self, name: str) -> Adapter:
        """One part of the state, on the backbone's device."""
        return {key: tensor.to(self.adapted.device) for key, tensor in self.state.parts[name].items()}

    @property
    def tensors(self) -> Adapter:
        """The tensors that the algorithm works on; before the first message its initial ones."""
        if "tensors" not in self.state.parts:
            clients = self.run_config.setting.clients
            initial = {name: tensor.expand(clients, *tensor.shape) for name, tensor in self.adapted.initial.items()}
            tensors = self.run_config.algorithm.init(initial)
            self.state.parts["tensors"] = select_clients(tensors, torch.tensor([self.state.number]))
        return self.part("tensors")

    @property
    def models(self) -> tuple[Adapter, Adapter]:
        """The federated and the local model, which are merged."""
        return self.part("federated"), self.part("local")

    def optimizers(self, tensors: Adapter) -> list[OptimizerState]:
        """The optimiser state of every phase."""
        new = self.run_config.algorithm.new_optimizers(tensors)
        saved = [self.state.parts.get(f"optimizer-{i}") for i in range(len(new))]
        return [OptimizerState(**one).to(self.adapted.device) if one else first for one, first in zip(saved, new)]

    def write_model(self, name: str, stack: Adapter) -> None:
        """Write a model as a PEFT folder with the name that the command uses, if the node has a folder."""
        if self.state.folder:
            seed, client = f"seed-{self.run_config.seed}", f"client-{self.state.number}"
            save_adapter(self.adapted, client_adapter(stack, 0), self.state.folder / "adapters" / seed / client / name)

    def receive(self, message: RecordDict, number: int) -> Adapter:
        """The tensors once the server's message ``number`` has arrived."""
        received = self.tensors | from_record(message["tensors"], self.adapted.device)
        return self.run_config.algorithm.on_receive(received, number)


def train_round(client: Client, message: RecordDict) -> RecordDict:
    """A round: take the server's tensors, train, send back what is uploaded."""
    algorithm, training = client.run_config.algorithm, client.run_config.training
    number = int(message["config"]["number"])
    tensors = client.receive(message, number)
    optimizers = client.optimizers(tensors)
    backbone = algorithm.backbone(client.adapted)
    tensors, optimizers, _ = client_step(
        algorithm, backbone, client.data.train, tensors, optimizers, number=number, **training
    )
    states = {f"optimizer-{i}": vars(one) for i, one in enumerate(optimizers)} if algorithm.keep_optimizer else {}
    client.state.save(tensors=tensors, **states)
    return RecordDict({"tensors": to_record(algorithm.upload(tensors))})


def finish(client: Client, message: RecordDict) -> RecordDict:
    """The last message: the algorithm's model of this client, after the steps that follow the rounds."""
    algorithm, rounds = client.run_config.algorithm, client.run_config.setting.rounds
    tensors = client.receive(message, rounds)
    personal = algorithm.personal_model(tensors)
    if algorithm.finetune_steps:
        backbone = algorithm.backbone(client.adapted)
        options = dict(number=rounds, **client.run_config.training)
        tensors, personal = finetune_step(algorithm, backbone, client.data.train, tensors, personal, **options)
    client.state.save(tensors=tensors, federated=personal)
    return RecordDict()


def curve(client: Client, message: RecordDict) -> RecordDict:
    """Exchange 1: train the local model, send the mean calibration loss at each weight of the grid."""
    began = time.perf_counter()
    adapted, run_config, calibration = client.adapted, client.run_config, client.data.calibration
    federated = client.part("federated")
    initial = {name: tensor.unsqueeze(0) for name, tensor in adapted.initial.items()}
    start = federated if run_config.setting.local_from_federated else initial
    trained, _, _ = train_local(adapted, start, client.data, run_config.setting, run_config.seed)
    local = trained.adapters
    client.state.save(local=local)
    client.write_model("local", local)
    losses = segment_losses(adapted, federated, local, calibration, weight_grid(POINTS))
    mean = losses[0].double().cpu().sum(1) / int(calibration.sizes)
    metrics = MetricRecord({"seconds": time.perf_counter() - began})
    return RecordDict({"up": MetricRecord({"losses": mean.tolist()}), "metrics": metrics})


def slope_variance(client: Client, message: RecordDict) -> RecordDict:
    """Exchange 2: the grid's point with the lowest loss of all clients came down; send the variance of the samples'
    slopes there."""
    grid, index, calibration = weight_grid(POINTS), int(message["down"]["index"]), client.data.calibration
    three = segment_losses(client.adapted, *client.models, calibration, grid[index - 1 : index + 2]).unbind(1)
    _, _, variance = parabolas(*three, calibration.sizes, float(grid[1] - grid[0]))
    return RecordDict({"up": MetricRecord({"variance": float(variance)})})


def offset_parabola(client: Client, message: RecordDict) -> RecordDict:
    """Exchange 3: receive the client's weight; send the parabola of its loss in the offset between head and body."""
    weight = torch.tensor([float(message["down"]["weight"])], dtype=torch.float64)
    client.state.save(weight={"client": weight})
    federated, local = client.models
    calibration = client.data.calibration
    merged = (merge_exact(federated, local, offset_weights(local, weight, offset)) for offset in (-STEP, 0.0, STEP))
    three = [client_losses(client.adapted, one, calibration) for one in merged]
    slope, curvature, variance = map(float, parabolas(*three, calibration.sizes, STEP))
    return RecordDict({"up": MetricRecord({"slope": slope, "curvature": curvature, "variance": variance})})


def merge(client: Client, message: RecordDict) -> RecordDict:
    """The last number came down, the weight or the offset: merge, keep the model, send nothing."""
    down, (federated, local) = message["down"], client.models
    if "offset" in down:
        weight = offset_weights(local, client.state.parts["weight"]["client"], float(down["offset"]))
    else:
        weight = torch.tensor([float(down["weight"])], dtype=torch.float64)
    merged = merge_exact(federated, local, weight)
    client.state.save(merged=merged)
    client.write_model("potara-calibrated", merged)
    return RecordDict()


def score(client: Client, message: RecordDict) -> RecordDict:
    """Loss and accuracy of each of the client's models on its test examples, for the table alone."""
    scores: dict[str, float] = {}
    for part in ("federated", "local", "merged"):
        if part in client.state.parts:
            backbone = client.run_config.algorithm.backbone(client.adapted) if part == "federated" else client.adapted
            loss, accuracy = evaluate(backbone, client.part(part), client.data.test)
            scores |= {f"{part}-loss": float(loss), f"{part}-accuracy": float(accuracy)}
    return RecordDict({"metrics": MetricRecord(scores)})


def join(client: Client, message: RecordDict) -> RecordDict:
    """The handshake: the client's number, how many examples it has, the fingerprint of what all must share."""
    sizes = {"train": int(client.data.train.sizes), "calibration": int(client.data.calibration.sizes)}
    fingerprint = ConfigRecord({"fingerprint": client.run_config.fingerprint(client.adapted)})
    return RecordDict({"metrics": MetricRecord({"client": client.state.number, **sizes}), "config": fingerprint})


Exchange = Callable[[Client, RecordDict], RecordDict]
QUERIES = dict(join=join, finish=finish, curve=curve, slope=slope_variance, offset=offset_parabola, merge=merge)


@checked
def client_app(load: LoadClient = load_lab_client, algorithms: Named[Algorithm] = ALGORITHMS) -> ClientApp:
    """The ``ClientApp`` of clients whose backbone and data ``load(run_config, client, node_config)`` gives.

    The node's configuration says which client it is (``partition-id``) and, if it is to keep its state and its models
    on disk, in which ``folder``. What ``load`` returns is the client's federation of one, whose id is the client's.
    """
    app = ClientApp()

    def answering(exchange: Exchange) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            run_config = RunConfig.of(context.run_config, algorithms)
            state = ClientState(context)
            adapted, data = load(run_config, state.number, context.node_config)
            if data.train.ids != (state.number,):
                raise ValueError(f"client {state.number} was given the data of clients {list(data.train.ids)}")
            client = Client(run_config, adapted, data, state)
            return Message(exchange(client, message.content), reply_to=message)

        return answer

    app.train()(answering(train_round))
    app.evaluate()(answering(score))
    for name, exchange in QUERIES.items():
        app.query(name)(answering(exchange))
    return app
