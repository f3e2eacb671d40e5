"""A relay between agents and the control plane that changes what the control plane says.

Ends TLS on both sides and passes every stream on; in the configuration stream it carries out the orders of a file
(JSON), which it reads again for each message:
  {"mode": "pass"}      nothing but the patches
  {"mode": "bytes"}     bytes that are no message in the place of each message
  {"mode": "resource"}  messages whose resources are such bytes
  {"mode": "slow-ca"}   nothing, but requests of certificates wait for a second
  {"mode": "cut"}       half a message, then the end of the connection
  {"patches": {NAME: HEX}}  bytes that are added to the resource of that name: protobuf merges them into it
"""

import json
import select
import socket
import ssl
import sys
import threading
import time

import h2.config
import h2.connection
import h2.events
import h2.exceptions

ask = json.loads(sys.argv[1])
CONFIGURATION = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
CERTIFICATES = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
NONSENSE = b"\xff" * 32


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def number(value):
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def fields(data):
    """Numbers and raw values of a message's fields; only varints and bytes are met here."""
    at = 0
    while at < len(data):
        start = at
        key, at = varint(data, at)
        if key & 7 == 0:
            _, at = varint(data, at)
            yield key >> 3, None, data[start:at]
        else:
            size, at = varint(data, at)
            yield key >> 3, data[at : at + size], data[start : at + size]
            at += size


def put(field, value):
    return number(field << 3 | 2) + number(len(value)) + value


def changed_resource(resource, orders):
    """`Resource`: 2 is the Any, 3 the name; in the Any, 2 is the message."""
    parts = list(fields(resource))
    name = next((value.decode() for field, value, _ in parts if field == 3), "")
    patch = bytes.fromhex(orders.get("patches", {}).get(name, ""))
    out = b""
    for field, value, raw in parts:
        if field == 2:
            packed = {inner: content for inner, content, _ in fields(value)}
            message = NONSENSE if orders["mode"] == "resource" else packed.get(2, b"") + patch
            raw = put(2, put(1, packed[1]) + put(2, message))
        out += raw
    return out


def ordered():
    with open(ask["orders"]) as file:
        return json.load(file)


def changed(message):
    """`DeltaDiscoveryResponse`: 2 are the resources."""
    orders = ordered()
    if orders["mode"] == "bytes":
        return NONSENSE, "bytes"
    out = b""
    for field, value, raw in fields(message):
        out += put(2, changed_resource(value, orders)) if field == 2 else raw
    return out, orders["mode"]


class Side:
    def __init__(self, stream, client):
        self.stream = stream
        config = h2.config.H2Configuration(
            client_side=client, header_encoding="utf-8", validate_inbound_headers=False, validate_outbound_headers=False
        )
        self.conn = h2.connection.H2Connection(config)
        self.conn.initiate_connection()
        self.peer_of = {}

    def send(self, stream_id, data):
        size = self.conn.max_outbound_frame_size
        for at in range(0, len(data), size):
            self.conn.send_data(stream_id, data[at : at + size])


class Relay:
    def __init__(self, agent, control):
        self.agent = Side(agent, client=False)
        self.control = Side(control, client=True)
        self.pending = {}

    def run(self):
        sides = {self.agent.stream: self.agent, self.control.stream: self.control}
        while True:
            for side in sides.values():
                side.stream.sendall(side.conn.data_to_send())
            ready = [stream for stream in sides if stream.pending()]
            ready = ready or select.select(list(sides), [], [])[0]
            for stream in ready:
                side = sides[stream]
                data = stream.recv(65536)
                if not data:
                    return
                for event in side.conn.receive_data(data):
                    if side is self.agent:
                        self.from_agent(event)
                    elif not self.from_control(event):
                        return

    def from_agent(self, event):
        agent, control = self.agent, self.control
        if isinstance(event, h2.events.RequestReceived):
            to = control.conn.get_next_available_stream_id()
            agent.peer_of[event.stream_id], control.peer_of[to] = to, event.stream_id
            if dict(event.headers)[":path"] == CONFIGURATION:
                self.pending[to] = b""
                print("a configuration stream", flush=True)
            if dict(event.headers)[":path"] == CERTIFICATES and ordered()["mode"] == "slow-ca":
                time.sleep(1)
                print("a late certificate", flush=True)
            control.conn.send_headers(to, event.headers)
        elif isinstance(event, h2.events.DataReceived):
            agent.conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            control.send(agent.peer_of[event.stream_id], event.data)
        elif isinstance(event, h2.events.StreamEnded):
            control.conn.end_stream(agent.peer_of[event.stream_id])
        elif isinstance(event, h2.events.StreamReset):
            control.conn.reset_stream(agent.peer_of[event.stream_id], event.error_code)

    def from_control(self, event):
        agent, control = self.agent, self.control
        to = control.peer_of.get(getattr(event, "stream_id", None))
        if isinstance(event, h2.events.ResponseReceived):
            agent.conn.send_headers(to, event.headers)
        elif isinstance(event, h2.events.DataReceived):
            control.conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if event.stream_id in self.pending:
                return self.messages(event.stream_id, to, event.data)
            agent.send(to, event.data)
        elif isinstance(event, h2.events.TrailersReceived):
            agent.conn.send_headers(to, event.headers, end_stream=True)
        elif isinstance(event, h2.events.StreamReset):
            agent.conn.reset_stream(to, event.error_code)
        return True

    def messages(self, stream_id, to, data):
        """gRPC: a flag, four bytes of length, the message. False ends the connection."""
        held = self.pending[stream_id] + data
        while len(held) >= 5 and len(held) >= 5 + int.from_bytes(held[1:5], "big"):
            end = 5 + int.from_bytes(held[1:5], "big")
            message, mode = changed(held[5:end])
            held = held[end:]
            framed = b"\0" + len(message).to_bytes(4, "big") + message
            print(f"a message, {mode}", flush=True)
            if mode == "cut":
                agent = self.agent
                agent.send(to, framed[: len(framed) // 2])
                agent.stream.sendall(agent.conn.data_to_send())
                return False
            self.agent.send(to, framed)
        self.pending[stream_id] = held
        return True


def serve(plain, accept, connect):
    try:
        agent = accept.wrap_socket(plain, server_side=True)
        control = connect.wrap_socket(socket.create_connection(("127.0.0.1", ask["control"])))
    except OSError as error:
        print(f"no connection: {error}", flush=True)
        return
    try:
        Relay(agent, control).run()
    except (OSError, h2.exceptions.H2Error) as error:
        print(f"a connection ended: {error}", flush=True)
    finally:
        agent.close()
        control.close()


accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
accepting.load_cert_chain(ask["chain"], ask["key"])
accepting.set_alpn_protocols(["h2"])
connecting = ssl.create_default_context()
connecting.check_hostname = False
connecting.verify_mode = ssl.CERT_NONE
connecting.set_alpn_protocols(["h2"])
listener = socket.create_server(("0.0.0.0", 15012))
print("listening", flush=True)
while True:
    stream, _ = listener.accept()
    threading.Thread(target=serve, args=(stream, accepting, connecting), daemon=True).start()
