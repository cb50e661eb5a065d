"""A run says in its log when the SuperLink's certificate is about to end."""

import logging
import os
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedkrso_app.server_app import warn_before_expiry


def certificate(path, days):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server")])
    end = datetime.now(UTC) + timedelta(days=days)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, end - timedelta(days=400), end)
    path.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return str(path)


@pytest.mark.parametrize(("days", "warned"), [(800, False), (7.1, False), (6.9, True), (-1, True)])
def test_a_certificate_with_a_week_or_less_is_named_in_the_run_s_log(days, warned, tmp_path, monkeypatch, caplog):
    files = [certificate(tmp_path / "ca.crt", 3000), certificate(tmp_path / "server.pem", days)]
    monkeypatch.setenv("FEDKRSO_CERTIFICATE", os.pathsep.join(files))
    with caplog.at_level(logging.WARNING, "flwr"):
        warn_before_expiry()
    said = [record.getMessage() for record in caplog.records]
    assert [f"The certificate {files[1]} is valid until" in line for line in said] == [True] * warned


def test_a_file_that_is_no_certificate_is_a_warning_and_an_unset_variable_is_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "server.pem").write_text("no certificate")
    with caplog.at_level(logging.WARNING, "flwr"):
        monkeypatch.setenv("FEDKRSO_CERTIFICATE", str(tmp_path / "server.pem"))
        warn_before_expiry()
        monkeypatch.delenv("FEDKRSO_CERTIFICATE")
        warn_before_expiry()
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        f"The certificate {tmp_path / 'server.pem'} cannot be read"
    ]
