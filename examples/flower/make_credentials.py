"""Certificates and keys of a federation: who may join, and how the server proves who it is.

    python examples/flower/make_credentials.py credentials --host my.server.example --clients 8

Writes ``ca.crt`` (give it to every client), ``server.pem`` and ``server.key`` (the server's), and for each client
``client-i`` (its private key: give it to that client and no one else) and ``client-i.pub`` (register it with the
server). Private files are readable by their owner alone; the certificate authority's key is not kept, so that nobody
can issue another certificate: make all anew instead, before they expire (``--days``).
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

Key = ec.EllipticCurvePrivateKey


def named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def certificate(subject: str, key: Key, issuer: str, issuer_key: Key, days: int) -> x509.CertificateBuilder:
    """What every certificate says; valid from five minutes ago, for clocks that differ."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(named(subject))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def authority(key: Key, days: int) -> x509.Certificate:
    """The certificate that the clients are given."""
    usage = dict.fromkeys(("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"), False)
    usage |= dict(key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False)
    builder = certificate("federation", key, "federation", key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return builder.sign(key, hashes.SHA256())


def server(key: Key, authority_key: Key, hosts: list[str], days: int) -> x509.Certificate:
    """The server's certificate, for these host names and addresses."""
    names = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    builder = certificate(hosts[0], key, "federation", authority_key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(authority_key, hashes.SHA256())


def write_private(path: Path, text: bytes) -> None:
    """Write a file that its owner alone can read; never over another."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)


def make(folder: Path, hosts: list[str], clients: int, days: int) -> None:
    """Write all of it. Raises ``FileExistsError`` where there are credentials already."""
    folder.mkdir(parents=True, exist_ok=True)
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem, plain = PrivateFormat.PKCS8, NoEncryption()
    write_private(folder / "server.key", server_key.private_bytes(Encoding.PEM, pem, plain))
    (folder / "ca.crt").write_bytes(authority(authority_key, days).public_bytes(Encoding.PEM))
    (folder / "server.pem").write_bytes(server(server_key, authority_key, hosts, days).public_bytes(Encoding.PEM))
    for client in range(clients):
        key = ec.generate_private_key(ec.SECP384R1())
        write_private(folder / f"client-{client}", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, plain))
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        (folder / f"client-{client}.pub").write_bytes(public)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", nargs="+", default=["localhost", "127.0.0.1"], help="how clients reach the server")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--days", type=int, default=30)
    args = parser.parse_args()
    make(args.folder, args.host, args.clients, args.days)
    print(f"{args.folder}: ca.crt, server.pem, server.key and the keys of {args.clients} clients")


if __name__ == "__main__":
    main()
