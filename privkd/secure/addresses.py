"""Where services listen, and where they are reached."""

import ipaddress


def parse_listen(name: str, text: str) -> tuple[str, int]:
    """Host and port of a setting. Raises ``ValueError``, which says its ``name``."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{name}={text!r}: expected host:port")
    return host.strip("[]"), int(port)


def joined(host: str, port: int) -> str:
    """``host:port``, with brackets around the colons of IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
