"""Where chat page and API listen, and whom they answer: this machine alone, unless there is a secret."""

import ipaddress
import os
import socket

from medasst_tools.errors import UserError

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def number(variable: str, default: int, low: int, high: int) -> int:
    """Return an environment variable's whole number; UserError if it is none from `low` to `high`."""
    text = os.environ.get(variable) or str(default)
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise UserError(f"{variable} is {text!r}, must be a number from {low} to {high}")
    return int(text)


def listen(host_variable: str, port_variable: str, port: int, secret: str) -> socket.socket:
    """Return a socket bound to the environment's address, 127.0.0.1 without one.

    UserError if the address is taken or nonsense, or open to others while `secret`, the variable with what they must know,
    is empty.
    """
    host = (os.environ.get(host_variable) or LOCAL_HOSTS[0]).strip("[]")
    port = number(port_variable, port, 0, 65535)
    listener = None
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not (ipaddress.ip_address(address[0]).is_loopback or os.environ.get(secret)):
            others = f"{host_variable} is {host!r}: other machines could use the model"
            raise UserError(f"{others}; set {secret}, or leave it at 127.0.0.1")
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener:
            listener.close()
        why = f"cannot serve on {host}:{port} ({error.strerror})"
        raise UserError(f"{why}; set {port_variable} to a free port") from None
    return listener


def url(listener: socket.socket) -> str:
    """Return the address as a browser takes it, without a path."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
