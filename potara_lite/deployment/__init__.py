"""Potara as a Flower app: the same rounds and the same mixing weight between machines that are really apart."""

from .client import Home, client_app
from .run_config import Plan, load_lab_client
from .server import Outcome, Patience, play, server_app

__all__ = ["Home", "Outcome", "Patience", "Plan", "client_app", "load_lab_client", "play", "server_app"]
