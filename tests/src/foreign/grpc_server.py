"""A gRPC server (grpcio): service shop.Echo on the port of the first argument; the second is its log."""
import sys, threading, time
from concurrent import futures
import grpc

log, lock, failed = open(sys.argv[2], "a", buffering=1), threading.Lock(), {}


def note(*words):
    with lock:
        log.write(" ".join(map(str, words)) + "\n")


def told(context, name):
    return dict(context.invocation_metadata()).get(name, "")


def unary(request, context):
    context.set_trailing_metadata((("x-trailer", "last"),))
    note("Unary")
    return b"hello " + request


def fail(request, context):
    code = [c for c in grpc.StatusCode if c.value[0] == int(told(context, "x-code"))][0]
    note("Fail", code.name)
    context.abort(code, "as asked")


def slow(request, context):
    gone = threading.Event()
    context.add_callback(gone.set)
    note("Slow began", context.time_remaining() is not None)
    gone.wait(10)
    note("Slow", "cancelled" if not context.is_active() else "finished")
    return b"late"


def flaky(request, context):
    key = told(context, "x-key")
    with lock:
        failed[key] = failed.get(key, 0) + 1
        times = failed[key]
    note("Flaky", key, times)
    if times <= 2:
        context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
    return b"at last"


def many(request, context):
    for n in range(int(request)):
        yield b"%d" % n


def collect(requests, context):
    return b"%d" % sum(len(r) for r in requests)


def chat(requests, context):
    for request in requests:
        yield b"re: " + request


handlers = {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "Fail": grpc.unary_unary_rpc_method_handler(fail),
    "Slow": grpc.unary_unary_rpc_method_handler(slow),
    "Flaky": grpc.unary_unary_rpc_method_handler(flaky),
    "Many": grpc.unary_stream_rpc_method_handler(many),
    "Collect": grpc.stream_unary_rpc_method_handler(collect),
    "Chat": grpc.stream_stream_rpc_method_handler(chat),
}
server = grpc.server(futures.ThreadPoolExecutor(16))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Echo", handlers),))
server.add_insecure_port("0.0.0.0:" + sys.argv[1])
server.start()
server.wait_for_termination()
