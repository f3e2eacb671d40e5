"""Connects through io_uring and says what came of it: `uring.py ADDRESS PORT`.

Prints the result of the connect (0 or a negative errno), then keeps the socket until its input ends.
Exits with 77 and the reason if the kernel gives it no ring.
"""
import ctypes
import mmap
import os
import socket
import struct
import sys

SETUP, ENTER = 425, 426
CONNECT, GET_EVENTS = 16, 1
OFFSET_ENTRIES = 0x10000000

libc = ctypes.CDLL(None, use_errno=True)
parameters = (ctypes.c_uint8 * 120)()
ring = libc.syscall(SETUP, 4, parameters)
if ring < 0:
    print("io_uring_setup:", os.strerror(ctypes.get_errno()))
    sys.exit(77)
words = struct.unpack("30I", bytes(parameters))
entries, completions = words[0], words[1]
submission, completion = words[10:18], words[20:28]


def mapped(size, offset):
    return mmap.mmap(ring, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)


def word(memory, at, value=None):
    if value is not None:
        struct.pack_into("I", memory, at, value)
    return struct.unpack_from("I", memory, at)[0]


# Since 5.4 both rings share one mapping.
rings = mapped(max(submission[6] + entries * 4, completion[5] + completions * 16), 0)
requests = mapped(entries * 64, OFFSET_ENTRIES)

client = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_STREAM)
port = socket.htons(int(sys.argv[2]))
packed = socket.inet_pton(client.family, sys.argv[1])
layout = "=HHI16sI" if client.family == socket.AF_INET6 else "=HH4s8x"
fields = (0, packed, 0) if client.family == socket.AF_INET6 else (packed,)
address = ctypes.create_string_buffer(struct.pack(layout, client.family, port, *fields))
struct.pack_into(
    "=BBHiQQ", requests, 0, CONNECT, 0, 0, client.fileno(), len(address) - 1, ctypes.addressof(address)
)
word(rings, submission[6], 0)
word(rings, submission[1], word(rings, submission[1]) + 1)
if libc.syscall(ENTER, ring, 1, 1, GET_EVENTS, None, 0) < 0:
    print("io_uring_enter:", os.strerror(ctypes.get_errno()))
    sys.exit(1)
print(struct.unpack_from("=Qi", rings, completion[5])[1], flush=True)
sys.stdin.read()
