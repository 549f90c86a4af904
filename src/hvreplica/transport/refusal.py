"""Say in words why TLS refused a connection, on whichever side it happened."""

from __future__ import annotations

import ssl

_CHECK_FOLDER = "both sides need certificates of the same CA; compare ca.pem in both --tls folders"

# What the other side told us, by the alert of RFC 8446 6.2 as OpenSSL names it.
_ALERTS = {
    "CERTIFICATE_REQUIRED": (
        "the other side refused us: it got no certificate from us",
        "give --tls a folder with one",
    ),
    "UNKNOWN_CA": ("the other side refused our certificate: it does not know our CA", _CHECK_FOLDER),
    "CERTIFICATE_EXPIRED": (
        "the other side refused our certificate: expired, or not yet valid by its clock",
        "issue a new certificate, and compare the clocks of both hosts",
    ),
    "CERTIFICATE_REVOKED": ("the other side refused our certificate: revoked", "issue a new certificate"),
    "UNSUPPORTED_CERTIFICATE": (
        "the other side refused our certificate: not made for this use",
        "issue one with both extended key usages, serverAuth and clientAuth",
    ),
    "BAD_CERTIFICATE": (
        "the other side refused our certificate: not valid for this host name, or damaged",
        "connect by a name that the certificate carries, or issue one with that name",
    ),
    "CERTIFICATE_UNKNOWN": ("the other side refused our certificate", "the other side's log says why"),
    "ACCESS_DENIED": ("the other side refused us", "the other side's log says why"),
    "DECRYPT_ERROR": ("the other side could not verify our signature", _CHECK_FOLDER),
    "PROTOCOL_VERSION": ("the other side does not speak TLS 1.3", "update it"),
    "HANDSHAKE_FAILURE": ("the other side found no common way to encrypt", "update the older side"),
    "INTERNAL_ERROR": ("the other side failed inside TLS", "the other side's log says why"),
}

# What we found ourselves, by OpenSSL's X509_V_ERR code.
_EXPIRED, _NOT_YET, _HOST, _ADDRESS, _PURPOSE = 10, 9, 62, 64, 26
_UNKNOWN_CA = (2, 18, 19, 20, 21)
_NO_CERTIFICATE = "PEER_DID_NOT_RETURN_A_CERTIFICATE"
_NOT_TLS = (
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "HTTPS_PROXY_REQUEST",
    "UNKNOWN_PROTOCOL",
    "PACKET_LENGTH_TOO_LONG",
)
_AUTHENTICATION_ALERTS = (
    "CERTIFICATE",
    "UNKNOWN_CA",
    "ACCESS_DENIED",
    "DECRYPT_ERROR",
)


def is_authentication_error(error: ssl.SSLError) -> bool:
    """Return whether a certificate was refused, by us or by the other side."""
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError) or reason == _NO_CERTIFICATE:
        return True
    return "_ALERT_" in reason and any(word in reason for word in _AUTHENTICATION_ALERTS)


def describe_tls_error(error: ssl.SSLError) -> tuple[str, str]:
    """Return a sentence and a hint for what TLS reported."""
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _describe_verification(error.verify_code, error.verify_message)
    if reason == _NO_CERTIFICATE:
        return "the other side sent no certificate", "it needs a --tls folder with a certificate of our CA"
    if "_ALERT_" in reason:
        alert = reason.partition("_ALERT_")[2]
        told = (
            "the other side ended TLS with the alert " + alert.replace("_", " ").lower(),
            "its log may say more",
        )
        return _ALERTS.get(alert, told)
    if reason in _NOT_TLS:
        return "the other side does not speak TLS", "check the port; is an hvreplica server listening there?"
    if reason in ("UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE"):
        return "the other side does not speak TLS 1.3", "update it"
    words = reason.replace("_", " ").lower() or str(error)
    return f"TLS failed: {words}", "if it happens again, something between the two sites changes the data"


def _describe_verification(code: int, told: str) -> tuple[str, str]:
    if code == _EXPIRED:
        return "the other side's certificate has expired", "issue a new certificate for it"
    if code == _NOT_YET:
        return "the other side's certificate is not yet valid", "compare the clocks of both hosts"
    if code in (_HOST, _ADDRESS):
        return (
            f"the other side's certificate is not for the name that we connect to: {told}",
            "connect by a name that it carries, or issue one with this name",
        )
    if code in _UNKNOWN_CA:
        return f"the other side's certificate is from a CA that we do not know: {told}", _CHECK_FOLDER
    if code == _PURPOSE:
        return (
            "the other side's certificate is not made for this use",
            "issue one with both extended key usages, serverAuth and clientAuth",
        )
    return f"the other side's certificate was refused: {told}", _CHECK_FOLDER
