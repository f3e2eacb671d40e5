//! The server side of ZDS, the protocol by which Istio's CNI agent hands pods to ztunnel: protobuf messages over a
//! SEQPACKET unix socket, each pod with a descriptor of its network namespace.

use anyhow::{Context, Result, bail};
use prost::Message;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A pod as ztunnel is told of it.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Kubernetes uid.
    pub uid: String,
    /// Pod name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// Network namespace file.
    pub netns: PathBuf,
}

#[derive(Clone, PartialEq, Message)]
struct Hello {
    #[prost(int32, tag = "1")]
    version: i32,
}

#[derive(Clone, PartialEq, Message)]
struct WorkloadInfo {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(string, tag = "3")]
    service_account: String,
}

#[derive(Clone, PartialEq, Message)]
struct AddWorkload {
    #[prost(string, tag = "1")]
    uid: String,
    #[prost(message, optional, tag = "2")]
    workload_info: Option<WorkloadInfo>,
}

#[derive(Clone, PartialEq, Message)]
struct SnapshotSent {}

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(message, optional, tag = "1")]
    add: Option<AddWorkload>,
    #[prost(message, optional, tag = "3")]
    snapshot_sent: Option<SnapshotSent>,
}

#[derive(Clone, PartialEq, Message)]
struct Ack {
    #[prost(string, tag = "1")]
    error: String,
}

#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    ack: Option<Ack>,
}

/// A socket that waits for one ztunnel.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

/// A ztunnel that said hello and holds its pods; it forgets nothing while this lives.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
}

impl Listener {
    /// Binds the socket that ztunnel is pointed at by `INPOD_UDS`.
    ///
    /// # Errors
    /// The path cannot be bound.
    pub fn bind(path: &Path) -> Result<Self> {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .context("cannot make a SEQPACKET socket")?;
        let address = SocketAddrUnix::new(path).context("the socket path is too long")?;
        rustix::net::bind(&socket, &address).with_context(|| format!("cannot bind {}", path.display()))?;
        rustix::net::listen(&socket, 4).context("cannot listen")?;
        Ok(Self { socket })
    }

    /// Waits for ztunnel, gives it the pods and the end of the snapshot.
    ///
    /// # Errors
    /// It does not come or does not acknowledge within the time, or refuses a pod.
    pub fn hand_over(&self, pods: &[Pod], within: Duration) -> Result<Connection> {
        wait_readable(self.socket.as_fd(), within).context("ztunnel did not connect")?;
        let socket = rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC).context("accept")?;
        let connection = Connection { socket };
        let hello =
            Hello::decode(&connection.receive(within).context("no hello")?[..]).context("bad hello")?;
        if hello.version != 1 {
            bail!("ztunnel speaks ZDS version {}, not 1", hello.version);
        }
        for pod in pods {
            connection.add(pod, within).with_context(|| format!("pod {}/{}", pod.namespace, pod.name))?;
        }
        let done = Request { add: None, snapshot_sent: Some(SnapshotSent {}) };
        connection.call(&done, None, within).context("end of the snapshot")?;
        Ok(connection)
    }
}

impl Connection {
    /// Hands over one more pod and waits for the acknowledgement.
    ///
    /// # Errors
    /// The namespace cannot be opened, or ztunnel refuses or does not answer.
    pub fn add(&self, pod: &Pod, within: Duration) -> Result<()> {
        let netns = File::open(&pod.netns).with_context(|| format!("cannot open {}", pod.netns.display()))?;
        let info = WorkloadInfo {
            name: pod.name.clone(),
            namespace: pod.namespace.clone(),
            service_account: pod.service_account.clone(),
        };
        let add = AddWorkload { uid: pod.uid.clone(), workload_info: Some(info) };
        self.call(&Request { add: Some(add), snapshot_sent: None }, Some(netns.as_fd()), within)
    }

    fn call(&self, request: &Request, descriptor: Option<BorrowedFd<'_>>, within: Duration) -> Result<()> {
        let bytes = request.encode_to_vec();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.as_slice();
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            bail!("no room for the descriptor");
        }
        rustix::net::sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)
            .context("cannot send")?;
        let answer = Response::decode(&self.receive(within)?[..]).context("bad answer")?;
        match answer.ack {
            Some(ack) if ack.error.is_empty() => Ok(()),
            Some(ack) => bail!("ztunnel refused: {}", ack.error),
            None => bail!("ztunnel answered without an acknowledgement"),
        }
    }

    fn receive(&self, within: Duration) -> Result<Vec<u8>> {
        wait_readable(self.socket.as_fd(), within).context("no answer from ztunnel")?;
        let mut buffer = vec![0; 1024];
        let (length, _) =
            rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty()).context("recv")?;
        if length == 0 {
            bail!("ztunnel closed the connection");
        }
        buffer.truncate(length);
        Ok(buffer)
    }
}

fn wait_readable(socket: BorrowedFd<'_>, within: Duration) -> Result<()> {
    let mut poll = [rustix::event::PollFd::new(&socket, rustix::event::PollFlags::IN)];
    let timeout = rustix::event::Timespec::try_from(within).context("timeout")?;
    if rustix::event::poll(&mut poll, Some(&timeout)).context("poll")? == 0 {
        bail!("nothing within {within:?}");
    }
    Ok(())
}
