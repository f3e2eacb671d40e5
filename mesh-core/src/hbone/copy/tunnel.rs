//! The two directions between a socket and a tunnel stream.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::net::TcpStream;

use super::super::buffers;
use super::super::stream::{RecvHalf, SendHalf};
use super::socket::{shutdown, try_read};
use super::{Ended, Meter};

/// Reads up to this size are copied into a piece of their own, so that the thread's buffer is free at once; larger ones
/// travel in the buffer that they were read into.
const COPIED: usize = 16 << 10;
/// Pieces in one vectored write.
const PIECES: usize = 16;

/// Socket to tunnel.
pub(super) async fn send(from: &TcpStream, to: &mut SendHalf, meter: &impl Meter) -> Result<(), Ended> {
    loop {
        // Room in the tunnel is asked for only once there is something to send: it is taken from the other streams.
        let read = poll_fn(|cx| poll_read(from, to, cx)).await?;
        let Some(data) = read else {
            return to.finish().map_err(Ended::Tunnel);
        };
        meter.forward(data.len() as u64);
        to.send(data).map_err(Ended::Tunnel)?;
    }
}

/// Waits until the socket has bytes and the tunnel has room, then reads.
fn poll_read(
    from: &TcpStream,
    to: &mut SendHalf,
    cx: &mut Context<'_>,
) -> Poll<Result<Option<Bytes>, Ended>> {
    loop {
        if from.poll_read_ready(cx).map_err(Ended::FirstReset)?.is_pending() {
            to.give_back_room();
            // The peer may abort although its direction has ended.
            return to.poll_aborted(cx).map(|e| Err(Ended::Tunnel(e)));
        }
        let room = ready!(to.poll_room(cx, buffers::SIZE)).map_err(Ended::Tunnel)?;
        match try_read(from, room.min(buffers::SIZE)) {
            Some(Ok(read)) => return Poll::Ready(Ok(read.map(into_bytes))),
            Some(Err(e)) => return Poll::Ready(Err(Ended::FirstReset(e))),
            None => {}
        }
    }
}

fn into_bytes(mut buffer: BytesMut) -> Bytes {
    if buffer.len() <= COPIED {
        let bytes = Bytes::copy_from_slice(&buffer);
        buffers::give(buffer);
        return bytes;
    }
    let bytes = buffer.split().freeze();
    // The rest of the allocation serves the next read, and is freed with the last piece.
    buffers::give(buffer);
    bytes
}

/// Tunnel to socket.
pub(super) async fn receive(from: &mut RecvHalf, to: &TcpStream, meter: &impl Meter) -> Result<(), Ended> {
    let mut pieces = VecDeque::new();
    loop {
        let more = poll_fn(|cx| poll_pieces(from, &mut pieces, cx)).await?;
        while !pieces.is_empty() {
            let n = poll_fn(|cx| poll_write(to, &pieces, cx)).await.map_err(Ended::FirstReset)?;
            take_front(&mut pieces, n);
            from.passed_on(n);
            meter.backward(n as u64);
        }
        if !more {
            return shutdown(to).map_err(Ended::FirstReset);
        }
    }
}

/// Collects what has arrived, at least one piece. `false`: the peer's end of file came after them.
fn poll_pieces(
    from: &mut RecvHalf,
    pieces: &mut VecDeque<Bytes>,
    cx: &mut Context<'_>,
) -> Poll<Result<bool, Ended>> {
    while pieces.len() < PIECES {
        match from.poll_data(cx) {
            Poll::Ready(Some(Ok(data))) => pieces.push_back(data),
            Poll::Ready(Some(Err(e))) => return Poll::Ready(Err(Ended::Tunnel(e))),
            Poll::Ready(None) => return Poll::Ready(Ok(false)),
            Poll::Pending if pieces.is_empty() => {
                // An idle connection keeps no room for pieces either.
                *pieces = VecDeque::new();
                return Poll::Pending;
            }
            Poll::Pending => break,
        }
    }
    Poll::Ready(Ok(true))
}

fn poll_write(to: &TcpStream, pieces: &VecDeque<Bytes>, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    let mut slices = [IoSlice::new(&[]); PIECES];
    let mut used = 0;
    for (slice, piece) in slices.iter_mut().zip(pieces) {
        *slice = IoSlice::new(piece);
        used += 1;
    }
    loop {
        match to.try_write_vectored(&slices[..used]) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready!(to.poll_write_ready(cx))?,
            result => return Poll::Ready(result),
        }
    }
}

fn take_front(pieces: &mut VecDeque<Bytes>, mut n: usize) {
    while let Some(front) = pieces.front_mut() {
        if n < front.len() {
            front.advance(n);
            return;
        }
        n -= front.len();
        pieces.pop_front();
    }
}
