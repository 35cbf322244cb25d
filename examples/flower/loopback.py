"""A whole deployment on one machine: a SuperLink and a SuperNode per client, each a process, over 127.0.0.1.

    python examples/flower/loopback.py out --tls                       # encrypted, and only registered nodes
    python examples/flower/loopback.py out --tls --stranger --kill 1   # and one that is not registered, one killed

It does what you do by hand on several machines (``docs/deployment.md``), waits for the result, stops what it started
and prints the seconds as JSON. ``out``, a new folder, gets the tables and adapters named as by the command, the
clients' states, and in ``work`` the logs and credentials.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from ssl import create_default_context

from make_credentials import make

HERE = Path(__file__).resolve().parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
OFFLINE = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}  # else the SuperLink installs the app's dependencies
CORES = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Deployment:
    """The processes of a federation on this machine; leaving the block stops them."""

    def __init__(self, out: Path, clients: int, tls: bool, simulation: bool):
        self.out, self.clients, self.tls, self.simulation = out, clients, tls, simulation
        self.work, self.port = out / "work", free_port()
        self.credentials, self.processes, self.cleanup = self.work / "credentials", {}, ExitStack()
        flower_home = self.work / ".flwr"
        flower_home.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = os.environ | QUIET | OFFLINE | CORES | {"FLWR_HOME": str(flower_home), "PATH": path}
        security = f'root-certificates = "{self.credentials / "ca.crt"}"' if tls else "insecure = true"
        (flower_home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n{security}\n'
        )
        if tls:
            make(self.credentials, ["localhost", "127.0.0.1"], clients + 1, days=1)

    def __enter__(self) -> Deployment:
        files = self.credentials
        secure = f"--ssl-ca-certfile {files}/ca.crt --ssl-certfile {files}/server.pem --ssl-keyfile {files}/server.key"
        options = f"{secure} --enable-supernode-auth" if self.tls else "--insecure"
        options += " --simulation" if self.simulation else ""
        self.start("link", f"flower-superlink {options} --host 127.0.0.1 --port {self.port}")
        try:
            self.wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait_until_up(self) -> None:
        """Until the SuperLink answers. Raises ``RuntimeError`` when it does not within two minutes."""
        context = create_default_context(cafile=self.credentials / "ca.crt") if self.tls else None
        address = f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/health"
        for _ in range(240):
            try:
                urllib.request.urlopen(address, context=context, timeout=2)
                return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"the SuperLink does not answer; see {self.work / 'link.log'}")

    def __exit__(self, *_) -> None:
        for process in reversed(self.processes.values()):
            stop(process, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                stop(process, signal.SIGKILL)
        self.cleanup.close()

    def start(self, name: str, command: str) -> subprocess.Popen:
        """Start a process that logs to ``name.log``; with its children it is a group that can be stopped together."""
        log = self.cleanup.enter_context(open(self.work / f"{name}.log", "w"))
        self.processes[name] = subprocess.Popen(
            shlex.split(command), env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        return self.processes[name]

    def join(self, client: int) -> subprocess.Popen:
        """Register this client's key where that is asked for, and start its node."""
        if self.tls:
            key = self.credentials / f"client-{client}.pub"
            command = ["flwr", "supernode", "register", str(key), "here", "--name", f"client-{client}"]
            subprocess.run(command, env=self.environment, check=True, capture_output=True)
        return self.node(client)

    def node(self, client: int) -> subprocess.Popen:
        """Start the SuperNode of a client."""
        key = self.credentials / f"client-{client}"
        secure = f"--root-certificates {self.credentials}/ca.crt --auth-supernode-private-key {key}"
        addresses = f"--superlink 127.0.0.1:{self.port} --host 127.0.0.1 --port {free_port()}"
        config = shlex.quote(f'partition-id={client} folder="{self.out}"')
        options = f"{secure if self.tls else '--insecure'} {addresses} --node-config {config}"
        return self.start(f"node-{client}", f"flower-supernode {options}")

    def run(self, config: str) -> subprocess.Popen:
        """``flwr run`` of the app, with its log."""
        nodes = f"--federation-config num-supernodes={self.clients}" if self.simulation else ""
        return self.start("run", f"flwr run {HERE} here --stream {nodes} --run-config {shlex.quote(config)}")


def stop(process: subprocess.Popen, how: signal.Signals) -> None:
    """A signal to a process and its children."""
    try:
        os.killpg(process.pid, how)
    except ProcessLookupError:
        pass


def wait_for(what, seconds: float, process: subprocess.Popen) -> None:
    """Until ``what()`` is true, or the process has ended."""
    end = time.monotonic() + seconds
    while not what() and process.poll() is None:
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.2)


def play(args: argparse.Namespace) -> dict:
    """Start everything, run the app, stop everything. Returns the seconds of each part, and how the node that is not
    registered ended."""
    out, began = args.out.resolve(), time.perf_counter()
    result, seconds, found = out / "results.csv", {}, {}
    (out / "work").mkdir(parents=True)
    with Deployment(out, args.clients, args.tls, args.simulation) as deployment:
        nodes = [] if args.simulation else [deployment.join(client) for client in range(args.clients)]
        seconds["until all is started"] = time.perf_counter() - began
        if args.stranger:
            deployment.node(args.clients).wait(120)
            log = (out / "work" / f"node-{args.clients}.log").read_text()
            found["stranger"] = log[log.index("Exit Code") :].splitlines()[0]
        began = time.perf_counter()
        run = deployment.run(f'out="{out}" clients={args.clients} {args.config}')
        if args.kill is not None:
            wait_for(lambda: any(out.glob(f"state/client-{args.kill}-*.safetensors")), args.limit, run)
            stop(nodes[args.kill], signal.SIGKILL)
            seconds["until the kill"] = time.perf_counter() - began
        wait_for(result.is_file, args.limit, run)
        seconds["from the start of the run to its result"] = time.perf_counter() - began
        if result.is_file():
            wait_for(lambda: run.poll() is not None, 60, run)
    if not result.is_file():
        raise RuntimeError(f"no result; see the logs in {out / 'work'}")
    return found | {"seconds": {name: round(value, 1) for name, value in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--tls", action="store_true", help="encryption and node authentication")
    parser.add_argument("--simulation", action="store_true", help="Flower's simulation runtime (Ray) instead of nodes")
    parser.add_argument("--stranger", action="store_true", help="also start a node that is not registered")
    parser.add_argument("--kill", type=int, metavar="CLIENT", help="kill this client's node after its first round")
    parser.add_argument("--config", default="", help="run configuration, such as 'rounds=3 method=\"FedSA-LoRA\"'")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds to wait for the result")
    print(json.dumps(play(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
