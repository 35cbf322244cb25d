"""Credentials, the app's configuration, what was measured; with ``POTARA_DEPLOYMENT=1`` a whole run (minutes)."""

import argparse
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_results import script

pytest.importorskip("flwr", reason="needs the extra `flower`")

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key, load_ssh_public_key

from potara_lite import Setting, compare
from potara_lite.deployment import RunConfig, Timeouts
from potara_lite.experiment import MODEL_PAIR_METHODS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "examples" / "flower"


@pytest.fixture
def credentials(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(APP)
    import make_credentials

    make_credentials.make(tmp_path / "made", ["my-server", "127.0.0.1"], clients=2, days=3)
    return make_credentials, tmp_path / "made"


def test_the_servers_certificate_is_for_its_names_and_signed_by_the_authority(credentials):
    _, folder = credentials
    authority, server = (
        x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.crt", "server.pem")
    )
    server.verify_directly_issued_by(authority)
    with pytest.raises(ValueError):
        authority.verify_directly_issued_by(server)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["my-server"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert (server.not_valid_after_utc - server.not_valid_before_utc).days == 3
    key = load_pem_private_key((folder / "server.key").read_bytes(), None)
    assert key.public_key() == server.public_key() != authority.public_key()


def test_only_the_owner_can_read_private_keys_and_they_are_never_overwritten(credentials):
    make_credentials, folder = credentials
    for name in ("server.key", "client-0", "client-1"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    keys = [load_ssh_private_key((folder / f"client-{i}").read_bytes(), None) for i in range(2)]
    public = [load_ssh_public_key((folder / f"client-{i}.pub").read_bytes()) for i in range(2)]
    assert [key.public_key() for key in keys] == public and public[0] != public[1]
    with pytest.raises(FileExistsError):
        make_credentials.make(folder, ["my-server"], clients=2, days=3)


def test_the_apps_configuration_is_that_of_the_library():
    """Every key is read, and what is not said is the library's default."""
    config = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    run_config, plain = RunConfig.of(config), Setting()
    differ = {name for name, value in vars(run_config.setting).items() if value != getattr(plain, name)}
    assert differ == {"clients", "rounds", "local_steps"} and run_config.algorithm.name == "FedIT"
    assert Timeouts.of(config) == Timeouts(join=300.0, answer=600.0, least=1)
    read = {name.replace("_", "-") for name in vars(plain)} | {"method", "seed", "clip", "noise-multiplier", "out"}
    assert set(config) <= read | {"join-timeout", "timeout", "min-clients"}


def test_what_was_measured_of_whole_deployments():
    found = json.loads((ROOT / "benchmarks" / "deployment.json").read_text())["ways"]
    tls = found["tls"]
    assert tls["rows"] == 9 and tls["events"] == []
    assert tls["loss, largest difference"] < 1e-6 and tls["weight, largest difference"] < 1e-9
    assert tls["bytes_up, largest difference"] == tls["bytes_down, largest difference"] == 0
    assert found["tls"]["stranger"] == "Exit Code: 305"
    assert found["simulation"]["rows"] == 9 and found["simulation"]["events"] == []
    assert found["simulation"]["loss, largest difference"] < 1e-6
    assert found["engine"]["seconds"]["from the start of the run to its result"] < 5  # its steps: next to nothing
    assert found["kill"]["rows"] == 6 and len(found["kill"]["events"]) >= 1


def test_what_was_measured_of_privacy():
    privacy, rows = script("privacy"), pd.read_csv(ROOT / "benchmarks" / "privacy.csv")
    assert sorted(rows.epsilon.unique()) == sorted(privacy.EPSILONS) and rows.seed.nunique() == len(privacy.SEEDS)
    noisy = rows[rows.epsilon < math.inf]
    assert (noisy.noise_multiplier > 0).all() and (noisy.groupby("epsilon").noise_multiplier.nunique() == 1).all()


def test_a_small_private_run_has_a_row_for_each_epsilon(monkeypatch):
    pytest.importorskip("dp_accounting", reason="needs the extra `privacy`")
    privacy = script("privacy")
    setting = Setting(
        clients=3, train_size=12, calibration_size=6, test_size=12, rounds=2, round_steps=2, local_steps=3
    )
    monkeypatch.setattr(privacy, "noise_multiplier_for", lambda epsilon, *_: {math.inf: 0.0, 4.0: 1.0}[epsilon])
    rows = privacy.measure(setting, 0, 0.2, (math.inf, 4.0))
    assert rows.moment[0] == rows.moment_predicted[0] == 0 and rows.local_loss.nunique() == 1
    np.testing.assert_allclose(rows.moment[1], rows.moment_predicted[1], rtol=0.2)  # some 5,000 numbers of one draw
    assert rows.weight_predicted[1] <= rows.weight_predicted[0]
    assert len(privacy.figure(rows).axes) == 2 and "no noise" in privacy.table(rows).index


@pytest.mark.skipif(os.environ.get("POTARA_DEPLOYMENT") != "1", reason="minutes, and ports: POTARA_DEPLOYMENT=1")
def test_over_tls_a_stranger_is_refused_and_the_rows_are_the_engines(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(APP)
    import loopback

    config = "rounds=2 round-steps=5 local-steps=10 test-size=50"
    options = dict(clients=3, tls=True, simulation=False, stranger=True, kill=None, config=config, limit=1200.0)
    found = loopback.play(argparse.Namespace(out=tmp_path / "out", **options))
    assert found["stranger"] == "Exit Code: 305"
    methods = {name: MODEL_PAIR_METHODS[name] for name in ("federated", "local", "potara-calibrated")}
    setting = Setting(clients=3, rounds=2, round_steps=5, local_steps=10, test_size=50)
    rows, reference = pd.read_csv(tmp_path / "out" / "results.csv"), compare(setting, [0], methods)
    pd.testing.assert_frame_equal(rows.drop(columns="seconds"), reference.drop(columns="seconds"), rtol=1e-5)
    assert json.loads((tmp_path / "out" / "events.json").read_text()) == []
    for client in range(3):
        assert (tmp_path / "out" / "adapters" / "seed-0" / f"client-{client}" / "potara-calibrated").is_dir()
