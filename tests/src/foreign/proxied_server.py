"""A server on 127.0.0.1 that wants a PROXY protocol header (version 2) and prints what it says as a line of JSON.

Layout: section 2.2 of HAProxy's proxy-protocol.txt. What follows the header is given back.
"""

import json
import socket
import struct
import sys

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def exactly(stream, size):
    data = b""
    while len(data) < size:
        more = stream.recv(size - len(data))
        if not more:
            raise ValueError(f"it ended after {data.hex()}")
        data += more
    return data


def header(stream):
    start = exactly(stream, 16)
    if start[:12] != SIGNATURE:
        raise ValueError(f"no header but {start!r}")
    command, family, length = struct.unpack("!BBH", start[12:])
    body = exactly(stream, length)
    kind, size = {0x11: (socket.AF_INET, 4), 0x21: (socket.AF_INET6, 16)}[family]
    source, destination = (socket.inet_ntop(kind, body[at : at + size]) for at in (0, size))
    ports = struct.unpack("!HH", body[2 * size : 2 * size + 4])
    rest, fields = body[2 * size + 4 :], {}
    while rest:
        number, length = struct.unpack("!BH", rest[:3])
        fields[f"{number:#x}"] = rest[3 : 3 + length].decode()
        rest = rest[3 + length :]
    return {"command": command, "source": [source, ports[0]], "destination": [destination, ports[1]], "fields": fields}


listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    stream, peer = listener.accept()
    with stream:
        try:
            said = {"peer": peer[0], **header(stream)}
        except (ValueError, KeyError) as error:
            said = {"peer": peer[0], "error": str(error)}
        print(json.dumps(said), flush=True)
        if "error" in said:
            continue
        while data := stream.recv(4096):
            stream.sendall(data)
