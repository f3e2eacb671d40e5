"""A wide area between two bridges: frames go from one TAP device to the other, late, lost, out of order, cut or not at all.

Ethernet frames with IP inside are treated by the options, everything else (ARP) passes. Every decision comes from the
seed and the frame's number. On SIGTERM it prints what it did as one line of JSON.
"""
import argparse
import fcntl
import heapq
import json
import os
import random
import select
import signal
import struct
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("devices", nargs=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--delay-ms", type=float, default=0, help="each way")
    parser.add_argument("--loss", type=float, default=0, help="per cent of the frames")
    parser.add_argument("--reorder", type=float, default=0, help="per cent of the frames that come later than they should")
    parser.add_argument("--reorder-ms", type=float, default=2, help="by how much")
    parser.add_argument("--duplicate", type=float, default=0, help="per cent of the frames that come twice")
    parser.add_argument("--cut", type=int, default=0, help="TCP segments carry at most this many bytes")
    parser.add_argument("--mtu", type=int, default=0, help="larger packets vanish without a word")
    return parser.parse_args()


def tap(name):
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return fd


def checksum(data):
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def cut(frame, size):
    """The frame as TCP segments of at most `size` bytes (RFC 9293: FIN and PSH belong to the last one)."""
    kind = frame[12:14]
    if kind == b"\x08\x00" and frame[23] == 6:
        tcp = 14 + (frame[14] & 15) * 4
        end = 14 + struct.unpack("!H", frame[16:18])[0]
        addresses = frame[26:34]
    elif kind == b"\x86\xdd" and frame[20] == 6:
        tcp = 54
        end = 54 + struct.unpack("!H", frame[18:20])[0]
        addresses = frame[22:54]
    else:
        return [frame]
    body = tcp + (frame[tcp + 12] >> 4) * 4
    if end - body <= size:
        return [frame]
    sequence = struct.unpack("!I", frame[tcp + 4 : tcp + 8])[0]
    pieces = []
    for at in range(body, end, size):
        data = frame[at : min(at + size, end)]
        head = bytearray(frame[tcp:body])
        head[4:8] = struct.pack("!I", (sequence + at - body) & 0xFFFFFFFF)
        if at + size < end:
            head[13] &= ~0x09
        head[16:18] = b"\0\0"
        length = len(head) + len(data)
        head[16:18] = struct.pack("!H", checksum(addresses + struct.pack("!HH", 6, length) + bytes(head) + data))
        ip = bytearray(frame[14:tcp])
        if kind == b"\x08\x00":
            ip[2:4] = struct.pack("!H", len(ip) + length)
            ip[10:12] = b"\0\0"
            ip[10:12] = struct.pack("!H", checksum(bytes(ip)))
        else:
            ip[4:6] = struct.pack("!H", length)
        pieces.append(frame[:14] + bytes(ip) + bytes(head) + data)
    return pieces


class Wan:
    def __init__(self, args):
        self.args = args
        self.fds = [tap(name) for name in args.devices]
        self.random = random.Random(args.seed)
        self.waiting = []
        self.number = 0
        self.did = dict.fromkeys(["passed", "lost", "reordered", "duplicated", "cut", "too_large", "full"], 0)

    def write(self, fd, frame):
        try:
            os.write(fd, frame)
            self.did["passed"] += 1
        except BlockingIOError:
            self.did["full"] += 1

    def take(self, frame, to):
        args, chance = self.args, self.random.random
        if frame[12:14] not in (b"\x08\x00", b"\x86\xdd"):
            return self.write(to, frame)
        if args.mtu and len(frame) - 14 > args.mtu:
            self.did["too_large"] += 1
            return
        pieces = cut(frame, args.cut) if args.cut else [frame]
        self.did["cut"] += len(pieces) > 1
        for piece in pieces:
            if args.loss and chance() * 100 < args.loss:
                self.did["lost"] += 1
                continue
            delay = args.delay_ms
            if args.reorder and chance() * 100 < args.reorder:
                self.did["reordered"] += 1
                delay += args.reorder_ms
            copies = 1
            if args.duplicate and chance() * 100 < args.duplicate:
                self.did["duplicated"] += 1
                copies = 2
            for _ in range(copies):
                if delay:
                    self.number += 1
                    heapq.heappush(self.waiting, (time.monotonic() + delay / 1e3, self.number, to, piece))
                else:
                    self.write(to, piece)

    def due(self):
        """Sends what is due; seconds until the next one is."""
        while self.waiting:
            left = self.waiting[0][0] - time.monotonic()
            if left > 0:
                return left
            _, _, to, frame = heapq.heappop(self.waiting)
            self.write(to, frame)
        return None

    def run(self):
        poll = select.epoll()
        for fd in self.fds:
            poll.register(fd, select.EPOLLIN)
        print("forwarding", flush=True)
        while True:
            for fd, _ in poll.poll(self.due()):
                to = self.fds[1 - self.fds.index(fd)]
                # Not for ever: what waits for its time must not wait for a busy sender.
                for _ in range(64):
                    try:
                        frame = os.read(fd, 65536)
                    except BlockingIOError:
                        break
                    self.take(frame, to)


def main():
    wan = Wan(arguments())

    def stop(*_):
        print(json.dumps(wan.did), flush=True)
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    wan.run()


main()
