"""A peer on the tunnel port that this project did not write: TLS is OpenSSL's, HTTP/2 is python-h2's.

Opens one connection, makes the requests of its argument (JSON) one after the other, and prints what came of them as
JSON.
"""

import json
import socket
import ssl
import sys

import h2.config
import h2.connection
import h2.events
import h2.exceptions

ask = json.loads(sys.argv[1])
said = {"error": "", "server": [], "goaway": None, "answers": []}


def open_tls():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.load_verify_locations(ask["roots"])
    context.set_alpn_protocols(["h2"])
    if ask["chain"]:
        context.load_cert_chain(ask["chain"], ask["key"])
    host, port = ask["to"].rsplit(":", 1)
    plain = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
    stream = context.wrap_socket(plain)
    said["server"] = [value for kind, value in stream.getpeercert().get("subjectAltName", ()) if kind == "URI"]
    return stream


def talk(stream):
    # In TLS 1.3 a refusal of our certificate comes with the first read. Reading before writing makes sure that the
    # server closes nothing unread, which would be a reset in the place of its alert.
    first = stream.recv(65536)
    # What we send is often wrong on purpose.
    config = h2.config.H2Configuration(
        client_side=True, header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False
    )
    conn = h2.connection.H2Connection(config)
    conn.initiate_connection()
    pending = conn.receive_data(first)
    stream.sendall(conn.data_to_send())
    for request in ask["requests"]:
        answer = {"status": None, "headers": {}, "received": "", "reset": None}
        said["answers"].append(answer)
        stream_id = conn.get_next_available_stream_id()
        pseudo = [(":method", request["method"])]
        if request["authority"]:
            pseudo.append((":authority", request["authority"]))
        if request["method"] != "CONNECT":
            pseudo += [(":scheme", "https"), (":path", "/")]
        headers = [(name, value) for name, value in request["headers"]]
        headers += [(f"x-padding-{i}", "x" * 1000) for i in range(request["padding"] // 1000)]
        conn.send_headers(stream_id, pseudo + headers)
        stream.sendall(conn.data_to_send())
        pending = finish(stream, conn, stream_id, request, answer, pending)
        if said["goaway"] is not None:
            return


def finish(stream, conn, stream_id, request, answer, events):
    """Handles events until the stream is over; sends the request's text once it is accepted."""
    while True:
        over = False
        for event in events:
            if isinstance(event, h2.events.ResponseReceived) and event.stream_id == stream_id:
                headers = dict(event.headers)
                answer["status"] = int(headers.pop(":status"))
                answer["headers"] = headers
                if answer["status"] == 200:
                    conn.send_data(stream_id, request["send"].encode(), end_stream=True)
            elif isinstance(event, h2.events.DataReceived) and event.stream_id == stream_id:
                answer["received"] += event.data.decode()
                conn.acknowledge_received_data(event.flow_controlled_length, stream_id)
            elif isinstance(event, h2.events.StreamEnded) and event.stream_id == stream_id:
                over = True
            elif isinstance(event, h2.events.StreamReset) and event.stream_id == stream_id:
                answer["reset"] = int(event.error_code)
                over = True
            elif isinstance(event, h2.events.ConnectionTerminated):
                said["goaway"] = int(event.error_code)
                over = True
        stream.sendall(conn.data_to_send())
        if over:
            return []
        data = stream.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        events = conn.receive_data(data)


try:
    talk(open_tls())
except (OSError, h2.exceptions.H2Error) as error:
    said["error"] = str(error) or type(error).__name__
print(json.dumps(said))
