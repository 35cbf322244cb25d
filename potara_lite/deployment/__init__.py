"""Potara as a Flower app: the same rounds and the same mixing weight between machines that are really apart."""

from .client import ClientState, client_app
from .run_config import RunConfig, load_lab_client
from .server import RunResult, Timeouts, play, server_app

__all__ = ["ClientState", "RunResult", "Timeouts", "RunConfig", "client_app", "load_lab_client", "play", "server_app"]
