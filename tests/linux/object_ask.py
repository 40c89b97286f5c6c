#!/usr/bin/python3
"""Asks the recogniser of object.py. It needs no numpy, which takes its time to load.

    object_ask.py DATA SOCKET N    sends the picture N of those held back, prints the answer
    object_ask.py verify SOCKET    says whether the features are still what they were
"""

import socket
import sys

RECORD = 65


def held_back(path, number):
    """A label and the 64 pixels of the picture that it belongs to."""
    with open(path, "rb") as data:
        data.seek((5 * number + 4) * RECORD)
        record = data.read(RECORD)
    return record[0], record[1:]


def ask(path, request):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        connection.send(request)
        print(connection.recv(4096).decode())


match sys.argv[1:]:
    case ["verify", path]:
        ask(path, b"v")
    case [data, path, number]:
        label, pixels = held_back(data, int(number))
        print(f"shows {label}:", end=" ")
        ask(path, b"p" + pixels)
    case _:
        sys.exit(__doc__)
