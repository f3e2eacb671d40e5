"""A gRPC client (grpcio): calls every method of shop.Echo at the address of the first argument, and says what it got, one
line a call. With a second argument it calls Unary only."""
import queue, sys, time
import grpc

channel = grpc.insecure_channel(sys.argv[1], options=(("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)))
unary = lambda name: channel.unary_unary("/shop.Echo/" + name)

reply, call = unary("Unary").with_call(b"you", timeout=10)
trailer = dict(call.trailing_metadata()).get("x-trailer")
print("unary", reply.decode(), trailer, flush=True)
if len(sys.argv) > 2:
    sys.exit()
for code in range(1, 17):
    try:
        unary("Fail")(b"", metadata=(("x-code", str(code)),), timeout=10)
    except grpc.RpcError as error:
        print("fail", code, error.code().value[0], error.details(), flush=True)
began = time.monotonic()
try:
    unary("Slow")(b"", timeout=0.5)
except grpc.RpcError as error:
    print("slow", error.code().name, time.monotonic() - began < 5, flush=True)
print("flaky", unary("Flaky")(b"", metadata=(("x-key", "a"),), timeout=10).decode(), flush=True)
got = [int(n) for n in channel.unary_stream("/shop.Echo/Many")(b"2000", timeout=20)]
print("many", got == list(range(2000)), flush=True)
# More than the waypoint keeps, and more than a window.
sent = (b"x" * 10000 for _ in range(500))
print("collect", channel.stream_unary("/shop.Echo/Collect")(sent, timeout=20).decode(), flush=True)
questions = queue.Queue()
answers = channel.stream_stream("/shop.Echo/Chat")(iter(questions.get, None), timeout=20)
turns = 0
for n in range(100):
    # Each is sent only once the last was answered.
    questions.put(b"%d" % n)
    turns += next(answers) == b"re: %d" % n
questions.put(None)
print("chat", turns, list(answers) == [], flush=True)
