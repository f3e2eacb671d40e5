"""The far end of a tunnel that this project did not write: TLS is OpenSSL's, HTTP/2 is python-h2's.

A stand-in for a waypoint or a gateway: takes CONNECTs on a port from clients with a certificate, prints each as a line
of JSON (who asked, for what, with which headers), and either gives the bytes back or, where the argument (JSON) names
a target for the authority, forwards them there.
"""

import json
import select
import socket
import ssl
import sys
import threading

import h2.config
import h2.connection
import h2.events

ask = json.loads(sys.argv[1])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.minimum_version = ssl.TLSVersion.TLSv1_3
context.verify_mode = ssl.CERT_REQUIRED
context.load_verify_locations(ask["roots"])
context.load_cert_chain(ask["chain"], ask["key"])
context.set_alpn_protocols(["h2"])


class Tunnel:
    """One accepted connection; one thread."""

    def __init__(self, stream, peer):
        self.stream = stream
        self.peer = peer
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8", validate_inbound_headers=False)
        self.conn = h2.connection.H2Connection(config)
        self.targets = {}
        names = stream.getpeercert().get("subjectAltName", ())
        self.names = [value for kind, value in names if kind == "URI"]

    def run(self):
        self.conn.initiate_connection()
        self.flush()
        while True:
            if not self.stream.pending():
                ready, _, _ = select.select([self.stream, *self.targets.values()], [], [])
                for target in ready:
                    if target is not self.stream:
                        self.backward(target)
                if self.stream not in ready:
                    continue
            data = self.stream.recv(65536)
            if not data:
                return
            for event in self.conn.receive_data(data):
                self.handle(event)
            self.flush()

    def flush(self):
        self.stream.sendall(self.conn.data_to_send())

    def handle(self, event):
        if isinstance(event, h2.events.RequestReceived):
            self.connect(event)
        elif isinstance(event, h2.events.DataReceived):
            self.conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if event.stream_id in self.targets:
                self.targets[event.stream_id].sendall(event.data)
            else:
                self.conn.send_data(event.stream_id, event.data)
        elif isinstance(event, h2.events.StreamEnded):
            if event.stream_id in self.targets:
                self.targets[event.stream_id].shutdown(socket.SHUT_WR)
            else:
                self.conn.end_stream(event.stream_id)
        elif isinstance(event, h2.events.StreamReset) and event.stream_id in self.targets:
            self.targets.pop(event.stream_id).close()

    def connect(self, event):
        headers = dict(event.headers)
        print(json.dumps({"from": self.peer, "identity": self.names, "headers": headers}), flush=True)
        target = ask["targets"].get(headers.get(":authority", ""))
        if target:
            host, port = target.rsplit(":", 1)
            self.targets[event.stream_id] = socket.create_connection((host, int(port)), timeout=10)
        self.conn.send_headers(event.stream_id, [(":status", "200")])

    def backward(self, target):
        stream_id = next(key for key, value in self.targets.items() if value is target)
        data = target.recv(16384)
        if data:
            self.conn.send_data(stream_id, data)
        else:
            del self.targets[stream_id]
            target.close()
            self.conn.end_stream(stream_id)
        self.flush()


def serve(plain, peer):
    try:
        Tunnel(context.wrap_socket(plain, server_side=True), f"{peer[0]}:{peer[1]}").run()
    except OSError as error:
        print(json.dumps({"from": f"{peer[0]}:{peer[1]}", "error": str(error)}), flush=True)


listener = socket.create_server(("0.0.0.0", ask["port"]), reuse_port=False)
while True:
    threading.Thread(target=serve, args=listener.accept(), daemon=True).start()
