"""Potara as a Flower app: the same rounds and the same mixing weight between separate machines."""

from .client import ClientState, client_app
from .registry import Timeouts
from .run_config import RunConfig, load_lab_client
from .server import RunResult, play, server_app

__all__ = ["ClientState", "RunConfig", "RunResult", "Timeouts", "client_app", "load_lab_client", "play", "server_app"]
